"""The examples of a TensorFlow Datasets data set: listed, read and converted one by one, without TensorFlow."""

import bisect
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from tensorflow_datasets import decode
from tensorflow_datasets.core import features, read_only_builder

from data_prep import pixels
from data_prep.shards import Item
from pera_jax.data import codecs, records, statistics
from pera_jax.errors import UserError

FORMAT = "array_record"  # of TFDS's file formats the one that is read without TensorFlow, at any place


class Examples(Sequence[Item]):
    """The examples of a split or a part of one, in order; an Item is made when asked for. Its `part` is (index here,).

    Attributes:
      pieces: (name of the shard, bytes, examples in it, first example taken, number of those taken).
    """

    def __init__(self, builder: read_only_builder.ReadOnlyBuilder, tfds_split: str):
        """Raises UserError: no such split, an empty one, a damaged shard."""
        self._data_dir = str(builder.data_dir)
        self.pieces = []
        try:
            found = builder.info.splits[tfds_split].file_instructions
        except (ValueError, KeyError) as error:
            raise UserError(_no_split(builder, tfds_split)) from error
        for piece in found:
            shard = pathlib.Path(piece.filename)
            records.check_shard(shard, piece.examples_in_shard)
            size = os.path.getsize(shard)
            self.pieces.append((shard.name, size, piece.examples_in_shard, piece.skip, piece.take))
        self._ends = list(itertools.accumulate(piece[-1] for piece in self.pieces))
        if not self.pieces:
            raise UserError(_no_split(builder, tfds_split))

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
        # The size is the mean of the shard: to know that of each one would be to read it.
        return Item(self._data_dir, f"{shard}__{place}", None, size // held, (index,))


def _no_split(builder: read_only_builder.ReadOnlyBuilder, tfds_split: str) -> str:
    held = ", ".join(f"{name} ({split.num_examples})" for name, split in sorted(builder.info.splits.items()))
    return f"{tfds_split!r} names no examples of {builder.info.full_name}; give --tfds-split of: {held}"


def flat(feature: features.FeatureConnector, prefix: str = "") -> dict[str, features.FeatureConnector]:
    """The features by path, OUTER/INNER."""
    if not isinstance(feature, features.FeaturesDict):
        return {prefix[:-1]: feature}
    return {path: inner for name in feature for path, inner in flat(feature[name], f"{prefix}{name}/").items()}


def feature_of(builder: read_only_builder.ReadOnlyBuilder, path: str) -> features.FeatureConnector:
    """The feature at a path of `flat`."""
    return flat(builder.info.features)[path]


def first_line(error: Exception) -> str:
    """An error in a sentence's midst: those of TFDS have many lines."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


@functools.cache
def _reader(data_dir: str, tfds_split: str, image: str, label: str | None) -> Callable[[int], dict]:
    """Reads example i of a split: the image's bytes or array, and the label. A process opens it at its first use."""
    builder = read_only_builder.builder_from_directory(data_dir, file_format=FORMAT)
    raw = decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(tfds_split, deserialize_method=raw)
    wanted = {path: feature_of(builder, path) for path in (image, label) if path is not None}
    parser = features.FeaturesDict(wanted)  # of nothing but what is wanted: other features may need TensorFlow
    encoded = isinstance(wanted[image], features.Image)
    decoders = {image: decode.SkipDecoding()} if encoded else None
    return lambda i: parser.deserialize_example_np(source[i], decoders=decoders)


def _read(item: Item, tfds_split: str, image: str, label: str | None) -> dict:
    try:
        return _reader(item.path, tfds_split, image, label)(item.part[0])
    except Exception as error:  # ArrayRecord, protobuf and TFDS raise each their own
        raise codecs.ImageDecodeError(f"cannot be read: {first_line(error)}") from error


def read_bytes(item: Item, *, tfds_split: str, image: str, label: str | None) -> bytes:
    """The bytes of an image: as encoded, or those of its values. Raises ImageDecodeError."""
    value = _read(item, tfds_split, image, label)[image]
    return value if isinstance(value, bytes) else _described(value)


def _described(values: np.ndarray) -> bytes:
    return str(values.shape).encode() + values.tobytes()


def convert_example(item: Item, *, tfds_split: str, image: str, label: str | None, **options) -> pixels.Stored:
    """Reads and converts one example. Raises ImageDecodeError, and Rejected also for one without a class.

    Args:
      item: of `Examples`.
      tfds_split: theirs.
      image, label: paths of features.
      options: of `pixels.convert`.
    """
    example = _read(item, tfds_split, image, label)
    index = None if label is None else int(example[label])
    if index is not None and index < 0:
        raise pixels.Rejected("no class; --no-labels takes such images, too")
    value = example[image]
    stored = pixels.convert(value, **options) if isinstance(value, bytes) else _store_array(value)
    return dataclasses.replace(stored, label=index)


def _store_array(values: np.ndarray) -> pixels.Stored:
    """Stores [H, W, C] without loss. Raises ImageDecodeError where values are not finite."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise codecs.ImageDecodeError("holds values that are not finite")
    return pixels.Stored(codecs.encode(values), statistics.count(values), ("tensor",), pixels.content_hash(_described(values)))
