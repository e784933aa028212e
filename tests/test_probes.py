"""The probe on a small run and data set: what scores may depend on, what is written, bad input."""

import csv
import dataclasses
import functools
import io
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from tensorboardX.proto import event_pb2

from pera_jax import checkpoint, errors, probe, run_meta
from pera_jax import config as configs
from pera_jax import step as steps
from pera_jax.bands import Bands
from pera_jax.data import codecs, records
from pera_jax.data import crops as geometry
from pera_jax.errors import UserError
from pera_jax.models import vit
from pera_jax.objectives import pera
from pera_jax.probes import features, linear, results

CLASSES = ["dots", "plain", "stripes"]


def picture(label: int, rng: np.random.Generator) -> Image.Image:
    height, width = rng.integers(50, 90, 2)
    pixels = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
    if label == 0:
        pixels[::6, ::6] = 255
    if label == 2:
        pixels[:, ::8] //= 3
    return Image.fromarray(pixels)


def write_data(folder: pathlib.Path, labels: dict[str, list], class_names=CLASSES, bands=None) -> pathlib.Path:
    """A data set folder with one PNG per label and split."""
    folder.mkdir()
    splits = {}
    for split, values in labels.items():
        name = f"{split}.array_record"
        writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
        rng = np.random.default_rng(len(values))
        for index, label in enumerate(values):
            file = io.BytesIO()
            picture(label or 0, rng).save(file, "PNG")
            writer.write(records.encode_record(file.getvalue(), f"{index}.png", label))
        writer.close()
        size = (folder / name).stat().st_size
        splits[split] = records.SplitInfo(
            len(values), [name], [len(values)], [size], [[0.0, 255.0]] * 3, [0.4] * 3, [0.1] * 3, {}, split, ""
        )
    bands = bands or ["red", "green", "blue"]
    info = records.DatasetInfo("small", bands, "uint8", class_names, False, records.FORMAT_VERSION, splits)
    (folder / records.INFO_FILE).write_text(json.dumps(dataclasses.asdict(info)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    labels = {"train": [0, 1, 2] * 15, "test": [0, 1, 2] * 7, "few": [0, 1] * 6, "part": [0, 1, 1] * 10}
    return write_data(tmp_path_factory.mktemp("data") / "small", labels)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run with checkpoints of steps 4 and 12, both of a network as it is at birth, but for another seed at 12."""
    workdir = tmp_path_factory.mktemp("run")
    config = configs.smoke(configs.default())
    objective = pera.from_config(config, Bands.plain(mean=0.4, std=0.1))
    card = {"name": "small", "fingerprint": "train", "class_names": CLASSES}
    meta = run_meta.describe(config, objective, card)
    store = checkpoint.Store(str(workdir), keep_last=5, keep_every=100)
    optimiser = steps.make_optimiser(config.optimiser)
    birth = jax.jit(lambda seed: steps.new_state(objective, optimiser, seed))
    for step, seed in ((4, config.seed), (12, 77)):
        state = birth(seed)
        store.save(state.replace(step=jax.numpy.int32(step)), meta, {"batches": step, "replaced": 0})
    store.close()
    return workdir


def test_features_are_the_networks_tokens(run, data):
    weights, source = checkpoint.load_weights(run), records.open_split(data, "test")
    extractor = features.Extractor(weights.backbone, weights.meta)
    found = features.extract(extractor, source, Bands.of(weights.meta), 40, batch_size=5)
    raw = [records.decode_record(source.read(index)) for index in range(len(source))]
    assert found.labels.tolist() == [record.label for record in raw]
    images = np.empty((len(raw), 40, 40, 3), np.uint8)
    for out, record in zip(images, raw, strict=True):
        whole = geometry.Image(codecs.decode_image(record.image))
        geometry.crop_resize(whole, geometry.Box(0, 0, whole.height, whole.width), 40, False, False, out)
    normalised = (images / 255.0 - 0.4) / 0.1
    model = vit.build(weights.meta["model"])
    encode = jax.jit(lambda images: model.apply({"params": weights.backbone}, images, blocks=4))
    tokens = encode(normalised.astype(np.float32))
    np.testing.assert_allclose(found.class_tokens[:, -1], tokens["class_token"], atol=1e-5)
    np.testing.assert_allclose(found.patch_means[:, -1], tokens["patch_tokens"].mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(found.class_tokens[:, 0], tokens["blocks"][0][:, 0], atol=1e-5)
    assert found.concatenated(4, True).shape == (21, 4 * 2 * 32)
    np.testing.assert_array_equal(found.concatenated(1, False), found.class_tokens[:, -1])


def test_padding_never_counts(run, data):
    """Same features, hence scores, for every batch size and number of devices; 45 and 21 images fill no batch."""
    weights, source = checkpoint.load_weights(run), records.open_split(data, "train")
    extracted = {}
    for devices in (1, 8):
        extractor = features.Extractor(weights.backbone, weights.meta, jax.devices()[:devices])
        for batch in (7, 32, 100):
            extracted[devices, batch] = features.extract(extractor, source, Bands.of(weights.meta), 48, batch)
    first = extracted[1, 7]
    assert first.class_tokens.shape == (45, 4, 32)
    for found in extracted.values():
        np.testing.assert_allclose(found.class_tokens, first.class_tokens, atol=1e-5)
        np.testing.assert_allclose(found.patch_means, first.patch_means, atol=1e-5)
        np.testing.assert_array_equal(found.labels, first.labels)


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


def test_the_job_writes_what_it_found(run, data, capsys, monkeypatch):
    monkeypatch.setattr(linear, "STEPS", 200)
    command = ["--run", str(run), "--data", str(data)]
    outputs = {}
    for batch in ("7", "32"):
        probe.main([*command, "--tasks", "knn,linear", "--batch-size", batch])
        outputs[batch] = json.loads((run / "probe/step_000012/results.json").read_text())["results"]
    assert outputs["7"] == outputs["32"]
    probe.main([*command, "--tasks", "colour"])
    probe.main([*command, "--tasks", "knn", "--untrained"])

    entries = {e["task"]: e for e in json.loads((run / "probe/step_000012/results.json").read_text())["results"]}
    assert sorted(entries) == ["colour", "knn", "linear"]  # the later command kept what the earlier one had found
    assert entries["knn"]["checkpoint"]["step"] == 12 and not entries["knn"]["checkpoint"]["untrained"]
    assert entries["knn"]["data"]["test_fingerprint"] == "test" and entries["knn"]["data"]["train_images"] == 45
    assert entries["linear"]["chosen"]["variant"] in ("class_1", "class_mean_1", "class_4", "class_mean_4")
    # Stripes and dots against plain ground: the tokens of a network at birth tell them apart, far better than chance.
    assert entries["linear"]["scores"]["linear"]["value"] > 0.6
    for entry in entries.values():
        for score in entry["scores"].values():
            assert score.get("low", 0.0) <= score["value"] <= score.get("high", 1.0)
    rows = list(csv.DictReader((run / "probe/step_000012/results.csv").open()))
    assert {row["score"]: float(row["value"]) for row in rows} == {
        name: score["value"] for entry in entries.values() for name, score in entry["scores"].items()
    }
    untrained = json.loads((run / "probe/step_000000_untrained/results.json").read_text())["results"]
    assert untrained[0]["checkpoint"]["untrained"] and untrained[0]["checkpoint"]["step"] == 0
    tags = tags_of(run / "tb_probe")
    assert sorted(tags["probe/knn20"]) == [0, 12, 12] and tags["probe/colour"] == [12]
    printed = capsys.readouterr().out
    for name in ("knn20 ", "knn20_class", "linear", "linear_macro_f1", "colour"):
        assert name in printed
    # The weights of step 4 are those that the stored seed makes, so step 4 and the untrained network score the same.
    probe.main([*command, "--tasks", "knn", "--step", "4", "--output", str(run / "four")])
    four = json.loads((run / "four/results.json").read_text())["results"]
    assert four[0]["scores"] == untrained[0]["scores"] and four[0]["held_out"] == untrained[0]["held_out"]


def test_results_of_others_are_kept_and_foreign_files_refused(tmp_path):
    def entry(task, step, value):
        place = {"run": "r", "step": step, "untrained": False}
        return {"task": task, "checkpoint": place, "data": {"name": "d"}, "scores": {task: {"value": value}}}

    results.write(tmp_path, [entry("a", 1, 0.1), entry("b", 1, 0.2)])
    results.write(tmp_path, [entry("b", 1, 0.3), entry("b", 2, 0.4)])
    kept = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [e["scores"] for e in kept] == [{"a": {"value": 0.1}}, {"b": {"value": 0.3}}, {"b": {"value": 0.4}}]
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="no file of results"):
        results.write(tmp_path, [entry("a", 1, 0.1)])
    assert (tmp_path / "results.json").read_text() == "[]"


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--run", "{tmp}/nothing"], "nothing does not exist"),
        (["--run", "{tmp}"], "is not the folder of a run"),
        (["--step", "5"], "has no checkpoint of step 5; there are 4, 12"),
        (["--data", "{tmp}/nothing"], "nothing does not exist"),
        (["--test-split", "val"], "has no split 'val'; it has few, part, test, train"),
        (["--test-split", "train"], "are both 'train'"),
        (["--tasks", "knn,svm"], "no task 'svm'; choose from knn, linear, colour"),
        (["--image-size", "50"], r"image size 50 is not a multiple of the checkpoint's patch of 8 px; try .* 48"),
        (["--train-split", "part"], "split 'test' of .* has 3 classes and 'part' has 2, which lacks stripes"),
        (["--train-split", "few", "--test-split", "part", "--tasks", "knn"], "holds 12 images, and k = 20"),
        (["--data", "{unlabelled}"], "has no labels"),
        (["--data", "{strange}"], "holds images without one of its 3 classes"),
        (["--data", "{bands}"], "has no band 'red'; it has blue, green, infrared"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, run, data, capsys, arguments, sentence):
    places = {"tmp": str(tmp_path)}
    if "{" in arguments[-1]:
        write = functools.partial(write_data, tmp_path / "data")
        if arguments[-1] == "{unlabelled}":
            places["unlabelled"] = write({"train": [None] * 4, "test": [None] * 4}, class_names=None)
        if arguments[-1] == "{strange}":
            places["strange"] = write({"train": [0, 1, 2, 7], "test": [0, 1]})
        if arguments[-1] == "{bands}":
            places["bands"] = write({"train": [0, 1], "test": [0, 1]}, bands=["blue", "green", "infrared"])
    before = sorted(path for path in run.rglob("*") if "checkpoints" not in path.parts)
    with pytest.raises(SystemExit) as ended:
        errors.run(
            lambda: probe.main(["--run", str(run), "--data", str(data), *(part.format(**places) for part in arguments)])
        )
    captured = capsys.readouterr()
    assert ended.value.code == 1 and captured.out == ""
    assert re.match(f"error: .*{sentence}", captured.err.splitlines()[-1])
    assert sorted(path for path in run.rglob("*") if "checkpoints" not in path.parts) == before


def test_a_damaged_image_ends_the_probe(tmp_path, run, data, capsys):
    folder = write_data(tmp_path / "data", {"train": [0, 1, 2] * 8, "test": [0, 1, 2]})
    raw = bytearray((folder / "train.array_record").read_bytes())
    start = raw.find(b"IHDR", raw.find(b"IHDR") + 4)
    raw[start : start + 400] = bytes(400)
    (folder / "train.array_record").write_bytes(raw)
    with pytest.raises(SystemExit):
        errors.run(lambda: probe.main(["--run", str(run), "--data", str(folder), "--tasks", "colour"]))
    assert "convert it anew" in capsys.readouterr().err.splitlines()[-1]
