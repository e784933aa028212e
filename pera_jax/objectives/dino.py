"""DINO: self-distillation of class tokens between crops (Caron et al., Emerging Properties in Self-Supervised Vision
Transformers, arXiv:2104.14294).

The student sees two global and some local crops of an image, the teacher the global ones. Each of the student's crops
is trained towards the teacher's prototype distribution of every other global crop.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from pera_jax.augment import color
from pera_jax.bands import Bands, rgb_indices
from pera_jax.common.errors import UserError
from pera_jax.losses import crossed, prototypes
from pera_jax.models import drop_path as drop
from pera_jax.models import flops, heads, vit
from pera_jax.models.heads import Head
from pera_jax.models.precision import Precision
from pera_jax.models.vit import ViT
from pera_jax.objectives import base, check, independent_views, official_formats, prototype_checks
from pera_jax.objectives.base import Context, CropSpec, Freeze, Layout, Schedule, Streams
from pera_jax.objectives.watched import HealthChecks, Panel, Preview

VIEWS = {"global": ("global_1", "global_2"), "local": ("local",)}  # by crop type
TRAINED = "last_layer_trained"  # the scalar that is 0 while the last layer is frozen

REMEDIES = prototype_checks.Remedies(
    few="set dino.center_momentum=0.9, and raise dino.teacher_temperature",
    unused="set dino.center_momentum=0.9, or lower schedules.learning_rate.peak",
    uniform="lower schedules.learning_rate.peak or dino.teacher_temperature",
    features="lower schedules.learning_rate.peak, or raise dino.teacher_momentum.start",
)
CURVES = (
    ("Loss terms", (
        Panel("Class term, nats", False, True,
              {"loss": "all", "loss/class_global": "global part", "loss/class_local": "local part"}),
    )),
    ("Teacher", (*prototype_checks.TEACHER, prototype_checks.CENTER)),
    ("Schedules", (prototype_checks.MOMENTUM, prototype_checks.TEMPERATURES)),
)  # fmt: skip
READING = (
    "Each row is one image: its two global crops and its first local crops, as the networks see them. The student sees "
    "all crops, the teacher the global ones, and each of the student's crops is trained towards the teacher's output "
    "for the other global crops."
)


@dataclasses.dataclass(frozen=True)
class Dino(base.Base):
    """The DINO objective. Its methods are pure functions of parameters and state.

    Attributes:
      encoder: the vision transformer of student and teacher.
      specs: photometric operations of the views, by crop type.
      rgb: indices of the red, green and blue channels, or None.
      growing_drop_path: whether the rate of drop path grows over the blocks, see `models.drop_path`.
      drop_path_group: images per group of drop path if it does not, or 0 for all images of a device.
    """

    encoder: ViT
    prototype_head: Head
    precision: Precision
    crops: dict[str, CropSpec]
    specs: independent_views.Specs
    rgb: color.Rgb
    bands: Bands
    drop_path_rate: float
    drop_path_group: int
    growing_drop_path: bool
    center_momentum: float
    frozen: tuple[Freeze, ...]
    warm_start_batches: int

    name: ClassVar = "dino"
    citation: ClassVar = (
        "DINO (Caron et al., Emerging Properties in Self-Supervised Vision Transformers, arXiv:2104.14294)"
    )
    teacher_keys: ClassVar = ("backbone", "prototype_head")
    fixed_fields: ClassVar = ("heads", "norm_last_layer")
    free_fields: ClassVar = ("center_batches",)
    sharding_rules: ClassVar = (*heads.SHARDING_RULES, (r"center$", P("tensor")))
    decay_rules: ClassVar = heads.DECAY_RULES
    official: ClassVar = official_formats.Dino()
    curves: ClassVar = CURVES

    @classmethod
    def default_config(cls) -> ConfigDict:
        """The official ViT-B/16."""
        own = ConfigDict()
        own.views = dict(
            global_1=independent_views.fields(blur=1.0, solarize=0.0),
            global_2=independent_views.fields(blur=0.1, solarize=0.2),
            local=independent_views.fields(blur=0.5, solarize=0.0),
        )
        own.heads = dict(hidden=2048, bottleneck=256, prototypes=65536)
        own.norm_last_layer = True  # the last layer's gains stay 1
        own.freeze_last_layer = "1 epochs"  # the last layer is not trained during this time
        own.growing_drop_path = True  # from 0 to drop_path.rate over the blocks; False: the same rate in all of them
        own.center_momentum = 0.9
        own.teacher_momentum = dict(start=0.996, end=1.0)  # of the EMA, a cosine
        # Constant by default; 0.04 to 0.07 over 30 epochs is better where it is stable (arXiv:2104.14294, appendix D).
        own.teacher_temperature = dict(start=0.04, end=0.04, warmup="30 epochs")
        own.student_temperature = 0.1
        # With `init_from`, the center starts as the teacher's mean output over this many batches; 0: at 0, as without.
        own.center_batches = 16
        return own

    @classmethod
    def set_defaults(cls, config: ConfigDict) -> None:
        config.total = "100 epochs"
        config.drop_path.update(dict(rate=0.1, group=1))
        config.optimizer.update(
            dict(exact_bias_correction=True, eps=1e-8, clip="parameter", clip_norm=3.0, decay="no_bias_or_norm")
        )
        peak = 5e-4 * config.batch_size / 256
        config.schedules.learning_rate.update(dict(start=0.0, peak=peak, end=1e-6, warmup="10 epochs"))
        config.schedules.weight_decay.update(dict(start=0.04, end=0.4))

    @classmethod
    def shrink(cls, config: ConfigDict) -> None:
        config.dino.heads.update(dict(hidden=32, bottleneck=16, prototypes=64))
        config.dino.teacher_temperature.warmup = "2 steps"
        config.dino.freeze_last_layer = "1 steps"

    @classmethod
    def validate(cls, config: ConfigDict, layout: Layout) -> None:
        own = config.dino
        if config.crops.global_number != 2:
            raise UserError(f"crops.global_number={config.crops.global_number} must be 2 for DINO")
        if own.heads.prototypes % layout.weight_shards:
            raise UserError(
                f"dino.heads.prototypes={own.heads.prototypes} is not divisible by the {layout.weight_shards} shards "
                "of the mesh (fsdp x tensor); choose a multiple, or a smaller mesh.fsdp"
            )
        if own.growing_drop_path and config.drop_path.group != 1:
            raise UserError(
                f"drop_path.group={config.drop_path.group} must be 1 with dino.growing_drop_path, which drops each "
                "crop by itself; set it to 1, or dino.growing_drop_path=False"
            )
        if not 0 <= own.center_momentum <= 1:
            raise UserError(f"dino.center_momentum={own.center_momentum} must lie in [0, 1]")

    @classmethod
    def schedules(cls) -> dict[str, Schedule]:
        return {
            "one_minus_momentum": Schedule("cosine", "dino.teacher_momentum", highest=1.0, complement=True),
            "teacher_temperature": Schedule("ramp", "dino.teacher_temperature", positive=True),
            "student_temperature": Schedule("constant", "dino.student_temperature", positive=True),
            TRAINED: Schedule("after", "dino.freeze_last_layer"),
        }

    @classmethod
    def from_config(cls, config: ConfigDict, bands: Bands, device: jax.Device | None = None) -> "Dino":
        """Builds the objective from a config. Raises UserError for inconsistent sizes or fields of views."""
        own, encoder = check.sized(config.dino, "dino"), vit.from_config(config, len(bands), device, initial="dino")
        independent_views.check(own.views, "dino.views", config.data.rgb, bands.names)
        gain = (Freeze(r"prototype_head/gain$"),) if own.norm_last_layer else ()
        return cls(
            encoder=encoder,
            prototype_head=Head(own.heads.hidden, own.heads.bottleneck, own.heads.prototypes, encoder.precision),
            precision=encoder.precision,
            crops=base.crop_specs(config.crops),
            specs=independent_views.specs_from(own.views, VIEWS),
            rgb=rgb_indices(config.data.rgb, bands.names),
            bands=bands,
            drop_path_rate=config.drop_path.rate,
            drop_path_group=config.drop_path.group,
            growing_drop_path=own.growing_drop_path,
            center_momentum=own.center_momentum,
            frozen=(*gain, Freeze(r"prototype_head/(direction|gain)$", until=TRAINED)),
            warm_start_batches=own.center_batches,
        )

    # ---------------------------------------------------------------- facts

    def health_checks(self, images: int) -> HealthChecks:
        return prototype_checks.checks(REMEDIES, self.prototype_head.outputs, images)

    def flops_per_image(self) -> dict[str, float]:
        """FLOPs per image of a training step, by part: the matrix products, without position resampling and center."""
        encoder, result = self.encoder, {}
        for name, spec in self.crops.items():
            patches, rate = (spec.size // encoder.patch) ** 2, 0.0 if self.growing_drop_path else self.drop_path_rate
            kept = drop.kept_fraction(rate, self.drop_path_group, spec.number)
            blocks, embedding = encoder.depth * flops.block(encoder, 1 + patches), flops.embedding(encoder, patches)
            result[f"student {name}"] = spec.number * (flops.TRAINED * kept * blocks + flops.TRAINED_FIRST * embedding)
            if name == "global":
                result["teacher global"] = spec.number * flops.FORWARD * (blocks + embedding)
        rows = flops.TRAINED * sum(spec.number for spec in self.crops.values())
        rows += flops.FORWARD * self.crops["global"].number
        result["prototype head"] = rows * flops.head(self.prototype_head, encoder.width)
        return result

    # ---------------------------------------------------------------- the step

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The student's parameters: `backbone` and `prototype_head`."""
        encoder_key, head_key = jax.random.split(key)
        side, wide = self.encoder.image_size, self.precision.wide
        image, token = jnp.zeros((1, side, side, self.encoder.bands), wide), jnp.zeros((1, self.encoder.width), wide)
        return {
            "backbone": self.encoder.init(encoder_key, image)["params"],
            "prototype_head": self.prototype_head.init(head_key, token)["params"],
        }

    def init_state(self) -> dict[str, jax.Array]:
        """The center [K] of the teacher's outputs."""
        return {"center": jnp.zeros((self.prototype_head.outputs,), self.precision.wide)}

    def prepare(self, rngs: Streams, batch: dict[str, jax.Array]) -> dict[str, Any]:
        number = len(batch["global"])
        draws = independent_views.draw(rngs("examples"), number, self.crops, self.specs)
        return {"crops": batch, "draws": draws, "place": jnp.arange(number, dtype=jnp.int32)}

    def make_views(self, examples: dict[str, Any]) -> dict[str, jax.Array]:
        """The normalized views [B V, H, W, C] by crop type, from (a microbatch of) the result of `prepare`."""
        wide = self.precision.wide
        return independent_views.make(examples["crops"], examples["draws"], self.bands, self.rgb, wide)

    def loss(self, params, teacher, state, examples, context: Context):
        drop_path = self.drop_paths(context.rngs("drop_path"), examples["place"])
        return self.loss_on_views(params, teacher, state, self.make_views(examples), drop_path, context.scalars)

    def drop_paths(self, key: jax.Array, place: jax.Array) -> dict[str, Any]:
        """The drop path of each crop type, for images with indices `place` [b] in the whole batch."""
        numbers = {name: spec.number for name, spec in self.crops.items()}
        depth = self.encoder.depth if self.growing_drop_path else None
        return drop.by_type(key, place, numbers, self.drop_path_rate, self.drop_path_group, depth)

    def loss_on_views(self, params, teacher, state, views: dict[str, jax.Array], drop_path, scalars):
        """The class term on views [B V, H, W, C] by crop type, and its `aux`; both are means over images.

        Args:
          state: `center` [K], as updated by the previous step.
          drop_path: by crop type; None disables it.
          scalars: `student_temperature`, `teacher_temperature`.
        """
        student_out, teacher_out, tokens = self.outputs(params, teacher, views, drop_path)
        temperature = scalars["teacher_temperature"]
        per_crop, statistics = crossed.crossed_term(
            student_out, teacher_out, -state["center"] / temperature, scalars["student_temperature"], temperature,
            self.precision,
        )  # [V]
        aux = {
            "per_crop": per_crop, "statistics": statistics,
            "output": prototypes.mean_output(teacher_out, self.precision),
            "token": prototypes.mean_direction(tokens), "unit": jnp.mean(teacher_out.units, axis=(0, 1)),
        }  # fmt: skip
        return jnp.mean(per_crop), jax.lax.stop_gradient(aux)

    def outputs(self, params, teacher, views, drop_path):
        """Prototype outputs of the student for all crops (units [B, V, E], first the global ones), of the teacher for
        the global ones (units [B, 2, E]), and the teacher's class tokens [B, 2, D]."""
        tokens = self._tokens(teacher, "global", views["global"])
        # The teacher finishes before the student stores activations for its backward pass.
        tokens, views = jax.lax.optimization_barrier((tokens, views))
        teacher_out = self._prototypes(teacher, tokens)
        drop_path = drop_path or dict.fromkeys(views)
        student = [self._tokens(params, name, view, drop_path[name]) for name, view in views.items()]
        student_out = self._prototypes(params, jnp.concatenate(student, axis=1))
        return student_out, *jax.lax.stop_gradient((teacher_out, tokens))

    def _tokens(self, network: Any, kind: str, views: jax.Array, drop_path: Any = None) -> jax.Array:
        """The class tokens [B, V, D] of the views of a crop type."""
        encoded = self.encoder.apply({"params": network["backbone"]}, views, drop_path=drop_path)
        return rearrange(encoded["class_token"], "(b v) d -> b v d", v=self.crops[kind].number)

    def _prototypes(self, network: Any, tokens: jax.Array) -> prototypes.Prototypes:
        return prototypes.Prototypes(*self.prototype_head.apply({"params": network["prototype_head"]}, tokens))

    def update(self, state: dict[str, jax.Array], aux: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The new center, moved after its use, and the metrics, from the `aux` of the whole batch."""
        center = self.center_momentum * state["center"] + (1 - self.center_momentum) * aux["output"]
        per_crop, globals_ = aux["per_crop"], self.crops["global"].number
        metrics = {
            "loss": jnp.mean(per_crop),
            "loss/class_global": jnp.sum(per_crop[:globals_]) / len(per_crop),
            "loss/class_local": jnp.sum(per_crop[globals_:]) / len(per_crop),
            "teacher/center_norm": jnp.linalg.norm(center),
        }
        metrics |= prototype_checks.teacher_metrics(per_crop, aux["statistics"], aux["token"], aux["unit"])
        return {"center": center}, metrics

    # ---------------------------------------------------------------- a start from weights, and the report

    def estimate(self, teacher: dict[str, Any], examples: dict[str, Any]) -> jax.Array:
        """The teacher's mean output [K], towards which each step moves the center."""
        out = self._prototypes(teacher, self._tokens(teacher, "global", self.make_views(examples)["global"]))
        return prototypes.mean_output(out, self.precision)

    def with_estimate(self, state, estimate: jax.Array) -> tuple[dict[str, jax.Array], str]:
        return state | {"center": estimate}, prototype_checks.started(estimate)

    def preview(self, networks, batch, rngs, channels) -> Preview:
        """The crops as the networks see them, and how similar the class tokens of both global crops are."""

        def look(network, batch):
            views = self.make_views(self.prepare(rngs, batch))
            return views, self._tokens(network, "global", views["global"])

        network = networks.get("teacher") or networks["student"]
        views, tokens = jax.device_get(jax.jit(look)({"backbone": network["backbone"]}, batch))
        columns = independent_views.pictures(views, self.crops, self.bands, channels)
        return Preview(columns, READING, independent_views.similarity(tokens), {})


OBJECTIVE = Dino
