"""Small labeled datasets of each kind, and a run with checkpoints, for tests of probes and reports."""

import functools
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import toy_shards

from pera_jax import config as configs
from pera_jax.bands import Bands
from pera_jax.data import records
from pera_jax.objectives.pera import objective as pera
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint_store, run_meta

CLASSES = ["dots", "plain", "stripes"]


def picture(label: int, rng: np.random.Generator) -> np.ndarray:
    """Noise, with dots or stripes for two of the three classes; 50 to 90 px."""
    height, width = rng.integers(50, 90, 2)
    pixels = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
    if label == 0:
        pixels[::6, ::6] = 255
    if label == 2:
        pixels[:, ::8] //= 3
    return pixels


def pictures(labels: list) -> list[bytes]:
    """A PNG for each label; None as 0."""
    rng = np.random.default_rng(len(labels))
    return [toy_shards.png(picture(label or 0, rng)) for label in labels]


def write_shards(folder: pathlib.Path, labels: dict[str, list], class_names=CLASSES, bands=records.RGB) -> pathlib.Path:
    """A dataset folder with one PNG per label and split."""
    facts = {"mean": [0.4] * 3, "std": [0.1] * 3}
    splits = {
        name: toy_shards.Split(pictures(values), values, facts=facts | {"fingerprint": name})
        for name, values in labels.items()
    }
    return toy_shards.write(folder, splits, bands=bands, class_names=class_names)


def write_folders(folder: pathlib.Path, labels: dict[str, list[int]]) -> pathlib.Path:
    """The same images in class folders, as FOLDER/SPLIT/CLASS/NUMBER.png."""
    for split, values in labels.items():
        for index, (label, image) in enumerate(zip(values, pictures(values), strict=True)):
            place = folder / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index}.png").write_bytes(image)
    return folder


def write_run(workdir: pathlib.Path, saved=((4, 0), (12, 77)), bands=Bands.plain(mean=0.4, std=0.1)) -> pathlib.Path:
    """A run with a checkpoint for each (step, seed), of a network as it is at birth; seed 0 is the run's own.

    Equal arguments give copies of one run.
    """
    shutil.copytree(_written(tuple(saved), bands), workdir, dirs_exist_ok=True)
    return workdir


@functools.cache
def _runs() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="toy_runs_")


@functools.cache
def _written(saved: tuple, bands: Bands) -> pathlib.Path:
    workdir = pathlib.Path(tempfile.mkdtemp(dir=_runs().name))
    config, objective, birth = _newborn(bands)
    card = {"name": "small", "split": "train", "records": 45, "fingerprint": "train", "class_names": CLASSES}
    meta = run_meta.describe(config, objective, card)
    store = checkpoint_store.Store(str(workdir), keep_last=20, keep_every=100)
    for step, seed in saved:
        state = birth(seed + config.seed).replace(step=np.int32(step))
        store.save(jax.device_put(state, jax.devices()[0]), meta, {"batches": step, "replaced": 0, "drawn": []})
    store.close()
    return workdir


@functools.cache
def _newborn(bands: Bands):
    config = configs.smoke(configs.default())
    if bands.names != records.RGB:
        config.pera.views.update(dict(saturation=0.0, hue=0.0, student_grayscale=0.0))
    objective = pera.PerA.from_config(config, bands)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    return config, objective, jax.jit(lambda seed: steps.new_state(objective, optimizer, seed))
