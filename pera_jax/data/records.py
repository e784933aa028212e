"""The dataset folder: its metadata, its ArrayRecord shards, and the record that holds one image.

    FOLDER/info.json                                  what `load_info` reads; written last: a folder without it is
    unfinished FOLDER/NAME-SPLIT.array_record-00000-of-0000K     the records of one split, `group_size:1,uncompressed`
    FOLDER/SPLIT.report.json                          report of the conversion: failed and changed images
    FOLDER/SPLIT.histogram.npz                        histogram of each band: see `statistics`
    FOLDER/dataset_info.json, features.json           the same facts for `tfds.builder_from_directory`

A record is a serialized `tf.train.Example` with the features `image` (encoded as `codecs` says), `key` (the path of the
source relative to the converted folder) and, optionally, `label` (class index) and `place` (JSON: location, date and
source of a tile). The message is small and fixed, so it is encoded and parsed here without protobuf or TensorFlow
Datasets, and data workers start in a fraction of a second.
"""

import bisect
import dataclasses
import itertools
import pathlib
from typing import Annotated, Any

import msgspec

from pera_jax.bands import RGB as RGB
from pera_jax.common import json_files, paths
from pera_jax.common.environment import EnvironmentFault
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several
from pera_jax.data import info_faults, shard_files

FORMAT_VERSION = 2
INFO_FILE = "info.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One stored image.

    Attributes:
      image: encoded bytes, for `codecs.decode_image`.
      key: path of the source image.
      label: class index, -1 without classes.
      place: JSON text with a tile's "crs", "bounds", "date", "source", ...; "" for other images.
    """

    image: bytes
    key: str
    label: int
    place: str = ""


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split: its shards and a hash of its content.

    Attributes:
      records: number of records in all shards.
      shards: file names in the order of the records.
      shard_records: number of records of each shard.
      shard_bytes: size of each shard in bytes.
      ranges: [low, high] per band in stored units, mapped to [0, 1] by default; the full range for uint8, else
        percentiles 1 and 99 of the split.
      mean, std: per band, over all valid pixels, after that mapping.
      percentiles: by name ("0.1", "1", "50", "99", "99.9"), per band in stored units.
      fingerprint: SHA-256 over the records in order; independent of the number of shards and workers.
      source: SHA-256 over the list of source files and the conversion options.
    """

    records: json_files.Count
    shards: list[json_files.FileName]
    shard_records: list[json_files.Count]
    shard_bytes: list[json_files.Count]
    ranges: list[Annotated[list[json_files.Finite], msgspec.Meta(min_length=2, max_length=2)]]
    mean: list[json_files.Finite]
    std: list[json_files.Finite]
    percentiles: dict[str, list[json_files.Finite]]
    fingerprint: str
    source: str


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A dataset folder.

    Attributes:
      bands: band names in channel order; dtype: uint8, uint16 or float32.
      class_names: indexed by labels; None without classes.
      has_places: whether the images are tiles of scenes, whose records have a `place`.
    """

    name: str
    bands: list[json_files.Name]
    dtype: str
    class_names: list[json_files.Name] | None
    has_places: bool
    format_version: int
    splits: dict[json_files.FileName, SplitInfo]


# ---------------------------------------------------------------- the record (protobuf wire format)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field (wire type 2)."""
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def encode_record(image: bytes, key: str, label: int | None, place: str = "") -> bytes:
    """Serializes one `tf.train.Example`; `label` None and `place` "" omit the feature. Deterministic."""
    bytes_list, int64_list = 1, 3  # the members of tf.train.Feature
    features = [("image", bytes_list, image), ("key", bytes_list, key.encode("utf-8"))]
    if label is not None:
        if label < 0:
            raise ValueError(f"expected a label >= 0, got {label}")
        features.append(("label", int64_list, _varint(label)))
    if place:
        features.append(("place", bytes_list, place.encode("utf-8")))
    entries = (
        _field(1, _field(1, name.encode("ascii")) + _field(2, _field(kind, _field(1, value))))
        for name, kind, value in features
    )
    return _field(1, b"".join(entries))


def _parse_varint(raw: bytes, position: int) -> tuple[int, int]:
    """Returns (value, position behind it)."""
    value = shift = 0
    while True:
        byte = raw[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 56:  # lengths and labels are far smaller; this stops on arbitrary bytes
            raise ValueError("not a record of a dataset folder: an integer does not end")


def _parse_field(raw: bytes, position: int, end: int, number: int) -> tuple[int, int]:
    """Returns (start, end) of the payload of the length-delimited field `number` that begins at `position`."""
    if raw[position] != number << 3 | 2:
        raise ValueError("not a record of a dataset folder: unexpected field")
    length, start = _parse_varint(raw, position + 1)
    if start + length > end:
        raise ValueError("not a record of a dataset folder: a field is longer than the record")
    return start, start + length


def decode_record(raw: bytes) -> Record:
    """Parses the output of `encode_record` (features in any order). Raises ValueError for other bytes."""
    values = {}
    try:
        position, end = _parse_field(raw, 0, len(raw), 1)  # Example.features
        while position < end:
            entry, position = _parse_field(raw, position, end, 1)  # one entry of the map Features.feature
            name, name_end = _parse_field(raw, entry, position, 1)
            feature, feature_end = _parse_field(raw, name_end, position, 2)
            kind, list_end = _parse_field(raw, feature, feature_end, raw[feature] >> 3)  # bytes_list or int64_list
            value, value_end = _parse_field(raw, kind, list_end, 1)
            values[raw[name:name_end]] = (value, value_end)
        image, key = (raw[slice(*values[name])] for name in (b"image", b"key"))
        place = raw[slice(*values[b"place"])] if b"place" in values else b""
        label = _parse_varint(raw, values[b"label"][0])[0] if b"label" in values else -1
    except (IndexError, KeyError) as error:
        raise ValueError("not a record of a dataset folder: it is truncated or a feature is missing") from error
    return Record(image=image, key=key.decode("utf-8"), label=label, place=place.decode("utf-8"))


# ---------------------------------------------------------------- the folder


def load_info(path: str | pathlib.Path) -> DatasetInfo:
    """Reads FOLDER/info.json. Raises UserError: there is none, one of another format version, one that is damaged."""
    folder = pathlib.Path(paths.local(path))
    file = folder / INFO_FILE
    if not folder.is_dir():
        raise UserError(f"dataset folder {printable(folder)} does not exist; make one with pera-jax prep-images")
    if not file.is_file():
        raise UserError(
            f"{printable(folder)} has no {INFO_FILE}: it is not a dataset folder, or its conversion has not finished; "
            "make one of a folder of images with pera-jax prep-images --input IMAGES --output SHARDS"
        )
    fix = "copy it again, or convert the dataset again"
    fields = json_files.read(file, dict[str, Any], fix)
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{printable(folder)} has format version {printable(version)}, not {FORMAT_VERSION}; convert the dataset "
            "again"
        )
    try:
        info = json_files.convert(fields, DatasetInfo)
        wrong = info_faults.fault(info)
    except json_files.Invalid as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{printable(file)} is damaged: {wrong}; {fix}")
    return info


def check_split(path: str | pathlib.Path, info: DatasetInfo, split: str) -> None:
    """Raises UserError where a dataset folder has no such split."""
    if split not in info.splits:
        held = several(sorted(info.splits))
        raise UserError(f"{printable(path)} has no split '{printable(split)}'; it has {held}")


class RecordSource:
    """Random access to the records of one split. Picklable: a copy reopens each shard at its first read."""

    def __init__(self, path: str | pathlib.Path, info: DatasetInfo, split: str, damaged: frozenset[int] = frozenset()):
        self.path = pathlib.Path(path)
        self.info = info
        self.split = split
        self.damaged = damaged  # indices of skipped shards: reading from them is an error
        self.split_info = info.splits[split]
        self._ends = list(itertools.accumulate(self.split_info.shard_records))
        self._owner = shard_files.OPEN.owner(self)

    def __len__(self) -> int:
        return self.split_info.records

    def read(self, i: int) -> bytes:
        """The serialized record `i`, for `decode_record`.

        Raises RuntimeError if it is damaged, IndexError, or EnvironmentFault if the machine fails.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        shard = bisect.bisect_right(self._ends, i)
        if shard in self.damaged:
            raise RuntimeError(f"shard {self.split_info.shards[shard]} is damaged")
        first = self._ends[shard] - self.split_info.shard_records[shard]
        return shard_files.OPEN.read(self._owner, self.path / self.split_info.shards[shard], int(i) - first)

    def record(self, i: int) -> Record:
        """Record `i`, decoded. Raises UserError if it is damaged, EnvironmentFault if the machine fails."""
        try:
            return decode_record(self.read(i))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"record {i} of {self.path} is damaged; copy or convert the dataset again") from error

    def close(self) -> None:
        """Closes the open shards; a later read reopens them."""
        shard_files.OPEN.close(self._owner)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._owner = shard_files.OPEN.owner(self)


def open_split(path: str | pathlib.Path, split: str, skip_damaged: bool = False) -> RecordSource:
    """Opens one split of a dataset folder and checks every shard.

    Args:
      skip_damaged: skip missing and damaged shards, as long as one shard is intact.

    Raises UserError: as `load_info` and `check_split`; a shard is missing, truncated, or has a different number of
    records than in info.json.
    """
    info = load_info(path)
    check_split(path, info, split)
    split_info = info.splits[split]
    damaged = set()
    shards = zip(split_info.shards, split_info.shard_records, split_info.shard_bytes, strict=True)
    for number, (name, records, size) in enumerate(shards):
        try:
            shard_files.check_shard(pathlib.Path(path) / name, records, size)
        except EnvironmentFault:
            raise
        except UserError:
            damaged.add(number)
            if not skip_damaged or len(damaged) == len(split_info.shards):
                raise
    return RecordSource(path, info, split, frozenset(damaged))
