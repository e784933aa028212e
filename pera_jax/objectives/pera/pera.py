"""PerA as one objective: its networks, its state beside the parameters, and its loss on a batch.

Shen et al., "A Contrastive Learning Foundation Model Based on Perfectly Aligned Sample Pairs for Remote Sensing
Images", arXiv:2505.19447. One crop, two looks, disjoint patches for student and teacher.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from pera_jax.augment import views
from pera_jax.bands import Bands, rgb_places
from pera_jax.losses import prototypes as losses
from pera_jax.models.heads import Head
from pera_jax.models.precision import Precision
from pera_jax.models.stochastic_depth import Depth
from pera_jax.models.vit import ViT, build, patchify
from pera_jax.objectives.pera import masking
from pera_jax.parallel import sharding

KINDS = ("global", "local")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """The crops of one kind as both networks see them, batch-major: crop v of sample b is row `b * V + v`."""

    student: jax.Array  # [B V, H, W, C], normalised
    teacher: jax.Array  # [B V, H, W, C], normalised
    masks: masking.Masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """All that is drawn for the crops of one kind, for a whole batch at once. Leaves are [B, V, ...]."""

    student: views.Jitter
    teacher: views.Jitter
    masks: masking.Masks


@dataclasses.dataclass(frozen=True)
class PerA:
    """The objective. Pure: parameters and state go in and come out.

    Attributes:
      crops: for each kind, (number of crops per image, side in pixels).
      parts: for each kind, the counts of the masks.
      depth_group: images of one stochastic-depth group, or 0 for all of a device.
      koleo_group: images per group of the spreading term, or 0 for the whole batch.
    """

    vit: ViT
    prototype_head: Head
    pixel_head: Head
    precision: Precision
    crops: dict[str, tuple[int, int]]
    parts: dict[str, masking.Counts]
    depth_rate: float
    depth_group: int
    koleo_weight: float
    koleo_group: int
    pixel_weight: float
    center_momentum: float
    views: Any
    bands: Bands

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

    def examples(self, key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """The batch, crops [B, V, H, W, C] of each kind in the stored dtype, with all that is drawn for it.

        Every leaf has the batch as axis 0, so that the whole can be worked on in parts: what is drawn for an image
        depends on its place in the batch and not on the part.
        """
        number = len(batch["global"])
        draws = {}
        for index, kind in enumerate(self.parts):
            look_key, mask_key = jax.random.split(jax.random.fold_in(key, index))
            crops = number * self.crops[kind][0]
            drawn = Draws(
                *views.draw_jitter(look_key, crops, self.views), masking.sample(mask_key, crops, self.parts[kind])
            )
            draws[kind] = jax.tree.map(lambda x: rearrange(x, "(b v) ... -> b v ...", b=number), drawn)
        return {"crops": batch, "draws": draws, "place": jnp.arange(number, dtype=jnp.int32)}

    def make_views(self, examples: dict[str, Any]) -> dict[str, Views]:
        """Two looks of each crop, with its masks, from (a part of) `examples`."""

        rgb = rgb_places(self.views["rgb"], self.bands.names)

        def look(crops, jitter):
            return views.look(crops, jitter, self.bands, rgb, self.precision.wide)  # [B V, H, W, C]

        result = {}
        for kind, draws in examples["draws"].items():
            crops, draws = jax.tree.map(
                lambda x: rearrange(x, "b v ... -> (b v) ..."), (examples["crops"][kind], draws)
            )  # [B V, ...]
            student, teacher = (sharding.per_shard(look, crops, jitter) for jitter in (draws.student, draws.teacher))
            result[kind] = Views(student, teacher, draws.masks)
        return result

    def loss(self, params, teacher, state, examples, key, hyper):
        """The loss on (a part of) `examples`; the other arguments and the result as `loss_on_views`."""
        return self.loss_on_views(
            params, teacher, state, self.make_views(examples), self.depths(key, examples["place"]), hyper
        )

    def depths(self, key: jax.Array, place: jax.Array) -> dict[str, Depth | None]:
        """The stochastic depth of each kind's pass over images at `place` [b] of the whole batch."""
        group = self.depth_group or len(place)  # images
        return {
            kind: Depth(
                jax.random.fold_in(key, index), place[::group] // group, self.depth_rate, group * self.crops[kind][0]
            )
            for index, kind in enumerate(self.parts)
        }

    def loss_on_views(
        self,
        params: dict[str, Any],
        teacher: dict[str, Any],
        state: dict[str, jax.Array],
        views: dict[str, Views],
        depths: dict[str, Depth] | None,
        hyper: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The whole loss: class term + koleo_weight * KoLeo + pixel_weight * pixel term.

        Args:
          params: the student's parameters; teacher: the teacher's (`teacher_keys`).
          state: `center` as left by the steps before this one.
          depths: stochastic depth of each kind; None switches it off.
          hyper: `student_temperature`, `teacher_temperature`.

        Returns:
          (loss, means): both are means over the images, so that those of equal parts of a batch average to those of
          the whole (KoLeo's within the groups that lie in one part).
        """
        targets = self.pixel_targets(views["global"])
        # First, so that the whole looks are not kept until the end for the few patches that are guessed.
        targets, views = jax.lax.optimization_barrier((targets, views))
        student_out, teacher_out, predicted, tokens = self.outputs(params, teacher, views, depths)
        per_pair, statistics = losses.class_term(
            student_out, teacher_out, state["center"], hyper["student_temperature"], hyper["teacher_temperature"],
            self.precision,
        )  # [V]
        batch, globals_ = student_out.units.shape[0], self.crops["global"][0]
        koleo = losses.koleo(
            student_out.units[:, :globals_], student_out.weights, self.koleo_group or batch, self.precision
        )
        pixel = losses.pixel_term(predicted, targets)
        loss = jnp.mean(per_pair) + self.koleo_weight * koleo + self.pixel_weight * pixel
        means = {
            "loss": loss, "per_pair": per_pair, "koleo": koleo, "pixel": pixel, "statistics": statistics,
            "output": losses.mean_output(teacher_out, self.precision),
            "token": losses.mean_direction(tokens), "unit": jnp.mean(teacher_out.units, axis=(0, 1)),
        }  # fmt: skip
        return loss, jax.lax.stop_gradient(means)

    def finish(self, state: dict[str, jax.Array], means: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The new state, and the metrics, from what `loss` says of the whole batch."""
        center = self.center_momentum * state["center"] + (1 - self.center_momentum) * means["output"]
        per_pair, globals_ = means["per_pair"], self.crops["global"][0]
        teacher = losses.teacher_statistics(per_pair, means["statistics"])
        metrics = {
            "loss": means["loss"],
            "loss/class": jnp.mean(per_pair),
            "loss/class_global": jnp.sum(per_pair[:globals_]) / len(per_pair),
            "loss/class_local": jnp.sum(per_pair[globals_:]) / len(per_pair),
            "loss/koleo": means["koleo"],
            "loss/pixel": means["pixel"],
            "teacher/entropy": teacher["teacher_entropy"],
            "teacher/entropy_of_mean": teacher["teacher_entropy_of_mean"],
            "teacher/prototypes_in_use": teacher["prototypes_in_use"],
            "teacher/kl_to_uniform": jnp.log(len(center)) - teacher["teacher_entropy_of_mean"],
            "teacher/feature_variance": 1 - jnp.sum(jnp.square(means["token"])),
            "teacher/unit_variance": 1 - jnp.sum(jnp.square(means["unit"])),
            "teacher/center_norm": jnp.linalg.norm(center),
            "kl": teacher["kl"],
        }
        return {"center": center}, metrics

    def outputs(self, params, teacher, views, depths):
        """Both networks' class outputs over all pairs, and the student's prediction of the learnable patches.

        Returns:
          (student, teacher, predicted): two `losses.Prototypes` with units [B, V, D], V = global then local crops, and
          [B NG, n_l, p p C].
        """
        aligned = self._aligned(teacher, views)
        # The teacher first and done, and only then what the student keeps for its backward pass.
        looks = {kind: view.student for kind, view in views.items()}
        aligned, looks = jax.lax.optimization_barrier((aligned, looks))
        student_tokens, teacher_tokens = [], []
        for kind, view in views.items():
            crops = self.crops[kind][0]
            seen = self.vit.apply(
                {"params": params["backbone"]},
                looks[kind],
                view.masks.student,
                learnable=view.masks.learnable if kind == "global" else None,
                mask_token=params["mask_token"],
                depth=None if depths is None else depths[kind],
            )
            split = lambda x: rearrange(x, "(b v) d -> b v d", v=crops)  # noqa: E731
            student_tokens.append(split(seen["class_token"]))  # [B, V_kind, width]
            teacher_tokens.append(split(aligned[kind]))
            if kind == "global":
                learnable = seen["learnable_tokens"]  # [B NG, n_l, width]
        student_out, teacher_out = (
            losses.Prototypes(*self.prototype_head.apply({"params": tree["prototype_head"]}, jnp.concatenate(x, axis=1)))
            for tree, x in ((params, student_tokens), (teacher, teacher_tokens))
        )
        units, weights = self.pixel_head.apply({"params": params["pixel_head"]}, learnable)
        predicted = sharding.constrain_batch(self.precision.logits(units, sharding.constrain_whole(weights)))
        teacher_out, teacher_tokens = jax.lax.stop_gradient((teacher_out, jnp.concatenate(teacher_tokens, axis=1)))
        return student_out, teacher_out, predicted, teacher_tokens

    def _aligned(self, teacher, views: dict[str, Views]) -> dict[str, jax.Array]:
        """The teacher's class tokens of each kind, [B V, width]."""
        return {
            kind: self.vit.apply({"params": teacher["backbone"]}, view.teacher, view.masks.teacher)["class_token"]
            for kind, view in views.items()
        }

    def mean_output(self, teacher: dict[str, Any], examples: dict[str, Any]) -> jax.Array:
        """The teacher's mean output [K] on (a part of) `examples`: what one step moves the centre towards."""
        tokens = [
            rearrange(aligned, "(b v) d -> b v d", v=self.crops[kind][0])
            for kind, aligned in self._aligned(teacher, self.make_views(examples)).items()
        ]
        head = {"params": teacher["prototype_head"]}
        out = losses.Prototypes(*self.prototype_head.apply(head, jnp.concatenate(tokens, axis=1)))
        return losses.mean_output(out, self.precision)

    def pixel_targets(self, view: Views) -> jax.Array:
        """The student view's values at its learnable patches, [N, n_l, p p C]."""
        patches = patchify(view.student, self.vit.patch)  # [N, L, p p C]
        return jnp.take_along_axis(patches, view.masks.learnable[:, :, None], axis=1)


def from_config(config, bands: Bands, device: jax.Device | None = None) -> PerA:
    """The objective that a config describes, for images of these bands.

    Args:
      device: one of those that it will run on, see `attention.choose`.

    Raises:
      UserError: crops that the patch does not divide, masks with an empty part, sizes that do not fit together.
    """
    precision = Precision.of(config.precision, config.parameter_precision)
    model, crops, heads = config.model, config.crops, config.heads
    vit = build(
        dict(
            width=model.width, depth=model.depth, heads=model.heads, patch=model.patch, image_size=crops.global_size,
            bands=len(bands), split=model.depth // 2, mlp_ratio=model.mlp_ratio,
        ),
        precision, scan=model.scan, remat=model.remat, attention=model.attention, device=device,
    )
    sizes = {"global": (crops.global_number, crops.global_size), "local": (crops.local_number, crops.local_size)}
    parts = {
        kind: masking.counts(
            (size // model.patch) ** 2, config.masks.student, config.masks.teacher, needs_learnable=kind == "global"
        )
        for kind, (number, size) in sizes.items() if number
    }
    views.check(config.views, bands.names)
    return PerA(
        vit=vit,
        prototype_head=Head(heads.hidden, heads.bottleneck, heads.prototypes, precision),
        pixel_head=Head(heads.hidden, heads.bottleneck, model.patch**2 * len(bands), precision),
        precision=precision,
        crops=sizes,
        parts=parts,
        depth_rate=config.stochastic_depth.rate,
        depth_group=config.stochastic_depth.group,
        koleo_weight=config.loss.koleo_weight,
        koleo_group=config.loss.koleo_group,
        pixel_weight=config.loss.pixel_weight,
        center_momentum=config.loss.center_momentum,
        views=config.views,
        bands=bands,
    )
