"""Frozen features of whole images: class token and mean of the patch tokens of the last blocks.

The devices always work on the same number of images each, `MICRO_BATCH`; what is missing is padded and cut off again.
So the features depend neither on the batch that a user reads nor on the number of devices.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax import sharding
from pera_jax.bands import Bands
from pera_jax.data import codecs, records
from pera_jax.data import crops as geometry
from pera_jax.errors import UserError
from pera_jax.metrics import Progress
from pera_jax.models import vit

MICRO_BATCH = 32  # images per device
BLOCKS = 4  # last blocks whose tokens are kept


@dataclasses.dataclass(frozen=True)
class Features:
    """Tokens of N images from the last n blocks, each after the final norm, the last block last."""

    class_tokens: np.ndarray  # float32 [N, n, D]
    patch_means: np.ndarray  # float32 [N, n, D]
    labels: np.ndarray  # int32 [N], -1 without classes

    def concatenated(self, blocks: int, patch_means: bool) -> np.ndarray:
        """The last `blocks` class tokens, with `patch_means` also their patch means, in one row: [N, F]."""
        parts = [self.class_tokens[:, -blocks:]] + ([self.patch_means[:, -blocks:]] if patch_means else [])
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


class Extractor:
    """A frozen backbone on a mesh over all devices.

    Args:
      backbone: the parameters of the ViT.
      meta: of the checkpoint.
      devices: the devices to use, all by default.
    """

    def __init__(self, backbone: dict[str, Any], meta: dict[str, Any], devices: list | None = None):
        self._mesh = sharding.make_mesh(devices=devices)
        self._step = MICRO_BATCH * sharding.batch_shards(self._mesh)
        self._where = jax.sharding.NamedSharding(self._mesh, sharding.BATCH)
        everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._backbone = jax.device_put(backbone, everywhere)
        model = vit.build(meta["model"])  # float32 throughout
        bands = Bands.of(meta)
        mean, std = np.float32(bands.mean), np.float32(bands.std)

        def encode(backbone, images):  # [B, H, W, C] -> [B, 2, n, D]
            normalised = (bands.mapped(images) - mean) / std
            tokens = model.apply({"params": backbone}, normalised, blocks=min(BLOCKS, model.depth))["blocks"]
            tokens = jnp.stack(tokens, axis=1)  # [B, n, 1 + L, D]
            return jnp.stack([tokens[:, :, 0], tokens[:, :, 1:].mean(axis=2)], axis=1)

        self._encode = jax.jit(encode, in_shardings=(everywhere, self._where), out_shardings=self._where)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored values [B, H, W, C], H and W multiples of the patch -> (class tokens, patch means), float32 [B, n, D]."""
        results = []
        with jax.set_mesh(self._mesh):
            for first in range(0, len(images), self._step):
                part = images[first : first + self._step]
                padded = np.zeros((self._step, *images.shape[1:]), images.dtype)
                padded[: len(part)] = part
                results.append(self._encode(self._backbone, jax.device_put(padded, self._where)))
        tokens = np.concatenate([np.asarray(result) for result in results])[: len(images)]  # only the end is padded
        return tokens[:, 0], tokens[:, 1]


def check_image_size(image_size: int, meta: dict[str, Any]) -> None:
    """Raises UserError where the patch does not divide `image_size` (px)."""
    patch = meta["model"]["patch"]
    if image_size < patch or image_size % patch:
        raise UserError(
            f"the image size {image_size} is not a multiple of the checkpoint's patch of {patch} px; "
            f"try --image-size {max(round(image_size / patch), 1) * patch}"
        )


def extract(
    extractor: Extractor, source: records.RecordSource, bands: Bands, image_size: int, batch_size: int
) -> Features:
    """The features of every image of a split, each resized as a whole to `image_size` x `image_size` px.

    Args:
      batch_size: images that are decoded ahead and held; changes no result.

    Raises:
      UserError: a record that cannot be read or decoded; features that are not finite.
    """

    def resize(pixels):
        image = geometry.Image(pixels)
        out = np.empty((image_size, image_size, len(bands)), pixels.dtype)
        geometry.crop_resize(image, geometry.Box(0, 0, image.height, image.width), image_size, False, False, out)
        return out

    class_tokens, patch_means, labels = [], [], []
    for images, batch_labels in read(source, bands, resize, batch_size, "features"):
        classes, means = extractor(images)
        if not (np.isfinite(classes).all() and np.isfinite(means).all()):
            raise UserError("the checkpoint gives features that are not finite; probe an earlier step with --step")
        class_tokens.append(classes)
        patch_means.append(means)
        labels.append(batch_labels)
    return Features(np.concatenate(class_tokens), np.concatenate(patch_means), np.concatenate(labels))


def read(
    source: records.RecordSource,
    bands: Bands,
    transform: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    label: str,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (transformed images [b, ...], labels int32 [b]) of all records in order, decoded by a pool of threads.

    Args:
      bands: those to hand over.
      transform: takes stored values [H, W, C]; runs in the threads and gives equal shapes.
      label: what the line of progress begins with.

    Raises:
      UserError: a record that cannot be read or decoded; a band that is missing.
    """
    places = bands.places(source.info, source.path)

    def decode(raw):
        record = records.decode_record(raw)
        try:
            return transform(codecs.decode_bands(record.image, source.info, places)), record.label
        except codecs.ImageDecodeError as error:
            raise UserError(f"image {record.key} of {source.path} cannot be decoded; convert it anew") from error

    def raw_records(first):
        return (_read_record(source, index) for index in range(first, min(first + batch_size, len(source))))

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        waiting = collections.deque()
        with Progress(len(source), "images", label) as progress:
            for first in range(0, len(source), batch_size):
                waiting.append(pool.map(decode, raw_records(first)))
                if len(waiting) == 2:  # the threads decode the next batch while the devices work on this one
                    yield _collect(waiting.popleft(), progress)
            while waiting:
                yield _collect(waiting.popleft(), progress)


def labels_of(source: records.RecordSource) -> np.ndarray:
    """The labels of a split, int32 [N], -1 without classes; decodes no image. Raises UserError for a damaged record."""
    raws = (_read_record(source, index) for index in range(len(source)))
    return np.array([records.decode_record(raw).label for raw in raws], np.int32)


def _read_record(source, index):
    try:
        return source.read(index)
    except RuntimeError as error:
        raise UserError(f"record {index} of {source.path} is damaged; copy or convert it anew") from error


def _collect(results, progress):
    images, labels = zip(*results, strict=True)
    progress.update(len(images))
    return np.stack(images), np.array(labels, np.int32)
