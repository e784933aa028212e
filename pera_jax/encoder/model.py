"""Features of images by weights that are there: class token, map of patch tokens, tokens of chosen blocks.

    model = features.load("runs/aid")        # or a folder that `python -m pera_jax.export timm` has written
    found = model(images)                    # stored values [B, H, W, C], of NumPy or JAX
    found.class_token, found.patch_map       # [B, D], [B, h, w, D]
    model(images, blocks=(3, 7, 11)).block_maps

`model.apply` is the same as a pure function of the parameters, for one's own jit, vmap and grad:

    loss = lambda params: jnp.mean((model.apply(params, images).class_token @ head - targets) ** 2)
    gradients = jax.grad(loss)(model.params)
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from pera_jax import calls
from pera_jax.bands import Bands
from pera_jax.common import paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.encoder import exported
from pera_jax.encoder.load import Weights
from pera_jax.encoder.load import load_weights as load_of_run
from pera_jax.models import vit
from pera_jax.training.checkpoints import checkpoint

NETWORKS = ("teacher", "student")
SIZES = ("refuse", "pad")  # what becomes of sides that the patch does not divide


class Tokens(NamedTuple):
    """What a network makes of images, each after the final norm; float32. Of a single image without the axis B."""

    class_token: jax.Array  # [B, D]
    patch_map: jax.Array  # [B, h, w, D]
    block_class_tokens: tuple[jax.Array, ...] = ()  # of each block that was asked for: [B, D]
    block_maps: tuple[jax.Array, ...] = ()  # the same: [B, h, w, D]


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen vision transformer.

    Attributes:
      params: its parameters, nested dicts of arrays.
      network: their module; has `width`, `depth`, `patch` (px) and `image_size` (px, of the crops it was trained on).
      bands: which values it takes, in which order, and how they are normalized.
    """

    params: dict[str, Any] = dataclasses.field(repr=False)
    network: vit.ViT
    bands: Bands

    @classmethod
    def of(cls, backbone: dict[str, Any], meta: dict[str, Any]) -> "Model":
        """The model of a ViT's parameters and a checkpoint's `meta`; float32 throughout."""
        return cls(backbone, vit.build(meta["model"]), Bands.from_metadata(meta))

    def __call__(self, images, *, blocks: int | Sequence[int] = (), size: str = "refuse") -> Tokens:
        """`apply` with the model's own parameters, compiled once for each shape."""
        chosen = blocks if isinstance(blocks, int) else tuple(blocks)
        self._check(images, size)  # before NumPy's values become JAX's, which have no 64 bits
        return _compiled(dataclasses.replace(self, params=None), self.params, jnp.asarray(images), chosen, size)

    def apply(self, params: dict[str, Any], images, *, blocks: int | Sequence[int] = (), size: str = "refuse") -> Tokens:
        """The tokens of images by any parameters of this network; pure.

        Args:
          images: stored values [B, H, W, C] of `bands.dtype`, or one image [H, W, C]; channels in the order of `bands.names`.
          blocks: whose tokens to return too: indices from 0, or a number: so many last ones, the last one last.
          size: "refuse": H and W must be multiples of the patch; "pad": others are reflected at the lower and the right
            edge up to the next multiple, and the maps have ceil(H / patch) rows and ceil(W / patch) columns.

        Raises:
          UserError: images of another shape, dtype or size; no such block.
        """
        self._check(images, size)
        values = self.bands.normalized(images)
        if size == "pad":
            padding = [(0, -side % self.network.patch) for side in images.shape[-3:-1]]
            values = jnp.pad(values, [(0, 0)] * (values.ndim - 3) + padding + [(0, 0)], "symmetric")
        return self.encode(params, values, blocks=blocks)

    def encode(self, params: dict[str, Any], values, *, blocks: int | Sequence[int] = ()) -> Tokens:
        """`apply` on `bands.normalized` values [B, H, W, C] or [H, W, C], for augmentations of one's own.

        Raises:
          UserError: sides that are no multiples of the patch; no such block.
        """
        (height, width), patch = values.shape[-3:-1], self.network.patch
        if height % patch or width % patch:
            raise UserError(
                f"images of {height} x {width} px are not multiples of the patch of {patch} px; resize them, or pad them "
                "with size='pad'"
            )
        chosen = _chosen(blocks, self.network.depth)
        batch = values if values.ndim == 4 else values[None]
        last = self.network.depth - min(chosen, default=self.network.depth)
        found = self.network.apply({"params": params}, batch, blocks=last)
        asked = [found["blocks"][block - self.network.depth] for block in chosen]  # [B, 1 + L, D]
        to_map = functools.partial(rearrange, pattern="b (h w) d -> b h w d", h=height // patch)
        tokens = Tokens(
            found["class_token"], to_map(found["patch_tokens"]),
            tuple(each[:, 0] for each in asked), tuple(to_map(each[:, 1:]) for each in asked),
        )  # fmt: skip
        return tokens if values.ndim == 4 else jax.tree.map(lambda array: array[0], tokens)

    def _check(self, images, size: str) -> None:
        names = self.bands.names
        if size not in SIZES:
            raise UserError(f"size={size!r} is none of {', '.join(SIZES)}")
        if not hasattr(images, "dtype"):
            raise UserError(f"images are a {type(images).__name__}; hand over an array [H, W, C] or [B, H, W, C] of {self.bands.dtype}")
        if images.ndim not in (3, 4) or 0 in images.shape:
            raise UserError(f"images of shape {tuple(images.shape)} are neither [B, H, W, C] nor [H, W, C], or have no pixel")
        if images.shape[-1] != len(names):
            raise UserError(
                f"the images have {images.shape[-1]} bands on their last axis, and these weights take {len(names)}: "
                f"{several(names, 10)}"
            )
        if images.dtype != self.bands.dtype:
            raise UserError(
                f"the images are {images.dtype}, and these weights take stored values of {self.bands.dtype}; hand over "
                "the values as they are stored, not normalized"
            )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _compiled(model: Model, params, images, blocks, size) -> Tokens:
    return model.apply(params, images, blocks=blocks, size=size)


def _chosen(blocks: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """The indices of blocks that `Model.apply` is asked for."""
    if isinstance(blocks, int):
        if not 0 <= blocks <= depth:
            raise UserError(f"blocks={blocks} asks for {blocks} last blocks, and the network has {depth}")
        return tuple(range(depth - blocks, depth))
    wrong = [block for block in blocks if not 0 <= block < depth]
    if wrong:
        raise UserError(f"there is no block {wrong[0]}; the network has {depth}, from 0 to {depth - 1}")
    return tuple(int(block) for block in blocks)


def load(
    path: str | pathlib.Path, step: int | None = None, which: str | None = None, verify: bool = True
) -> Model:
    """The model of a run's folder, or of a folder that `python -m pera_jax.export timm` has written.

    Args:
      step: the checkpoint of a run; None: the latest.
      which: "teacher" or "student"; None: the one that is judged, the teacher where there is one.
      verify: compare the weights with the digests that were written with them.

    Raises:
      UserError: no such folder, step or network; damaged files.
    """
    weights = load_weights(path, step, which, verify, parts=("backbone",))
    return Model.of(weights.backbone, weights.meta)


@calls.logging_unchanged()
def load_weights(
    path: str | pathlib.Path, step: int | None = None, which: str | None = None, verify: bool = True,
    parts: Sequence[str] | None = None,
) -> Weights:  # fmt: skip
    """The weights that `load` takes; the `meta` of an exported folder has only what is needed to use them.

    Args:
      parts: of a run, see `encoder.load.load_weights`.
    """
    if which not in (None, *NETWORKS):
        raise UserError(f"there is no network {which!r}; choose from {', '.join(NETWORKS)}")
    path = pathlib.Path(paths.local(path))
    if not path.is_dir():
        raise UserError(f"the folder {path} does not exist; name a run, or what python -m pera_jax.export timm has written")
    if (path / exported.FILE).is_file():
        return exported.load(path, step, which, verify)
    if (path / checkpoint.FOLDER).is_dir():
        return load_of_run(path, step, which, verify, parts)
    raise UserError(f"{path} holds neither {checkpoint.FOLDER}/ of a run nor {exported.FILE} of an export")
