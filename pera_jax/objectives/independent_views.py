"""Views of independent crops: each crop of an image is changed in color, blurred and solarized by draws of its own.

Those of DINO (arXiv:2104.14294), DINOv2 (arXiv:2304.07193) and MoCo v3 (arXiv:2104.02057): the geometry of a crop is
the host's, the operations are those of `augment.photometric`, with probabilities that depend on the view.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float, Key, Real

from pera_jax.augment import photometric
from pera_jax.augment.photometric import Photometric, PhotometricSpec
from pera_jax.bands import Bands, as_bytes
from pera_jax.objectives.base import CropSpec
from pera_jax.parallel import sharding

# By crop type: a spec for each crop of the type, or one for all of them.
Specs = dict[str, tuple[PhotometricSpec, ...]]


def fields(blur: float, solarize: float) -> dict[str, Any]:
    """The fields of a view's config group, with the probabilities of blur and solarize; all else is the same in all
    views of DINO, DINOv2 and MoCo v3."""
    return dict(
        jitter=0.8, grayscale=0.2, blur=blur, solarize=solarize,
        brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, sigma=(0.1, 2.0),
    )  # fmt: skip


def specs_from(settings: Any, views: Mapping[str, Sequence[str]], kernel: str = "boxes") -> Specs:
    """The specs of config groups.

    Args:
      settings: the groups by name of the view, such as `config.dino.views`.
      views: by crop type, the names of the views of its crops, such as {"global": ("global_1", "global_2"), "local":
        ("local",)}; a single name is that of all crops of the type.
      kernel: of the blur, see `photometric.PhotometricSpec`.
    """
    return {
        kind: tuple(photometric.spec_from(settings[name], kernel) for name in names) for kind, names in views.items()
    }


def check(settings: Any, field: str, rgb: Sequence[str], names: Sequence[str]) -> None:
    """Checks the config groups of all views.

    Args:
      settings: the groups by name of the view. field: theirs, such as "dino.views".
      rgb: `config.data.rgb`; names: of the bands.

    Raises:
      UserError: as in `photometric.check`.
    """
    for view in settings:
        photometric.check(photometric.spec_from(settings[view]), f"{field}.{view}", rgb, names)


def draw(
    key: Key[jax.Array, ""], number: int, crops: Mapping[str, CropSpec], specs: Specs
) -> dict[str, Photometric]:
    """All random draws for the crops of `number` images, by crop type; leaves are [B, V, ...].

    Raises:
      ValueError: neither one spec for all crops of a type nor one for each.
    """
    draws = {}
    for index, (kind, crop) in enumerate(crops.items()):
        chosen, kind_key = specs[kind], jax.random.fold_in(key, index)
        if len(chosen) == 1:
            together = photometric.draw(kind_key, number * crop.number, chosen[0])  # leaves [B V, ...]
            draws[kind] = jax.tree.map(lambda x: rearrange(x, "(b v) ... -> b v ...", b=number), together)
            continue
        if len(chosen) != crop.number:
            raise ValueError(f"{crop.number} {kind} crops, but {len(chosen)} specs of their views")
        drawn = [photometric.draw(jax.random.fold_in(kind_key, v), number, spec) for v, spec in enumerate(chosen)]
        draws[kind] = jax.tree.map(_stacked, *drawn)
    return draws


def _stacked(*leaves: jax.Array) -> jax.Array:
    """V leaves [B, ...] -> [B, V, ...]; the blur's weights, of which there are fewer for a shorter reach, are padded
    with zeros."""
    if leaves[0].ndim == 1:
        return jnp.stack(leaves, axis=1)
    longest = max(leaf.shape[1] for leaf in leaves)
    return jnp.stack([jnp.pad(leaf, ((0, 0), (0, longest - leaf.shape[1]))) for leaf in leaves], axis=1)


def make(
    crops: Mapping[str, Real[jax.Array | np.ndarray, "B _V _H _W C"]],
    draws: Mapping[str, Photometric],
    bands: Bands,
    rgb: tuple[int, int, int] | None,
    dtype: Any,
) -> dict[str, Float[jax.Array, "_BV _H _W C"]]:
    """The normalized views by crop type, in `dtype`, from crops in the stored dtype; batch-major: crop v of image b is
    row `b * V + v`."""

    def view(crops, drawn):
        return photometric.apply(crops, drawn, bands, rgb, dtype)  # [B V, H, W, C]

    result = {}
    for kind, drawn in draws.items():
        flat, rows = jax.tree.map(lambda x: rearrange(x, "b v ... -> (b v) ..."), (crops[kind], drawn))  # [B V, ...]
        result[kind] = sharding.per_shard(view, flat, rows)
    return result


def pictures(
    views: Mapping[str, Any], crops: Mapping[str, CropSpec], bands: Bands, channels: tuple[int, int, int], most: int = 2
) -> dict[str, np.ndarray]:
    """The first `most` views of each crop type for the report's picture: uint8 [B, H, W, 3] by name, such as "global
    1"."""
    result = {}
    for kind, crop in crops.items():
        shown = as_bytes(bands.denormalized(np.asarray(views[kind])), channels)  # [B V, H, W, 3]
        for v in range(min(most, crop.number)):
            result[f"{kind} {v + 1}"] = shown[v :: crop.number]
    return result


def similarity(tokens: Float[np.ndarray, "B _V D"]) -> str:
    """A sentence on the cosine similarity of the class tokens of the first two views of images."""
    units = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    cosine = units[:, 0] @ units[:, 1].T  # [B, B]
    same, number = np.trace(cosine), len(cosine)
    others = f", those of different images {(cosine.sum() - same) / (number**2 - number):.2f}" if number > 1 else ""
    return f"The class tokens of two views of an image have a cosine similarity of {same / number:.2f}{others}."
