"""Frozen features of whole images: class token, mean of the patch tokens and patch tokens of the last blocks.

The devices always work on the same number of images each, `MICRO_BATCH`; what is missing is padded and cut off again.
So the features depend neither on the batch that a user reads nor on the number of devices. With several hosts each
encodes a part of the images, and all of them get the whole.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import multihost_utils

from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.common.progress import Progress
from pera_jax.data import codecs
from pera_jax.data import crops as geometry
from pera_jax.data.labelled.samples import Samples
from pera_jax.encoder.model import Model
from pera_jax.parallel import distributed, sharding

MICRO_BATCH = 32  # images per device
BLOCKS = 4  # last blocks whose tokens are kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Tokens of N images from the last n blocks, each after the final norm, the last block last."""

    class_tokens: np.ndarray  # float32 [N, n, D]
    patch_means: np.ndarray  # float32 [N, n, D]

    def __len__(self) -> int:
        return len(self.class_tokens)

    def concatenated(self, blocks: int, patch_means: bool) -> np.ndarray:
        """The last `blocks` class tokens, with `patch_means` also their patch means, in one row: [N, F]."""
        parts = [self.class_tokens[:, -blocks:]] + ([self.patch_means[:, -blocks:]] if patch_means else [])
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def take(self, indices: np.ndarray) -> "Features":
        """The features of some of the images."""
        return Features(self.class_tokens[indices], self.patch_means[indices])


class OverDevices:
    """A function of images on all devices of this host, each of which always gets `MICRO_BATCH` of them."""

    def __init__(self, function: Callable[[dict, jax.Array], Any], devices: list | None = None):
        """
        Args:
          function: (params, images [B, H, W, C]) -> a tree of arrays [B, ...]; pure.
          devices: those to use, all of this host by default.
        """
        self._mesh = sharding.make_mesh(devices=devices or jax.local_devices())
        self._step = MICRO_BATCH * sharding.batch_shards(self._mesh)
        self._where = jax.sharding.NamedSharding(self._mesh, sharding.BATCH)
        self._everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._function = jax.jit(function, in_shardings=(self._everywhere, self._where), out_shardings=self._where)

    def placed(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters on every device."""
        return jax.device_put(params, self._everywhere)

    def __call__(self, params: dict[str, Any], images: np.ndarray) -> Any:
        """The tree of float32 arrays [B, ...] of images [B, H, W, C], by parameters that are `placed`.

        Raises:
          UserError: values that are not finite.
        """
        results = []
        with jax.set_mesh(self._mesh):
            for first in range(0, len(images), self._step):
                part = images[first : first + self._step]
                padded = np.zeros((self._step, *images.shape[1:]), images.dtype)
                padded[: len(part)] = part
                results.append(self._function(params, jax.device_put(padded, self._where)))
        join = lambda *parts: np.concatenate([np.asarray(part) for part in parts])[: len(images)]  # noqa: E731
        found = jax.tree.map(join, *results)  # only the end is padded
        if not all(np.isfinite(array).all() for array in jax.tree.leaves(found)):
            raise UserError("the checkpoint gives features that are not finite; take an earlier step with --step")
        return found


class Extractor:
    """A frozen backbone on the devices of this host.

    Attributes:
      bands: what it sees; patch: side of a patch, px.
    """

    def __init__(self, backbone: dict[str, Any], meta: dict[str, Any], devices: list | None = None):
        """
        Args:
          backbone: the parameters of the ViT.
          meta: of the checkpoint.
          devices: the devices to use, all of this host by default.
        """
        model = dataclasses.replace(Model.of(backbone, meta), params={})  # which come with each call
        self.bands, self.patch = model.bands, model.network.patch
        blocks = min(BLOCKS, model.network.depth)

        def summaries(params, images):
            found = model.apply(params, images, blocks=blocks)
            means = [tokens.mean(axis=(1, 2)) for tokens in found.block_maps]
            return Features(jnp.stack(found.block_class_tokens, axis=1), jnp.stack(means, axis=1))  # [B, n, D] each

        def maps(params, images):
            return jnp.stack(model.apply(params, images, blocks=blocks).block_maps, axis=1)  # [B, n, h, w, D]

        self._summaries, self._maps = (OverDevices(function, devices) for function in (summaries, maps))
        self._params = self._summaries.placed(backbone)

    def take(self, backbone: dict[str, Any]) -> None:
        """Goes on with other parameters of the same network: nothing is compiled again."""
        self._params = None  # first, so that there is room for the new ones
        self._params = self._summaries.placed(backbone)

    def __call__(self, images: np.ndarray) -> Features:
        """Stored values [B, H, W, C], H and W multiples of the patch."""
        return self._summaries(self._params, images)

    def maps(self, images: np.ndarray) -> np.ndarray:
        """Stored values [B, H, W, C] -> the patch tokens float32 [B, n, H / patch, W / patch, D]."""
        return self._maps(self._params, images)


class Pixels:
    """The baseline that has learnt nothing, with the methods of an `Extractor`: mean and deviation of each band, of a
    patch, and of an image in place of the class token."""

    def __init__(self, meta: dict[str, Any]):
        self.bands, self.patch = Bands.from_metadata(meta), meta["model"]["patch"]

    def __call__(self, images: np.ndarray) -> Features:
        values = self.bands.mapped(images).reshape(len(images), -1, images.shape[3])  # [B, H W, C]
        whole = np.concatenate([values.mean(axis=1), values.std(axis=1)], axis=1)  # [B, 2 C]
        return Features(whole[:, None], self.maps(images).mean(axis=(2, 3)))

    def maps(self, images: np.ndarray) -> np.ndarray:
        patches = rearrange(
            self.bands.mapped(images), "b (h p) (w q) c -> b 1 h w (p q) c", p=self.patch, q=self.patch
        )
        return np.concatenate([patches.mean(axis=4), patches.std(axis=4)], axis=-1)  # [B, 1, h, w, 2 C]


def check_image_size(image_size: int, meta: dict[str, Any]) -> None:
    """Raises UserError where the patch does not divide `image_size` (px)."""
    patch = meta["model"]["patch"]
    if image_size < patch or image_size % patch:
        raise UserError(
            f"the image size {image_size} is not a multiple of the checkpoint's patch of {patch} px; "
            f"try {max(round(image_size / patch), 1) * patch}"
        )


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """A whole image [H, W, C] as `size` x `size` px, bilinear and antialiased as crops are in training."""
    image = geometry.Image(pixels)
    out = np.empty((size, size, pixels.shape[2]), pixels.dtype)
    geometry.crop_resize(image, geometry.Box(0, 0, image.height, image.width), size, False, False, out)
    return out


def extract(extractor: Extractor | Pixels, samples: Samples, image_size: int, batch_size: int) -> Features:
    """The features of every image of a split, each resized as a whole to `image_size` x `image_size` px.

    All hosts must call it; each encodes its part, and where one fails all do.

    Args:
      batch_size: images that are decoded ahead and held; changes no result.

    Raises:
      UserError: an image that cannot be read or decoded; a band that is missing; features that are not finite.
    """
    hosts, own = jax.process_count(), jax.process_index()
    most = -(-len(samples) // hosts)
    rows = range(min(own * most, len(samples)), min((own + 1) * most, len(samples)))
    read_size = lambda image: resized(image, image_size)  # noqa: E731
    parts, batches, error = batched(rows, batch_size), [], None
    try:
        batches = [extractor(images) for images in read(samples, extractor.bands, read_size, parts, "features")]
    except Exception as wrong:
        error = wrong
    distributed.raise_on_all_hosts(error)
    if hosts == 1:
        return Features(*(np.concatenate([getattr(b, name) for b in batches]) for name in ("class_tokens", "patch_means")))
    return _of_all_hosts(batches, len(samples), most, rows)


def _of_all_hosts(batches: list[Features], number: int, most: int, rows: range) -> Features:
    sizes = multihost_utils.process_allgather(np.array(batches[0].class_tokens.shape[1:] if batches else (0, 0)))
    blocks, width = sizes.max(axis=0)  # a host may have no image
    found = np.zeros((2, most, blocks, width), np.float32)
    for place, name in enumerate(("class_tokens", "patch_means")):
        if batches:
            found[place, : len(rows)] = np.concatenate([getattr(batch, name) for batch in batches])
    gathered = multihost_utils.process_allgather(found)  # [hosts, 2, most, n, D]
    return Features(*rearrange(gathered, "p t m n d -> t (p m) n d")[:, :number])


def batched(rows: range, size: int) -> list[range]:
    """`rows` in runs of `size`, the last one shorter."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def read(
    samples: Samples,
    bands: Bands,
    transform: Callable[[np.ndarray], np.ndarray],
    batches: Sequence[range],
    label: str,
) -> Iterator[np.ndarray]:
    """Yields the transformed images [b, ...] of each batch, decoded by a pool of threads.

    Args:
      bands: those to hand over.
      transform: takes stored values [H, W, C]; runs in the threads and gives equal shapes.
      batches: rows of `samples`; one batch is decoded ahead.
      label: what the line of progress begins with.

    Raises:
      UserError: an image that cannot be read or decoded; a band that is missing.
    """
    samples = samples.suited_to(bands)
    places = bands.indices_in(samples, samples.path)

    def decode(row, raw):
        try:
            return transform(np.ascontiguousarray(samples.decode(raw)[..., places]))
        except codecs.ImageDecodeError as error:
            raise UserError(f"image {samples.keys[row]} of {samples.path} cannot be decoded ({error}); mend it") from error

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        waiting = collections.deque()
        with Progress(sum(map(len, batches)), "images", label) as progress:
            for part in batches:
                waiting.append(pool.map(decode, part, map(samples.raw, part)))
                if len(waiting) == 2:  # the threads decode the next batch while the devices work on this one
                    yield _collect(waiting.popleft(), progress)
            while waiting:
                yield _collect(waiting.popleft(), progress)


def _collect(results, progress):
    images = np.stack(list(results))
    progress.update(len(images))
    return images
