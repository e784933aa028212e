"""Small labelled data sets of each kind, and a run with checkpoints, for the tests of probes and reports."""

import dataclasses
import io
import json
import pathlib

import jax
import numpy as np
from array_record.python import array_record_module
from PIL import Image

from pera_jax import config as configs
from pera_jax.bands import Bands
from pera_jax.data import records
from pera_jax.objectives.pera import objective as pera
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint_store, run_meta

CLASSES = ["dots", "plain", "stripes"]


def picture(label: int, rng: np.random.Generator) -> Image.Image:
    """Noise, with dots or stripes for two of the three classes; 50 to 90 px."""
    height, width = rng.integers(50, 90, 2)
    pixels = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
    if label == 0:
        pixels[::6, ::6] = 255
    if label == 2:
        pixels[:, ::8] //= 3
    return Image.fromarray(pixels)


def pictures(labels: list) -> list[bytes]:
    """A PNG for each label; None as 0."""
    rng, result = np.random.default_rng(len(labels)), []
    for label in labels:
        file = io.BytesIO()
        picture(label or 0, rng).save(file, "PNG")
        result.append(file.getvalue())
    return result


def write_shards(folder: pathlib.Path, labels: dict[str, list], class_names=CLASSES, bands=None) -> pathlib.Path:
    """A data set folder with one PNG per label and split."""
    folder.mkdir()
    splits = {}
    for split, values in labels.items():
        name = f"{split}.array_record"
        writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
        for index, (label, image) in enumerate(zip(values, pictures(values), strict=True)):
            writer.write(records.encode_record(image, f"{index}.png", label))
        writer.close()
        size = (folder / name).stat().st_size
        splits[split] = records.SplitInfo(
            len(values), [name], [len(values)], [size], [[0.0, 255.0]] * 3, [0.4] * 3, [0.1] * 3, {}, split, ""
        )
    bands = bands or ["red", "green", "blue"]
    info = records.DatasetInfo("small", bands, "uint8", class_names, False, records.FORMAT_VERSION, splits)
    (folder / records.INFO_FILE).write_text(json.dumps(dataclasses.asdict(info)))
    return folder


def write_folders(folder: pathlib.Path, labels: dict[str, list[int]]) -> pathlib.Path:
    """The same images in class folders, as FOLDER/SPLIT/CLASS/NUMBER.png."""
    for split, values in labels.items():
        for index, (label, image) in enumerate(zip(values, pictures(values), strict=True)):
            place = folder / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index}.png").write_bytes(image)
    return folder


def write_run(workdir: pathlib.Path, saved=((4, 0), (12, 77)), bands=Bands.plain(mean=0.4, std=0.1)) -> pathlib.Path:
    """A run with a checkpoint for each (step, seed), of a network as it is at birth; seed 0 is the run's own."""
    config = configs.smoke(configs.default())
    if bands.names != records.RGB:
        config.pera.views.update(dict(saturation=0.0, hue=0.0, student_grayscale=0.0))
    objective = pera.PerA.from_config(config, bands)
    card = {"name": "small", "split": "train", "records": 45, "fingerprint": "train", "class_names": CLASSES}
    meta = run_meta.describe(config, objective, card)
    store = checkpoint_store.Store(str(workdir), keep_last=20, keep_every=100)
    optimizer = steps.make_optimizer(config.optimizer)
    birth = jax.jit(lambda seed: steps.new_state(objective, optimizer, seed))
    for step, seed in saved:
        state = birth(seed + config.seed)
        store.save(state.replace(step=jax.numpy.int32(step)), meta, {"batches": step, "replaced": 0, "drawn": []})
    store.close()
    return workdir
