"""The names of the arrays in the state dictionary of the official program, `SSLMetaArch`."""

from typing import Any

from pera_jax.formats.tables import Entry, backbone, head


def entries(objective: Any) -> list[Entry]:
    """The arrays of a `DINOv2`; paths start with `params` (the student), `teacher` or `objective` (its state)."""
    names = {"prototype_head": "dino_head", "patch_prototype_head": "ibot_head"}
    encoder, result = objective.encoder, []
    for network, root in (("student", "params"), ("teacher", "teacher")):
        scaled = bool(encoder.layer_scale)
        prefix = f"{network}.backbone."
        result += backbone(prefix, (root, "backbone"), encoder.depth, encoder.split, layer_scale=scaled)
        result += [Entry(f"{prefix}mask_token", (root, "mask_token"), "d", "1 d")]
        for ours in objective.teacher_keys:
            if ours in names:
                name = f"{network}.{names[ours]}"
                result += head(f"{name}.mlp", f"{name}.last_layer", (root, ours))
    if objective.targets == "centering":
        result += [
            Entry("dino_loss.center", ("objective", "center"), "k", "1 k"),
            Entry("ibot_patch_loss.center", ("objective", "patch_center"), "k", "1 1 k"),
        ]
    return result
