"""Features, predictions and scores do not depend on batch size, devices and hosts; on real images if available."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import labelled_toys
import numpy as np
import pytest
import toy_hosts
import toy_shards

from pera_jax import probe
from pera_jax.data import codecs
from pera_jax.probes.classification import knn
from pera_jax.probes.runner import results

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHOTOS = pathlib.Path(os.environ.get("PERA_JAX_PHOTOS", ROOT.parent / "shared" / "data" / "aid"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return labelled_toys.write_run(tmp_path_factory.mktemp("run"), [(1, 0)])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """11 training and 3 test images of each of 3 classes of AID; toy images without it. They fill no batch."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    if not PHOTOS.is_dir():
        return labelled_toys.write_folders(folder, {"train": [0, 1, 2] * 11, "test": [0, 1, 2] * 3})
    for split, number in (("train", 11), ("test", 3)):
        for place in sorted((PHOTOS / split).iterdir())[:3]:
            (folder / split / place.name).mkdir(parents=True)
            for file in sorted(place.iterdir())[:number]:
                shutil.copy(file, folder / split / place.name)
    return folder


def arguments(run, data, output, batch: int) -> list[str]:
    quick = ["--set", "logistic.seeds=(0,)", "--set", "logistic.smallest=-3", "--set", "logistic.largest=1"]
    names = {"--run": run, "--data": data, "--output": output, "--tasks": "knn,logistic", "--batch-size": batch}
    return [*(str(word) for pair in names.items() for word in pair), *quick]


def on_two_hosts(run, data, output, devices: int, batch: int) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "pera_jax.probe", *arguments(run, data, output, batch)]
    return toy_hosts.launch(command, 2, devices)


def found(output: pathlib.Path):
    """(arrays of the training and the test split, the entries)."""
    arrays = {}
    for file in (output / "cache").glob("*.npz"):
        kept = dict(np.load(file))
        split = json.loads(str(kept.pop("of")))["split"]
        arrays |= {f"{split}/{name}": values for name, values in kept.items()}
    return arrays, [results.read_step(output, 1, name)[0] for name in ("knn", "logistic")]


def test_scores_depend_on_nothing_but_images_and_weights(run, data, tmp_path, request):
    processes = on_two_hosts(run, data, tmp_path / "hosts", devices=2, batch=8)
    probe.main(arguments(run, data, tmp_path / "eight", batch=100))
    request.getfixturevalue("one_device")
    probe.main(arguments(run, data, tmp_path / "one", batch=7))
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    (first, entries), *others = (found(tmp_path / name) for name in ("one", "eight", "hosts"))
    labels = np.arange(len(first["train/class_tokens"])) % 5  # any will do to compare predictions image by image

    def predicted(arrays):
        return knn.predict(arrays["train/class_tokens"][:, -1], labels, arrays["test/class_tokens"][:, -1], 5, (5, 20))

    for arrays, other in others:
        assert sorted(arrays) == sorted(first) and len(first) == 4
        for name, values in arrays.items():
            np.testing.assert_allclose(values, first[name], atol=1e-5)
        for k, classes in predicted(arrays).items():
            np.testing.assert_array_equal(classes, predicted(first)[k])
        for one, entry in zip(entries, other, strict=True):
            assert entry["scores"] == one["scores"]
            assert entry["details"].get("confusion") == one["details"].get("confusion")


def test_hosts_fail_together(run, tmp_path):
    """An image that only one of them reads, in the second half of the training split."""
    labels = {"train": [0, 1, 2] * 5, "test": [0, 1, 2]}
    images = {split: labelled_toys.pictures(values) for split, values in labels.items()}
    images["train"][8] = codecs.encode_tiff(np.zeros((60, 60, 4), np.uint8))
    splits = {split: toy_shards.Split(images[split], labels[split]) for split in labels}
    data = toy_shards.write(tmp_path / "data", splits, class_names=labelled_toys.CLASSES)
    processes = on_two_hosts(run, data, tmp_path / "out", devices=1, batch=4)
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert "8.png of" in said[1] and "cannot be decoded" in said[1] and "error: " in said[0], said
