"""What the program reads: a sound one of each kind, made once, and what reads it.

`TARGETS` lists (name, how to make it, the files to damage, how to read it). A reader may raise UserError and nothing else;
where it returns something, that must be the same as of the sound one.
"""

import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tiny
import toy_data
import toy_files
import toy_weights
from PIL import Image

from data_prep import archives, browse, check_shard, folder_info, sources, stats
from data_prep import folder as folders_of_shards
from data_prep import shards as part_files
from data_prep.pixels import Stored, content_hash
from pera_jax import export, feature_folder, files, intact, metrics, probe, run_meta
from pera_jax.common import digests
from pera_jax.common.text import printable
from pera_jax.data import codecs, foreign, records, statistics
from pera_jax.data.image_errors import ImageDecodeError
from pera_jax.errors import UserError
from pera_jax.probes import cache, entries, folders, results, samples, scenes
from pera_jax.reports import folder as run_folder
from pera_jax.reports import page
from pera_jax.weights import arrays, exported, pickles, timm


@dataclasses.dataclass(frozen=True)
class Target:
    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], Any]
    damaged: str = "**/*"  # which files


# ---------------------------------------------------------------- data sets


def make_shards(place: pathlib.Path) -> None:
    toy_data.write(place / "toy", images=6)
    report = {"split": "train", "inputs": 6, "failed": {"number": 1, "first": [{"key": "a", "reason": "b"}]}, "changed": {"x": 3}}
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
    folders_of_shards._write_plan(split)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    encoded = toy_files.encode(pixels)

    def convert(item):
        return Stored(encoded, statistics.count(pixels), (), content_hash(encoded))

    part_files.write_shard(split.job(0), convert, lambda done, corrupt: None)


def _split(place: pathlib.Path) -> folders_of_shards.Split:
    items = [part_files.Item(str(place / f"{i}.png"), f"{i}.png", i % 2, 10) for i in range(3)]
    return folders_of_shards.Split(place / "out", "set", "train", list(records.RGB), "uint8", ["a", "b"], False, items, 1, "f")


def read_partial(place: pathlib.Path) -> None:
    split = _split(place)
    folders_of_shards.check_unfinished(split)
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
    (place / "labels.csv").write_text("key,label\n" + "".join(f"{kind}/{i}.png,{kind}\n" for kind in "ab" for i in range(2)))
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
    for read in (lambda: folders.read_labels(place / "labels.csv", keys), lambda: scenes._class_names(place, 1, ())):
        try:
            read()
        except UserError as error:
            print(error)


# ---------------------------------------------------------------- runs and what is written beside them


def make_run(place: pathlib.Path) -> None:
    config = tiny.config()
    card = {"name": "toy", "split": "train", "records": 10, "fingerprint": "f", "class_names": ["a", "b"]}
    run = place / "run"
    run.mkdir()
    run_meta.write(str(run), run_meta.describe(config, tiny.objective(config), card))
    lines = [{"step": s, "loss": 5.0 / s, "norm/gradient": "nan", "time/images_per_second": 50.0, "time/mfu": 0.1} for s in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "alarms.jsonl").write_text(json.dumps({"step": 2, "alarm": "collapse", "text": "of the class token"}) + "\n")
    for encoder, step, task in (("teacher", 3, "knn"), ("pixels", 0, "knn"), ("untrained", 0, "segmentation")):
        score = {"value": 0.5, "low": 0.4, "high": None, "seeds": [0.5, 0.6]}
        entry = {
            "name": task, "task": task, "settings": {"k": [1, 2]}, "spec": {"task": task, "name": task},
            "checkpoint": {"run": "r", "step": step, "encoder": encoder, "image_size": 48, "saved": "s", "origin": "..", "weights": "w"},
            "data": {"path": "x", "name": "small", "test_images": 12, "class_names": ["a", "b"], "train_split": "train",
                     "test_split": "test", "train_fingerprint": "f", "test_fingerprint": "g", "labels": "", "train_images": 3},
            "scores": {"top1": score, "top5": score}, "seconds": 1.0,
            "details": {"confusion": [[3, 1], [0, 4]], "per_class": {"a": 0.5, "b": None}, "chosen": ["x"]},
        }  # fmt: skip
        files.write_json(run / "probe" / results.folder_of(encoder, step) / f"{task}.json", entry)


def show_results(place: pathlib.Path) -> None:
    probe.main(["--run", str(place / "run"), "--show"])
    for file in (place / "run/probe").rglob("*.json"):
        entries.read(file)
    results.write_table(place / "run/probe")


def read_run(place: pathlib.Path) -> None:
    found = run_folder.read(str(place / "run"), None)
    before, after, _ = page.of_the_folder(found)
    page.assembled(found, [*before, *after])


def resume_metrics(place: pathlib.Path) -> None:
    metrics.MetricsWriter(str(place / "run"), resume_step=2, total=9, batch_size=4).close()


def make_meta(place: pathlib.Path) -> None:
    config = tiny.config()
    card = {"name": "toy", "split": "train", "records": 10, "fingerprint": "f", "class_names": None}
    (place / "meta.json").write_text(json.dumps(run_meta.describe(config, tiny.objective(config), card) | {"step": 3}))


def read_meta(place: pathlib.Path) -> None:
    """As a save of an older version would hold it: digests of newer ones refuse all that differs, before it is looked at."""
    from pera_jax import checkpoint
    from pera_jax.bands import Bands
    from pera_jax.models import vit

    try:
        meta = json.loads((place / "meta.json").read_text())
    except (ValueError, RecursionError):  # Orbax reads it, and `intact.read` tells what it raises
        return
    if isinstance(meta, dict):
        meta.pop(intact.ENTRY, None)
        meta["format_version"] = 2 if meta.get("format_version") == intact.FORMAT_VERSION else meta.get("format_version")
    found, _ = intact._unsealed(place, meta)
    Bands.of(found)
    vit.build(found["model"])
    checkpoint.objective_of(found)


def make_cache(place: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    cache.Cache(place / "cache").arrays({"of": "x"}, lambda: {"class_token": rng.normal(size=(20, 8)).astype(np.float32)})


def read_cache(place: pathlib.Path) -> str:
    made = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    return digests.of_named(cache.Cache(place / "cache").arrays({"of": "x"}, lambda: {"class_token": made}))


PLAN = {"format_version": 1, "weights": "w", "step": 3, "data": {"name": "toy", "split": "train"}, "arrays": {"class_token": [8]}}


def make_features(place: pathlib.Path) -> None:
    (place / "features").mkdir()
    files.write_json(place / "features" / feature_folder.PLAN, PLAN)
    np.save(place / "features/class_token-00000.npy", np.ones((4, 8), np.float32))


def read_features(place: pathlib.Path) -> None:
    feature_folder._begin(place / "features", PLAN)
    feature_folder._whole(place / "features", 0, 4, PLAN["arrays"])


# ---------------------------------------------------------------- weights


def make_export(place: pathlib.Path) -> None:
    file = place / "a.safetensors"
    arrays.write(file, toy_weights.dictionary(np.random.default_rng(0)))
    export.main(["import-released", str(file), "--heads", "2", "--output", str(place / "run")])
    export.main(["timm", "--run", str(place / "run"), "--output", str(place / "out")])
    (place / "timm").mkdir()
    arrays.write(place / "timm/a.safetensors", arrays.read(place / "out/model.safetensors"))
    (place / "timm/config.json").write_bytes((place / "out/config.json").read_bytes())
    with zipfile.ZipFile(place / "timm/a.params", "w") as archive:
        archive.writestr("a/data.pkl", _pickle())


def _pickle() -> bytes:
    import pickle

    file = io.BytesIO()
    pickle.dump({"model": {"a": [1.0, 2.0], "b": "text"}, "epoch": 3, "x" * 70000: b"\0" * 300}, file, protocol=2)
    return file.getvalue()


def read_export(place: pathlib.Path) -> str:
    weights = exported.load(place / "out", None, "teacher")
    return cache.digest(weights.backbone)


def read_foreign_weights(place: pathlib.Path) -> None:
    file = place / "timm/a.safetensors"
    for read in (
        lambda: timm.beside(file), lambda: timm.without_extras(arrays.read(file)), lambda: pickles.load(place / "timm/a.params"),
    ):  # fmt: skip
        try:
            read()
        except UserError as error:
            print(error)


TARGETS = {
    "shards": Target(make_shards, read_shards),
    "verify": Target(make_shards, verify_shards),
    "unfinished conversion": Target(make_partial, read_partial, "out/.train.partial/*"),
    "pictures": Target(make_pictures, read_pictures),
    "archives": Target(make_archives, read_archives, "in.*"),
    "names": Target(make_names, read_names, "in/*/*"),
    "tables": Target(make_names, read_tables, "*.*"),
    "results": Target(make_run, show_results, "run/probe/*/*.json"),
    "report": Target(make_run, read_run),
    "metrics": Target(make_run, resume_metrics, "run/*.jsonl"),
    "meta": Target(make_meta, read_meta),
    "feature cache": Target(make_cache, read_cache),
    "feature folder": Target(make_features, read_features),
    "export": Target(make_export, read_export, "out/*.*"),
    "foreign weights": Target(make_export, read_foreign_weights, "timm/*"),
}
