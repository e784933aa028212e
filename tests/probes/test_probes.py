"""The probe job on a small run and dataset: what scores depend on, what is written, invalid input."""

import csv
import functools
import json
import pathlib
import re

import jax
import labelled_toys
import numpy as np
import pytest
import toy_shards
from labelled_toys import write_shards
from tensorboardX.proto import event_pb2

from pera_jax import probe
from pera_jax.common import errors
from pera_jax.data import decode
from pera_jax.data.labelled import samples
from pera_jax.encoder import extract as features
from pera_jax.encoder import load
from pera_jax.models import vit
from pera_jax.probes.runner import results

QUICK = ("knn", "--set", "knn.k=(5,20)")
on_one_device = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    labels = {"train": [0, 1, 2] * 15, "test": [0, 1, 2] * 7, "few": [0, 1] * 6, "part": [0, 1, 1] * 10}
    return write_shards(tmp_path_factory.mktemp("data") / "small", labels)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return labelled_toys.write_run(tmp_path_factory.mktemp("run"))


@on_one_device
def test_features_are_the_networks_tokens(run, data):
    weights, found = load.load_weights(run), samples.open_samples(str(data), "test")
    extractor = features.Extractor(weights.backbone, weights.meta)
    got = features.extract(extractor, found, 40, batch_size=5)
    images = np.stack([decode.resized(found.decode(found.raw(index)), 40) for index in range(len(found))])
    normalized = (images / 255.0 - 0.4) / 0.1
    model = vit.build(weights.meta["model"])
    encode = jax.jit(lambda images: model.apply({"params": weights.backbone}, images, blocks=4))
    tokens = encode(normalized.astype(np.float32))
    np.testing.assert_allclose(got.class_tokens[:, -1], tokens["class_token"], atol=1e-5)
    np.testing.assert_allclose(got.patch_means[:, -1], tokens["patch_tokens"].mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(got.class_tokens[:, 0], tokens["blocks"][0][:, 0], atol=1e-5)
    assert got.concatenated(4, True).shape == (21, 4 * 2 * 32)
    np.testing.assert_array_equal(got.concatenated(1, False), got.class_tokens[:, -1])
    maps = extractor.maps(images[:, :24])  # [21, 4, 3, 5, 32], not square
    tokens = encode(normalized[:, :24].astype(np.float32))
    np.testing.assert_allclose(maps[:, -1].reshape(21, 15, 32), tokens["patch_tokens"], atol=1e-5)


def test_the_baseline_knows_colors_only(run):
    meta = load.load_weights(run).meta
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    pixels, patch = features.Pixels(meta), (images[:, 8:16, 16:24] / 255).reshape(3, 64, 3)
    assert pixels.maps(images).shape == (3, 1, 2, 3, 6)
    wanted = np.concatenate([patch.mean(axis=1), patch.std(axis=1)], axis=1)
    np.testing.assert_allclose(pixels.maps(images)[:, 0, 1, 2], wanted, atol=1e-6)
    whole = (images / 255).reshape(3, -1, 3)
    np.testing.assert_allclose(
        pixels(images).class_tokens[:, 0], np.concatenate([whole.mean(axis=1), whole.std(axis=1)], axis=1), atol=1e-6
    )


def test_padding_never_counts(run, data):
    """Same features, hence scores, for every batch size and number of devices; 21 images fill no batch."""
    weights, found = load.load_weights(run), samples.open_samples(str(data), "test")
    extracted = {}
    for devices in (1, 8):
        extractor = features.Extractor(weights.backbone, weights.meta, jax.devices()[:devices])
        for batch in (8, 100):
            extracted[devices, batch] = features.extract(extractor, found, 48, batch)
    first = extracted[1, 8]
    assert first.class_tokens.shape == (21, 4, 32)
    for got in extracted.values():
        np.testing.assert_allclose(got.class_tokens, first.class_tokens, atol=1e-5)
        np.testing.assert_allclose(got.patch_means, first.patch_means, atol=1e-5)


def tags_of(folder: pathlib.Path) -> dict[str, list[int]]:
    """The steps at which each tag is in a folder's TensorBoard files; TFRecords without their checksums."""
    tags = {}
    for file in sorted(folder.iterdir()):
        raw, position = file.read_bytes(), 0
        while position < len(raw):
            length = int.from_bytes(raw[position : position + 8], "little")
            event = event_pb2.Event.FromString(raw[position + 12 : position + 12 + length])
            position += length + 16
            for value in event.summary.value:
                tags.setdefault(value.tag, []).append(event.step)
    return tags


def entry_of(base: pathlib.Path, place: str) -> dict:
    [file] = base.glob(f"{place}-*.json")
    return json.loads(file.read_text())


@on_one_device
def test_the_job_writes_what_it_found(run, data, capsys):
    base = run / "probe"
    command = ["--run", str(run), "--data", str(data), "--image-size", "48"]
    changes = ["knn.k=(5,20)", "linear.seeds=(0,1)", "linear.blocks=(1,)"]
    linear = ["--tasks", "knn,linear", *(word for change in changes for word in ("--set", change))]
    entries = {}
    for batch in ("7", "32"):
        probe.main([*command, *linear, "--batch-size", batch, "--output", str(run / f"batch_{batch}")])
        entries[batch] = [entry_of(run / f"batch_{batch}", f"step_000012/{name}") for name in ("knn", "linear")]
    for one, other in zip(*entries.values(), strict=True):
        assert one["scores"] == other["scores"] and one["details"] == other["details"]
    probe.main([*command, "--tasks", *QUICK])
    probe.main([*command, "--tasks", *QUICK, "--encoder", "untrained"])
    probe.main([*command, "--tasks", *QUICK, "--encoder", "pixels"])

    knn, linear = entries["32"]
    assert knn["checkpoint"]["step"] == 12 and knn["checkpoint"]["encoder"] == "teacher"
    assert knn["data"]["test_fingerprint"] == "test" and knn["data"]["train_images"] == 45
    assert knn["settings"]["k"] == [5, 20] and linear["settings"]["seeds"] == [0, 1]
    # Stripes and dots against plain ground: the tokens of a network at birth tell them apart, far better than chance.
    assert linear["scores"]["linear"]["value"] > 0.6 and len(linear["scores"]["linear"]["seeds"]) == 2
    for entry in (knn, linear):
        for name, score in entry["scores"].items():
            assert name.startswith(entry["task"]) and score["low"] <= score["value"] <= score["high"]
    rows = list(csv.DictReader((base / "results.csv").open()))
    wanted = [entry_of(base, f"{place}/knn") for place in ("pixels", "untrained", "step_000012")]
    assert [(row["encoder"], row["score"], float(row["value"])) for row in rows] == [
        (entry["checkpoint"]["encoder"], name, score["value"])
        for entry in wanted
        for name, score in entry["scores"].items()
    ]
    [tagged] = [steps for tag, steps in tags_of(base / "tb").items() if re.fullmatch(r"probe/knn-\w{10}/knn20", tag)]
    assert sorted(tagged) == [0, 12]  # pixels are no step of the run
    capsys.readouterr()
    probe.main(["--run", str(run), "--show"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("| result") and len(shown) == 2 + len(rows) and len({len(line) for line in shown}) == 1
    # The weights of step 4 are those that the stored seed makes, so step 4 and the untrained network score the same.
    probe.main([*command, "--tasks", *QUICK, "--step", "4", "--output", str(run / "four")])
    four, untrained = entry_of(run / "four", "step_000004/knn"), entry_of(base, "untrained/knn")
    assert four["scores"] == untrained["scores"] and four["details"] == untrained["details"]
    assert four["checkpoint"]["weights"] == untrained["checkpoint"]["weights"] != knn["checkpoint"]["weights"]


@on_one_device
def test_features_are_encoded_once(run, data, monkeypatch, tmp_path):
    """A second task, and a second command, take them from the cache; another image size or other data does not."""
    calls = []
    extract = features.extract
    monkeypatch.setattr(features, "extract", lambda *args: calls.append(args[2]) or extract(*args))
    command = ["--run", str(run), "--output", str(tmp_path), "--set", "knn.k=(5,)", "--tasks", "knn"]
    for _ in range(2):
        probe.main([*command, "--data", str(data)])
    assert calls == [48, 48]  # the training and the test split
    probe.main([*command, "--data", str(data), "--image-size", "40"])
    probe.main([*command, "--data", str(data), "--encoder", "pixels"])
    probe.main([*command, "--data", str(data), "--step", "4"])
    assert calls == [48, 48, 40, 40, 48, 48, 48, 48]
    for number, file in enumerate(sorted((tmp_path / "cache").glob("*.npz"))):  # cut off, as by a crash of the machine
        file.write_bytes(file.read_bytes()[: 100 * (number % 2)])
    before = entry_of(tmp_path, "step_000004/knn")
    probe.main([*command, "--data", str(data), "--step", "4"])
    assert len(list(tmp_path.glob("step_000012/knn-*.json"))) == 2  # of 48 and of 40 px: neither gave way
    assert len(calls) == 10 and entry_of(tmp_path, "step_000004/knn")["scores"] == before["scores"]


@on_one_device
def test_a_config_names_several_tasks(run, data, tmp_path):
    config = tmp_path / "tasks.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(argument=None):\n"
        f"    common = dict(task='knn', data={str(data)!r}, k=(5,))\n"
        "    return ConfigDict(dict(tasks=dict(small=common, large=dict(common, image_size=96))))\n"
    )
    probe.main(
        ["--run", str(run), "--config", str(config), "--set", "large.image_size=40", "--output", str(tmp_path / "out")]
    )
    sizes = {
        name: entry_of(tmp_path / "out", f"step_000012/{name}")["checkpoint"]["image_size"]
        for name in ("small", "large")
    }
    assert sizes == {"small": 48, "large": 40}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--run", "{tmp}/nothing"], "nothing does not exist"),
        (["--run", "{tmp}"], "is not a run folder"),
        (["--step", "5"], "has no checkpoint of step 5; choose one of 4, 12"),
        (["--data", "{tmp}/nothing"], "nothing does not exist"),
        (["--test-split", "val"], "has no split 'val'; it has few, part, test and 1 more"),
        (["--test-split", "train"], "are both 'train'"),
        (["--tasks", "knn,svm"], "unknown task 'svm'; expected one or more of knn, linear"),
        (["--image-size", "50"], r"image size 50 is not a multiple of the checkpoint's patch size 8 px; try 48"),
        (["--train-split", "part"], "split 'part' of .* has no image of stripes, which 'test' has"),
        (["--data", "{unlabeled}"], "has no labels"),
        (["--data", "{strange}"], "the image 3.png of split 'train' of .* has no valid label for 3 classes"),
        (["--data", "{bands}"], "has no band 'red'; it has blue, green, infrared"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--poll", "-1"], "--poll is -1.0"),
        (["--train-split", ""], "knn.train_split is empty"),
        (["--encoder", "ema"], "unknown encoder 'ema'; expected one of teacher, student, untrained, pixels"),
        (["--encoder", "student"], "the encoder of .* is its teacher, not a student; remove"),
        (["--set", "knn.kk=3"], "unknown setting 'kk' in knn; the settings of knn are k, "),
        (["--set", "knn.k=3"], "expected knn.k as tuple, such as the default"),
        (["--set", "linear.k=3"], "unknown name 'linear' in NAME.FIELD=VALUE; expected one of knn"),
        (["--set", "k"], "expected NAME=VALUE, got 'k'"),
        (["--config", "{tmp}/none.py"], "data cannot be combined with a probe config"),
        (["--follow", "--step", "4"], "--follow evaluates the trained encoder of every checkpoint"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, run, data, capsys, arguments, sentence):
    places = {"tmp": str(tmp_path)}
    if "{" in arguments[-1]:
        write = functools.partial(write_shards, tmp_path / "data")
        if arguments[-1] == "{unlabeled}":
            places["unlabeled"] = write({"train": [None] * 4, "test": [None] * 4}, class_names=None)
        if arguments[-1] == "{strange}":
            places["strange"] = write({"train": [0, 1, 2, 7], "test": [0, 1]})
        if arguments[-1] == "{bands}":
            places["bands"] = write({"train": [0, 1], "test": [0, 1]}, bands=["blue", "green", "infrared"])
    before = sorted(path for path in run.rglob("*") if "checkpoints" not in path.parts)
    command = ["--run", str(run), "--data", str(data), "--tasks", "knn"]
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: probe.main([*command, *(part.format(**places) for part in arguments)]))
    captured = capsys.readouterr()
    assert ended.value.code == 1 and captured.out == ""
    assert re.match(f"error: .*{sentence}", captured.err.splitlines()[-1])
    assert sorted(path for path in run.rglob("*") if "checkpoints" not in path.parts) == before


def test_a_damaged_image_ends_the_probe(tmp_path, run, capsys):
    folder = write_shards(tmp_path / "data", {"train": [0, 1, 2] * 8, "test": [0, 1, 2]})
    raw = bytearray((folder / toy_shards.shard("data", "train")).read_bytes())
    start = raw.find(b"IHDR", raw.find(b"IHDR") + 4)
    raw[start : start + 400] = bytes(400)
    (folder / toy_shards.shard("data", "train")).write_bytes(raw)
    command = ["--run", str(run), "--data", str(folder), "--tasks", "knn", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        errors.run(lambda: probe.main(command))
    assert "is damaged; copy or convert the dataset again" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000001" / "mine.json").write_text("[]")
    with pytest.raises(errors.UserError, match="mine.json is not a probe result"):
        results.read(tmp_path)
    assert (tmp_path / "step_000001" / "mine.json").read_text() == "[]"
