"""Linear segmentation heads on patch tokens, with bilinear upsampling; a whole hyperparameter grid is trained at once.

The logits of a pixel are interpolated bilinearly from the four surrounding tokens (half-pixel centers). The `px` x `px`
pixels between the same four token centers, a cell, share these tokens and one fixed interpolation matrix. Training
samples cells, with exactly the logits of the full map, and prediction processes the cells of a scene in batches.

The tokens of many scenes may exceed device memory. They stay on the host; a fit transfers the tokens of the sampled
cells, and a prediction transfers batches.

All heads of the grid see the same cells, so that a step is one matrix product, as in `probes.classification.linear`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.probes import sgd
from pera_jax.probes.dense.overlap import IGNORE

MOMENTUM = 0.9
_LOGITS = 2**22  # held at once: 16 MiB
_VALUES = 2**24  # of tokens processed at once: 64 MiB

# ---------------------------------------------------------------- cells between token centers


def _taps(px: int) -> np.ndarray:
    """Interpolation weights float32 [px px, 4] of the four tokens around a cell for each of its pixels, in raster
    order."""
    after = (np.arange(px) + 0.5 - (px + 1) // 2) / px + 0.5
    axis = np.stack([1.0 - after, after], axis=1)  # [px, 2]
    return np.einsum("ya,xb->yxab", axis, axis).reshape(px * px, 4).astype(np.float32)


def _neighbors(length: int) -> np.ndarray:
    """The tokens before and after each of the `length` + 1 cells along an axis, int32 [length + 1, 2]; edge tokens
    repeat."""
    return np.clip(np.arange(length + 1, dtype=np.int32)[:, None] + (-1, 0), 0, length - 1).astype(np.int32)


def corners(height: int, width: int) -> np.ndarray:
    """Indices (raster order) of the four tokens around each cell, int32 [(height + 1) (width + 1), 4]."""
    rows, columns = _neighbors(height), _neighbors(width)
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(-1, 4)


def cells(mask: np.ndarray, height: int, width: int, px: int) -> np.ndarray:
    """Cuts a mask uint8 [H, W] into the cells of a map of `height` x `width` tokens: uint8 [cells, px px].

    Pixels outside the mask are IGNORE.
    """
    before = (px + 1) // 2  # pixels of the first cells outside the mask
    whole = np.full(((height + 1) * px, (width + 1) * px), IGNORE, np.uint8)
    whole[before : before + mask.shape[0], before : before + mask.shape[1]] = mask
    return whole.reshape(height + 1, px, width + 1, px).transpose(0, 2, 1, 3).reshape(-1, px * px)


def picture(found: np.ndarray, shape: tuple[int, int], width: int, px: int) -> np.ndarray:
    """The inverse of `cells`: values [cells, px px] of a map `width` tokens wide -> [H, W] with `shape`."""
    before = (px + 1) // 2
    whole = found.reshape(-1, width + 1, px, px).transpose(0, 2, 1, 3).reshape(-1, (width + 1) * px)
    return whole[before : before + shape[0], before : before + shape[1]]


# ---------------------------------------------------------------- the head


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _logits(at_tokens: jax.Array, bias: jax.Array, px: int) -> jax.Array:
    """Logits of the pixels of cells [K, px px, G, C] from logits at their tokens [K, 4, G C] and bias [G, C]."""
    return _product(_taps(px), at_tokens).reshape(len(at_tokens), px * px, *bias.shape) + bias


@functools.partial(jax.jit, static_argnames=("classes", "px"))
def _train(tokens, corners, labels, order, mean, scale, rates, kept, classes, px):
    """Trains the heads with `sgd.minimize`; returns W [F, G, C], b [G, C] for standardized tokens.

    Args:
      tokens: [T, F]; corners: [K, 4]; labels: [K, px px]; order: [steps, B], cells of each step; mean, scale: [F].
      rates: [G], learning rates; kept: [F, G], 1 where head g uses the dimension, else 0.
    """
    batch, (dims, grid) = order.shape[1], kept.shape
    taps = _taps(px)

    def gradients(weights, bias, chosen):
        x = (tokens[corners[chosen]] - mean) * scale  # [B, 4, F]
        y = labels[chosen][:, :, None, None]  # [B, P, 1, 1]
        at_tokens = _product(x.reshape(batch * 4, dims), weights.reshape(dims, grid * classes))
        logits = _logits(at_tokens.reshape(batch, 4, grid * classes), bias, px)  # [B, P, G, C]
        labeled = y != IGNORE
        error = jnp.where(labeled, jax.nn.softmax(logits) - (y == jnp.arange(classes)), 0.0) / labeled.sum()
        error = error.reshape(batch, px * px, grid * classes)  # the gradient of the mean cross-entropy
        error_at_tokens = _product(taps.T, error).reshape(batch * 4, grid * classes)
        gradient = (
            _product(x.reshape(batch * 4, dims).T, error_at_tokens).reshape(dims, grid, classes) * kept[:, :, None]
        )
        return gradient, error.sum(axis=(0, 1)).reshape(grid, classes)

    return sgd.minimize(gradients, order, dims, classes, rates, MOMENTUM)


def _padded(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`values[rows]`, padded with zeros to a power of two rows, to compile for few shapes."""
    padded = np.zeros((1 << (len(rows) - 1).bit_length(), *values.shape[1:]), values.dtype)
    np.take(values, rows, axis=0, out=padded[: len(rows)], mode="clip")  # mode "raise" would buffer a copy
    return padded


def _statistics(tokens: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [F] each, of these rows of the tokens [T, F], without copying them all."""
    size = max(_VALUES // tokens.shape[1], 1)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    mean = sum(tokens[part].sum(axis=0, dtype=np.float64) for part in parts) / len(rows)
    return mean, np.sqrt(sum(np.square(tokens[part] - mean).sum(axis=0) for part in parts) / len(rows))


def fit(
    tokens: np.ndarray,
    corners: np.ndarray,
    labels: np.ndarray,
    classes: int,
    rates: np.ndarray,
    kept: np.ndarray,
    steps: int,
    batch: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains G heads at once on cells, each with at least one label.

    Args:
      tokens: float32 [T, F]; standardized internally with the statistics of the tokens of these cells. Only the tokens
        of sampled cells are moved to the device, at most `4 steps batch / px^2`.
      corners: int32 [K, 4], rows of `tokens`; labels: uint8 [K, px px], below `classes` or IGNORE.
      classes: C.
      rates: [G], learning rates; kept: bool [F, G], the dimensions used by head g.
      steps, batch: number of steps, and pixels per step (rounded down to whole cells).
      seed: seed of the sampled cells.

    Returns:
      (weights float32 [F, G, C], bias float32 [G, C]), for raw tokens.
    """
    px = round(labels.shape[1] ** 0.5)
    number, size = len(corners), max(batch // (px * px), 1)
    rng = np.random.default_rng(seed)
    passes = -(-steps * size // number)
    order = np.concatenate([rng.permutation(number).astype(np.int32) for _ in range(passes)])
    order = order[: steps * size].reshape(steps, size)

    mean, std = _statistics(tokens, np.unique(corners))
    scale = np.where(std > 1e-6 * (1.0 + np.abs(mean)), 1.0 / np.maximum(std, 1e-12), 0.0)  # constant dimensions get 0
    drawn, order = np.unique(order, return_inverse=True)  # cells, and the indices of each step into them
    rows, inverse = np.unique(corners[drawn], return_inverse=True)  # tokens, and the indices of the corners into them
    order, inverse = np.int32(order).reshape(steps, size), np.int32(inverse).reshape(-1, 4)
    cells = _padded(inverse, np.arange(len(drawn))), _padded(labels, drawn)
    arrays = _padded(tokens, rows), *cells, order, np.float32(mean), np.float32(scale)
    settings = np.float32(rates), np.float32(kept)
    weights, bias = (np.asarray(part, np.float64) for part in _train(*arrays, *settings, classes, px))
    weights = weights * scale[:, None, None]
    bias = bias - np.einsum("f,fgc->gc", mean, weights)
    return weights.astype(np.float32), bias.astype(np.float32)


_at_tokens = jax.jit(_product)


@functools.partial(jax.jit, static_argnames="px")
def _predict(at_tokens, bias, offsets, px):
    logits = _logits(at_tokens, bias, px)  # [K, P, G, C]
    return jnp.argmax(logits[:, :, :, None] + offsets, axis=-1).astype(jnp.uint8)  # [K, P, G, O]


def predict(
    tokens: np.ndarray, corners: np.ndarray, weights: np.ndarray, bias: np.ndarray, offsets: np.ndarray, px: int
) -> np.ndarray:
    """Predicts the class of each pixel of cells by each head with each offset, uint8 [K, px px, G, O]; ties go to the
    lowest.

    Args:
      tokens: float32 [T, F]; corners: int32 [K, 4]; weights, bias: from `fit`.
      offsets: float32 [O, C], added to the logits.
    """
    rows, inverse = np.unique(corners, return_inverse=True)
    inverse = inverse.reshape(-1, 4)
    size = max(_VALUES // tokens.shape[1], 1)
    matrix = jnp.asarray(weights.reshape(len(weights), -1))  # [F, G C]
    found = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        found.append(np.asarray(_at_tokens(_padded(tokens, part), matrix))[: len(part)])
    at_tokens = np.concatenate(found)  # [R, G C]
    chunk = max(_LOGITS // (px * px * bias.size * len(offsets)), 1)
    found = []
    for first in range(0, len(inverse), chunk):
        part = inverse[first : first + chunk]
        # one shape, compiled once; the padding is removed below
        padded = np.zeros((chunk, 4, at_tokens.shape[1]), np.float32)
        padded[: len(part)] = at_tokens[part]
        found.append(np.asarray(_predict(padded, bias, offsets, px))[: len(part)])
    return np.concatenate(found)
