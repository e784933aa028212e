"""Features of images from trained weights: class token, map of patch tokens, tokens of intermediate blocks.

    model = features.load("runs/aid")        # or a folder written by `pera-jax export timm`
    tokens = model(images)                   # stored values [B, H, W, C], NumPy or JAX
    tokens.class_token, tokens.patch_map     # [B, D], [B, h, w, D]
    model(images, blocks=(3, 7, 11)).block_maps

`model.apply` is the same as a pure function of the parameters, to use with jit, vmap and grad:

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
from pera_jax.encoder.load import load_weights as load_run
from pera_jax.models import vit
from pera_jax.training.checkpoints import checkpoint

NETWORKS = ("teacher", "student")
SIZES = ("refuse", "pad")  # what to do with image sides that are not multiples of the patch size


class Tokens(NamedTuple):
    """Output of the encoder after the final norm; float32. A single image has no batch axis."""

    class_token: jax.Array  # [B, D]
    patch_map: jax.Array  # [B, h, w, D]
    block_class_tokens: tuple[jax.Array, ...] = ()  # one [B, D] for each requested block
    block_maps: tuple[jax.Array, ...] = ()  # one [B, h, w, D] for each requested block


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen vision transformer.

    Attributes:
      params: the parameters, nested dicts of arrays.
      network: the Flax module, with `width`, `depth`, `patch` (px) and `image_size` (px, the size of the global crops
        in training).
      bands: names, order, dtype and normalization of the input bands.
    """

    params: dict[str, Any] = dataclasses.field(repr=False)
    network: vit.ViT
    bands: Bands

    @classmethod
    def from_metadata(cls, backbone: dict[str, Any], meta: dict[str, Any]) -> "Model":
        """A model from the parameters of a ViT and the metadata of its checkpoint; computes in float32."""
        return cls(backbone, vit.build(meta["model"]), Bands.from_metadata(meta))

    def __call__(self, images, *, blocks: int | Sequence[int] = (), size: str = "refuse") -> Tokens:
        """`apply` with the model's own parameters, compiled once per input shape."""
        chosen = blocks if isinstance(blocks, int) else tuple(blocks)
        self._check(images, size)  # before the conversion to JAX, which would turn float64 into float32
        return _compiled(dataclasses.replace(self, params=None), self.params, jnp.asarray(images), chosen, size)

    def apply(
        self, params: dict[str, Any], images, *, blocks: int | Sequence[int] = (), size: str = "refuse"
    ) -> Tokens:
        """The tokens of images, as a pure function of the parameters.

        Args:
          params: parameters of this network.
          images: stored values [B, H, W, C] of `bands.dtype`, or one image [H, W, C]; channels in the order of
            `bands.names`.
          blocks: blocks whose tokens are returned too: 0-based indices, or an int n for the last n blocks, in order.
          size: "refuse": H and W must be multiples of the patch size. "pad": images are padded by reflection at the
            bottom and the right to the next multiple; the maps have ceil(H / patch) rows and ceil(W / patch) columns.

        Raises:
          UserError: images of the wrong shape, dtype or size; a block that does not exist.
        """
        self._check(images, size)
        values = self.bands.normalized(images)
        if size == "pad":
            padding = [(0, -side % self.network.patch) for side in images.shape[-3:-1]]
            values = jnp.pad(values, [(0, 0)] * (values.ndim - 3) + padding + [(0, 0)], "symmetric")
        return self.encode(params, values, blocks=blocks)

    def encode(self, params: dict[str, Any], values, *, blocks: int | Sequence[int] = ()) -> Tokens:
        """`apply` on normalized values (`bands.normalized`) [B, H, W, C] or [H, W, C], for custom augmentations.

        Raises:
          UserError: sides that are not multiples of the patch size; a block that does not exist.
        """
        (height, width), patch = values.shape[-3:-1], self.network.patch
        if height % patch or width % patch:
            raise UserError(
                f"the image size {height} x {width} px is not a multiple of the patch size {patch} px; resize the "
                "images, or pad them with size='pad'"
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
            raise UserError(f"unknown size={size!r}; expected one of {', '.join(SIZES)}")
        if not hasattr(images, "dtype"):
            raise UserError(
                f"expected images as a {self.bands.dtype} array [H, W, C] or [B, H, W, C], got "
                f"{type(images).__name__}; pass a NumPy or JAX array"
            )
        if images.ndim not in (3, 4) or 0 in images.shape:
            raise UserError(
                f"expected images of shape [B, H, W, C] or [H, W, C] with at least one pixel, got {tuple(images.shape)}"
            )
        if images.shape[-1] != len(names):
            raise UserError(
                f"expected {len(names)} bands on the last axis of the images ({several(names, 10)}), got "
                f"{images.shape[-1]}; pass the bands that the weights were trained on"
            )
        if images.dtype != self.bands.dtype:
            raise UserError(
                f"expected images of dtype {self.bands.dtype}, got {images.dtype}; pass the values as they are stored, "
                "without normalization"
            )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _compiled(model: Model, params, images, blocks, size) -> Tokens:
    return model.apply(params, images, blocks=blocks, size=size)


def _chosen(blocks: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """The indices of the blocks in the argument `blocks` of `Model.apply`."""
    if isinstance(blocks, int):
        if not 0 <= blocks <= depth:
            raise UserError(f"blocks={blocks} is out of range; expected a number of last blocks from 0 to {depth}")
        return tuple(range(depth - blocks, depth))
    wrong = [block for block in blocks if not 0 <= block < depth]
    if wrong:
        raise UserError(f"block {wrong[0]} does not exist; the network has blocks 0 to {depth - 1}")
    return tuple(int(block) for block in blocks)


def load(
    path: str | pathlib.Path, step: int | None = None, which: str | None = None, verify: bool = True
) -> Model:
    """Loads the model of a run, or of a folder written by `pera-jax export timm`.

    Args:
      path: the run folder (its `--workdir`) or the exported folder.
      step: step of the checkpoint; None for the latest.
      which: "teacher" or "student"; None for the teacher, or for the student of a method without a teacher.
      verify: check the weights against their stored SHA-256 digests.

    Raises:
      UserError: a folder, step or network that does not exist; damaged files.
    """
    weights = load_weights(path, step, which, verify, parts=("backbone",))
    return Model.from_metadata(weights.backbone, weights.meta)


@calls.logging_unchanged()
def load_weights(
    path: str | pathlib.Path, step: int | None = None, which: str | None = None, verify: bool = True,
    parts: Sequence[str] | None = None,
) -> Weights:  # fmt: skip
    """Loads weights as `load` does; the metadata of an exported folder have only what is needed to use the weights.

    Args:
      parts: see `encoder.load.load_weights`; used only for runs.
    """
    if which not in (None, *NETWORKS):
        raise UserError(f"unknown network {which!r}; expected one of {', '.join(NETWORKS)}")
    path = pathlib.Path(paths.local(path))
    if not path.is_dir():
        raise UserError(
            f"the folder {path} does not exist; give a run folder or a folder written by pera-jax export timm"
        )
    if (path / exported.FILE).is_file():
        return exported.load(path, step, which, verify)
    if (path / checkpoint.FOLDER).is_dir():
        return load_run(path, step, which, verify, parts)
    raise UserError(
        f"{path} is not a run folder (no {checkpoint.FOLDER}/) and not an exported folder (no {exported.FILE}); give "
        "one of the two"
    )
