"""MAE's part of `check_reference`: numbers of facebookresearch/mae."""

import dataclasses
from typing import Any

import numpy as np
from references import base

from pera_jax import config as configs
from pera_jax.bands import Bands
from pera_jax.objectives import mae


class Reference(base.Reference):
    def __init__(self, arrays: dict[str, np.ndarray], meta: dict[str, Any], precision: str):
        self.arrays, self.meta = arrays, meta
        cfg = meta["cfg"]
        self.batch, bands = cfg["b"], arrays["step0/in/images"].shape[1]
        config = configs.default("mae")
        config.precision, config.parameter_precision = precision, precision
        config.batch_size, config.crops.global_size = cfg["b"], cfg["size"]
        config.model.update(dict(width=cfg["dim"], depth=cfg["depth"], heads=cfg["heads"], patch=cfg["patch"]))
        config.model.mlp_ratio = arrays["init/blocks.0.mlp.fc1.weight"].shape[0] / cfg["dim"]
        config.mae.removed, config.mae.norm_targets = cfg["mask_ratio"], cfg["norm_pix_loss"]
        config.mae.decoder.update(dict(width=cfg["dec_dim"], depth=cfg["dec_depth"], heads=cfg["dec_heads"]))
        config.optimizer.eps = cfg["eps"]
        self.config = config
        plain = Bands.plain([f"band_{number}" for number in range(bands)], mean=0.0, std=1.0)
        self.objective = mae.MAE.from_config(config, plain)
        self.other_targets = dataclasses.replace(self.objective, norm_targets=not self.objective.norm_targets)

    def examples(self, n):
        order = np.argsort(self.arrays[f"step{n}/mask/order"], axis=1).astype(np.int32)
        kept, removed = np.split(order, [self.objective.kept], axis=1)
        images = self.arrays[f"step{n}/in/images"].transpose(0, 2, 3, 1).astype(self.objective.precision.wide)
        # The file lists tokens in raster order.
        return {"images": images, "order": np.concatenate([np.sort(kept, axis=1), np.sort(removed, axis=1)], axis=1)}

    def scalars(self, n):
        return {"learning_rate": self.meta["cfg"]["lrs"][n], "weight_decay": self.meta["cfg"]["wds"][n]}

    def loss(self, params, teacher, state, examples, scalars):
        return self.objective.loss_on_views(params, examples["images"], examples["order"])

    def outputs(self, params, teacher, state, examples, scalars):
        images, order = examples["images"], examples["order"]
        kept = order[:, : self.objective.kept]
        encoded = self.objective.encoder.apply({"params": params["backbone"]}, images, kept)
        return {
            "student/latent_cls": encoded["class_token"], "student/latent_kept": encoded["patch_tokens"],
            "student/pred": self.objective.outputs_on_views(params, images, order)[0],
            "loss/other_targets": self.other_targets.loss_on_views(params, images, order)[0],
        }  # fmt: skip

    def arranged(self, n, name, ours):
        """The program predicts the removed patches only: of the others, the file's own prediction."""
        if name != "student/pred":
            return ours
        whole, removed = self.arrays[f"step{n}/{name}"].copy(), self.examples(n)["order"][:, self.objective.kept :]
        np.put_along_axis(whole, removed[:, :, None], ours, axis=1)
        return whole
