"""PerA as one objective: its networks, its state beside the parameters, and its loss on a batch.

Shen et al., "A Contrastive Learning Foundation Model Based on Perfectly Aligned Sample Pairs for Remote Sensing
Images", arXiv:2505.19447. One crop, two looks, disjoint patches for student and teacher.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from pera_jax import losses, masking, views
from pera_jax.models.heads import Head
from pera_jax.models.vit import Depth, ViT, build, patchify
from pera_jax.precision import Precision

KINDS = ("global", "local")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """The crops of one kind as both networks see them, batch-major: crop v of sample b is row `b * V + v`."""

    student: jax.Array  # [B V, H, W, C], normalised
    teacher: jax.Array  # [B V, H, W, C], normalised
    masks: masking.Masks


@dataclasses.dataclass(frozen=True)
class PerA:
    """The objective. Pure: parameters and state go in and come out.

    Attributes:
      crops: for each kind, (number of crops per image, side in pixels).
      parts: for each kind, the counts of the masks.
      depth_groups: for each kind, the crops of one stochastic-depth group.
      koleo_group: images per group of the spreading term, or 0 for the whole batch.
    """

    vit: ViT
    prototype_head: Head
    pixel_head: Head
    precision: Precision
    crops: dict[str, tuple[int, int]]
    parts: dict[str, masking.Counts]
    depth_rate: float
    depth_groups: dict[str, int]
    koleo_weight: float
    koleo_group: int
    pixel_weight: float
    center_momentum: float
    views: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    # The sub-trees of the parameters that the teacher follows.
    teacher_keys = ("backbone", "prototype_head")

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The student's parameters: `backbone`, `prototype_head`, `pixel_head`, `mask_token`."""
        vit, proto, pixel, mask = jax.random.split(key, 4)
        side = self.crops["global"][1]
        token = jnp.zeros((1, self.vit.width), self.precision.wide)
        image = jnp.zeros((1, side, side, self.vit.bands), self.precision.wide)
        return {
            "backbone": self.vit.init(vit, image)["params"],
            "prototype_head": self.prototype_head.init(proto, token)["params"],
            "pixel_head": self.pixel_head.init(pixel, token)["params"],
            "mask_token": 0.02 * jax.random.normal(mask, (self.vit.width,), self.precision.wide),
        }

    def init_state(self) -> dict[str, jax.Array]:
        """What the objective keeps beside parameters: the centre [K] of the teacher's outputs."""
        return {"center": jnp.zeros((self.prototype_head.outputs,), self.precision.wide)}

    def make_views(self, key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, Views]:
        """Two looks and one mask per crop, from uint8 crops [B, V, H, W, C] of each kind."""
        result = {}
        for number, kind in enumerate(k for k in KINDS if self.crops[k][0]):
            look_key, mask_key = jax.random.split(jax.random.fold_in(key, number))
            crops = rearrange(batch[kind], "b v h w c -> (b v) h w c")  # [B V, H, W, C]
            student, teacher = views.make_views(
                look_key, crops, self.views, jnp.asarray(self.mean), jnp.asarray(self.std), self.precision.wide
            )
            result[kind] = Views(student, teacher, masking.sample(mask_key, len(crops), self.parts[kind]))
        return result

    def loss(self, params, teacher, state, batch, key, hyper):
        """The loss on a batch of uint8 crops; arguments and result as `loss_on_views`."""
        view_key, depth_key = jax.random.split(key)
        return self.loss_on_views(params, teacher, state, self.make_views(view_key, batch), depth_key, hyper)

    def loss_on_views(
        self,
        params: dict[str, Any],
        teacher: dict[str, Any],
        state: dict[str, jax.Array],
        views: dict[str, Views],
        key: jax.Array | None,
        hyper: dict[str, jax.Array],
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
        """The whole loss: class term + koleo_weight * KoLeo + pixel_weight * pixel term.

        Args:
          params: the student's parameters; teacher: the teacher's (`teacher_keys`).
          state: `center` as left by the steps before this one.
          key: for stochastic depth; None switches it off.
          hyper: `student_temperature`, `teacher_temperature`.

        Returns:
          (loss, (new state, metrics)).
        """
        student_out, teacher_out, predicted = self.outputs(params, teacher, views, key)
        per_pair, statistics = losses.class_term(
            student_out, teacher_out, state["center"], hyper["student_temperature"], hyper["teacher_temperature"],
            self.precision,
        )  # [V]
        class_loss = jnp.mean(per_pair)

        batch, globals_ = student_out.units.shape[0], self.crops["global"][0]
        koleo = losses.koleo(
            student_out.units[:, :globals_], student_out.weights, self.koleo_group or batch, self.precision
        )
        pixel = losses.pixel_term(predicted, self.pixel_targets(views["global"]))
        loss = class_loss + self.koleo_weight * koleo + self.pixel_weight * pixel

        center = losses.new_center(state["center"], teacher_out, self.center_momentum, self.precision)
        metrics = {
            "loss": loss,
            "loss/class": class_loss,
            "loss/class_global": jnp.sum(per_pair[:globals_]) / len(per_pair),
            "loss/class_local": jnp.sum(per_pair[globals_:]) / len(per_pair),
            "loss/koleo": koleo,
            "loss/pixel": pixel,
            "teacher/entropy": statistics["teacher_entropy"],
            "teacher/entropy_of_mean": statistics["teacher_entropy_of_mean"],
            "teacher/prototypes_in_use": statistics["prototypes_in_use"],
            "teacher/center_norm": jnp.linalg.norm(center),
            "kl": statistics["kl"],
        }
        return loss, (jax.lax.stop_gradient({"center": center}), jax.lax.stop_gradient(metrics))

    def outputs(self, params, teacher, views, key):
        """Both networks' class outputs over all pairs, and the student's prediction of the learnable patches.

        Returns:
          (student, teacher, predicted): two `losses.Prototypes` with units [B, V, D], V = global then local crops, and
          [B NG, n_l, p p C].
        """
        student_tokens, teacher_tokens = [], []
        for number, (kind, view) in enumerate(views.items()):
            crops = self.crops[kind][0]
            seen = self.vit.apply(
                {"params": params["backbone"]},
                view.student,
                view.masks.student,
                learnable=view.masks.learnable if kind == "global" else None,
                mask_token=params["mask_token"],
                key=None if key is None else jax.random.fold_in(key, number),
                depth=Depth(self.depth_rate, self.depth_groups[kind] or len(view.student)),
            )
            aligned = self.vit.apply({"params": teacher["backbone"]}, view.teacher, view.masks.teacher)
            split = lambda x: rearrange(x, "(b v) d -> b v d", v=crops)  # noqa: E731
            student_tokens.append(split(seen["class_token"]))  # [B, V_kind, width]
            teacher_tokens.append(split(aligned["class_token"]))
            if kind == "global":
                learnable = seen["learnable_tokens"]  # [B NG, n_l, width]
        student_out, teacher_out = (
            losses.Prototypes(*self.prototype_head.apply({"params": tree["prototype_head"]}, jnp.concatenate(x, axis=1)))
            for tree, x in ((params, student_tokens), (teacher, teacher_tokens))
        )
        predicted = self.precision.logits(*self.pixel_head.apply({"params": params["pixel_head"]}, learnable))
        return student_out, jax.lax.stop_gradient(teacher_out), predicted

    def pixel_targets(self, view: Views) -> jax.Array:
        """The student view's values at its learnable patches, [N, n_l, p p C]."""
        patches = patchify(view.student, self.vit.patch)  # [N, L, p p C]
        return jnp.take_along_axis(patches, view.masks.learnable[:, :, None], axis=1)


def from_config(config, mean, std, bands: int) -> PerA:
    """The objective that a config describes, for images of `bands` channels normalised by `mean` and `std`.

    Raises:
      UserError: crops that the patch does not divide, masks with an empty part, sizes that do not fit together.
    """
    precision = Precision.of(config.precision, config.parameter_precision)
    model, crops, heads = config.model, config.crops, config.heads
    vit = build(
        dict(
            width=model.width, depth=model.depth, heads=model.heads, patch=model.patch, image_size=crops.global_size,
            bands=bands, split=model.depth // 2, mlp_ratio=model.mlp_ratio,
        ),
        precision, scan=model.scan, remat=model.remat,
    )
    sizes = {"global": (crops.global_number, crops.global_size), "local": (crops.local_number, crops.local_size)}
    parts = {
        kind: masking.counts(
            (size // model.patch) ** 2, config.masks.student, config.masks.teacher, needs_learnable=kind == "global"
        )
        for kind, (number, size) in sizes.items() if number
    }
    group = config.stochastic_depth.group
    return PerA(
        vit=vit,
        prototype_head=Head(heads.hidden, heads.bottleneck, heads.prototypes, precision),
        pixel_head=Head(heads.hidden, heads.bottleneck, model.patch**2 * bands, precision),
        precision=precision,
        crops=sizes,
        parts=parts,
        depth_rate=config.stochastic_depth.rate,
        depth_groups={kind: group * number for kind, (number, _) in sizes.items()},
        koleo_weight=config.loss.koleo_weight,
        koleo_group=config.loss.koleo_group,
        pixel_weight=config.loss.pixel_weight,
        center_momentum=config.loss.center_momentum,
        views=config.views,
        mean=tuple(mean),
        std=tuple(std),
    )
