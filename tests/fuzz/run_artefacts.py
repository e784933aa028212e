"""Runs, what is written beside them, and weights: a sound one of each, and what reads it. See `artefacts`."""

import io
import json
import pathlib
import pickle
import zipfile

import numpy as np
import tiny
import toy_weights

from pera_jax import export, objectives, probe
from pera_jax.bands import Bands
from pera_jax.common import digests, files
from pera_jax.common.errors import UserError
from pera_jax.encoder import cache, exported, feature_folder
from pera_jax.formats import arrays, pickles
from pera_jax.models import vit
from pera_jax.probes.runner import entries, results
from pera_jax.reports import folder as run_folder
from pera_jax.reports import page
from pera_jax.training import metrics
from pera_jax.training.checkpoints import intact, run_meta
from pera_jax.weights import timm

# ---------------------------------------------------------------- runs and what is written beside them


def make_run(place: pathlib.Path) -> None:
    config = tiny.config()
    card = {"name": "toy", "split": "train", "records": 10, "fingerprint": "f", "class_names": ["a", "b"]}
    run = place / "run"
    run.mkdir()
    run_meta.write(str(run), run_meta.describe(config, tiny.objective(config), card))
    lines = [
        {"step": s, "loss": 5.0 / s, "norm/gradient": "nan", "time/images_per_second": 50.0, "time/mfu": 0.1}
        for s in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "alarms.jsonl").write_text(json.dumps({"step": 2, "alarm": "collapse", "text": "of the class token"}) + "\n")
    for encoder, step, task in (("teacher", 3, "knn"), ("pixels", 0, "knn"), ("untrained", 0, "segmentation")):
        score = {"value": 0.5, "low": 0.4, "high": None, "seeds": [0.5, 0.6]}
        entry = {
            "name": task, "task": task, "settings": {"k": [1, 2]}, "spec": {"task": task, "name": task},
            "checkpoint": {"run": "r", "step": step, "encoder": encoder, "image_size": 48, "saved": "s", "origin": "..",
            "weights": "w"},
            "data": {"path": "x", "name": "small", "test_images": 12, "class_names": ["a", "b"], "train_split": "train",
                     "test_split": "test", "train_fingerprint": "f", "test_fingerprint": "g", "labels": "",
                     "train_images": 3},
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
    before, after, _ = page.folder_sections(found)
    page.assembled(found, [*before, *after])


def resume_metrics(place: pathlib.Path) -> None:
    metrics.MetricsWriter(str(place / "run"), resume_step=2, total=9, batch_size=4).close()


def make_meta(place: pathlib.Path) -> None:
    config = tiny.config()
    card = {"name": "toy", "split": "train", "records": 10, "fingerprint": "f", "class_names": None}
    (place / "meta.json").write_text(json.dumps(run_meta.describe(config, tiny.objective(config), card) | {"step": 3}))


def read_meta(place: pathlib.Path) -> None:
    """As a save of an older version would hold it: digests of newer ones refuse all that differs, before it is looked
    at."""
    try:
        meta = json.loads((place / "meta.json").read_text())
    except (OSError, ValueError, RecursionError):  # Orbax reads it, and `intact.read` tells what it raises
        return
    if isinstance(meta, dict):
        meta.pop(intact.ENTRY, None)
        meta["format_version"] = (
            2 if meta.get("format_version") == intact.FORMAT_VERSION else meta.get("format_version")
        )
    found, _ = intact._parse_meta(place, meta)
    Bands.from_metadata(found)
    vit.build(found["model"])
    objectives.from_metadata(found)


def make_cache(place: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    cache.Cache(place / "cache").arrays(
        {"of": "x"}, lambda: {"class_token": rng.normal(size=(20, 8)).astype(np.float32)}
    )


def read_cache(place: pathlib.Path) -> str:
    made = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    return digests.arrays_digest(cache.Cache(place / "cache").arrays({"of": "x"}, lambda: {"class_token": made}))


PLAN = {
    "format_version": 1,
    "weights": "w",
    "step": 3,
    "data": {"name": "toy", "split": "train"},
    "arrays": {"class_token": [8]},
}


def make_features(place: pathlib.Path) -> None:
    (place / "features").mkdir()
    files.write_json(place / "features" / feature_folder.PLAN, PLAN)
    file = place / "features/class_token-00000.npy"
    np.save(file, np.ones((4, 8), np.float32))
    feature_folder._write_sums(place / "features", {file.name: digests.file_digest(file)})


def read_features(place: pathlib.Path) -> list:
    """The features where they are accepted as intact, else those that would be computed again."""
    output, made = place / "features", np.ones((4, 8), np.float32)
    feature_folder._begin(output, PLAN)
    intact_part = feature_folder._intact(output, 0, PLAN["arrays"], feature_folder._read_sums(output))
    return (np.load(output / "class_token-00000.npy") if intact_part else made).tolist()


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
    file = io.BytesIO()
    pickle.dump({"model": {"a": [1.0, 2.0], "b": "text"}, "epoch": 3, "x" * 70000: b"\0" * 300}, file, protocol=2)
    return file.getvalue()


def read_export(place: pathlib.Path) -> str:
    weights = exported.load(place / "out", None, "teacher")
    return cache.digest(weights.backbone)


def read_foreign_weights(place: pathlib.Path) -> None:
    file = place / "timm/a.safetensors"
    for read in (
        lambda: timm.read_config(file), lambda: timm.without_extras(arrays.read(file), "it"),
        lambda: pickles.load(place / "timm/a.params"),
    ):  # fmt: skip
        try:
            read()
        except UserError as error:
            print(error)
