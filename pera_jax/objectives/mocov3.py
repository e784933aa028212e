"""MoCo v3: contrastive pre-training with a momentum encoder (Chen et al., arXiv:2104.02057), for vision transformers.

Two independent crops of an image; each one's query must find the other one's key among the keys of the whole batch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from ml_collections import ConfigDict

from pera_jax.augment import color
from pera_jax.bands import Bands, as_bytes, rgb_indices
from pera_jax.common.errors import UserError
from pera_jax.losses.contrastive import contrastive_term
from pera_jax.models import batch_norm_mlp, flops, heads, vit
from pera_jax.models.batch_norm_mlp import BatchNormMlp
from pera_jax.models.precision import Precision
from pera_jax.models.vit import ViT
from pera_jax.objectives import base, independent_views, official_formats, watched
from pera_jax.objectives.base import Context, CropSpec, Freeze, Schedule, Streams
from pera_jax.objectives.watched import Condition, HealthChecks, Panel, Preview

VIEWS = ("view_1", "view_2")
CONDITIONS = (
    Condition(
        "no contrast", "advantage", 0.1, 0.2, True,
        "the student finds the key of its own image for {accuracy:.2%} of the queries, hardly better than chance "
        "({chance:.2%}); lower schedules.learning_rate.peak, or raise mocov3.temperature",
    ),
    Condition(
        "features collapse", "variance", 0.05, 0.10, True,
        "the student's class tokens are nearly the same for all views (variance of their directions {variance:.4f} of "
        "1); lower schedules.learning_rate.peak",
    ),
    *watched.COMMON_CONDITIONS,
)  # fmt: skip
CURVES = (
    ("Contrast", (
        Panel("Contrastive terms", False, True,
              {"loss/view_1": "queries of view 1", "loss/view_2": "queries of view 2"}),
        Panel("Queries that find their own key", False, True, {"contrast/accuracy": "fraction"}),
        Panel("Cosine of query and key", False, True,
              {"contrast/own": "of the same image", "contrast/others": "of different images"}),
        Panel("Variance of directions (0: all equal)", False, True,
              {"student/feature_variance": "student's class tokens", "teacher/key_variance": "keys"}),
    )),
    ("Schedules", (
        Panel("Momentum of the teacher", False, False, {"hyper/momentum": "momentum"}),
    )),
)  # fmt: skip
READING = (
    "Each row is one image: two independent crops, and the views that are made of them. The query of each view must "
    "find the key of the other view among those of all images."
)


@dataclasses.dataclass(frozen=True)
class MoCoV3(base.Base):
    """The MoCo v3 objective. Its methods are pure functions of parameters and state.

    Attributes:
      encoder: the vision transformer of student and teacher ("base encoder" and "momentum encoder").
      projector: of both networks. predictor: of the student.
      specs: the photometric operations of each view.
      rgb: indices of the red, green and blue channels, or None.
      frozen: the patch projection, unless it is trained.
    """

    encoder: ViT
    projector: BatchNormMlp
    predictor: BatchNormMlp
    precision: Precision
    crops: dict[str, CropSpec]
    specs: independent_views.Specs
    rgb: color.Rgb
    bands: Bands
    frozen: tuple[Freeze, ...]

    name: ClassVar = "mocov3"
    citation: ClassVar = (
        "MoCo v3 (Chen et al., An Empirical Study of Training Self-Supervised Vision Transformers, arXiv:2104.02057)"
    )
    teacher_keys: ClassVar = ("backbone", "projector")
    evaluated: ClassVar = "student"
    official: ClassVar = official_formats.MoCoV3()
    fixed_fields: ClassVar = ("heads",)
    sharding_rules: ClassVar = batch_norm_mlp.SHARDING_RULES
    decay_rules: ClassVar = batch_norm_mlp.DECAY_RULES
    curves: ClassVar = CURVES

    # ---------------------------------------------------------------- facts

    @classmethod
    def default_config(cls) -> ConfigDict:
        """The published ViT-B/16 (section 4 of the paper, and its appendix)."""
        own = ConfigDict()
        own.heads = dict(hidden=4096, outputs=256)  # widths of the projector's and the predictor's layers
        own.temperature = 0.2
        own.teacher_momentum = dict(start=0.99, end=1.0)  # of the EMA, a cosine
        own.freeze_patch_projection = True  # at its initial values, in both networks
        own.views = dict(
            view_1=independent_views.fields(blur=1.0, solarize=0.0),
            view_2=independent_views.fields(blur=0.1, solarize=0.2),
        )
        return own

    @classmethod
    def set_defaults(cls, config: ConfigDict) -> None:
        config.total, config.batch_size = "300 epochs", 4096
        config.crops.update(dict(global_number=2, global_area=(0.08, 1.0), local_number=0))
        config.drop_path.update(dict(rate=0.0, group=0))
        config.optimizer.update(
            dict(exact_bias_correction=True, beta1=0.9, beta2=0.999, eps=1e-8, clip="none", decay="all")
        )
        rate = 1.5e-4 * config.batch_size / 256
        config.schedules.learning_rate.update(dict(start=0.0, peak=rate, end=0.0, warmup="40 epochs"))
        config.schedules.weight_decay.update(dict(start=0.1, end=0.1))

    @classmethod
    def shrink(cls, config: ConfigDict) -> None:
        config.mocov3.heads.update(dict(hidden=32, outputs=16))

    @classmethod
    def validate(cls, config: ConfigDict, layout: base.Layout) -> None:
        if config.crops.global_number != 2 or config.crops.local_number:
            raise UserError(
                f"crops.global_number={config.crops.global_number} and crops.local_number={config.crops.local_number} "
                "must be 2 and 0: mocov3 compares two global crops of each image; change them"
            )
        if config.drop_path.rate:
            raise UserError(f"drop_path.rate={config.drop_path.rate} must be 0: mocov3 runs every block on every crop")
        if config.accumulate > 1:
            raise UserError(
                f"accumulate={config.accumulate} must be 1: the batch norm and the negatives of mocov3 need the whole "
                "batch at once; use more devices, model.remat or a smaller batch_size"
            )
        if config.batch_size < 2:
            raise UserError(f"batch_size={config.batch_size} must be >= 2: mocov3 compares images with each other")

    @classmethod
    def schedules(cls) -> dict[str, Schedule]:
        return {
            "one_minus_momentum": Schedule("cosine", "mocov3.teacher_momentum", highest=1.0, complement=True),
            "temperature": Schedule("constant", "mocov3.temperature", positive=True),
        }

    def logged_scalars(self, scalars: dict[str, float]) -> dict[str, float]:
        shown = {name: value for name, value in scalars.items() if name != "one_minus_momentum"}
        return shown | {"momentum": 1.0 - scalars["one_minus_momentum"]}

    def health_checks(self, images: int) -> HealthChecks:
        """Relative to what is possible: the accuracy on a logarithmic scale from chance (0) to 1."""

        def averaged(values: Mapping[str, float]) -> dict[str, float]:
            return watched.common_averages(values) | {
                "accuracy": values["contrast/accuracy"],
                "variance": values["student/feature_variance"],
            }

        def quantities(averages: Mapping[str, float]) -> dict[str, Any]:
            found = max(averages["accuracy"] * images, 1.0)
            advantage = math.log(found) / math.log(images) if images > 1 else 1.0
            return {"advantage": advantage, "chance": 1 / images, "excess_name": "loss"}

        return HealthChecks(CONDITIONS, averaged, quantities)

    @classmethod
    def from_config(cls, config, bands: Bands, device: jax.Device | None = None) -> "MoCoV3":
        """Builds the objective from a config.

        Raises:
          UserError: sizes or the fields of a view are invalid.
        """
        own, precision = config.mocov3, Precision.from_names(config.precision, config.parameter_precision)
        hidden, outputs = own.heads.hidden, own.heads.outputs
        independent_views.check(own.views, "mocov3.views", config.data.rgb, bands.names)
        return cls(
            encoder=vit.from_config(config, len(bands), device, initial="mocov3", position="sincos_yx"),
            projector=BatchNormMlp((hidden, hidden, outputs), precision),
            predictor=BatchNormMlp((hidden, outputs), precision),
            precision=precision,
            crops={"global": base.crop_specs(config.crops)["global"]},
            specs=independent_views.specs_from(own.views, {"global": VIEWS}),
            rgb=rgb_indices(config.data.rgb, bands.names),
            bands=bands,
            frozen=(Freeze("backbone/patch_projection/"),) if own.freeze_patch_projection else (),
        )

    def flops_per_image(self) -> dict[str, float]:
        """FLOPs per image of a training step, by part, without the products of queries and keys, which depend on the
        batch: in the published recipe less than 0.01 %. A frozen patch projection has no backward pass."""
        encoder, views = self.encoder, self.crops["global"].number
        patches = (self.crops["global"].size // encoder.patch) ** 2
        embedding = flops.embedding(encoder, patches)
        blocks = encoder.depth * flops.block(encoder, 1 + patches)
        projector = flops.layers(encoder.width, *self.projector.widths)
        predictor = flops.layers(self.projector.widths[-1], *self.predictor.widths)
        trained = flops.FORWARD if self.frozen else flops.TRAINED_FIRST
        return {
            "student": views * (flops.TRAINED * blocks + trained * embedding),
            "teacher": views * flops.FORWARD * (blocks + embedding),
            "projector": views * (flops.TRAINED + flops.FORWARD) * projector,
            "predictor": views * flops.TRAINED * predictor,
        }

    # ---------------------------------------------------------------- the step

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The student's parameters: `backbone`, `projector`, `predictor`."""
        encoder, projector, predictor = jax.random.split(key, 3)
        side, wide = self.crops["global"].size, self.precision.wide
        image = jnp.zeros((1, side, side, self.encoder.bands), wide)
        token, projected = (jnp.zeros((1, n), wide) for n in (self.encoder.width, self.projector.widths[-1]))
        return {
            "backbone": self.encoder.init(encoder, image)["params"],
            "projector": self.projector.init(projector, token)["params"],
            "predictor": self.predictor.init(predictor, projected)["params"],
        }

    def prepare(self, rngs: Streams, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """Adds the draws of both views, leaves [B, 2, ...], to a batch of crops [B, 2, H, W, C] in the stored dtype."""
        draws = independent_views.draw(rngs("examples"), len(batch["global"]), self.crops, self.specs)
        return {"crops": batch, "draws": draws}

    def make_views(self, examples: dict[str, Any]) -> jax.Array:
        """The normalized views [B 2, H, W, C], batch-major, from the result of `prepare`."""
        crops, draws = examples["crops"], examples["draws"]
        return independent_views.make(crops, draws, self.bands, self.rgb, self.precision.wide)["global"]

    def loss(self, params, teacher, state, examples, context: Context):
        """The loss on the result of `prepare`; arguments and result as in `loss_on_views`."""
        return self.loss_on_views(params, teacher, self.make_views(examples), context.scalars)

    def loss_on_views(
        self, params: dict[str, Any], teacher: dict[str, Any], views: jax.Array, scalars: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The contrastive term of the queries of view 1 with the keys of view 2, and the other way round (algorithm 1).

        Args:
          params: the student's parameters. teacher: the teacher's, with keys `teacher_keys`.
          views: [B 2, H, W, C], batch-major; the whole batch.
          scalars: `temperature`.

        Returns:
          (loss, aux), where `aux` holds the metrics.
        """
        keys = self.projections(teacher, views)[1]
        # The teacher finishes before the student stores activations for its backward pass.
        keys, views = jax.lax.optimization_barrier((keys, views))
        tokens, projected = self.projections(params, views)
        queries = self.predictor.apply({"params": params["predictor"]}, projected)
        queries, keys, units = (heads.normalize(x, self.precision.norm_floor) for x in (queries, keys, tokens))
        wanted, batch = keys[:, ::-1], len(queries)  # [B, 2, D]: the key of each query is that of the other view
        (first, found_1), (second, found_2) = (
            contrastive_term(queries[:, v], wanted[:, v], scalars["temperature"], self.precision) for v in (0, 1)
        )
        own = jnp.sum(queries * wanted) / (2 * batch)
        all_pairs = jnp.sum(jnp.mean(queries, axis=0) * jnp.mean(wanted, axis=0)) / 2
        aux = {
            "loss": first + second,
            "loss/view_1": first,
            "loss/view_2": second,
            "contrast/accuracy": (found_1 + found_2) / 2,
            "contrast/own": own,
            "contrast/others": (batch * all_pairs - own) / max(batch - 1, 1),
            "student/feature_variance": _variance(units),
            "teacher/key_variance": _variance(keys),
        }
        return first + second, jax.lax.stop_gradient(aux)

    def projections(self, params: dict[str, Any], views: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A network's class tokens [B, 2, width] and the projector's outputs for them [B, 2, D]: the teacher's are the
        keys, the predictor makes the student's to queries."""
        backbone, stop = params["backbone"], jax.lax.stop_gradient
        # Batch norm removes what this bias adds to all images: its gradient is 0, and would be noise.
        backbone = backbone | {"norm": backbone["norm"] | {"bias": stop(backbone["norm"]["bias"])}}
        if self.frozen:  # so that its gradient is not even computed
            backbone = backbone | {"patch_projection": stop(backbone["patch_projection"])}
        tokens = self.encoder.apply({"params": backbone}, views)["class_token"]
        tokens = rearrange(tokens, "(b v) d -> b v d", v=2)  # statistics of batch norm are over axis 0
        return tokens, self.projector.apply({"params": params["projector"]}, tokens)

    # ---------------------------------------------------------------- the report

    def preview(self, networks, batch, rngs, channels) -> Preview:
        """Both crops and both views of each image; `batch` and arguments as in `Objective.preview`."""
        views = jax.jit(lambda batch: self.make_views(self.prepare(rngs, batch)))(batch)
        views = as_bytes(self.bands.denormalized(np.asarray(views)), channels)  # [B 2, H, W, 3]
        crops = [as_bytes(self.bands.mapped(batch["global"][:, v]), channels) for v in (0, 1)]
        columns = {"crop 1": crops[0], "view 1": views[::2], "crop 2": crops[1], "view 2": views[1::2]}
        return Preview(columns, READING, "Both networks see all patches of both views.", {})


def _variance(units: jax.Array) -> jax.Array:
    """1 - the squared norm of the mean of unit vectors [B, 2, D] over the batch, averaged over the two views."""
    return 1 - jnp.mean(jnp.sum(jnp.square(jnp.mean(units, axis=0)), axis=-1))


OBJECTIVE = MoCoV3
