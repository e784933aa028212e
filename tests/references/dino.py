"""DINO's part of `check_reference`: numbers of the official program."""

from typing import Any

import numpy as np
from einops import rearrange
from references import base

from pera_jax import config as configs
from pera_jax.bands import RGB, Bands
from pera_jax.objectives import dino


class Reference(base.Reference):
    def __init__(self, arrays: dict[str, np.ndarray], meta: dict[str, Any], precision: str):
        self.arrays, self.meta = arrays, meta
        cfg = meta["cfg"]
        self.batch = cfg["b"]
        config = configs.default("dino")
        config.precision, config.parameter_precision = precision, precision
        config.model.update(dict(width=cfg["dim"], depth=cfg["depth"], heads=cfg["heads"], patch=cfg["patch"]))
        config.model.mlp_ratio = arrays["init/student.backbone.blocks.0.mlp.fc1.weight"].shape[0] / cfg["dim"]
        config.dino.heads.update(dict(hidden=cfg["hid"], bottleneck=cfg["bot"], prototypes=cfg["k"]))
        config.dino.norm_last_layer = cfg["norm_last_layer"]
        config.crops.update(dict(global_size=cfg["size"], local_size=cfg["local"], local_number=cfg["nl"]))
        config.optimizer.eps = cfg["eps"]
        base.set_clip(config.optimizer, cfg["clip"])
        config.drop_path.rate = 0.0
        self.config = config
        bands = arrays["step0/in/global_crops"].shape[1]
        self.objective = dino.Dino.from_config(config, Bands.plain(RGB[:bands], mean=0.0, std=1.0))

    def objective_state(self, prefix):
        return {"center": self.arrays[f"{prefix}dino_loss.center"].reshape(-1)}

    def examples(self, n):
        """The file orders rows crop by crop; the program image by image."""
        wide = self.objective.precision.wide
        return {
            kind: rearrange(self.arrays[f"step{n}/in/{kind}_crops"], "(v b) c h w -> b v h w c", v=spec.number)
            .astype(wide) for kind, spec in self.objective.crops.items()
        }  # fmt: skip

    def scalars(self, n):
        cfg = self.meta["cfg"]
        return {
            "learning_rate": cfg["lrs"][n], "weight_decay": cfg["wds"][n], "one_minus_momentum": 1 - cfg["momenta"][n],
            "teacher_temperature": cfg["temps"][n], "student_temperature": 0.1,
            dino.TRAINED: float(cfg["epochs"][n] >= cfg["freeze_last_layer"]),
        }  # fmt: skip

    def views(self, examples):
        return {kind: rearrange(crops, "b v ... -> (b v) ...") for kind, crops in examples.items()}

    def loss(self, params, teacher, state, examples, scalars):
        return self.objective.loss_on_views(params, teacher, state, self.views(examples), None, scalars)

    def outputs(self, params, teacher, state, examples, scalars):
        objective = self.objective
        student_out, teacher_out, _ = objective.outputs(params, teacher, self.views(examples), None)
        return {
            f"{network}/output": objective.precision.logits(out.units, out.weights)  # [B, V, K]
            for network, out in (("student", student_out), ("teacher", teacher_out))
        }

    def arranged(self, n, name, ours):
        return rearrange(ours, "b v k -> (v b) k")
