"""Datasets, pictures, archives, names and tables: a sound one of each, and what reads it. See `artefacts`."""

import json
import pathlib

import numpy as np
import toy_data
import toy_files
from PIL import Image

from data_prep import browse, stats
from data_prep.convert import folder as folders_of_shards
from data_prep.convert import shards as part_files
from data_prep.convert import split_plan
from data_prep.convert.pixels import Stored, content_hash
from data_prep.inputs import archives, sources
from data_prep.inspect import check_shard, folder_info
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data import codecs, records, statistics
from pera_jax.data.images import foreign
from pera_jax.data.images.image_errors import ImageDecodeError
from pera_jax.data.labelled import label_tables, samples, scenes

# ---------------------------------------------------------------- datasets


def make_shards(place: pathlib.Path) -> None:
    toy_data.write(place / "toy", images=6)
    report = {
        "split": "train",
        "inputs": 6,
        "failed": {"number": 1, "first": [{"key": "a", "reason": "b"}]},
        "changed": {"x": 3},
    }
    (place / "toy/train.report.json").write_text(json.dumps(report))


def read_shards(place: pathlib.Path) -> None:
    data = str(place / "toy")
    found = samples.open_samples(data, "train")
    for index in range(len(found)):
        try:
            found.decode(found.raw(index))
        except ImageDecodeError as error:  # training replaces it, and counts it
            printable(error)
    stats.main([data, "--output", str(place / "statistics")])
    browse.main([data, "--output", str(place / "page.html"), "--images", "4"])


def verify_shards(place: pathlib.Path) -> None:
    info, _ = folder_info.load(place / "toy", "train")
    found = check_shard.check(check_shard.Task(place / "toy", "train", 0, info), lambda done: None)
    for text in found.shard_problems + [problem[2] for problem in found.record_problems]:
        print(printable(text, limit=1000))
    folder_info.histogram(place / "toy", info, "train")


def make_partial(place: pathlib.Path) -> None:
    split = _split(place)
    split.partial.mkdir(parents=True)
    split_plan.write(split)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    encoded = toy_files.encode(pixels)

    def convert(item):
        return Stored(encoded, statistics.count(pixels), (), content_hash(encoded))

    part_files.write_shard(split.job(0), convert, lambda done, corrupt: None)


def _split(place: pathlib.Path) -> split_plan.Split:
    items = [part_files.Item(str(place / f"{i}.png"), f"{i}.png", i % 2, 10) for i in range(3)]
    return split_plan.Split(place / "out", "set", "train", list(records.RGB), "uint8", ["a", "b"], False, items, 1, "f")


def read_partial(place: pathlib.Path) -> None:
    split = _split(place)
    split_plan.check_unfinished(split)
    folders_of_shards._finished(split, split.shard_name(0))


# ---------------------------------------------------------------- pictures, archives, names, tables


def make_pictures(place: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for name, content in toy_files.contents(rng).items():
        if name.startswith("written/"):
            (place / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "in" / name).write_bytes(content)
    (place / "in/written/deep.tif").write_bytes(codecs.encode_tiff(rng.integers(0, 5000, (20, 24, 5), np.uint16)))


def read_pictures(place: pathlib.Path) -> None:
    for file in sorted((place / "in").rglob("*.*")):
        for read in (foreign.read, foreign.read_indices, codecs.decode_image):
            try:
                read(file.read_bytes())
            except ImageDecodeError as error:
                printable(error)


def make_archives(place: pathlib.Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    held = {f"train/{kind}/{i}.png": toy_files.encode(pixels) for kind in ("wood", "sea") for i in range(3)}
    for ending in ("zip", "tar", "tar.gz", "tar.xz"):
        toy_files.pack(place / f"in.{ending}", held)


def read_archives(place: pathlib.Path) -> None:
    for path in sorted(place.glob("in.*")):
        archives.close_all()
        try:
            inventory = sources.take_stock([path])
            inventory.label()
        except UserError as error:
            print(f"{error}")
            continue
        for item in inventory:
            try:
                foreign.read(sources.read(item))
            except ImageDecodeError as error:
                print(printable(f"{item.key}: {error}"))
    archives.close_all()


def make_names(place: pathlib.Path) -> None:
    for kind in "ab":
        (place / "in" / kind).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40), (i, i, i)).save(place / "in" / kind / f"{i}.png")
    (place / "labels.csv").write_text(
        "key,label\n" + "".join(f"{kind}/{i}.png,{kind}\n" for kind in "ab" for i in range(2))
    )
    (place / "classes.txt").write_text("tree\nwater\n")


def read_names(place: pathlib.Path) -> None:
    inventory = sources.take_stock([place / "in"])
    inventory.label()
    inventory.digest([])
    found = samples.open_images(str(place / "in"))
    samples.check_labels(found, None)
    for key in found.keys:
        print(printable(key))


def read_tables(place: pathlib.Path) -> None:
    keys = ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    for read in (
        lambda: label_tables.read_labels(place / "labels.csv", keys),
        lambda: scenes._class_names(place, 1, ()),
    ):
        try:
            read()
        except UserError as error:
            print(error)
