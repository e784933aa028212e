"""Labeled images from dataset folders, class folders, label tables and TFDS give the same samples; invalid input."""

import io
import os
import pathlib
import shutil

import labelled_toys
import numpy as np
import pytest
from PIL import Image

from pera_jax.common.errors import UserError
from pera_jax.data import codecs
from pera_jax.data.labelled import folders as class_folders
from pera_jax.data.labelled import label_tables, samples

LABELS = {"train": [0, 1, 2, 2, 1], "test": [2, 0, 1]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return str(labelled_toys.write_shards(tmp_path_factory.mktemp("shards") / "small", LABELS))


@pytest.fixture
def folders(tmp_path) -> pathlib.Path:
    return labelled_toys.write_folders(tmp_path / "small", LABELS)


def images(found: samples.Samples) -> list[np.ndarray]:
    return [found.decode(found.raw(index)) for index in range(len(found))]


def test_shards_and_class_folders_hold_the_same(shards, folders):
    for split, labels in LABELS.items():
        stored, loose = samples.open_samples(shards, split), samples.open_samples(str(folders), split)
        order = [int(pathlib.Path(key).stem) for key in loose.keys]  # class folders come class by class
        assert stored.labels.tolist() == labels and loose.labels.tolist() == [labels[i] for i in order]
        assert stored.class_names == loose.class_names == tuple(labelled_toys.CLASSES)
        assert (stored.bands, stored.dtype) == (loose.bands, loose.dtype)
        expected = [np.asarray(Image.open(io.BytesIO(raw))) for raw in labelled_toys.pictures(labels)]
        for index, image in zip(order, images(loose), strict=True):
            np.testing.assert_array_equal(image, expected[index])
        for image, wanted in zip(images(stored), expected, strict=True):
            np.testing.assert_array_equal(image, wanted)


def test_fingerprints_follow_images_keys_and_labels(folders, tmp_path):
    first = samples.open_samples(str(folders), "train").fingerprint
    assert samples.open_samples(str(folders), "train").fingerprint == first
    other = pathlib.Path(shutil.copytree(folders, tmp_path / "other"))
    assert samples.open_samples(str(other), "train").fingerprint == first  # wherever it lies
    (other / "train/stripes/2.png").rename(other / "train/plain/2.png")
    assert samples.open_samples(str(other), "train").fingerprint != first
    (other / "train/plain/2.png").rename(other / "train/stripes/2.png")
    file = other / "train/dots/0.png"
    file.write_bytes(file.read_bytes() + b"\0")
    assert samples.open_samples(str(other), "train").fingerprint != first


def test_tables_of_labels(shards, folders, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("water,key,road\n1,0.png,0\n1,1.png,1\n0,2.png,0\n0,3.png,1\n0,4.png,1\n1,other.png,1\n")
    found = samples.open_samples(shards, "train", str(table))
    assert found.class_names == ("water", "road")
    assert found.labels.tolist() == [[True, False], [True, True], [False, False], [False, True], [False, True]]
    assert found.fingerprint != samples.open_samples(shards, "train").fingerprint
    table.write_text(
        "key,label\n" + "".join(f"{folder}/{i}.png,{i % 2}\n" for folder in labelled_toys.CLASSES for i in range(5))
    )
    found = samples.open_samples(str(folders), "train", str(table))
    assert found.class_names == ("0", "1")
    assert found.labels.tolist() == [int(pathlib.Path(key).stem) % 2 for key in found.keys]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("cell", [",", ";", "\t"])
def test_tables_as_spreadsheets_save_them(tmp_path, encoding, cell):
    keys = ["wood/caf\u00e9.png", "wood/2.png", "water/3.png"]
    rows = [
        "key,label,,",
        " wood\\cafe\u0301.png, wood ,,",
        "",
        "wood/2.png,wood,,",
        "other.png,,,",
        "water/3.png,\u6c34,,",
        ",,,",
        "",
    ]
    (tmp_path / "l.csv").write_bytes("\r\n".join(rows).replace(",", cell).encode(encoding))
    names, labels, _ = label_tables.read_labels(tmp_path / "l.csv", keys)
    assert names == ("wood", "\u6c34")
    assert labels.tolist() == [0, 0, 1]


def test_class_folders_whose_names_no_table_could_hold_are_refused(tmp_path):
    for name in ("a\n", "b\x1b[31m", "caf\udce9"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "in" / name / "1.png")
    with pytest.raises(UserError) as error:
        class_folders.list_images(tmp_path / "in", "", None)
    assert "class names that are empty or contain control characters" in str(error.value)
    assert str(error.value).isprintable()


def test_names_that_are_not_utf_8_stay_out_as_in_conversions(folders, capsys):
    for split in ("train/dots", "train/stripes"):
        one = next((folders / split).iterdir())
        (folders / split / os.fsdecode(b"lat\xe9.png")).write_bytes(one.read_bytes())
    found = samples.open_samples(str(folders), "train")
    assert all(key.isascii() for key in found.keys) and "not valid UTF-8 (2)" in capsys.readouterr().err


def test_an_archive_is_to_be_converted_first(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="a.zip is a file; convert archives with pera-jax prep-images"):
        samples.open_images(str(tmp_path / "a.zip"))


def test_other_dtypes_and_bands(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            pixels = rng.integers(0, 5000, (20, 24, 5), np.uint16)
            (tmp_path / split / name / "1.tif").write_bytes(codecs.encode_tiff(pixels))
    found = samples.open_samples(str(tmp_path), "train")
    assert (found.bands, found.dtype) == (tuple(f"band_{n}" for n in range(1, 6)), "uint16")
    assert images(found)[1].shape == (20, 24, 5)
    (tmp_path / "train" / "b" / "1.tif").write_bytes(codecs.encode_tiff(np.zeros((20, 24, 4), np.uint16)))
    with pytest.raises(UserError, match="b/1.tif .*4 bands of uint16, but most images have 5 of uint16"):
        samples.open_samples(str(tmp_path), "train")


def _move(source: str, target: str):
    def change(folder):
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / source).rename(folder / target)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            _move("test/plain/2.png", "test/forest/2.png"),
            "small has different classes in 'train' and 'test': plain .* forest",
        ),
        (_move("train", "training"), "has no folder 'train' for the split; it has test, training"),
        (
            lambda folder: [
                _move(f"train/{name}", f"train/{name[-5:]}")(folder) for name in ("dots/0.png", "stripes/2.png")
            ],
            "train/0.png is not in a class folder, like 1 other images of 5",
        ),
        (lambda folder: (folder / "train" / "water").mkdir(), "train/water has no images"),
        (lambda folder: shutil.rmtree(folder / "test") or (folder / "test").mkdir(), "test has no images"),
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / "train/dots/0.png").write_bytes(b"x"), "dots/0.png cannot be read as an image"),
    ],
)
def test_bad_folders(folders, change, sentence):
    change(folders)
    for split in LABELS:  # the folder of a class goes with its last image
        for place in (folders / split).glob("*") if (folders / split).is_dir() else ():
            if place.is_dir() and not any(place.iterdir()) and place.name != "water":
                place.rmdir()
    with pytest.raises(UserError, match=sentence):
        samples.check_labels(*(samples.open_samples(str(folders), split) for split in LABELS))


def test_a_few_images_beside_the_class_folders_are_left_out_and_named(folders, capsys):
    stray = (folders / "train/dots/0.png").read_bytes()
    (folders / "train/logo.png").write_bytes(stray)
    found = samples.open_samples(str(folders), "train")
    assert found.labels.tolist() == [0, 1, 1, 2, 2] and "logo.png" not in found.keys
    told = capsys.readouterr().err
    assert "1 image lies outside the folders of the 3 classes dots, plain, stripes and is left out" in told
    assert "train/logo.png" in told
    assert len(samples.open_images(str(folders), "train")) == 6  # an export takes all
    assert (
        "folders are not used as classes (dots, plain, stripes): there are images outside of them (logo.png"
        in capsys.readouterr().err
    )


def test_folders_that_look_like_splits_are_told(folders, capsys):
    samples.open_samples(str(folders.parent), folders.name)
    assert "look like splits: test, train" in capsys.readouterr().err
    samples.open_images(str(folders))
    assert "folders are not used as classes (test, train)" in capsys.readouterr().err


def test_a_few_unreadable_files_are_left_out_and_named(folders, capsys):
    first = samples.open_samples(str(folders), "train").fingerprint
    for name, content in (("a.png", b"x"), ("b.jpg", b""), ("c.bmp", b"BM"), ("d.txt", b"")):
        (folders / "train/plain" / name).write_bytes(content)
    with pytest.raises(
        UserError, match="plain/a.png cannot be read as an image .*, like 2 of 7 images; .*max-corrupt-fraction"
    ):
        samples.open_samples(str(folders), "train")
    found = samples.open_samples(str(folders), "train", reading=samples.folders.Reading(max_corrupt_fraction=0.3))
    assert len(found) == 5 and len(images(found)) == 5 and found.fingerprint == first
    told = capsys.readouterr().err
    assert "2 of 7 images cannot be read and are skipped" in told and "plain/a.png" in told and "plain/b.jpg" in told
    assert "2 files of " in told and ".bmp (1), .txt (1)" in told


def test_links_that_leave_the_folder_are_followed_where_they_are_to_be(folders, tmp_path, capsys):
    outside = tmp_path / "elsewhere"
    (folders / "train/dots").rename(outside)
    (folders / "train/dots").symlink_to(outside)
    (folders / "train/plain/far.png").symlink_to(outside / "0.png")
    with pytest.raises(UserError, match="the class folder .*dots has no images; .*; 2 links lead out"):
        samples.open_samples(str(folders), "train")
    assert len(samples.open_images(str(folders), "train")) == 4
    assert "2 links lead out of" in (told := capsys.readouterr().err) and "dots, plain/far.png; --follow-links" in told
    found = samples.open_samples(str(folders), "train", reading=samples.folders.Reading(follow_links=True))
    assert found.labels.tolist() == [0, 1, 1, 1, 2, 2] and len(images(found)) == 6


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("name,label\n", "must have a column key"),
        ("key\n", "must have a column key"),
        ("key,label\n0.png,a\n", "has no label for the images 1.png, 2.png, 3.png and 1 more"),
        ("key,label\n0.png,a,b\n", "line 2 .* expected 2 cells, got 3"),
        ("key,label\n0.png,a\n0.png,a\n", "line 3 .* repeats the key 0.png"),
        ("key,label\nx/0.png,a\nx\\0.png,b\n", r"lines 2 and 3 of .* different labels"),
        ("key,label\n" + "".join(f"{i}.png,\x1b[31m{i % 2}\n" for i in range(5)), "control characters"),
        (
            "key,label\n0.png,a\n1.png, \n2.png,b\n3.png,\n4.png,b\n",
            r"line 3 .* has an empty label for the image 1.png \(2 such",
        ),
        ("key,label,\n0.png,a,\n1.png,a,b\n", "line 3 .* expected 2 cells, got 3"),
        ("key,a,b\n" + "".join(f"{i}.png,0,2\n" for i in range(5)), "has '2' for the image 0.png; expected 0 or 1"),
    ],
)
def test_bad_tables(shards, tmp_path, content, sentence):
    table = tmp_path / "labels.csv"
    if content is not None:
        table.write_text(content)
    with pytest.raises(UserError, match=sentence):
        samples.open_samples(shards, "train", str(table))
