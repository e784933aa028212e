"""PerA's part of `check_reference`: numbers of the authors' released program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from references import base

from pera_jax import config as configs
from pera_jax.bands import RGB, Bands
from pera_jax.objectives.pera import masks as masking
from pera_jax.objectives.pera import objective as pera
from pera_jax.objectives.pera.views import Views
from pera_jax.weights import released


class Reference(base.Reference):
    LOSS = 5e-5

    def __init__(self, arrays: dict[str, np.ndarray], meta: dict[str, Any], precision: str):
        self.arrays, self.meta = arrays, meta
        cfg = meta["cfg"]
        self.batch, self.numbers = cfg["b"], {"global": cfg["ng"], "local": cfg["nl"]}
        bands = arrays["step0/in/S_global_crops"].shape[1]
        config = configs.default()
        config.precision, config.parameter_precision = precision, precision
        config.model.update(dict(width=cfg["dim"], depth=cfg["depth"], heads=cfg["heads"], patch=cfg["patch"]))
        hidden = arrays["init/student.backbone.blocks.0.mlp.fc1.weight"].shape[0]
        config.model.mlp_ratio = hidden / cfg["dim"]
        config.pera.heads.update(dict(hidden=cfg["hid"], bottleneck=cfg["bot"], prototypes=cfg["k"]))
        config.crops.update(dict(global_size=cfg["global_size"], local_size=cfg["local_size"]))
        config.crops.update(dict(global_number=cfg["ng"], local_number=cfg["nl"]))
        config.pera.masks.update(dict(student=cfg["s"], teacher=cfg["t"]))
        config.pera.loss.koleo_group = 0
        config.optimizer.clip_norm, config.optimizer.eps = meta["clip"], meta["eps"]
        config.optimizer.beta1, config.optimizer.beta2 = meta["betas"]
        self.config = config
        self.objective = pera.PerA.from_config(config, Bands.plain(RGB[:bands], mean=0.0, std=1.0))

    def entries(self):
        return released.table(self.meta["cfg"]["depth"], self.objective.encoder.split)

    def objective_state(self, prefix):
        name = "step0/center_before" if prefix == "init/" else "final/center"
        return {"center": self.arrays[name].reshape(-1)}

    def batch_major(self, array: np.ndarray, kind: str) -> np.ndarray:
        """The file orders rows crop by crop; the program sample by sample."""
        return rearrange(array, "(v b) ... -> b v ...", v=self.numbers[kind])

    def examples(self, n):
        result = {}
        for kind, number in self.numbers.items():
            if not number:
                continue
            student, teacher = (
                self.batch_major(self.arrays[f"step{n}/in/{name}_{kind}_crops"], kind).transpose(0, 1, 3, 4, 2)
                for name in "ST"
            )
            order = self.batch_major(self.arrays[f"step{n}/mask/{kind}_order"], kind)
            wide = self.objective.precision.wide
            result[kind] = {
                "student": student.astype(wide), "teacher": teacher.astype(wide),
                "order": np.argsort(order, axis=-1).astype(np.int32),
            }  # fmt: skip
        return result

    def scalars(self, n):
        meta = self.meta
        return {
            "learning_rate": meta["lrs"][n], "weight_decay": meta["wds"][n],
            "one_minus_momentum": 1 - meta["momenta"][n],
            "teacher_temperature": meta["temps"][n], "student_temperature": 0.1,
        }  # fmt: skip

    def views(self, examples) -> dict[str, Views]:
        views = {}
        for kind, crops in jax.tree.map(lambda x: rearrange(x, "b v ... -> (b v) ..."), examples).items():
            masks = masking.cut(crops["order"], self.objective.parts[kind])
            # The file lists tokens in raster order.
            views[kind] = Views(crops["student"], crops["teacher"], jax.tree.map(lambda i: jnp.sort(i, axis=1), masks))
        return views

    def loss(self, params, teacher, state, examples, scalars):
        return self.objective.loss_on_views(params, teacher, state, self.views(examples), None, scalars)

    def outputs(self, params, teacher, state, examples, scalars):
        objective, views = self.objective, self.views(examples)
        student_out, teacher_out, predicted, _ = objective.outputs(params, teacher, views, None)
        target = objective.pixel_targets(views["global"])
        result = {"student/global_pred_tokens": predicted, "student/global_patch_target": target}
        for network, out in (("student", student_out), ("teacher", teacher_out)):
            z = objective.precision.logits(out.units, out.weights)  # [B, V, K]
            parts = {"global": z[:, : self.numbers["global"]], "local": z[:, self.numbers["global"] :]}
            result |= {
                f"{network}/{kind}_cls_tokens": part for kind, part in parts.items()
                if f"step0/{network}/{kind}_cls_tokens" in self.arrays
            }  # fmt: skip
        return result

    def arranged(self, n, name, ours):
        if name.endswith("cls_tokens"):
            return rearrange(ours, "b v k -> (v b) k")
        return rearrange(ours, "(b v) ... -> (v b) ...", v=self.numbers["global"])

    def losses(self, metrics):
        globals_ = self.numbers["global"]
        return {
            "total": metrics["loss"], "global_dino_loss": metrics["loss/class_global"],
            "local_dino_loss": metrics["loss/class_local"], "koleo_loss": metrics["loss/koleo"] / globals_,
            "mae_loss": metrics["loss/pixel"] / (100 * globals_),
        }  # fmt: skip
