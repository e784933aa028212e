"""Examples of a TensorFlow Datasets dataset: listing, reading and conversion without TensorFlow."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from tensorflow_datasets.core import read_only_builder

from data_prep.convert import pixels
from data_prep.convert.shards import Item
from pera_jax.data import codecs, statistics, tfds_sets


class Examples(Sequence[Item]):
    """The examples of a split or slice, in order, as lazily created Items whose `part` is (index in the slice,).

    Attributes:
      pieces: see `tfds_sets.pieces`.
    """

    def __init__(self, builder: read_only_builder.ReadOnlyBuilder, tfds_split: str):
        """Raises UserError: no such split, an empty slice, a damaged shard."""
        self._data_dir = str(builder.data_dir)
        self.pieces = tfds_sets.pieces(builder, tfds_split)
        self._ends = list(itertools.accumulate(piece[-1] for piece in self.pieces))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard, size, held, skip, take = self.pieces[piece := bisect.bisect_right(self._ends, index)]
        place = skip + index - (self._ends[piece] - take)
        # The size is the mean of the shard: exact sizes would require reading all examples.
        return Item(self._data_dir, f"{shard}__{place}", None, size // held, (index,))


def _read(item: Item, tfds_split: str, image: str, label: str | None) -> dict:
    return tfds_sets.read(item.path, tfds_split, image, label, item.part[0])


def read_bytes(item: Item, *, tfds_split: str, image: str, label: str | None) -> bytes:
    """The bytes of an image: encoded, or of its values. Raises ImageDecodeError."""
    value = _read(item, tfds_split, image, label)[image]
    return value if isinstance(value, bytes) else _described(value)


def _described(values: np.ndarray) -> bytes:
    return str(values.shape).encode() + values.tobytes()


def convert_example(item: Item, *, tfds_split: str, image: str, label: str | None, **options) -> pixels.Stored:
    """Reads and converts one example. Raises ImageDecodeError, and Rejected, also for an example without a class.

    Args:
      item: from `Examples`.
      tfds_split: the split of `Examples`.
      image, label: feature paths.
      options: of `pixels.convert`.
    """
    example = _read(item, tfds_split, image, label)
    index = None if label is None else int(example[label])
    if index is not None and index < 0:
        raise pixels.Rejected("no class; --no-labels includes such images")
    value = example[image]
    stored = pixels.convert(value, **options) if isinstance(value, bytes) else _store_array(value)
    return dataclasses.replace(stored, label=index)


def _store_array(values: np.ndarray) -> pixels.Stored:
    """Stores [H, W, C] losslessly. Raises ImageDecodeError for values that are not finite."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise codecs.ImageDecodeError("has values that are not finite")
    return pixels.Stored(
        codecs.encode(values), statistics.count(values), ("tensor",), pixels.content_hash(_described(values))
    )
