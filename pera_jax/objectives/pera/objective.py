"""PerA: its networks, its state beside the parameters, and its loss on a batch.

Shen et al., "A Contrastive Learning Foundation Model Based on Perfectly Aligned Sample Pairs for Remote Sensing
Images", arXiv:2505.19447. One crop, two views, disjoint patches.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from pera_jax.augment import color
from pera_jax.bands import Bands, rgb_indices
from pera_jax.losses import koleo, pixels, prototypes
from pera_jax.models import heads, vit
from pera_jax.models.drop_path import DropPath, GrowingDropPath, by_type
from pera_jax.models.heads import Head
from pera_jax.models.precision import Precision
from pera_jax.models.vit import ViT, patchify
from pera_jax.objectives import base, check, prototype_checks
from pera_jax.objectives.base import Context, CropSpec, Schedule, Streams
from pera_jax.objectives.pera import cost, curves, health, masks, preview, settings, transfer, views
from pera_jax.objectives.pera.views import Views
from pera_jax.objectives.watched import HealthChecks
from pera_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class PerA(base.Base):
    """The PerA objective. Its methods are pure functions of parameters and state.

    Attributes:
      encoder: the vision transformer of student and teacher.
      parts: patch counts of the masks, by crop type.
      drop_path_group: images per group of drop path, or 0 for all images of a device.
      koleo_group: images per group of the KoLeo term, or 0 for the whole batch.
      rgb: indices of the red, green and blue channels, or None.
    """

    encoder: ViT
    prototype_head: Head
    pixel_head: Head
    precision: Precision
    crops: dict[str, CropSpec]
    parts: dict[str, masks.Counts]
    drop_path_rate: float
    drop_path_group: int
    koleo_weight: float
    koleo_group: int
    pixel_weight: float
    center_momentum: float
    views: Any
    rgb: color.Rgb
    bands: Bands
    warm_start_batches: int

    name: ClassVar = "pera"
    citation: ClassVar = (
        "PerA (Shen et al., A Contrastive Learning Foundation Model Based on Perfectly Aligned Sample Pairs for Remote "
        "Sensing Images, arXiv:2505.19447)"
    )
    teacher_keys: ClassVar = ("backbone", "prototype_head")
    fixed_fields: ClassVar = ("heads",)
    free_fields: ClassVar = ("center_batches",)
    sharding_rules: ClassVar = (*heads.SHARDING_RULES, (r"mask_token$", P()), (r"center$", P("tensor")))
    decay_rules: ClassVar = (*heads.DECAY_RULES, (r"mask_token$", False))
    curves: ClassVar = curves.CURVES

    # ---------------------------------------------------------------- facts

    default_config = staticmethod(settings.default)
    shrink = staticmethod(settings.shrink)
    limit_groups = staticmethod(settings.limit_groups)
    validate = staticmethod(settings.validate)

    @classmethod
    def schedules(cls) -> dict[str, Schedule]:
        return {
            "one_minus_momentum": Schedule("cosine", "pera.teacher_momentum", highest=1.0, complement=True),
            "teacher_temperature": Schedule("ramp", "pera.teacher_temperature", positive=True),
            "student_temperature": Schedule("constant", "pera.student_temperature", positive=True),
        }

    def health_checks(self, images: int) -> HealthChecks:
        return health.checks(self.prototype_head.outputs, images)

    @classmethod
    def from_config(cls, config, bands: Bands, device: jax.Device | None = None) -> "PerA":
        """Builds the objective from a config.

        Raises:
          UserError: a crop size is no multiple of the patch size, a mask has an empty part, or sizes are inconsistent.
        """
        own, encoder = check.sized(config.pera, "pera"), vit.from_config(config, len(bands), device)
        patch = encoder.patch
        crops = base.crop_specs(config.crops)
        parts = {
            name: masks.counts(
                (spec.size // patch) ** 2, own.masks.student, own.masks.teacher, needs_learnable=name == "global"
            )
            for name, spec in crops.items()
        }
        views.check(own.views, config.data.rgb, bands.names)
        precision = encoder.precision
        return cls(
            encoder=encoder,
            prototype_head=Head(own.heads.hidden, own.heads.bottleneck, own.heads.prototypes, precision),
            pixel_head=Head(own.heads.hidden, own.heads.bottleneck, patch**2 * len(bands), precision),
            precision=precision,
            crops=crops,
            parts=parts,
            drop_path_rate=config.drop_path.rate,
            drop_path_group=config.drop_path.group,
            koleo_weight=own.loss.koleo_weight,
            koleo_group=own.loss.koleo_group,
            pixel_weight=own.loss.pixel_weight,
            center_momentum=own.loss.center_momentum,
            views=own.views,
            rgb=rgb_indices(config.data.rgb, bands.names),
            bands=bands,
            warm_start_batches=own.center_batches,
        )

    def flops_per_image(self) -> dict[str, float]:
        return cost.flops_per_image(self)

    # ---------------------------------------------------------------- the step

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The student's parameters: `backbone`, `prototype_head`, `pixel_head`, `mask_token`."""
        vit, proto, pixel, mask = jax.random.split(key, 4)
        side = self.crops["global"].size
        token = jnp.zeros((1, self.encoder.width), self.precision.wide)
        image = jnp.zeros((1, side, side, self.encoder.bands), self.precision.wide)
        return {
            "backbone": self.encoder.init(vit, image)["params"],
            "prototype_head": self.prototype_head.init(proto, token)["params"],
            "pixel_head": self.pixel_head.init(pixel, token)["params"],
            "mask_token": 0.02 * jax.random.normal(mask, (self.encoder.width,), self.precision.wide),
        }

    def init_state(self) -> dict[str, jax.Array]:
        """The objective's state: the center [K] of the teacher's outputs."""
        return {"center": jnp.zeros((self.prototype_head.outputs,), self.precision.wide)}

    def prepare(self, rngs: Streams, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """Adds all random draws to a batch of crops [B, V, H, W, C] by crop type, in the stored dtype.

        Axis 0 of every leaf is the batch, so that it can be split into microbatches: the draws for an image depend on
        its index in the batch, not on the microbatch.
        """
        number = len(batch["global"])
        draws = views.draw(rngs("examples"), number, self.crops, self.parts, self.views)
        return {"crops": batch, "draws": draws, "place": jnp.arange(number, dtype=jnp.int32)}

    def make_views(self, examples: dict[str, Any]) -> dict[str, Views]:
        """Two views of each crop and its masks, from (a microbatch of) the result of `prepare`."""
        return views.make(examples["crops"], examples["draws"], self.bands, self.rgb, self.precision.wide)

    def loss(self, params, teacher, state, examples, context: Context):
        """The loss on (a microbatch of) the result of `prepare`; arguments and result as in `loss_on_views`."""
        drop_path = self.drop_paths(context.rngs("drop_path"), examples["place"])
        return self.loss_on_views(params, teacher, state, self.make_views(examples), drop_path, context.scalars)

    def drop_paths(self, key: jax.Array, place: jax.Array) -> dict[str, DropPath | GrowingDropPath | None]:
        """The drop path of each crop type, for images with indices `place` [b] in the whole batch."""
        numbers = {name: self.crops[name].number for name in self.parts}
        return by_type(key, place, numbers, self.drop_path_rate, self.drop_path_group)

    def loss_on_views(
        self,
        params: dict[str, Any],
        teacher: dict[str, Any],
        state: dict[str, jax.Array],
        views: dict[str, Views],
        drop_path: dict[str, DropPath | GrowingDropPath | None] | None,
        scalars: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The whole loss: class term + koleo_weight * KoLeo + pixel_weight * pixel term.

        Args:
          params: the student's parameters. teacher: the teacher's, with keys `teacher_keys`.
          state: `center` [K], as updated by the previous step.
          drop_path: by crop type; None disables it.
          scalars: `student_temperature`, `teacher_temperature`.

        Returns:
          (loss, aux): both are means over images, so that those of equal microbatches average to those of the whole
          batch (for KoLeo if each group lies in one microbatch).
        """
        targets = self.pixel_targets(views["global"])
        # First, so that the full views are not kept in memory for the few patches that are predicted.
        targets, views = jax.lax.optimization_barrier((targets, views))
        student_out, teacher_out, predicted, tokens = self.outputs(params, teacher, views, drop_path)
        per_pair, statistics = prototypes.class_term(
            student_out, teacher_out, state["center"], scalars["student_temperature"], scalars["teacher_temperature"],
            self.precision,
        )  # [V]
        batch, globals_ = student_out.units.shape[0], self.crops["global"].number
        spread = koleo.koleo(
            student_out.units[:, :globals_], student_out.weights, self.koleo_group or batch, self.precision
        )
        pixel = pixels.pixel_term(predicted, targets)
        loss = jnp.mean(per_pair) + self.koleo_weight * spread + self.pixel_weight * pixel
        aux = {
            "loss": loss, "per_pair": per_pair, "koleo": spread, "pixel": pixel, "statistics": statistics,
            "output": prototypes.mean_output(teacher_out, self.precision),
            "token": prototypes.mean_direction(tokens), "unit": jnp.mean(teacher_out.units, axis=(0, 1)),
        }  # fmt: skip
        return loss, jax.lax.stop_gradient(aux)

    def update(self, state: dict[str, jax.Array], aux: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The new center and the metrics, from the `aux` of the whole batch."""
        center = self.center_momentum * state["center"] + (1 - self.center_momentum) * aux["output"]
        per_pair, globals_ = aux["per_pair"], self.crops["global"].number
        metrics = {
            "loss": aux["loss"],
            "loss/class": jnp.mean(per_pair),
            "loss/class_global": jnp.sum(per_pair[:globals_]) / len(per_pair),
            "loss/class_local": jnp.sum(per_pair[globals_:]) / len(per_pair),
            "loss/koleo": aux["koleo"],
            "loss/pixel": aux["pixel"],
            "teacher/center_norm": jnp.linalg.norm(center),
        }
        metrics |= prototype_checks.teacher_metrics(per_pair, aux["statistics"], aux["token"], aux["unit"])
        return {"center": center}, metrics

    def outputs(self, params, teacher, views, drop_path):
        """Both networks' prototype outputs for all crops, and the student's prediction of the learnable patches.

        Returns:
          (student, teacher, predicted, teacher_tokens): two `prototypes.Prototypes` with units [B, V, D], V = global
          then local crops; predicted pixels [B NG, n_l, p p C]; the teacher's class tokens [B, V, width].
        """
        teacher_class = self._teacher_tokens(teacher, views)
        # The teacher finishes before the student stores activations for its backward pass.
        student_views = {name: view.student for name, view in views.items()}
        teacher_class, student_views = jax.lax.optimization_barrier((teacher_class, student_views))
        student_tokens, teacher_tokens = [], []
        for name, view in views.items():
            crops = self.crops[name].number
            encoded = self.encoder.apply(
                {"params": params["backbone"]},
                student_views[name],
                view.masks.student,
                learnable=view.masks.learnable if name == "global" else None,
                mask_token=params["mask_token"],
                drop_path=None if drop_path is None else drop_path[name],
            )
            split = lambda x: rearrange(x, "(b v) d -> b v d", v=crops)  # noqa: E731
            student_tokens.append(split(encoded["class_token"]))  # [B, V of the crop type, width]
            teacher_tokens.append(split(teacher_class[name]))
            if name == "global":
                learnable = encoded["learnable_tokens"]  # [B NG, n_l, width]
        student_out, teacher_out = (
            prototypes.Prototypes(*self.prototype_head.apply({"params": tree["prototype_head"]}, jnp.concatenate(x, 1)))
            for tree, x in ((params, student_tokens), (teacher, teacher_tokens))
        )
        units, weights = self.pixel_head.apply({"params": params["pixel_head"]}, learnable)
        predicted = sharding.constrain_batch(self.precision.logits(units, sharding.constrain_replicated(weights)))
        teacher_out, teacher_tokens = jax.lax.stop_gradient((teacher_out, jnp.concatenate(teacher_tokens, axis=1)))
        return student_out, teacher_out, predicted, teacher_tokens

    def _teacher_tokens(self, teacher, views: dict[str, Views]) -> dict[str, jax.Array]:
        """The teacher's class tokens [B V, width] by crop type."""
        return {
            name: self.encoder.apply({"params": teacher["backbone"]}, view.teacher, view.masks.teacher)["class_token"]
            for name, view in views.items()
        }

    # ---------------------------------------------------------------- a start from weights, and the report

    def estimate(self, teacher: dict[str, Any], examples: dict[str, Any]) -> jax.Array:
        """The teacher's mean output [K], towards which each step moves the center.

        The released code does not save the center, and a center that starts at 0 needs tens of steps to reach the
        teacher's mean output.
        """
        tokens = [
            rearrange(class_tokens, "(b v) d -> b v d", v=self.crops[name].number)
            for name, class_tokens in self._teacher_tokens(teacher, self.make_views(examples)).items()
        ]
        head = {"params": teacher["prototype_head"]}
        out = prototypes.Prototypes(*self.prototype_head.apply(head, jnp.concatenate(tokens, axis=1)))
        return prototypes.mean_output(out, self.precision)

    def with_estimate(self, state, estimate: jax.Array) -> tuple[dict[str, jax.Array], str]:
        return state | {"center": estimate}, prototype_checks.started(estimate)

    def adapt(self, params, new, patch: int, source: tuple[str, ...], target: tuple[str, ...]):
        return transfer.adapt(params, new, patch, source, target)

    def preview(self, networks, batch, rngs, channels):
        return preview.preview(self, networks, batch, rngs, channels)

    def pixel_targets(self, view: Views) -> jax.Array:
        """The pixels of the student view at its learnable patches, [N, n_l, p p C]."""
        patches = patchify(view.student, self.encoder.patch)  # [N, L, p p C]
        return jnp.take_along_axis(patches, view.masks.learnable[:, :, None], axis=1)

