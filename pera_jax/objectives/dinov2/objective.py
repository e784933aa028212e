"""DINOv2: its networks, its state beside the parameters, and its loss on a batch.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv:2304.07193, section 4: the class term
of DINO, the patch term of iBOT (Zhou et al., arXiv:2111.07832), KoLeo, and targets by Sinkhorn-Knopp.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from pera_jax.augment import color
from pera_jax.bands import Bands, rgb_indices
from pera_jax.losses import koleo, prototypes
from pera_jax.losses.crossed import crossed_term
from pera_jax.losses.masked import masked_term
from pera_jax.losses.prototypes import Prototypes
from pera_jax.losses.sinkhorn import sinkhorn_bias
from pera_jax.models import drop_path as drop
from pera_jax.models import heads, vit
from pera_jax.models.heads import Head
from pera_jax.models.precision import Precision
from pera_jax.models.vit import ViT
from pera_jax.objectives import base, check, ibot_masks, independent_views
from pera_jax.objectives.base import Context, CropSpec, Freeze, Schedule, Streams
from pera_jax.objectives.dinov2 import cost, preview, settings, watching
from pera_jax.objectives.dinov2.official import SSLMetaArch
from pera_jax.objectives.ibot_masks import BlockMasks
from pera_jax.objectives.watched import HealthChecks


class Outputs(NamedTuple):
    """Outputs of both networks for B images, with V crops of which the first two are global.

    Attributes:
      student: the prototype head's units [B, V, bottleneck]. teacher: [B, 2, bottleneck].
      patch_student, patch_teacher: the patch head's, at the masked patches: units [G, M, bottleneck].
      row_weights: [G, M], of the masked patches, see `ibot_masks.index_buffer`.
      tokens, teacher_tokens: class tokens of the global crops, [B, 2, width].
    """

    student: Prototypes
    teacher: Prototypes
    patch_student: Prototypes
    patch_teacher: Prototypes
    row_weights: jax.Array
    tokens: jax.Array
    teacher_tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class DINOv2(base.Base):
    """The DINOv2 objective. Its methods are pure functions of parameters and state.

    Attributes:
      encoder: the vision transformer of student and teacher.
      patch_prototype_head: None: patches use the `prototype_head`.
      masks: how the masks of the student's global crops are drawn.
      drop_path_group: images per group of drop path, or 0 for all images of a device.
      targets: "sinkhorn" or "centering".
      koleo_group: images per group of the KoLeo term, or 0 for the whole batch.
      views: by crop type, the color operations.
      rgb: indices of the red, green and blue channels, or None.
    """

    encoder: ViT
    prototype_head: Head
    patch_prototype_head: Head | None
    precision: Precision
    crops: dict[str, CropSpec]
    masks: BlockMasks
    drop_path_rate: float
    drop_path_group: int
    targets: str
    koleo_weight: float
    koleo_group: int
    center_momentum: float
    views: independent_views.Specs
    rgb: color.Rgb
    bands: Bands

    name: ClassVar = "dinov2"
    citation: ClassVar = (
        "DINOv2 (Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, arXiv:2304.07193)"
    )
    fixed_fields: ClassVar = ("heads", "separate_heads", "targets")
    sharding_rules: ClassVar = (*heads.SHARDING_RULES, (r"mask_token$", P()), (r"center$", P("tensor")))
    decay_rules: ClassVar = (*heads.DECAY_RULES, (r"mask_token$", False))
    curves: ClassVar = watching.CURVES
    official: ClassVar = SSLMetaArch()
    frozen: ClassVar = (Freeze(r"prototype_head/(direction|gain)$", until="last_layer", moments=True),)

    # ---------------------------------------------------------------- facts

    default_config = staticmethod(settings.default)
    set_defaults = staticmethod(settings.set_defaults)
    shrink = staticmethod(settings.shrink)
    limit_groups = staticmethod(settings.limit_groups)
    validate = staticmethod(settings.validate)

    @classmethod
    def schedules(cls) -> dict[str, Schedule]:
        return {
            "one_minus_momentum": Schedule("cosine", "dinov2.teacher_momentum", highest=1.0, complement=True),
            "teacher_temperature": Schedule("ramp", "dinov2.teacher_temperature", positive=True),
            "student_temperature": Schedule("constant", "dinov2.student_temperature", positive=True),
            "last_layer": Schedule("after", "dinov2.freeze_last_layer"),
        }

    def health_checks(self, images: int) -> HealthChecks:
        return watching.checks(self.prototype_head.outputs, images)

    @classmethod
    def from_config(cls, config, bands: Bands, device: jax.Device | None = None) -> "DINOv2":
        """Builds the objective from a config.

        Raises:
          UserError: a crop size is no multiple of the patch size, no patch would be masked, or sizes are inconsistent.
        """
        own = check.sized(config.dinov2, "dinov2")
        encoder = vit.from_config(config, len(bands), device, layer_scale=float(own.layer_scale))
        precision, crops = encoder.precision, base.crop_specs(config.crops)
        independent_views.check(own.views, "dinov2.views", config.data.rgb, bands.names)
        names = {"global": ("global_1", "global_2"), "local": ("local",)}
        sizes = own.heads.hidden, own.heads.bottleneck
        patch_head = Head(*sizes, own.heads.patch_prototypes, precision) if own.separate_heads else None
        return cls(
            encoder=encoder,
            prototype_head=Head(*sizes, own.heads.prototypes, precision),
            patch_prototype_head=patch_head,
            precision=precision,
            crops=crops,
            masks=ibot_masks.from_config(own, "dinov2", crops["global"].size // encoder.patch),
            drop_path_rate=config.drop_path.rate,
            drop_path_group=config.drop_path.group,
            targets=own.targets,
            koleo_weight=own.loss.koleo_weight,
            koleo_group=own.loss.koleo_group,
            center_momentum=own.loss.center_momentum,
            views=independent_views.specs_from(own.views, names, kernel="gaussian"),
            rgb=rgb_indices(config.data.rgb, bands.names),
            bands=bands,
        )

    @property
    def host_draws(self) -> BlockMasks:
        return self.masks

    @property
    def teacher_keys(self) -> tuple[str, ...]:
        patch_head = () if self.patch_prototype_head is None else ("patch_prototype_head",)
        return ("backbone", "mask_token", "prototype_head", *patch_head)

    @property
    def clip_groups(self) -> tuple[tuple[str, ...], ...]:
        return (self.teacher_keys[:2], *((key,) for key in self.teacher_keys[2:]))

    def flops_per_image(self) -> dict[str, float]:
        return cost.flops_per_image(self)

    # ---------------------------------------------------------------- the step

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The student's parameters: `backbone`, `mask_token` (zeros), `prototype_head` and `patch_prototype_head`."""
        backbone, proto, patch = jax.random.split(key, 3)
        side = self.crops["global"].size
        token = jnp.zeros((1, self.encoder.width), self.precision.wide)
        image = jnp.zeros((1, side, side, self.encoder.bands), self.precision.wide)
        params = {
            "backbone": self.encoder.init(backbone, image)["params"],
            "mask_token": token[0],
            "prototype_head": self.prototype_head.init(proto, token)["params"],
        }
        if self.patch_prototype_head is not None:
            params["patch_prototype_head"] = self.patch_prototype_head.init(patch, token)["params"]
        return params

    def init_state(self) -> dict[str, jax.Array]:
        """With centering, the centers [K] of the teacher's outputs for class tokens and patches; else {}."""
        if self.targets != "centering":
            return {}
        patch_head = self.patch_prototype_head or self.prototype_head
        sizes = {"center": self.prototype_head.outputs, "patch_center": patch_head.outputs}
        return {name: jnp.zeros((size,), self.precision.wide) for name, size in sizes.items()}

    def prepare(self, rngs: Streams, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """Adds all random draws to a batch of crops [B, V, H, W, C] and masks [B, 2, L]."""
        number = len(batch["global"])
        return {
            "crops": {name: batch[name] for name in self.crops},
            "draws": independent_views.draw(rngs("examples"), number, self.crops, self.views),
            "masks": batch["masks"],
            "place": jnp.arange(number, dtype=jnp.int32),
        }

    def make_views(self, examples: dict[str, Any]) -> dict[str, jax.Array]:
        """The normalized views [B V, H, W, C] by crop type of (a microbatch of) the result of `prepare`."""
        crops, draws = examples["crops"], examples["draws"]
        return independent_views.make(crops, draws, self.bands, self.rgb, self.precision.wide)

    def loss(self, params, teacher, state, examples, context: Context):
        """The loss on (a microbatch of) the result of `prepare`; arguments and result as in `loss_on_views`."""
        drop_path = self.drop_paths(context.rngs("drop_path"), examples["place"])
        views, masks = self.make_views(examples), examples["masks"]
        return self.loss_on_views(params, teacher, state, views, masks, drop_path, context.scalars)

    def drop_paths(self, key: jax.Array, place: jax.Array) -> dict[str, Any]:
        """The drop path of each crop type, for images with indices `place` [b] in the whole batch."""
        numbers = {name: crop.number for name, crop in self.crops.items()}
        return drop.by_type(key, place, numbers, self.drop_path_rate, self.drop_path_group)

    def loss_on_views(self, params, teacher, state, views, masks, drop_path, scalars) -> tuple[jax.Array, Any]:
        """The whole loss: class term + patch term + koleo_weight * KoLeo.

        Args:
          params: the student's parameters. teacher: the teacher's, with keys `teacher_keys`.
          state: as of `init_state`, as updated by the previous step.
          views: normalized crops [B V, H, W, C] by crop type. masks: uint8 [B, 2, L].
          drop_path: by crop type; None disables it.
          scalars: `student_temperature`, `teacher_temperature`.

        Returns:
          (loss, aux): with centering, both are means over images, so that those of equal microbatches average to those
          of the whole batch (for KoLeo if each group lies in one microbatch).
        """
        out = self.outputs(params, teacher, views, masks, drop_path)
        bias, patch_bias = self.biases(out, state, scalars["teacher_temperature"])
        temperatures = scalars["student_temperature"], scalars["teacher_temperature"]
        per_crop, statistics = crossed_term(out.student, out.teacher, bias, *temperatures, self.precision)  # [V]
        patch, patch_statistics = masked_term(
            out.patch_student, out.patch_teacher, patch_bias, out.row_weights, *temperatures, self.precision
        )
        crops = masks.shape[0] * masks.shape[1]  # 2 B, with those that are not masked
        patch, masked = patch / crops, jnp.sum(out.row_weights) / crops
        spread = koleo.koleo(out.tokens, None, self.koleo_group or len(masks), self.precision)
        loss = jnp.mean(per_crop) + patch + self.koleo_weight * spread
        aux = {
            "loss": loss, "per_crop": per_crop, "patch": patch, "koleo": spread, "statistics": statistics,
            # Their number differs between microbatches: sums, of which `update` takes the mean over masked crops.
            "masked": masked, "patch_statistics": jax.tree.map(lambda each: masked * each, patch_statistics),
            "token": prototypes.mean_direction(out.teacher_tokens), "unit": jnp.mean(out.teacher.units, axis=(0, 1)),
        }  # fmt: skip
        if self.targets == "centering":
            rows = jnp.sum(out.row_weights > 0).astype(self.precision.wide)
            mean = prototypes.mean_output(out.patch_teacher, self.precision, out.row_weights)
            aux["output"] = prototypes.mean_output(out.teacher, self.precision)
            aux |= {"rows": rows, "patch_output": rows * mean}
        return loss, jax.lax.stop_gradient(aux)

    def biases(self, out: Outputs, state: dict[str, jax.Array], temperature) -> tuple[jax.Array, jax.Array]:
        """What is added to the teacher's logits / `temperature` of class tokens and of patches before the softmax: [K]
        each."""
        if self.targets == "centering":
            return -state["center"] / temperature, -state["patch_center"] / temperature
        return tuple(
            sinkhorn_bias(each.units, each.weights, row_weights, temperature, self.precision)
            for each, row_weights in ((out.teacher, None), (out.patch_teacher, out.row_weights))
        )

    def update(self, state: dict[str, jax.Array], aux: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The new centers and the metrics, from the `aux` of the whole batch."""
        metrics = watching.metrics(aux)
        if self.targets == "centering":
            means = {"center": aux["output"], "patch_center": aux["patch_output"] / jnp.maximum(aux["rows"], 1)}
            m = self.center_momentum
            state = {name: m * state[name] + (1 - m) * mean for name, mean in means.items()}
            metrics["teacher/center_norm"] = jnp.linalg.norm(state["center"])
            metrics["teacher/patch_center_norm"] = jnp.linalg.norm(state["patch_center"])
        return state, metrics

    def outputs(self, params, teacher, views, masks, drop_path) -> Outputs:
        """Both networks' outputs; arguments as in `loss_on_views`."""
        indices, row_weights = ibot_masks.index_buffer(
            masks, self.masks.group, self.masks.bound, self.precision.wide
        )  # [G, M] each

        def encode(tree, name, **settings):
            encoded = self.encoder.apply({"params": tree["backbone"]}, views[name], **settings)
            tokens = rearrange(encoded["class_token"], "(b v) d -> b v d", v=self.crops[name].number)
            if name != "global":
                return tokens, None
            return tokens, ibot_masks.masked_tokens(encoded["patch_tokens"], masks, indices)  # [G, M, width]

        # The teacher finishes before the student stores activations for its backward pass.
        taught = encode(teacher, "global")
        (teacher_tokens, teacher_patches), views = jax.lax.optimization_barrier((taught, views))
        replaced = rearrange(masks, "b v l -> (b v) l") != 0
        drops, token = drop_path or dict.fromkeys(self.crops), params["mask_token"]
        tokens, patches = encode(params, "global", mask_token=token, replaced=replaced, drop_path=drops["global"])
        every = [tokens]  # [B, V of the crop type, width]
        if "local" in self.crops:
            every.append(encode(params, "local", drop_path=drops["local"])[0])

        def head(tree, tokens):
            return Prototypes(*self.prototype_head.apply({"params": tree["prototype_head"]}, tokens))

        def patch_head(tree, tokens):
            if self.patch_prototype_head is None:
                return head(tree, tokens)
            return Prototypes(*self.patch_prototype_head.apply({"params": tree["patch_prototype_head"]}, tokens))

        of_teacher = (head(teacher, teacher_tokens), patch_head(teacher, teacher_patches), teacher_tokens)
        teacher_out, patch_teacher, teacher_tokens = jax.lax.stop_gradient(of_teacher)
        student_out = head(params, jnp.concatenate(every, axis=1))
        patch_student = patch_head(params, patches)
        return Outputs(student_out, teacher_out, patch_student, patch_teacher, row_weights, tokens, teacher_tokens)

    def preview(self, networks, batch, rngs, channels):
        return preview.preview(self, networks, batch, rngs, channels)
