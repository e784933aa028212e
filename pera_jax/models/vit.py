"""The vision transformer: pre-norm, class token, absolute positions, two stacks of scanned blocks.

Only visible patches are embedded; the learnable tokens are concatenated between the `lower` and the `upper` stack (Shen
et al., arXiv:2505.19447, section III-C). Parameters of a stack have a leading depth axis, whether it is scanned or
unrolled. The only collection is `params`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, Real

from pera_jax.common.errors import UserError
from pera_jax.models import blocks, positions
from pera_jax.models.attention import choose
from pera_jax.models.blocks import NORMAL, layer_norm, stack
from pera_jax.models.drop_path import DropPath, GrowingDropPath
from pera_jax.models.precision import Precision
from pera_jax.models.variants import sizes
from pera_jax.parallel.sharding import constrain_batch

POSITIONS = ("learned", *positions.ORDERS)

SHARDING_RULES: tuple[tuple[str, P], ...] = (
    *blocks.SHARDING_RULES,
    (r"patch_projection/kernel$", P("fsdp")),
    (r"(class_token|position_embedding|patch_projection/bias|norm/(scale|bias))$", P()),
)
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    *blocks.DECAY_RULES,
    (r"patch_projection/kernel$", True),
    (r"position_embedding$", True),
    (r"(class_token|patch_projection/bias|norm/(scale|bias))$", False),
)


def fan_in_uniform(fan_in: int):
    """Uniform in +-1/sqrt(fan_in), PyTorch's default for linear layers."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@jax.named_scope("patchify")
def patchify(
    images: Real[jax.Array | np.ndarray, "B H W C"], patch: int
) -> Real[jax.Array | np.ndarray, "B L {patch}*{patch}*C"]:
    """The patches of images in raster order, with values ordered by row, column, channel."""
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


class ViT(nn.Module):
    """A vision transformer over any subset of an image's patches.

    Attributes:
      image_size: side in px of the images for which the position embedding is defined.
      bands: number of image channels.
      split: number of blocks in the `lower` stack, after which the learnable tokens join.
      scan: compile one block and loop over it, else unroll (same parameters).
      position: "learned"; or the order of a fixed embedding, which is no parameter, see `positions.sincos`.
      layer_scale: initial value of a trained gain per channel on each residual branch (LayerScale, Touvron et al.,
        arXiv:2103.17239); 0.0 for none.
      initial: the distributions of the initial values: "vit", "dino", "mae" or "mocov3"; linear layers as in
        `blocks.KERNELS`.
      remat: what a block stores for the backward pass: everything ("none"), its input and the outputs of its four
        linear layers ("dots"), or only its input in `compute` precision ("block").
      attention: "xla" or "cudnn", see `attention.choose`.
    """

    width: int
    depth: int
    heads: int
    patch: int
    image_size: int
    bands: int
    split: int
    mlp_ratio: float = 4.0
    position: str = "learned"
    layer_scale: float = 0.0
    initial: str = "vit"
    scan: bool = True
    remat: str = "none"
    attention: str = "xla"
    precision: Precision = Precision()

    def setup(self):
        wide, grid = self.precision.wide, self.image_size // self.patch
        fan_in, xavier = self.patch**2 * self.bands, self.initial in ("mae", "mocov3")
        self.patch_projection = nn.Dense(
            self.width,
            dtype=self.precision.compute,
            param_dtype=wide,
            kernel_init=nn.initializers.xavier_uniform() if xavier else fan_in_uniform(fan_in),
            bias_init=nn.initializers.zeros if self.initial == "mocov3" else fan_in_uniform(fan_in),
            precision=self.precision.matmul,
        )
        token_init = NORMAL if self.initial in ("dino", "mae") else nn.initializers.normal(1e-6)
        self.class_token = self.param("class_token", token_init, (self.width,), wide)
        if self.position == "learned":
            self.position_embedding = self.param("position_embedding", NORMAL, (1 + grid * grid, self.width), wide)
        self.norm = layer_norm(self.precision)

    def positions(self, height: int, width: int) -> Float[jax.Array, "1+{height}*{width} {self.width}"]:
        """The position embedding of an image of `height` x `width` patches."""
        side = self.image_size // self.patch
        if self.position == "learned":
            embedding, offset = self.position_embedding, positions.DINO_OFFSET  # [1 + G G, D]
        else:
            embedding, offset = positions.sincos(self.position, side, self.width), 0.0
            embedding = jnp.asarray(embedding, self.precision.wide)
        grid = embedding[1:].reshape(side, side, self.width)  # [G, G, D]
        grid = positions.resample(grid, height, width, offset).reshape(height * width, self.width)  # [L, D]
        return jnp.concatenate([embedding[:1], grid])  # [1 + L, D]

    @nn.compact
    def __call__(
        self, images: Float[jax.Array | np.ndarray, "B H W C"],
        visible: Int[jax.Array | np.ndarray, "B n"] | None = None,
        learnable: Int[jax.Array | np.ndarray, "B m"] | None = None,
        mask_token: Float[jax.Array | np.ndarray, " {self.width}"] | None = None,
        drop_path: DropPath | GrowingDropPath | None = None, blocks: int = 0, class_attention: bool = False,
        replaced: Bool[jax.Array | np.ndarray, "B L"] | None = None,
    ) -> dict[str, Float[jax.Array, "B ..."] | list[Float[jax.Array, "B ..."]]]:  # fmt: skip
        """Encodes the `visible` patches of `images` and, from mid depth on, the `learnable` ones.

        Args:
          images: normalized, H and W multiples of `patch`.
          visible: patch indices; None: all patches in raster order.
          learnable: patch indices, or None.
          mask_token: the initial learnable token, to which positions are added; required with `learnable` and
            `replaced`.
          drop_path: None: every block runs on every crop.
          blocks: also return the outputs of this many last blocks.
          class_attention: also return the attention of the class token in the last block.
          replaced: patches whose embeddings are replaced by `mask_token`; not together with `visible`.

        Returns:
          A dict of `wide` arrays after the final norm: `class_token` [B, D] and `patch_tokens` [B, n, D]; with
          `learnable` also `learnable_tokens` [B, m, D]; with `blocks` also `blocks`, a list of [B, 1 + n, D], the last
          block last; with `class_attention` also `class_attention` [B, heads, 1 + n (+ m)], softmax weights that sum to
          1.
        """
        wide = self.precision.wide
        position = self.positions(images.shape[1] // self.patch, images.shape[2] // self.patch)  # [1 + L, D]
        patches = patchify(images, self.patch)  # [B, L, p p C]
        chosen = position[1:]  # [L, D]
        if visible is not None:  # gather before embedding, so that invisible patches are never embedded
            patches = jnp.take_along_axis(patches, visible[:, :, None], axis=1)  # [B, n, p p C]
            chosen = jnp.take(chosen, visible, axis=0)  # [B, n, D], positions of the visible patches
        tokens = self.patch_projection(patches).astype(wide)  # [B, n, D]
        if replaced is not None:
            tokens = jnp.where(replaced[:, :, None], mask_token, tokens)
        tokens = tokens + chosen
        first = jnp.broadcast_to(self.class_token + position[0], (len(images), 1, self.width))  # [B, 1, D]
        x = constrain_batch(jnp.concatenate([first, tokens], axis=1))  # [B, 1 + n, D]

        keep = ("output",) if blocks else ()
        x, lower = stack(self, "lower", self.split, x, drop_path, 0, keep)
        joined = x.shape[1]
        if learnable is not None:
            joining = mask_token + jnp.take(position[1:], learnable, axis=0)  # [B, m, D]
            x = constrain_batch(jnp.concatenate([x, joining], axis=1))  # [B, 1 + n + m, D]
        keep += ("class_attention",) if class_attention else ()
        x, upper = stack(self, "upper", self.depth - self.split, x, drop_path, 1, keep, first=self.split)
        x = self.norm(x)
        result: dict[str, Any] = {"class_token": x[:, 0], "patch_tokens": x[:, 1:joined]}
        if learnable is not None:
            result["learnable_tokens"] = x[:, joined:]
        if blocks:
            outputs = jnp.concatenate([lower["output"], upper["output"]])[-blocks:]  # [blocks, B, 1 + n, D]
            result["blocks"] = [self.norm(output) for output in outputs]
        if class_attention:
            result["class_attention"] = upper["class_attention"][-1]
        return result


def description(model: ViT) -> dict[str, Any]:
    """The arguments with which `build` recreates the network, as JSON types."""
    names = ("width", "depth", "heads", "patch", "image_size", "bands", "split", "mlp_ratio")
    optional = {name: getattr(model, name) for name in ("position", "layer_scale")}
    # Left out where they are the defaults, as in metadata written before there were other values.
    others = {name: value for name, value in optional.items() if value != getattr(ViT, name)}
    return {name: getattr(model, name) for name in names} | others


def build(
    shape: dict[str, Any], precision: Precision = Precision(), scan: bool = True, remat: str = "none",
    attention: str = "auto", device: jax.Device | None = None, initial: str = "vit",
) -> ViT:
    """Builds a `ViT` from its `description`; for `attention` and `device` see `attention.choose`.

    Raises:
      UserError: sizes that are not divisible, or a stack without blocks.
    """
    if shape["width"] % shape["heads"]:
        raise UserError(
            f"model.width={shape['width']} is not a multiple of model.heads={shape['heads']}; change one of them"
        )
    if shape["image_size"] % shape["patch"]:
        raise UserError(
            f"crops.global_size={shape['image_size']} is not a multiple of model.patch={shape['patch']}; "
            f"choose a multiple of {shape['patch']}"
        )
    if not 0 < shape["split"] < shape["depth"]:
        raise UserError(f"model.depth={shape['depth']} must be >= 2, because the network is two stacks of blocks")
    if shape.get("position", "learned") != "learned" and shape["width"] % 4:
        raise UserError(
            f"model.width={shape['width']} is not a multiple of 4, as fixed position embeddings need; change it"
        )
    implementation = choose(attention, precision, shape["width"] // shape["heads"], device)
    return ViT(**shape, initial=initial, scan=scan, remat=remat, attention=implementation, precision=precision)


def from_config(
    config: Any, bands: int, device: jax.Device | None = None, initial: str = "vit", **attributes: Any
) -> ViT:
    """Builds the vision transformer of a config, for images with `bands` bands and the size of its global crops.

    Args:
      device: one of the devices that it will run on, see `attention.choose`.
      initial, attributes: `initial`, `position` and `layer_scale` of the network, which depend on the method.

    Raises:
      UserError: as in `build`.
    """
    model, shape = config.model, sizes(config.model)
    shape |= {"image_size": config.crops.global_size, "bands": bands, "split": shape["depth"] // 2} | attributes
    precision = Precision.from_names(config.precision, config.parameter_precision)
    return build(shape, precision, model.scan, model.remat, model.attention, device, initial)
