"""A data set folder of small random images, written without the converter, for tests that train."""

import dataclasses
import io
import json
import pathlib

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from pera_jax.data import records

SHARD = "toy-train.array_record-00000-of-00001"


def write(folder: pathlib.Path, images: int = 48, undecodable: tuple[int, ...] = (), fingerprint: str = "toy") -> str:
    """Writes the split `train` of 64 x 60 px images with four classes; returns the folder's path."""
    folder.mkdir(parents=True)
    writer = array_record_module.ArrayRecordWriter(str(folder / SHARD), "group_size:1,uncompressed")
    for i in range(images):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 64, 3), np.uint8)).save(file, "PNG")
        encoded = b"no image" if i in undecodable else file.getvalue()
        writer.write(records.encode_record(encoded, f"{i}.png", i % 4))
    writer.close()
    split = records.SplitInfo(
        records=images, shards=[SHARD], shard_records=[images], shard_bytes=[(folder / SHARD).stat().st_size],
        ranges=[[0.0, 255.0]] * 3, mean=[0.5] * 3, std=[0.29] * 3, percentiles={}, fingerprint=fingerprint, source="",
    )  # fmt: skip
    info = records.DatasetInfo(
        name="toy", bands=list(records.RGB), dtype="uint8", class_names=list("abcd"), has_places=False,
        format_version=records.FORMAT_VERSION, splits={"train": split},
    )  # fmt: skip
    (folder / records.INFO_FILE).write_text(json.dumps(dataclasses.asdict(info)))
    return str(folder)


def edit_info(folder: pathlib.Path, **changes) -> None:
    """Changes fields of the folder's info.json."""
    file = folder / records.INFO_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
