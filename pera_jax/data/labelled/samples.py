"""Labelled images of one split, wherever they lie: shards, class folders, or a data set of TFDS.

A data set is named by
    shards/aid              a folder of shards (info.json); the split is one of its splits
    aid                     a folder of folders: aid/SPLIT/CLASS/NAME.jpg
    tfds:eurosat/rgb        what TFDS prepared, by name or folder (tfds:/data/eurosat/rgb/2.0.0); the split as TFDS writes
                            it, train[:80%]
With a table of labels the images of a folder lie anywhere below aid/SPLIT, and labels of other data sets are replaced:
CSV with the columns `key` (what the images are called) and `label` (the name of the class), or `key` and a column of 0
and 1 for each class: several labels for an image.
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
      fingerprint: SHA-256 over the images, keys and labels.
      keys: what each image is called.
      labels: int64 [N], -1 for none; or bool [N, classes]: several labels for an image.
      raw: reads image i; one thread at a time.
      decode: makes of it stored values [H, W, C] of all bands; any number of threads. Raises ImageDecodeError.
      reading: (bands, dtype, decode) by the argument `colours` of `foreign.read`; None where there is one reading only.
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
        """The samples as those bands need them: files of others as pictures, red, green and blue of 8 bits, or as the
        values that they hold. Raises UserError where an image cannot be read so."""
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
      labels: the file of a table of labels, "" for none.
      reading: how a folder of images is read.

    Raises:
      UserError: nothing there, no such split, damaged shards, more than a few unreadable images, a label without an image or the reverse.
    """
    samples = _open(data, split, not labels, reading)
    return _relabelled(samples, labels) if labels else samples


def open_images(data: str, split: str = "", reading: folders.Reading = folders.Reading()) -> Samples:
    """Opens images that need no labels.

    Args:
      data: see the module; of a folder all images are taken, and where every one lies at [SPLIT/]CLASS/NAME the classes.
      split: "" for all of a folder, or the only split of shards.
      reading: how a folder of images is read.

    Raises:
      UserError: nothing there, no such split, a split that must be named, damaged shards, more than a few unreadable
        images.
    """
    if not split and data.startswith("tfds:"):
        raise UserError(f"{data} needs a split; name one with --split, as train or train[:80%]")
    if not split and _are_shards(data):
        held = sorted(records.load_info(data).splits)
        if len(held) > 1:
            raise UserError(f"{data} has the splits {several(held, 10)}; name one with --split")
        split = held[0]
    return _open(data, split, None, reading)


def _open(data: str, split: str, with_classes: bool | None, reading: folders.Reading) -> Samples:
    paths.local(data)
    if data.startswith("tfds:"):
        return _from_tfds(data, split)
    if _are_shards(data):
        return of_source(records.open_split(data, split))
    if pathlib.Path(data).is_dir():
        return _from_folder(data, split, with_classes, reading)
    if pathlib.Path(data).is_file():
        raise UserError(f"{data} is a file; convert an archive with python -m data_prep.images, and name the folder of shards")
    raise UserError(f"the data set {data} does not exist; name a folder of shards, of images, or tfds:NAME")


def _are_shards(data: str) -> bool:
    return (pathlib.Path(data) / records.INFO_FILE).is_file()


def of_source(source: records.RecordSource) -> Samples:
    """The samples of a split of shards that is open. Raises UserError for a damaged record."""

    def raw(index):
        try:
            return records.decode_record(source.read(index))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"record {index} of {source.path} is damaged; copy or convert it anew") from error

    info = source.info
    keys, labels = [], []
    for record in map(raw, range(len(source))):
        keys.append(record.key)
        labels.append(record.label)
    return Samples(
        info.name, str(source.path), source.split, tuple(info.bands), info.dtype,
        None if info.class_names is None else tuple(info.class_names), source.split_info.fingerprint, keys,
        np.array(labels, np.int64), raw,
        lambda record: codecs.decode_bands(record.image, info, range(len(info.bands))),
    )  # fmt: skip


def _from_folder(data: str, split: str, with_classes: bool | None, reading: folders.Reading) -> Samples:
    found = folders.list_images(pathlib.Path(data), split, with_classes, reading.follow_links)
    found, fingerprint = folders.examine(found, reading.max_corrupt_share)
    for line in found.told:
        distributed.say(line)

    def raw(index):
        try:
            return found.files[index].read_bytes()
        except OSError as error:
            raise UserError(f"{found.files[index]} cannot be read: {error.strerror}; mend or remove it") from error

    reading_as = functools.partial(_reading, data, found.kinds)
    bands, dtype, decode = reading_as(None if None in found.kinds else False)
    return Samples(
        pathlib.Path(data).resolve().name, data, split, bands, dtype, found.class_names,
        fingerprint, found.keys, found.labels, raw, decode, reading_as,
    )  # fmt: skip


def _reading(data: str, kinds: dict[bool | None, folders.Kind], colours: bool | None):
    """(bands, dtype, decode) of a folder's images, which are alike, read as `foreign.read` does by `colours`."""
    if colours not in kinds:
        raise UserError(f"no image of {data} can be read as values of uint8, uint16 or float32; convert them first")
    bands, dtype = kinds[colours]

    def decode(encoded):
        pixels = foreign.read(encoded, colours).pixels
        if pixels.shape[2] != len(bands) or pixels.dtype != dtype:
            raise codecs.ImageDecodeError(f"{pixels.shape[2]} bands of {pixels.dtype} instead of {len(bands)} of {dtype}")
        return pixels

    return bands, dtype, decode


def _from_tfds(data: str, split: str) -> Samples:
    from pera_jax.data import tfds_sets  # takes seconds to import

    builder = tfds_sets.open_dataset(data.removeprefix("tfds:"))
    pieces = tfds_sets.pieces(builder, split)
    try:
        image, label = tfds_sets.pick_image(builder), tfds_sets.pick_label(builder)
    except UserError as error:
        raise UserError(f"{error} of python -m data_prep.tfds, and probe the shards that it writes") from error
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
        return foreign.read(value, colours=True).pixels if isinstance(value, bytes) else value

    return Samples(
        builder.info.name, data, split, tuple(bands), dtype, names, digest.hexdigest(), keys, np.array(labels, np.int64),
        lambda index: _read_tfds(read, index, data)[image], decode,
    )  # fmt: skip


def _read_tfds(read, index, data):
    try:
        return read(index)
    except codecs.ImageDecodeError as error:
        raise UserError(f"example {index} of {data} {error}; prepare it anew") from error


def _bytes_of(value: bytes | np.ndarray) -> bytes:
    return value if isinstance(value, bytes) else value.tobytes()


def _relabelled(samples: Samples, labels: str) -> Samples:
    class_names, values, digest = label_tables.read_labels(pathlib.Path(labels), samples.keys)
    if told := classes.alike(class_names, labels):
        distributed.say(told)
    fingerprint = hashlib.sha256(f"{samples.fingerprint} {digest}".encode()).hexdigest()
    return dataclasses.replace(samples, class_names=class_names, labels=values, fingerprint=fingerprint)


def check_labels(train: Samples, test: Samples | None) -> None:
    """Raises UserError without classes, with images without a label, or with classes that differ."""
    for samples in (train, test) if test else (train,):
        if samples.class_names is None:
            raise UserError(f"{samples.path} has no labels; convert class folders, or give a table with --labels")
        if samples.labels.ndim == 1 and not (
            (samples.labels >= 0) & (samples.labels < len(samples.class_names))
        ).all():
            wrong = samples.keys[int(np.argmax((samples.labels < 0) | (samples.labels >= len(samples.class_names))))]
            raise UserError(
                f"the image {wrong} of split {samples.split!r} of {samples.path} has none of the {len(samples.class_names)} "
                "classes; leave such images out"
            )
    if test and test.class_names != train.class_names:
        only = [f"{name} (in {there.split!r} only)" for there, other in ((train, test), (test, train))
                for name in there.class_names if name not in other.class_names]  # fmt: skip
        raise UserError(
            f"{train.path} has other classes in {train.split!r} than in {test.split!r}: {several(only)}; "
            "both splits need the same class folders"
        )
    if train.labels.ndim == 2:
        return
    present = set(train.labels.tolist())
    if len(present) < 2:
        raise UserError(f"split {train.split!r} of {train.path} holds one class only; there is nothing to tell apart")
    lacking = set(test.labels.tolist()) - present if test else ()
    if lacking:
        raise UserError(
            f"split {train.split!r} of {train.path} has no image of {several(train.class_names[c] for c in sorted(lacking))}, "
            f"which {test.split!r} has; convert both splits from folders of the same classes"
        )
