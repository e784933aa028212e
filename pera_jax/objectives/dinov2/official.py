"""The state dictionary of the official program of DINOv2, `SSLMetaArch`: names and sizes."""

from collections.abc import Mapping
from typing import Any

from pera_jax.formats import tables
from pera_jax.objectives.declared import Official


class SSLMetaArch(Official):
    """`student`, `teacher`; the centers are read with centering only: the official program has them in any case."""

    backbone = "student.backbone."
    unused = r"^(dino_loss|ibot_patch_loss)\.center$"

    def entries(self, objective: Any) -> list[tables.Entry]:
        heads = {"prototype_head": "dino_head", "patch_prototype_head": "ibot_head"}
        encoder, result = objective.encoder, []
        centers = {"center": "dino_loss", "patch_center": "ibot_patch_loss"}
        if objective.targets == "centering":
            shapes = {"center": "1 k", "patch_center": "1 1 k"}
            for ours, name in centers.items():
                result.append(tables.Entry(f"{name}.center", ("objective", ours), "k", shapes[ours]))
        scaled = bool(encoder.layer_scale)
        for network, root in (("student", "params"), ("teacher", "teacher")):
            prefix = f"{network}.backbone."
            result += tables.backbone(prefix, (root, "backbone"), encoder.depth, encoder.split, layer_scale=scaled)
            result.append(tables.Entry(f"{prefix}mask_token", (root, "mask_token"), "d", "1 d"))
            for ours in objective.teacher_keys:
                if ours in heads:
                    name = f"{network}.{heads[ours]}"
                    result += tables.head(f"{name}.mlp", f"{name}.last_layer", (root, ours))
        return result

    def set_sizes(self, config: Any, arrays: Mapping[str, Any]) -> list[str]:
        own, patches = config.dinov2, "student.ibot_head.last_layer.weight_v"
        own.heads.update(tables.head_sizes("student.dino_head.mlp", "student.dino_head.last_layer", arrays))
        own.separate_heads = patches in arrays
        if own.separate_heads:
            own.heads.patch_prototypes = tables.length(arrays, patches)
        if not any(name.endswith(".ls1.gamma") for name in arrays):
            own.layer_scale = 0.0
        return ["dinov2.targets=sinkhorn, which the file does not say; change it with --set"]
