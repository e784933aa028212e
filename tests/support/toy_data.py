"""A data set folder of small random images, written without the converter, for tests that train."""

import dataclasses
import io
import json
import pathlib

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from pera_jax.data import codecs, pipeline, records, statistics
from pera_jax.objectives import base


def crops(settings) -> pipeline.Crops:
    """What `config.crops` asks for."""
    return pipeline.Crops(base.crop_specs(settings), settings["aspect"], settings["flip"])


SHARD = "toy-train.array_record-00000-of-00001"


def write(
    folder: pathlib.Path,
    images: int = 48,
    undecodable: tuple[int, ...] = (),
    fingerprint: str = "toy",
    bands: tuple[str, ...] = records.RGB,
    dtype: str = "uint8",
) -> str:
    """Writes the split `train` of 64 x 60 px images with four classes; returns the folder's path."""
    folder.mkdir(parents=True)
    writer = array_record_module.ArrayRecordWriter(str(folder / SHARD), "group_size:1,uncompressed")
    coded = (bands, dtype) == (records.RGB, "uint8")
    counts = 0
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 256 if dtype == "uint8" else 5000, (60, 64, len(bands)))
        counts = counts + statistics.count(pixels.astype(dtype))
        file = io.BytesIO()
        if coded:
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        else:
            file.write(codecs.encode_tiff(pixels.astype(dtype)))
        encoded = b"no image" if i in undecodable else file.getvalue()
        writer.write(records.encode_record(encoded, f"{i}.png", i % 4))
    writer.close()
    (folder / statistics.file_name("train")).write_bytes(statistics.to_bytes(counts))
    ranges = statistics.default_ranges(counts, dtype)
    mean, std = ([0.5] * 3, [0.29] * 3) if coded else map(list, statistics.moments(counts, dtype, ranges))
    split = records.SplitInfo(
        records=images, shards=[SHARD], shard_records=[images], shard_bytes=[(folder / SHARD).stat().st_size],
        ranges=ranges, mean=mean, std=std, percentiles={}, fingerprint=fingerprint, source="",
    )  # fmt: skip
    info = records.DatasetInfo(
        name=folder.name, bands=list(bands), dtype=dtype, class_names=list("abcd"), has_places=False,
        format_version=records.FORMAT_VERSION, splits={"train": split},
    )  # fmt: skip
    (folder / records.INFO_FILE).write_text(json.dumps(dataclasses.asdict(info)))
    return str(folder)


def edit_info(folder: pathlib.Path, **changes) -> None:
    """Changes fields of the folder's info.json."""
    file = folder / records.INFO_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
