"""The state dictionaries of the official programs of DINO, MAE and MoCo v3: names and sizes."""

import re
from collections.abc import Mapping
from typing import Any

from pera_jax.formats import tables
from pera_jax.models import positions
from pera_jax.objectives.declared import Official


class Dino(Official):
    """The checkpoint of facebookresearch/dino: `student` (without `module.`), `teacher` and `dino_loss`, one prefix
    each."""

    backbone = "student.backbone."

    def entries(self, objective: Any) -> list[tables.Entry]:
        entries = [tables.Entry("dino_loss.center", ("objective", "center"), "k", "1 k")]
        for network, root in (("student", "params"), ("teacher", "teacher")):
            prefix, head = f"{network}.backbone.", f"{network}.head"
            entries += tables.backbone(prefix, (root, "backbone"), objective.encoder.depth, objective.encoder.split)
            entries += tables.head(f"{head}.mlp", f"{head}.last_layer", (root, "prototype_head"))
        return entries

    def set_sizes(self, config: Any, arrays: Mapping[str, Any]) -> list[str]:
        config.dino.heads.update(tables.head_sizes("student.head.mlp", "student.head.last_layer", arrays))
        gains = (arrays.get(f"{network}.head.last_layer.weight_g") for network in ("student", "teacher"))
        config.dino.norm_last_layer = all(gain is None or bool((gain == 1).all()) for gain in gains)
        return []


class Mae(Official):
    """The checkpoint of facebookresearch/mae, whose arrays have no prefix."""

    backbone = ""

    def entries(self, objective: Any) -> list[tables.Entry]:
        encoder, path = objective.encoder, ("params", "decoder")
        entries = tables.backbone("", ("params", "backbone"), encoder.depth, encoder.split, positions=False)
        entries.append(tables.Entry("mask_token", (*path, "mask_token"), "d", "1 1 d"))
        entries += tables.linear("decoder_embed", (*path, "embedding"))
        for number in range(objective.decoder.depth):
            block = tables.block(f"decoder_blocks.{number}", (*path, "blocks"), heads=objective.decoder.heads)
            entries += tables.stacked(block, number)
        entries += tables.norm("decoder_norm", (*path, "norm"))
        return entries + tables.linear("decoder_pred", (*path, "prediction"))

    def constants(self, objective: Any) -> dict[str, Any]:
        encoder, decoder = objective.encoder, objective.decoder
        sizes = {"pos_embed": encoder.width, "decoder_pos_embed": decoder.width}
        return {name: positions.sincos("sincos_xy", decoder.side, width)[None] for name, width in sizes.items()}

    def set_sizes(self, config: Any, arrays: Mapping[str, Any]) -> list[str]:
        sizes, blocks = config.mae.decoder, re.compile(r"decoder_blocks\.(\d+)\.")
        sizes.width = tables.length(arrays, "decoder_embed.weight")
        sizes.depth = len({found[1] for found in map(blocks.match, arrays) if found}) or 1
        sizes.heads = 16 if sizes.width % 16 == 0 else max(sizes.width // 32, 1)
        return [f"mae.decoder.heads={sizes.heads}, which the file does not say; change it with --set"]


class MoCoV3(Official):
    """The `state_dict` of facebookresearch/moco-v3, without `module.`."""

    backbone = "base_encoder."
    unused = r"\.(running_mean|running_var|num_batches_tracked)$"  # of batch norms, which use those of the batch

    def entries(self, objective: Any) -> list[tables.Entry]:
        depth, split = objective.encoder.depth, objective.encoder.split
        entries = tables.batch_norm_mlp("predictor", ("params", "predictor"), len(objective.predictor.widths))
        for prefix, root in (("base_encoder.", "params"), ("momentum_encoder.", "teacher")):
            entries += tables.backbone(prefix, (root, "backbone"), depth, split, positions=False)
            entries += tables.batch_norm_mlp(f"{prefix}head", (root, "projector"), len(objective.projector.widths))
        return entries

    def constants(self, objective: Any) -> dict[str, Any]:
        encoder = objective.encoder
        table = positions.sincos("sincos_yx", encoder.image_size // encoder.patch, encoder.width)[None]
        return {f"{network}.pos_embed": table for network in ("base_encoder", "momentum_encoder")}

    def set_sizes(self, config: Any, arrays: Mapping[str, Any]) -> list[str]:
        config.mocov3.heads.hidden = tables.length(arrays, "base_encoder.head.0.weight")
        config.mocov3.heads.outputs = tables.length(arrays, "base_encoder.head.6.weight")
        return []
