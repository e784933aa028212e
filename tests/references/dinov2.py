"""DINOv2's part of `check_reference`: numbers of the official program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from references import base

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import RGB, Bands

CENTERS = {"center": "dino_loss", "patch_center": "ibot_patch_loss"}


class Reference(base.Reference):
    def __init__(self, arrays: dict[str, np.ndarray], meta: dict[str, Any], precision: str):
        self.arrays, self.meta = dict(arrays), meta
        cfg = meta["cfg"]
        self.batch, self.numbers = cfg["b"], {"global": 2, "local": cfg["nl"]}
        config = configs.default("dinov2")
        config.precision, config.parameter_precision = precision, precision
        config.model.update(dict(width=cfg["dim"], depth=cfg["depth"], heads=cfg["heads"], patch=cfg["patch"]))
        hidden = arrays["init/student.backbone.blocks.0.mlp.fc1.weight"].shape[0]
        config.model.mlp_ratio = hidden / cfg["dim"]
        config.crops.update(dict(global_size=cfg["size"], local_size=cfg["local"], local_number=cfg["nl"]))
        sizes = dict(hidden=cfg["hid"], bottleneck=cfg["bot"], prototypes=cfg["k"], patch_prototypes=cfg["ibot_k"])
        config.dinov2.heads.update(sizes)
        config.dinov2.separate_heads = cfg["separate_head"]
        config.dinov2.layer_scale *= "init/student.backbone.blocks.0.ls1.gamma" in arrays
        config.dinov2.targets = {"sinkhorn_knopp": "sinkhorn"}.get(cfg["centering"], cfg["centering"])
        config.dinov2.loss.koleo_group = 0
        # The file's masks were drawn for the whole batch: each image is a group, with room for every mask.
        config.dinov2.update(dict(mask_group=1, mask_probability=1.0, mask_ratio=(1.0, 1.0)))
        config.optimizer.update(dict(eps=cfg["eps"], layer_decay=cfg["layerwise_decay"]))
        base.set_clip(config.optimizer, cfg["clip"])
        config.optimizer.rate_factors = ((r"patch_projection", cfg["patch_embed_lr_mult"]),)
        self.config = config
        bands = arrays["step0/in/global_crops"].shape[1]
        self.objective = objectives.from_config(config, Bands.plain(RGB[:bands], mean=0.0, std=1.0))
        for name in self.objective.init_state():
            for n in range(self.number_of_steps):
                self.arrays[f"step{n}/{name}_before"] = arrays[f"step{n}/center_before/{CENTERS[name]}"]

    def batch_major(self, array: np.ndarray, kind: str) -> np.ndarray:
        """The file orders rows crop by crop; the program sample by sample."""
        return rearrange(array, "(v b) ... -> b v ...", v=self.numbers[kind])

    def masks(self, n: int) -> np.ndarray:
        """uint8 [B, 2, L]."""
        return self.batch_major(self.arrays[f"step{n}/mask/collated_masks"], "global").astype(np.uint8)

    def objective_state(self, prefix):
        names = self.objective.init_state()
        return {name: self.arrays[f"{prefix}{CENTERS[name]}.center"].reshape(-1) for name in names}

    def examples(self, n):
        wide, kinds = self.objective.precision.wide, [kind for kind, number in self.numbers.items() if number]
        crops = {kind: self.batch_major(self.arrays[f"step{n}/in/{kind}_crops"], kind) for kind in kinds}
        views = {kind: rearrange(each, "b v c h w -> b v h w c").astype(wide) for kind, each in crops.items()}
        return views | {"masks": self.masks(n)}

    def scalars(self, n):
        cfg = self.meta["cfg"]
        return {
            "learning_rate": cfg["lrs"][n], "weight_decay": cfg["wds"][n], "one_minus_momentum": 1 - cfg["momenta"][n],
            "teacher_temperature": cfg["temps"][n], "student_temperature": 0.1,
            "last_layer": cfg["last_layer_lrs"][n] / cfg["lrs"][n],
        }  # fmt: skip

    def views(self, examples) -> dict[str, jax.Array]:
        return {name: rearrange(each, "b v ... -> (b v) ...") for name, each in examples.items() if name != "masks"}

    def loss(self, params, teacher, state, examples, scalars):
        views = self.views(examples)
        return self.objective.loss_on_views(params, teacher, state, views, examples["masks"], None, scalars)

    def outputs(self, params, teacher, state, examples, scalars):
        out = self.objective.outputs(params, teacher, self.views(examples), examples["masks"], None)
        every = out.student, out.teacher, out.patch_student, out.patch_teacher
        student, teacher, *patches = (self.objective.precision.logits(each.units, each.weights) for each in every)
        result = {"student/global_cls_tokens": student[:, :2], "teacher/global_cls_tokens": teacher}
        result |= {"student/local_cls_tokens": student[:, 2:]} if self.numbers["local"] else {}
        for network, each in zip(("student", "teacher"), patches, strict=True):
            result[f"{network}/masked_patch_tokens"] = jnp.where(out.row_weights[:, :, None] > 0, each, jnp.nan)
        return result

    def arranged(self, n, name, ours):
        if name.endswith("cls_tokens"):
            return rearrange(ours, "b v k -> (v b) k")
        # Rows are ordered by image, then crop; those of the file by crop, then image.
        masks, held = self.masks(n), ~np.isnan(ours[:, :, 0])
        image, crop, _ = np.nonzero(masks)
        return ours[held][np.argsort(crop, kind="stable")]

    def losses(self, metrics):
        return {
            "total": metrics["loss"], "dino_global_crops_loss": metrics["loss/class_global"],
            "dino_local_crops_loss": metrics["loss/class_local"], "ibot_loss": metrics["loss/patch"] / 2,
            "koleo_loss": 0.1 * metrics["loss/koleo"] / 2,
        }  # fmt: skip
