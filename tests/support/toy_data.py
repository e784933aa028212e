"""A dataset folder of small random images for tests that train."""

import pathlib

import numpy as np
import toy_shards

from pera_jax.data import codecs, pipeline, records, statistics
from pera_jax.objectives import base


def crops(settings) -> pipeline.Crops:
    """What `config.crops` asks for."""
    return pipeline.Crops(base.crop_specs(settings), settings["aspect"], settings["flip"])


def write(
    folder: pathlib.Path,
    images: int = 48,
    undecodable: tuple[int, ...] = (),
    fingerprint: str = "toy",
    bands: tuple[str, ...] = records.RGB,
    dtype: str = "uint8",
) -> str:
    """Writes the split `train` of 64 x 60 px images with four classes; returns the folder's path."""
    plain = (bands, dtype) == (records.RGB, "uint8")
    encoded, counts = [], 0
    for i in range(images):
        pixels = (
            np.random.default_rng(i).integers(0, 256 if dtype == "uint8" else 5000, (60, 64, len(bands))).astype(dtype)
        )
        counts = counts + statistics.count(pixels)
        encoded.append(
            b"no image" if i in undecodable else toy_shards.png(pixels) if plain else codecs.encode_tiff(pixels)
        )
    ranges = statistics.default_ranges(counts, dtype)
    mean, std = ([0.5] * 3, [0.29] * 3) if plain else map(list, statistics.moments(counts, dtype, ranges))
    facts = {"ranges": ranges, "mean": mean, "std": std, "fingerprint": fingerprint}
    split = toy_shards.Split(encoded, [i % 4 for i in range(images)], facts=facts)
    toy_shards.write(folder, {"train": split}, bands=bands, dtype=dtype, class_names=list("abcd"))
    (folder / statistics.file_name("train")).write_bytes(statistics.to_bytes(counts))
    return str(folder)
