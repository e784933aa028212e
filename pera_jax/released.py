"""Parameter names and layouts of the authors' PyTorch program (arXiv:2505.19447), as one table read in both directions.

Theirs: linear layers [out, in], convolution [out, in, height, width], qkv rows ordered three, heads, head dimension, one
entry per block. Ours: kernels [in, ...out], blocks stacked along a leading axis in `lower` and `upper`.
"""

import dataclasses
from typing import Any

import numpy as np
from einops import rearrange

from pera_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
    """`name` in the released dictionary is `path` in our tree, [`index`] of the stack, rearranged by `ours -> theirs`."""

    name: str
    path: tuple[str, ...]
    ours: str
    theirs: str
    index: int | None = None


def _linear(name: str, path: tuple[str, ...]) -> list[Entry]:
    return [Entry(f"{name}.weight", (*path, "kernel"), "i o", "o i"), Entry(f"{name}.bias", (*path, "bias"), "o", "o")]


def _norm(name: str, path: tuple[str, ...]) -> list[Entry]:
    return [Entry(f"{name}.weight", (*path, "scale"), "d", "d"), Entry(f"{name}.bias", (*path, "bias"), "d", "d")]


def _block(name: str, path: tuple[str, ...]) -> list[Entry]:
    return [
        *_norm(f"{name}.norm1", (*path, "norm_1")),
        Entry(f"{name}.attn.qkv.weight", (*path, "attention", "qkv", "kernel"), "d t h e", "(t h e) d"),
        Entry(f"{name}.attn.qkv.bias", (*path, "attention", "qkv", "bias"), "t h e", "(t h e)"),
        Entry(f"{name}.attn.proj.weight", (*path, "attention", "projection", "kernel"), "h e d", "d (h e)"),
        Entry(f"{name}.attn.proj.bias", (*path, "attention", "projection", "bias"), "d", "d"),
        *_norm(f"{name}.norm2", (*path, "norm_2")),
        *_linear(f"{name}.mlp.fc1", (*path, "mlp", "in")),
        *_linear(f"{name}.mlp.fc2", (*path, "mlp", "out")),
    ]


def backbone_table(name: str, path: tuple[str, ...], depth: int, split: int) -> list[Entry]:
    """The entries of a ViT of `depth` blocks whose `lower` stack has `split`."""
    table = [
        Entry(f"{name}.cls_token", (*path, "class_token"), "d", "1 1 d"),
        Entry(f"{name}.pos_embed", (*path, "position_embedding"), "l d", "1 l d"),
        Entry(f"{name}.patch_embed.proj.weight", (*path, "patch_projection", "kernel"), "(p q c) d", "d c p q"),
        Entry(f"{name}.patch_embed.proj.bias", (*path, "patch_projection", "bias"), "d", "d"),
        *_norm(f"{name}.norm", (*path, "norm")),
    ]
    for block in range(depth):
        stack, index = ("lower", block) if block < split else ("upper", block - split)
        entries = _block(f"{name}.blocks.{block}", (*path, stack))
        table += [dataclasses.replace(entry, index=index) for entry in entries]
    return table


def head_table(mlp: str, last: str, path: tuple[str, ...]) -> list[Entry]:
    """The entries of a head whose MLP is called `mlp` and whose weight-normalised layer is called `last`."""
    layers = zip((0, 2, 4), ("hidden_1", "hidden_2", "bottleneck"))
    return [
        *(entry for number, layer in layers for entry in _linear(f"{mlp}.{number}", (*path, layer))),
        Entry(f"{last}.weight_v", (*path, "direction"), "k d", "k d"),
        Entry(f"{last}.weight_g", (*path, "gain"), "k", "k 1"),
    ]


def table(depth: int, split: int) -> list[Entry]:
    """Every parameter; paths begin with `params` (the student's) or `teacher`."""
    entries = [Entry("s_mask_token", ("params", "mask_token"), "d", "1 1 d")]
    entries += head_table("pred_head.mlp0.mlp", "pred_head.last_layer", ("params", "pixel_head"))
    for network, root in (("student", "params"), ("teacher", "teacher")):
        entries += backbone_table(f"{network}.backbone", (root, "backbone"), depth, split)
        head = f"{network}.cls_head"
        entries += head_table(f"{head}.mlp", f"{head}.last_layer", (root, "prototype_head"))
    return entries


def _sizes(heads: int, patch: int) -> dict[str, int]:
    return {"t": 3, "h": heads, "p": patch, "q": patch}


def _rearrange(array: np.ndarray, before: str, after: str, sizes: dict[str, int]) -> np.ndarray:
    named = {axis: size for axis, size in sizes.items() if axis in before.replace("(", " ").replace(")", " ").split()}
    return rearrange(np.asarray(array), f"{before} -> {after}", **named)


def to_released(tree: dict[str, Any], entries: list[Entry], heads: int, patch: int) -> dict[str, np.ndarray]:
    """`{"params": ..., "teacher": ...}` -> the released names; entries whose root is not in `tree` are left out."""
    result = {}
    for entry in entries:
        if entry.path[0] in tree:
            leaf = tree
            for key in entry.path:
                leaf = leaf[key]
            leaf = leaf if entry.index is None else leaf[entry.index]
            result[entry.name] = _rearrange(leaf, entry.ours, entry.theirs, _sizes(heads, patch))
    return result


def from_released(arrays: dict[str, np.ndarray], entries: list[Entry], heads: int, patch: int) -> dict[str, Any]:
    """The released names -> `{"params": ..., "teacher": ...}`, blocks stacked.

    Raises:
      UserError: names that are missing.
    """
    missing = [entry.name for entry in entries if entry.name not in arrays]
    if missing:
        raise UserError(f"the released dictionary lacks {', '.join(missing)}")
    stacks: dict[tuple[str, ...], dict[int | None, np.ndarray]] = {}
    for entry in entries:
        leaf = _rearrange(arrays[entry.name], entry.theirs, entry.ours, _sizes(heads, patch))
        stacks.setdefault(entry.path, {})[entry.index] = leaf
    tree: dict[str, Any] = {}
    for path, parts in stacks.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = parts[None] if None in parts else np.stack([parts[i] for i in sorted(parts)])
    return tree
