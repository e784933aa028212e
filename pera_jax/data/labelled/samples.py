"""Labeled images of one split, from shards, class folders or TFDS.

A dataset is given as
    shards/aid              a dataset folder (info.json) and one of its splits
    aid                     an image folder: aid/SPLIT/CLASS/NAME.jpg
    tfds:eurosat/rgb        a dataset prepared by TFDS, by name or folder (tfds:/data/eurosat/rgb/2.0.0), and a TFDS
                            split: train[:80%]
A label table replaces the labels of a dataset; images of a folder may then lie anywhere below aid/SPLIT. It is a CSV
file with the columns `key` (the key of an image) and `label` (the class name), or `key` and a column of 0 and 1 per
class, for several labels per image.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pera_jax.bands import Bands
from pera_jax.common import classes, paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.data import codecs, records
from pera_jax.data.images import foreign
from pera_jax.data.labelled import folders, label_tables
from pera_jax.parallel import distributed


@dataclasses.dataclass(frozen=True)
class Samples:
    """
    Attributes:
      bands, dtype: of the stored values.
      class_names: None without classes.
      fingerprint: SHA-256 over images, keys and labels.
      keys: a unique name per image.
      labels: int64 [N], -1 without a label; or bool [N, classes] for several labels per image.
      raw: reads image i, not decoded; not thread-safe.
      decode: decodes the result of `raw` to stored values [H, W, C] of all bands; thread-safe. Raises ImageDecodeError.
      reading: (bands, dtype, decode) by the argument `colors` of `foreign.read`; None if there is only one way to read.
    """

    name: str
    path: str
    split: str
    bands: tuple[str, ...]
    dtype: str
    class_names: tuple[str, ...] | None
    fingerprint: str
    keys: Sequence[str]
    labels: np.ndarray
    raw: Callable[[int], Any]
    decode: Callable[[Any], np.ndarray]
    reading: Callable[[bool | None], tuple] | None = None

    def suited_to(self, bands: Bands) -> "Samples":
        """The samples read as required by `bands`: image files as RGB uint8, or as stored values.

        Raises UserError if the images cannot be read that way."""
        if self.reading is None or bands.is_rgb8():
            return self
        held, dtype, decode = self.reading(False)
        return dataclasses.replace(self, bands=held, dtype=dtype, decode=decode)

    def __len__(self) -> int:
        return len(self.keys)


def open_samples(data: str, split: str, labels: str = "", reading: folders.Reading = folders.Reading()) -> Samples:
    """Opens a split.

    Args:
      data: see the module.
      labels: path of a label table, "" for none.
      reading: how image folders are read.

    Raises:
      UserError: no such dataset or split, damaged shards, too many unreadable images, an image without a label.
    """
    samples = _open(data, split, not labels, reading)
    return _relabelled(samples, labels) if labels else samples


def open_images(data: str, split: str = "", reading: folders.Reading = folders.Reading()) -> Samples:
    """Opens images for which labels are optional.

    Args:
      data: see the module; a folder gives all its images, and classes if every image lies at [SPLIT/]CLASS/NAME.
      split: "" for a whole folder, or for the only split of a dataset folder.
      reading: how image folders are read.

    Raises:
      UserError: no such dataset or split, a missing split name, damaged shards, too many unreadable images.
    """
    if not split and data.startswith("tfds:"):
        raise UserError(f"{data} needs a split; choose one with --split, for example train or train[:80%]")
    if not split and _are_shards(data):
        held = sorted(records.load_info(data).splits)
        if len(held) > 1:
            raise UserError(f"{data} has the splits {several(held, 10)}; choose one with --split")
        split = held[0]
    return _open(data, split, None, reading)


def _open(data: str, split: str, with_classes: bool | None, reading: folders.Reading) -> Samples:
    paths.local(data)
    if data.startswith("tfds:"):
        return _from_tfds(data, split)
    if _are_shards(data):
        return from_source(records.open_split(data, split))
    if pathlib.Path(data).is_dir():
        return _from_folder(data, split, with_classes, reading)
    if pathlib.Path(data).is_file():
        raise UserError(
            f"{data} is a file; convert archives with pera-jax prep-images, and pass the dataset folder"
        )
    raise UserError(f"the dataset {data} does not exist; pass a dataset folder, an image folder, or tfds:NAME")


def _are_shards(data: str) -> bool:
    return (pathlib.Path(data) / records.INFO_FILE).is_file()


def from_source(source: records.RecordSource) -> Samples:
    """The samples of an open split of shards. Raises UserError for a damaged record."""
    info = source.info
    keys, labels = [], []
    for record in map(source.record, range(len(source))):
        keys.append(record.key)
        labels.append(record.label)
    return Samples(
        info.name, str(source.path), source.split, tuple(info.bands), info.dtype,
        None if info.class_names is None else tuple(info.class_names), source.split_info.fingerprint, keys,
        np.array(labels, np.int64), source.record,
        lambda record: codecs.decode_bands(record.image, info, range(len(info.bands))),
    )  # fmt: skip


def _from_folder(data: str, split: str, with_classes: bool | None, reading: folders.Reading) -> Samples:
    found = folders.list_images(pathlib.Path(data), split, with_classes, reading.follow_links)
    found, fingerprint = folders.examine(found, reading.max_corrupt_fraction)
    for line in found.messages:
        distributed.say(line)

    def raw(index):
        try:
            return found.files[index].read_bytes()
        except OSError as error:
            raise UserError(f"{found.files[index]} cannot be read: {error.strerror}; fix or remove it") from error

    reading_as = functools.partial(_reading, data, found.kinds)
    bands, dtype, decode = reading_as(None if None in found.kinds else False)
    return Samples(
        pathlib.Path(data).resolve().name, data, split, bands, dtype, found.class_names,
        fingerprint, found.keys, found.labels, raw, decode, reading_as,
    )  # fmt: skip


def _reading(data: str, kinds: dict[bool | None, folders.Kind], colors: bool | None):
    """(bands, dtype, decode) of the images of a folder, read by `foreign.read` with `colors`."""
    if colors not in kinds:
        raise UserError(f"no image of {data} can be read as values of uint8, uint16 or float32; convert them first")
    bands, dtype = kinds[colors]

    def decode(encoded):
        pixels = foreign.read(encoded, colors).pixels
        if pixels.shape[2] != len(bands) or pixels.dtype != dtype:
            raise codecs.ImageDecodeError(
                f"expected {len(bands)} bands of {dtype}, got {pixels.shape[2]} of {pixels.dtype}"
            )
        return pixels

    return bands, dtype, decode


def _from_tfds(data: str, split: str) -> Samples:
    from pera_jax.data import tfds_sets  # takes seconds to import

    builder = tfds_sets.open_dataset(data.removeprefix("tfds:"))
    pieces = tfds_sets.pieces(builder, split)
    try:
        image, label = tfds_sets.pick_image(builder), tfds_sets.pick_label(builder)
    except UserError as error:
        raise UserError(f"{error} of pera-jax prep-tfds, and probe the shards that it writes") from error
    bands, dtype = tfds_sets.bands_of(image, tfds_sets.feature_of(builder, image))
    names = None if label is None else tuple(tfds_sets.feature_of(builder, label).names)
    place = str(builder.data_dir)
    keys, labels, digest = [], [], hashlib.sha256(foreign.VERSION + builder.info.full_name.encode())
    read = lambda index: tfds_sets.read(place, split, image, label, index)  # noqa: E731
    for shard, _, _, skip, take in pieces:
        keys += [f"{shard}__{skip + index}" for index in range(take)]
    for index in range(len(keys)):
        example = _read_tfds(read, index, data)
        labels.append(-1 if label is None else int(example[label]))
        digest.update(_bytes_of(example[image]) + labels[-1].to_bytes(8, "little", signed=True))

    def decode(value):
        return foreign.read(value, colors=True).pixels if isinstance(value, bytes) else value

    return Samples(
        builder.info.name, data, split, tuple(bands), dtype, names, digest.hexdigest(), keys,
        np.array(labels, np.int64), lambda index: _read_tfds(read, index, data)[image], decode,
    )  # fmt: skip


def _read_tfds(read, index, data):
    try:
        return read(index)
    except codecs.ImageDecodeError as error:
        raise UserError(f"example {index} of {data} {error}; prepare it again") from error


def _bytes_of(value: bytes | np.ndarray) -> bytes:
    return value if isinstance(value, bytes) else value.tobytes()


def _relabelled(samples: Samples, labels: str) -> Samples:
    class_names, values, digest = label_tables.read_labels(pathlib.Path(labels), samples.keys)
    if warning := classes.lookalike_warning(class_names, labels):
        distributed.say(warning)
    fingerprint = hashlib.sha256(f"{samples.fingerprint} {digest}".encode()).hexdigest()
    return dataclasses.replace(samples, class_names=class_names, labels=values, fingerprint=fingerprint)


def check_labels(train: Samples, test: Samples | None) -> None:
    """Raises UserError if there are no classes, images lack labels, or the splits have different classes."""
    for samples in (train, test) if test else (train,):
        if samples.class_names is None:
            raise UserError(f"{samples.path} has no labels; convert class folders, or pass a label table with --labels")
        if samples.labels.ndim == 1 and not (
            (samples.labels >= 0) & (samples.labels < len(samples.class_names))
        ).all():
            wrong = samples.keys[int(np.argmax((samples.labels < 0) | (samples.labels >= len(samples.class_names))))]
            raise UserError(
                f"the image {wrong} of split {samples.split!r} of {samples.path} has no valid label for "
                f"{len(samples.class_names)} classes; remove such images"
            )
    if test and test.class_names != train.class_names:
        only = [f"{name} (in {there.split!r} only)" for there, other in ((train, test), (test, train))
                for name in there.class_names if name not in other.class_names]  # fmt: skip
        raise UserError(
            f"{train.path} has different classes in {train.split!r} and {test.split!r}: {several(only)}; "
            "both splits must have the same class folders"
        )
    if train.labels.ndim == 2:
        return
    present = set(train.labels.tolist())
    if len(present) < 2:
        raise UserError(f"split {train.split!r} of {train.path} has only one class; at least two are required")
    lacking = set(test.labels.tolist()) - present if test else ()
    if lacking:
        raise UserError(
            f"split {train.split!r} of {train.path} has no image of "
            f"{several(train.class_names[c] for c in sorted(lacking))}, which {test.split!r} has; convert both splits "
            "from folders of the same classes"
        )
