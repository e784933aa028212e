"""Writes dataset folders of a few records without the converter; all dataset builders of the tests use it."""

import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from pera_jax.data import records


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shard(path: pathlib.Path, content: Iterable[bytes]) -> None:
    """Writes a file of records that hold any bytes."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in content:
        writer.write(record)
    writer.close()


@dataclasses.dataclass
class Split:
    """
    Attributes:
      images: encoded.
      labels: one per image; all None without.
      keys: one per image; "0.png", "1.png", ... without.
      places: one JSON text per image; none without.
      shards: number of records in each shard; one shard without.
      facts: fields of `SplitInfo` that differ from the defaults below: ranges, mean, std, percentiles, fingerprint.
    """

    images: Sequence[bytes]
    labels: Sequence[int | None] | None = None
    keys: Sequence[str] | None = None
    places: Sequence[str] | None = None
    shards: Sequence[int] | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encoded(self) -> list[bytes]:
        """The records."""
        n = len(self.images)
        rows = (
            self.images,
            self.keys or [f"{i}.png" for i in range(n)],
            self.labels or [None] * n,
            self.places or [""] * n,
        )
        return [records.encode_record(*row) for row in zip(*rows, strict=True)]


def shard(name: str, split: str, k: int = 0, number: int = 1) -> str:
    """The file name of shard `k` of `number` of a split of the dataset `name`."""
    return f"{name}-{split}.array_record-{k:05d}-of-{number:05d}"


def write(
    folder: pathlib.Path,
    splits: dict[str, Split],
    *,
    bands: Sequence[str] = records.RGB,
    dtype: str = "uint8",
    class_names: list[str] | None = None,
) -> pathlib.Path:
    """Writes a dataset folder that is named as the folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {}
    for name, split in splits.items():
        encoded = split.encoded()
        counts = list(split.shards or [len(encoded)])
        files = [folder / shard(folder.name, name, k, len(counts)) for k in range(len(counts))]
        for file, end, count in zip(files, itertools.accumulate(counts), counts, strict=True):
            write_shard(file, encoded[end - count : end])
        width = len(bands)
        facts = {
            "ranges": [[0.0, 255.0]] * width, "mean": [0.5] * width, "std": [0.2] * width, "percentiles": {},
            "source": "",
            "fingerprint": hashlib.sha256(b"".join(hashlib.sha256(record).digest() for record in encoded)).hexdigest(),
        }  # fmt: skip
        infos[name] = records.SplitInfo(
            records=len(encoded), shards=[file.name for file in files], shard_records=counts,
            shard_bytes=[file.stat().st_size for file in files], **{**facts, **split.facts},
        )  # fmt: skip
    info = records.DatasetInfo(
        name=folder.name, bands=list(bands), dtype=dtype, class_names=class_names,
        has_places=any(split.places for split in splits.values()), format_version=records.FORMAT_VERSION, splits=infos,
    )  # fmt: skip
    (folder / records.INFO_FILE).write_text(json.dumps(dataclasses.asdict(info)))
    return folder


def edit_info(folder: pathlib.Path, **changes) -> None:
    """Changes fields of the folder's info.json."""
    file = folder / records.INFO_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
