"""MoCo v3's part of `check_reference`: numbers of the authors' program (arXiv:2104.02057)."""

from typing import Any

import numpy as np
from references import base

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import RGB, Bands


class Reference(base.Reference):
    OUTPUT = 1e-4  # statistics of few images make float noise larger
    # Batch norm makes the gradient of the final norm's bias zero but for noise. The teacher's projection is averaged by
    # their program, which changes its last bit; ours stays.
    SKIPPED = (
        "base_encoder.norm.bias", "momentum_encoder.norm.bias", "backbone/norm/bias",
        "momentum_encoder.patch_embed.proj.weight", "momentum_encoder.patch_embed.proj.bias",
    )  # fmt: skip

    def __init__(self, arrays: dict[str, np.ndarray], meta: dict[str, Any], precision: str):
        self.arrays, self.meta = arrays, meta
        cfg = meta["cfg"]
        self.batch = cfg["b"]
        config = configs.default("mocov3")
        config.precision, config.parameter_precision = precision, precision
        config.batch_size = cfg["b"]
        config.model.update(dict(width=cfg["dim"], depth=cfg["depth"], heads=cfg["heads"], patch=cfg["patch"]))
        config.model.mlp_ratio = arrays["init/base_encoder.blocks.0.mlp.fc1.weight"].shape[0] / cfg["dim"]
        config.crops.global_size = cfg["size"]
        config.mocov3.heads.update(dict(hidden=cfg["hid"], outputs=cfg["out"]))
        frozen = "base_encoder.patch_embed.proj.weight" in meta["frozen"]
        config.mocov3.freeze_patch_projection = frozen
        config.optimizer.eps = cfg["eps"]
        self.config = config
        bands = arrays["step0/in/x1"].shape[1]
        self.objective = objectives.from_config(config, Bands.plain(RGB[:bands], mean=0.0, std=1.0))

    def examples(self, n):
        views = np.stack([self.arrays[f"step{n}/in/x{v}"] for v in (1, 2)], axis=1)  # [B, 2, C, H, W]
        return views.transpose(0, 1, 3, 4, 2).astype(self.objective.precision.wide)

    def scalars(self, n):
        cfg = self.meta["cfg"]
        return {
            "temperature": cfg["t"], "learning_rate": cfg["lrs"][n], "weight_decay": cfg["wds"][n],
            # Their program moves the teacher at the start of the next step, with that step's momentum.
            "one_minus_momentum": 1 - cfg["momenta"][n + 1],
        }  # fmt: skip

    def loss(self, params, teacher, state, examples, scalars):
        return self.objective.loss_on_views(params, teacher, self._views(examples), scalars)

    def outputs(self, params, teacher, state, examples, scalars):
        views = self._views(examples)
        projected, keys = (self.objective.projections(net, views)[1] for net in (params, teacher))
        predicted = self.objective.predictor.apply({"params": params["predictor"]}, projected)
        found = {"student/projected": projected, "student/q": predicted, "teacher/k": keys}  # [B, 2, D] each
        return {f"{name}{v + 1}": value[:, v] for name, value in found.items() for v in (0, 1)}

    def losses(self, metrics):
        return {"total": metrics["loss"], "q1_k2": metrics["loss/view_1"], "q2_k1": metrics["loss/view_2"]}

    @staticmethod
    def _views(examples):
        return examples.reshape(-1, *examples.shape[2:])  # [B 2, H, W, C]
