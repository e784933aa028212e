"""The names of the arrays in the state dictionary of the official program, `SSLMetaArch`."""

from typing import Any

from pera_jax.formats.tables import Entry, backbone, linear


def entries(objective: Any) -> list[Entry]:
    """The arrays of a `DINOv2`; paths start with `params` (the student) or `teacher`."""
    heads = {"prototype_head": "dino_head"}
    if objective.patch_prototype_head is not None:
        heads["patch_prototype_head"] = "ibot_head"
    encoder, result = objective.encoder, []
    for network, root in (("student", "params"), ("teacher", "teacher")):
        scaled = bool(encoder.layer_scale)
        prefix = f"{network}.backbone."
        result += backbone(prefix, (root, "backbone"), encoder.depth, encoder.split, layer_scale=scaled)
        result += [Entry(f"{prefix}mask_token", (root, "mask_token"), "d", "1 d")]
        for ours, theirs in heads.items():
            result += _head(f"{network}.{theirs}", (root, ours))
    return result


def _head(name: str, path: tuple[str, ...]) -> list[Entry]:
    layers = zip((0, 2, 4), ("hidden_1", "hidden_2", "bottleneck"), strict=True)
    return [
        *(entry for number, layer in layers for entry in linear(f"{name}.mlp.{number}", (*path, layer))),
        Entry(f"{name}.last_layer.weight_g", (*path, "gain"), "k", "k 1"),
        Entry(f"{name}.last_layer.weight_v", (*path, "direction"), "k d", "k d"),
    ]
