"""Conversion of TensorFlow Datasets to a dataset folder, without TensorFlow."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from data_prep import tfds
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records
from pera_jax.data.labelled import samples

NAMES = ["forest", "river", "town"]
features = tensorflow_datasets.features


def picture(seed: int) -> bytes:
    """Every third a JPEG, a PNG, and a gray PNG that has to be changed."""
    values = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values if seed % 3 < 2 else values[..., 0]).save(buffer, "PNG" if seed % 3 else "JPEG")
    return buffer.getvalue()


def bands(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(5, 4, 6)).astype(np.float32)


class ToyFields(tensorflow_datasets.core.GeneratorBasedBuilder):
    """What TFDS can hold without TensorFlow: images given as bytes, tensors, text; two configs."""

    VERSION = tensorflow_datasets.core.Version("1.2.0")
    BUILDER_CONFIGS = [tensorflow_datasets.core.BuilderConfig(name=name) for name in ("full", "bare", "plain")]

    def _info(self):
        full = {
            "image": features.Image(), "label": features.ClassLabel(names=NAMES), "where": features.Text(),
            "scene": {"bands": features.Tensor(shape=(None, 4, 6), dtype=np.float32), "quick": features.Image(),
                      "use": features.ClassLabel(num_classes=2)},
        }  # fmt: skip
        bare = {"image": features.Image(shape=(None, None, 3), encoding_format="jpeg")}
        plain = {name: full[name] for name in ("image", "label")}
        chosen = {"full": full, "bare": bare, "plain": plain}[self.builder_config.name]
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=features.FeaturesDict(chosen))

    def _split_generators(self, _):
        ranges = {"train": (0, 20), "test": (20, 24), "unlabeled": (21, 22)}
        return {name: self._generate_examples(*ends) for name, ends in ranges.items()}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            full = {
                "image": picture(i), "label": -1 if i == 21 else i % 3, "where": str(i),
                "scene": {"bands": bands(i), "quick": picture(i + 100), "use": i % 2},
            }  # fmt: skip
            plain = {name: full[name] for name in ("image", "label")}
            yield i, {"full": full, "bare": {"image": picture(i % 23)}, "plain": plain}[self.builder_config.name]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp("tfds")
    for config in ("full", "bare", "plain"):
        ToyFields(data_dir=str(place), config=config, file_format="array_record").download_and_prepare()
    return place


def convert(data_dir: pathlib.Path, output: pathlib.Path, *args) -> records.RecordSource:
    given = ["--data-dir", data_dir, "--output", output, "--split", "train", "--workers", 1, *args]
    tfds.main([str(arg) for arg in given])
    return records.open_split(output, "train")


def read(source: records.RecordSource) -> list[records.Record]:
    return [records.decode_record(source.read(i)) for i in range(len(source))]


def test_images_keep_their_bytes_classes_and_order(data_dir, tmp_path):
    out = tmp_path / "out"
    args = ["--dataset", "toy_fields/full:1.2.0", "--data-dir", data_dir, "--image-feature", "image",
            "--label-feature", "label", "--shard-size", "8", "--workers", "2", "--output", out]  # fmt: skip
    program = [sys.executable, "-m", "data_prep.tfds", *map(str, args)]
    done = subprocess.run([*program, "--split", "train"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    source = records.open_split(out, "train")
    found = read(source)
    assert (source.info.class_names, source.info.bands, source.info.dtype) == (NAMES, list(records.RGB), "uint8")
    assert [record.key for record in found] == [f"toy_fields-train.array_record-00000-of-00001__{i}" for i in range(20)]
    theirs = tensorflow_datasets.builder_from_directory(data_dir / "toy_fields/full/1.2.0").as_data_source("train")
    kept = 0
    for record, example in zip(found, theirs, strict=True):
        original = picture(int(example["where"]))
        assert record.label == example["label"] == int(example["where"]) % 3
        np.testing.assert_array_equal(codecs.decode_image(record.image), example["image"])
        kept += record.image == original
    assert kept == 14 and json.loads((out / "train.report.json").read_text())["changed"] == {"mode L": 6}

    tested = subprocess.run([*program, "--split", "test"], capture_output=True, text=True, timeout=120)
    assert tested.returncode == 0, tested.stderr
    assert "left out: 1 rejected" in tested.stdout and len(records.open_split(out, "test")) == 3
    ((reason, rejected),) = json.loads((out / "test.report.json").read_text())["rejected"]["reasons"].items()
    assert "no class" in reason and rejected["number"] == 1
    ours = tensorflow_datasets.builder_from_directory(out).as_data_source("train")  # what TFDS gave, it takes back
    for example, before in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(example["image"], before["image"])
        assert example["label"] == before["label"]
    assert "tensorflow" not in sys.modules


def test_probes_read_it_as_it_is(data_dir, tmp_path):
    """The same images, keys and labels as the shards that are made of it; nothing is converted."""
    shards = convert(
        data_dir, tmp_path / "out", "--dataset", data_dir / "toy_fields/plain/1.2.0", "--tfds-split", "train"
    )
    ours, theirs = samples.from_source(shards), samples.open_samples(f"tfds:{data_dir}/toy_fields/plain/1.2.0", "train")
    assert (theirs.class_names, theirs.bands, theirs.dtype) == (ours.class_names, ours.bands, ours.dtype)
    assert list(theirs.keys) == list(ours.keys) and theirs.labels.tolist() == ours.labels.tolist()
    for index in range(len(ours)):
        np.testing.assert_array_equal(theirs.decode(theirs.raw(index)), ours.decode(ours.raw(index)))
    half = samples.open_samples(f"tfds:{data_dir}/toy_fields/plain/1.2.0", "train[50%:]")
    assert list(half.keys) == list(ours.keys)[10:] and half.fingerprint != theirs.fingerprint
    for name, split, sentence in (
        ("plain", "val", "'val' selects no examples"),
        ("full", "train", "choose one with --image-feature of pera-jax prep-tfds"),
    ):
        with pytest.raises(UserError, match=sentence):
            samples.open_samples(f"tfds:{data_dir}/toy_fields/{name}/1.2.0", split)


def test_parts_of_splits_keep_their_keys_and_options_apply(data_dir, tmp_path):
    args = ["--dataset", data_dir / "toy_fields/bare/1.2.0", "--tfds-split", "train[50%:75%]+test"]
    source = convert(data_dir, tmp_path / "out", *args, "--max-side", 8, "--jpeg-quality", 90)
    found = read(source)
    places = [f"train.array_record-00000-of-00001__{i}" for i in range(10, 15)]
    places += [f"test.array_record-00000-of-00001__{i}" for i in range(4)]
    assert [record.key for record in found] == [f"toy_fields-{place}" for place in places]
    assert source.info.class_names is None and {record.label for record in found} == {-1}
    for record in found:
        assert codecs.decode_image(record.image).shape == (6, 8, 3) and record.image.startswith(b"\xff\xd8")
    with pytest.raises(UserError, match="of other images or options"):
        convert(data_dir, tmp_path / "out", *args)


def test_cleaning_is_that_of_images(data_dir, tmp_path):
    args = ["--dataset", "toy_fields/bare", "--tfds-split", "train+test"]
    assert len(convert(data_dir, tmp_path / "found", *args)) == 24
    report = json.loads((tmp_path / "found/train.report.json").read_text())["found"]["reasons"]
    assert (report["small"]["number"], report["duplicate"]["number"]) == (24, 1)
    assert len(convert(data_dir, tmp_path / "dropped", *args, "--drop", "duplicates")) == 23
    (twin,) = json.loads((tmp_path / "dropped/train.report.json").read_text())["duplicates"]["first"]
    assert twin == report["duplicate"]["first"][0] and "-test." in twin


def test_tensors_keep_all_their_bands(data_dir, tmp_path):
    args = ["--dataset", "toy_fields/full", "--image-feature", "scene/bands", "--label-feature", "scene/use"]
    source = convert(data_dir, tmp_path / "named", *args, "--bands", "B2,B3,B4,B8,B11,B12")
    assert (source.info.bands, source.info.dtype) == (["B2", "B3", "B4", "B8", "B11", "B12"], "float32")
    assert source.info.class_names == ["0", "1"]
    theirs = tensorflow_datasets.builder_from_directory(data_dir / "toy_fields/full/1.2.0").as_data_source("train")
    for record, example in zip(read(source), theirs, strict=True):
        np.testing.assert_array_equal(codecs.decode_image(record.image), example["scene"]["bands"])
        assert record.label == example["scene"]["use"]
    unnamed = convert(data_dir, tmp_path / "unnamed", *args, "--no-labels")
    assert unnamed.info.bands[0] == "band_1" and unnamed.info.class_names is None


def test_bad_input_is_one_sentence_and_leaves_nothing(data_dir, tmp_path):
    full, bare = (data_dir / "toy_fields" / config / "1.2.0" for config in ("full", "bare"))
    records_only = tmp_path / "copies/tfrecord"
    cut, torn = tmp_path / "copies/cut", tmp_path / "copies/torn"
    for copy in (records_only, cut, torn):
        copy.mkdir(parents=True)
        for file in bare.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    facts = json.loads((records_only / "dataset_info.json").read_text())
    (records_only / "dataset_info.json").write_text(json.dumps({**facts, "fileFormat": "tfrecord"}))
    (torn / "dataset_info.json").write_text('{"name": "x')
    (shard,) = cut.glob("*-train*")
    shard.write_bytes(shard.read_bytes()[:-1])
    one = ["--image-feature", "image", "--label-feature", "label"]
    tensor = ["--dataset", full, "--image-feature", "scene/bands", "--no-labels"]
    cases = {
        "tfds build mnist --file_format=array_record": ["--dataset", "mnist"],
        "which has toy_fields/bare/1.2.0, toy_fields/full/1.2.0": ["--dataset", "toy_fields/nosuch"],
        "no prepared dataset 'no such'": ["--dataset", "no such"],
        "pass one of the datasets in it: bare/1.2.0, full/1.2.0": ["--dataset", data_dir / "toy_fields"],
        "is not a folder with a dataset_info.json": ["--dataset", tmp_path / "nowhere"],
        "is stored as tfrecord, which only TensorFlow reads": ["--dataset", records_only],
        "cannot be read as a TFDS dataset": ["--dataset", torn],
        "is truncated or damaged": ["--dataset", cut],
        "it has test (4), train (20), unlabeled (1)": ["--dataset", full, *one, "--tfds-split", "val"],
        "'train[:0]' selects no examples": ["--dataset", full, *one, "--tfds-split", "train[:0]"],
        "'train[50%:10%]' selects no examples": ["--dataset", full, *one, "--tfds-split", "train[50%:10%]"],
        "'train[x' selects no examples": ["--dataset", full, *one, "--tfds-split", "train[x"],
        "3 image features: image, scene/bands, scene/quick; choose": ["--dataset", full],
        "--image-feature where": ["--dataset", full, "--image-feature", "where"],
        "2 ClassLabels: label, scene/use; choose": ["--dataset", full, "--image-feature", "image"],
        "no images are left of 1 (the first is": ["--dataset", full, *one, "--tfds-split", "unlabeled"],
        "has no ClassLabel": ["--dataset", bare, "--label-feature", "label"],
        "must be 6 unique names": [*tensor, "--bands", "a,b"],
        "--bands only applies to a Tensor": ["--dataset", full, *one, "--bands", "r,g,b"],
        "do not apply to the Tensor": [*tensor, "--max-side", 9],
    }
    for sentence, args in cases.items():
        with pytest.raises(UserError) as caught:
            convert(data_dir, tmp_path / "out", *args)
        assert sentence in str(caught.value) and "\n" not in str(caught.value), caught.value
    with pytest.raises(UserError, match="overlap"):
        convert(data_dir, bare / "out", "--dataset", bare)
    assert not (tmp_path / "out").exists() and not (bare / "out").exists()
