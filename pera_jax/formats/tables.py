"""Tables of parameter names and layouts that convert between PyTorch vision transformers and Flax, in both directions.

PyTorch (`theirs`): linear layers [out, in], convolutions [out, in, height, width], rows of qkv in the order (3, heads,
head dimension), one set of arrays per block. Flax (`ours`): kernels [in, ...out], blocks stacked along a leading axis
in `lower` and `upper`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange

from pera_jax.common.errors import Misfit, UserError
from pera_jax.common.text import every, several


@dataclasses.dataclass(frozen=True)
class Entry:
    """The array called `name` is `path` in our tree, [`index`] of the stack, rearranged by `ours -> theirs`; `heads`
    if it has another number of them than the backbone."""

    name: str
    path: tuple[str, ...]
    ours: str
    theirs: str
    index: int | None = None
    heads: int | None = None


def linear(name: str, path: tuple[str, ...]) -> list[Entry]:
    return [Entry(f"{name}.weight", (*path, "kernel"), "i o", "o i"), Entry(f"{name}.bias", (*path, "bias"), "o", "o")]


def norm(name: str, path: tuple[str, ...]) -> list[Entry]:
    return [Entry(f"{name}.weight", (*path, "scale"), "d", "d"), Entry(f"{name}.bias", (*path, "bias"), "d", "d")]


def block(name: str, path: tuple[str, ...], layer_scale: bool = False, heads: int | None = None) -> list[Entry]:
    """The entries of one block, in a stack at `path`; `layer_scale`: whether it has LayerScale; `heads`: if these are
    not as many as in the backbone."""
    gains = [Entry(f"{name}.ls{i}.gamma", (*path, f"layer_scale_{i}"), "d", "d") for i in (1, 2)]
    entries = (gains if layer_scale else []) + [
        *norm(f"{name}.norm1", (*path, "norm_1")),
        Entry(f"{name}.attn.qkv.weight", (*path, "attention", "qkv", "kernel"), "d t h e", "(t h e) d"),
        Entry(f"{name}.attn.qkv.bias", (*path, "attention", "qkv", "bias"), "t h e", "(t h e)"),
        Entry(f"{name}.attn.proj.weight", (*path, "attention", "projection", "kernel"), "h e d", "d (h e)"),
        Entry(f"{name}.attn.proj.bias", (*path, "attention", "projection", "bias"), "d", "d"),
        *norm(f"{name}.norm2", (*path, "norm_2")),
        *linear(f"{name}.mlp.fc1", (*path, "mlp", "in")),
        *linear(f"{name}.mlp.fc2", (*path, "mlp", "out")),
    ]
    return [dataclasses.replace(entry, heads=heads) for entry in entries]


def batch_norm_mlp(name: str, path: tuple[str, ...], layers: int) -> list[Entry]:
    """The entries of a `BatchNormMlp`, whose names are numbered in the order linear, batch norm, ReLU, linear, ..."""
    table = [
        Entry(f"{name}.{3 * n}.weight", (*path, f"linear_{n + 1}", "kernel"), "i o", "o i") for n in range(layers)
    ]
    for n in range(layers - 1):  # the last batch norm has no arrays
        table += norm(f"{name}.{3 * n + 1}", (*path, f"norm_{n + 1}"))
    return table


def backbone(
    prefix: str, path: tuple[str, ...], depth: int, split: int, *, layer_scale: bool = False, positions: bool = True
) -> list[Entry]:
    """The entries of a ViT of `depth` blocks, `split` of them in the stack `lower`; names start with `prefix`.

    Args:
      positions: whether the position embedding is a parameter.
    """
    learned = Entry(f"{prefix}pos_embed", (*path, "position_embedding"), "l d", "1 l d")
    table = [
        Entry(f"{prefix}cls_token", (*path, "class_token"), "d", "1 1 d"),
        *([learned] if positions else []),
        Entry(f"{prefix}patch_embed.proj.weight", (*path, "patch_projection", "kernel"), "(p q c) d", "d c p q"),
        Entry(f"{prefix}patch_embed.proj.bias", (*path, "patch_projection", "bias"), "d", "d"),
        *norm(f"{prefix}norm", (*path, "norm")),
    ]
    for number in range(depth):
        stack, index = ("lower", number) if number < split else ("upper", number - split)
        table += stacked(block(f"{prefix}blocks.{number}", (*path, stack), layer_scale), index)
    return table


def head(mlp: str, last: str, path: tuple[str, ...]) -> list[Entry]:
    """The entries of a `Head` with an MLP named `mlp` and a weight-normalized last layer named `last`."""
    layers = zip((0, 2, 4), ("hidden_1", "hidden_2", "bottleneck"), strict=True)
    return [
        *(entry for number, layer in layers for entry in linear(f"{mlp}.{number}", (*path, layer))),
        Entry(f"{last}.weight_v", (*path, "direction"), "k d", "k d"),
        Entry(f"{last}.weight_g", (*path, "gain"), "k", "k 1"),
    ]


def head_sizes(mlp: str, last: str, arrays: Mapping[str, Any]) -> dict[str, int]:
    """`hidden`, `bottleneck` and `prototypes` of a `head`, from the shapes of arrays by name. Raises UserError."""
    names = {"hidden": f"{mlp}.0.weight", "bottleneck": f"{mlp}.4.weight", "prototypes": f"{last}.weight_v"}
    return {field: length(arrays, name) for field, name in names.items()}


def length(arrays: Mapping[str, Any], name: str) -> int:
    """The first side of an array, at least 1. Raises UserError if it is missing."""
    if name not in arrays:
        raise UserError(f"the file lacks the array {name}, which gives a size of the network; get a complete file")
    return (*arrays[name].shape, 1)[0] or 1


def stacked(entries: list[Entry], index: int) -> list[Entry]:
    """The entries as the number `index` of a stack."""
    return [dataclasses.replace(entry, index=index) for entry in entries]


# ---------------------------------------------------------------- conversion


def _sizes(heads: int, patch: int) -> dict[str, int]:
    return {"t": 3, "h": heads, "p": patch, "q": patch}


def _rearrange(array, before: str, after: str, sizes: dict[str, int]):
    named = {axis: size for axis, size in sizes.items() if axis in before.replace("(", " ").replace(")", " ").split()}
    return rearrange(array, f"{before} -> {after}", **named)


def to_named(tree: dict[str, Any], entries: list[Entry], heads: int, patch: int) -> dict[str, Any]:
    """Converts our tree to arrays by name; skips entries whose root (such as `params`, `teacher`) is not in `tree`."""
    result = {}
    for entry in entries:
        if entry.path[0] in tree:
            leaf = tree
            for key in entry.path:
                leaf = leaf[key]
            leaf = leaf if entry.index is None else leaf[entry.index]
            result[entry.name] = _rearrange(leaf, entry.ours, entry.theirs, _sizes(entry.heads or heads, patch))
    return result


def from_named(arrays: dict[str, np.ndarray], entries: list[Entry], heads: int, patch: int) -> dict[str, Any]:
    """Converts arrays by name to our tree with stacked blocks; every entry must be present."""
    stacks: dict[tuple[str, ...], dict[int | None, np.ndarray]] = {}
    for entry in entries:
        sizes = _sizes(entry.heads or heads, patch)
        leaf = _rearrange(arrays[entry.name], entry.theirs, entry.ours, sizes)
        stacks.setdefault(entry.path, {})[entry.index] = leaf
    tree: dict[str, Any] = {}
    for path, parts in stacks.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = parts[None] if None in parts else np.stack([parts[i] for i in sorted(parts)])
    return tree


# ---------------------------------------------------------------- checks


def depth_of(names: Iterable[str], prefix: str) -> int:
    """The number of distinct blocks among the names."""
    found = (re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def shape_of(arrays: dict[str, np.ndarray], prefix: str, heads: int | None, what: str) -> dict[str, Any]:
    """The sizes of the ViT whose array names start with `prefix`, as arguments of `vit.build`.

    Args:
      heads: number of attention heads, which no array shape gives; None for width / 64.
      what: the file, for error messages.

    Raises:
      UserError: arrays whose shapes are not those of a ViT; the error names all of them.
    """
    wanted = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    shapes = {name: arrays[prefix + name].shape for name in wanted}
    wrong = [name for name, ndim in wanted.items() if len(shapes[name]) != ndim or 0 in shapes[name]]
    if not wrong:
        width, (hidden, _) = shapes["cls_token"][2], shapes["blocks.0.mlp.fc1.weight"]
        _, bands, patch, other_patch = shapes["patch_embed.proj.weight"]
        grid = math.isqrt(shapes["pos_embed"][1] - 1)
        wrong += ["pos_embed"] * (grid < 1 or 1 + grid**2 != shapes["pos_embed"][1])
        wrong += ["patch_embed.proj.weight"] * (patch != other_patch)
    if wrong:
        listed = several(f"{prefix}{name} {list(shapes[name])}" for name in wrong)
        raise UserError(f"{what} is not a ViT with a class token and square patches in a square grid: {listed}")
    if heads is None and width % 64:
        raise UserError(
            f"the width {width} of {what} is not a multiple of 64, so the number of heads is unknown; give --heads"
        )
    if heads is not None and (heads < 1 or width % heads):
        raise UserError(f"the width {width} of {what} is not a multiple of {heads} heads; give another --heads")
    ratio = hidden / width
    depth = depth_of(arrays, prefix)
    return dict(
        width=width, depth=depth, heads=heads or width // 64, patch=patch, image_size=grid * patch, bands=bands,
        split=depth // 2, mlp_ratio=ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
    )  # fmt: skip


def check_grid(named: dict[str, np.ndarray], size: tuple[int, int] | None, what: str) -> None:
    """Raises UserError if the position embedding is for a non-square grid, given the image `size` (px) in
    config.json."""
    positions, kernel = named.get("pos_embed"), named.get("patch_embed.proj.weight")
    if not size or len(size) != 2 or positions is None or kernel is None or positions.ndim != 3 or kernel.ndim != 4:
        return
    rows, columns = (side // max(patch, 1) for side, patch in zip(size, kernel.shape[2:]))
    if rows != columns and rows * columns == positions.shape[1] - 1:
        raise UserError(
            f"{what} has a position embedding for {rows} x {columns} patches (images of {size[0]} x {size[1]} px in "
            "config.json), but only square grids can be imported; resample it with timm.create_model(..., "
            "img_size=SIDE) first"
        )


def check_sizes(named: dict[str, np.ndarray], expected: dict[str, int], what: str) -> None:
    """Raises UserError if the sizes of a file differ from those in config.json: blocks are missing, or it is another
    network.

    Args:
      expected: any of `depth`, `width`, `patch`, `bands`.
    """
    token, kernel = named.get("cls_token"), named.get("patch_embed.proj.weight")
    held = {"depth": depth_of(named, "")}
    held |= {"width": token.shape[-1]} if token is not None and token.ndim else {}
    held |= dict(zip(("bands", "patch"), kernel.shape[1:3])) if kernel is not None and kernel.ndim == 4 else {}
    wrong = [
        f"expected {name} {expected[name]}, got {size}"
        for name, size in held.items()
        if expected.get(name, size) != size
    ]
    if wrong:
        raise UserError(
            f"{what} does not match config.json beside it ({'; '.join(wrong)}); get a complete file, or move it to a "
            "folder without config.json"
        )


def misfits(arrays: dict[str, np.ndarray], entries: list[Entry]) -> list[str]:
    """Parts of an error message that name every missing array, every unexpected array and every array with NaN or
    inf."""
    names = {entry.name for entry in entries}
    problems = {
        "lacks the arrays": sorted(names - arrays.keys()),
        "has unexpected arrays:": sorted(arrays.keys() - names),
        "has NaN or infinite values in": sorted(name for name, each in arrays.items() if not np.isfinite(each).all()),
    }
    return [f"{verb} {every(found)}" for verb, found in problems.items() if found]


def misshapen(arrays: dict[str, np.ndarray], tree: Any, entries: list[Entry], shape: dict[str, Any]) -> list[str]:
    """A part of an error message that names every array whose shape differs from `tree` (arrays or shapes); [] if none
    does."""
    wanted = jax.eval_shape(lambda tree: to_named(tree, entries, shape["heads"], shape["patch"]), tree)
    wrong = [
        f"{name} (expected {list(wanted[name].shape)}, got {list(arrays[name].shape)})"
        for name in sorted(wanted) if name in arrays and arrays[name].shape != wanted[name].shape
    ]  # fmt: skip
    return [f"has arrays of the wrong shape: {every(wrong)}"] if wrong else []


def check(problems: list[str], what: str) -> None:
    """Raises Misfit with all problems that `misfits` and `misshapen` found in the file `what`."""
    if problems:
        raise Misfit(f"{what} {'; '.join(problems)}")
