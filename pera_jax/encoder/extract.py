"""Frozen features of whole images: class token, mean of the patch tokens and patch tokens of the last blocks.

Every device processes exactly `MICRO_BATCH` images at a time; smaller batches are padded. So the features depend
neither on the batch size nor on the number of devices. With several processes each encodes a part of the images, and
all get the full result.
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
from pera_jax.data.decode import resized
from pera_jax.data.labelled.samples import Samples
from pera_jax.encoder.model import Model
from pera_jax.parallel import distributed, sharding

MICRO_BATCH = 32  # images per device
BLOCKS = 4  # the last blocks whose tokens are extracted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Tokens of N images from the last n blocks, each after the final norm; the last block is at index n - 1."""

    class_tokens: np.ndarray  # float32 [N, n, D]
    patch_means: np.ndarray  # float32 [N, n, D]

    def __len__(self) -> int:
        return len(self.class_tokens)

    def concatenated(self, blocks: int, patch_means: bool) -> np.ndarray:
        """The last `blocks` class tokens, and with `patch_means` also the patch means, concatenated: float32 [N, F]."""
        parts = [self.class_tokens[:, -blocks:]] + ([self.patch_means[:, -blocks:]] if patch_means else [])
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def take(self, indices: np.ndarray) -> "Features":
        """The features of the images at `indices`."""
        return Features(self.class_tokens[indices], self.patch_means[indices])


class OverDevices:
    """Runs a function of images data-parallel on the local devices, `MICRO_BATCH` images on each."""

    def __init__(self, function: Callable[[dict, jax.Array], Any], devices: list | None = None):
        """
        Args:
          function: (params, images [B, H, W, C]) -> a tree of arrays [B, ...]; pure.
          devices: default: all local devices.
        """
        self._mesh = sharding.make_mesh(devices=devices or jax.local_devices())
        self._step = MICRO_BATCH * sharding.batch_shards(self._mesh)
        self._where = jax.sharding.NamedSharding(self._mesh, sharding.BATCH)
        self._everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._function = jax.jit(function, in_shardings=(self._everywhere, self._where), out_shardings=self._where)

    def placed(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters, replicated on every device."""
        return jax.device_put(params, self._everywhere)

    def __call__(self, params: dict[str, Any], images: np.ndarray) -> Any:
        """The tree of float32 arrays [B, ...] for images [B, H, W, C] and parameters from `placed`.

        Raises:
          UserError: the result has NaN or infinite values.
        """
        results = []
        with jax.set_mesh(self._mesh):
            for first in range(0, len(images), self._step):
                part = images[first : first + self._step]
                padded = np.zeros((self._step, *images.shape[1:]), images.dtype)
                padded[: len(part)] = part
                results.append(self._function(params, jax.device_put(padded, self._where)))
        join = lambda *parts: np.concatenate([np.asarray(part) for part in parts])[: len(images)]  # noqa: E731
        found = jax.tree.map(join, *results)  # removes the padding
        if not all(np.isfinite(array).all() for array in jax.tree.leaves(found)):
            raise UserError(
                "the features of this checkpoint contain NaN or infinite values; use an earlier one with --step"
            )
        return found


class Extractor:
    """A frozen backbone on the local devices.

    Attributes:
      bands: the input bands; patch: patch size in px.
    """

    def __init__(self, backbone: dict[str, Any], meta: dict[str, Any], devices: list | None = None):
        """
        Args:
          backbone: the parameters of the ViT.
          meta: metadata of the checkpoint.
          devices: default: all local devices.
        """
        model = dataclasses.replace(Model.from_metadata(backbone, meta), params={})  # passed with each call
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
        """Replaces the parameters by those of another checkpoint of the same network, without recompiling."""
        self._params = None  # first, to free the memory
        self._params = self._summaries.placed(backbone)

    def __call__(self, images: np.ndarray) -> Features:
        """The features of stored values [B, H, W, C]; H and W must be multiples of the patch size."""
        return self._summaries(self._params, images)

    def maps(self, images: np.ndarray) -> np.ndarray:
        """Stored values [B, H, W, C] -> the patch tokens float32 [B, n, H / patch, W / patch, D]."""
        return self._maps(self._params, images)


class Pixels:
    """The baseline without a network, with the interface of `Extractor`: mean and standard deviation of each band, over
    each patch, and over the whole image in place of the class token."""

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
    """Raises UserError if `image_size` (px) is not a multiple of the patch size."""
    patch = meta["model"]["patch"]
    if image_size < patch or image_size % patch:
        raise UserError(
            f"the image size {image_size} is not a multiple of the checkpoint's patch size {patch} px; "
            f"try {max(round(image_size / patch), 1) * patch}"
        )


def extract(extractor: Extractor | Pixels, samples: Samples, image_size: int, batch_size: int) -> Features:
    """Extracts the features of every image of a split, resized (not cropped) to `image_size` x `image_size` px.

    A collective: all processes must call it; each encodes its part, and if one fails all raise.

    Args:
      batch_size: images decoded at a time; does not change the result.

    Raises:
      UserError: an image that cannot be read or decoded; a missing band; NaN or infinite features.
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
        return Features(
            *(np.concatenate([getattr(b, name) for b in batches]) for name in ("class_tokens", "patch_means"))
        )
    return _of_all_hosts(batches, len(samples), most, rows)


def _of_all_hosts(batches: list[Features], number: int, most: int, rows: range) -> Features:
    sizes = multihost_utils.process_allgather(np.array(batches[0].class_tokens.shape[1:] if batches else (0, 0)))
    blocks, width = sizes.max(axis=0)  # a process may have no images
    found = np.zeros((2, most, blocks, width), np.float32)
    for place, name in enumerate(("class_tokens", "patch_means")):
        if batches:
            found[place, : len(rows)] = np.concatenate([getattr(batch, name) for batch in batches])
    gathered = multihost_utils.process_allgather(found)  # [hosts, 2, most, n, D]
    return Features(*rearrange(gathered, "p t m n d -> t (p m) n d")[:, :number])


def batched(rows: range, size: int) -> list[range]:
    """`rows` cut into batches of `size`; the last one may be shorter."""
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
      bands: the bands to read, in this order.
      transform: maps stored values [H, W, C] to an array of fixed shape; runs in the threads.
      batches: rows of `samples`; one batch is decoded ahead.
      label: prefix of the progress line.

    Raises:
      UserError: an image that cannot be read or decoded; a missing band.
    """
    samples = samples.suited_to(bands)
    places = bands.indices_in(samples, samples.path)

    def decode(row, raw):
        try:
            return transform(np.ascontiguousarray(samples.decode(raw)[..., places]))
        except codecs.ImageDecodeError as error:
            raise UserError(
                f"image {samples.keys[row]} of {samples.path} cannot be decoded ({error}); repair or remove the file"
            ) from error

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        waiting = collections.deque()
        with Progress(sum(map(len, batches)), "images", label) as progress:
            for part in batches:
                waiting.append(pool.map(decode, part, map(samples.raw, part)))
                if len(waiting) == 2:  # the threads decode the next batch while the devices process this one
                    yield _collect(waiting.popleft(), progress)
            while waiting:
                yield _collect(waiting.popleft(), progress)


def _collect(results, progress):
    images = np.stack(list(results))
    progress.update(len(images))
    return images
