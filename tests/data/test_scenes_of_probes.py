"""Folders of labeled scenes: reading, folds, fingerprints; errors name the file."""

import dataclasses
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.data import codecs
from pera_jax.data.labelled import scenes
from pera_jax.probes.dense.overlap import IGNORE

REAL = pathlib.Path(os.environ.get("PERA_JAX_SCENES", pathlib.Path(__file__).parents[3] / "shared/data"))
RGB = Bands.plain()


def save(path: pathlib.Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        path.write_bytes(codecs.encode_tiff(pixels))
    else:
        Image.fromarray(pixels).save(path)


def write(folder, stems="abcd", kinds=("image",), suffix=".png", height=12):
    """Scenes of `height` x 10 px with classes 0 to 2, or with two dates 0 and 255."""
    for number, stem in enumerate(stems):
        rng = np.random.default_rng(number)
        for kind in kinds:
            save(folder / kind / f"{stem}{suffix}", rng.integers(0, 256, (height, 10, 3), np.uint8))
        mask = rng.integers(0, 3, (height, 10)) if len(kinds) == 1 else 255 * rng.integers(0, 2, (height, 10))
        save(folder / "label" / f"{stem}.png", mask.astype(np.uint8))
    return folder


@pytest.mark.parametrize(
    "dtype, suffix", [("uint8", ".png"), ("uint8", ".tif"), ("uint16", ".tif"), ("float32", ".tif")]
)
def test_scenes_come_back_as_they_were(tmp_path, dtype, suffix):
    rng = np.random.default_rng(0)
    bands = dataclasses.replace(Bands.plain(("a", "b", "c") if suffix == ".png" else tuple("abcde")), dtype=dtype)
    images = {stem: (rng.random((7, 9, len(bands))) * 255).astype(dtype) for stem in "ba"}
    masks = {stem: rng.choice([0, 1, 4, IGNORE], (7, 9)).astype(np.uint8) for stem in "ba"}
    for stem in images:
        save(tmp_path / "image" / f"{stem}{suffix}", images[stem])
        save(tmp_path / "label" / f"{stem}.png", masks[stem])
    found = scenes.load(tmp_path, 1, bands)
    assert [scene.key for scene in found.scenes] == ["a", "b"]
    for scene in found.scenes:
        np.testing.assert_array_equal(scene.images[0], images[scene.key])
        np.testing.assert_array_equal(scene.mask, masks[scene.key])
        assert scene.images[0].dtype == dtype and scene.mask.dtype == np.uint8
    assert found.class_names == ("class 0", "class 1", "class 2", "class 3", "class 4")


@pytest.mark.parametrize("high", [1, 255])
def test_masks_of_change_are_zero_and_one(tmp_path, high):
    write(tmp_path, kinds=("A", "B"))
    truth = np.random.default_rng(0).integers(0, 2, (12, 10))
    save(tmp_path / "label" / "a.png", (truth * high).astype(np.uint8))
    save(tmp_path / "label" / "b.png", np.zeros((12, 10), np.uint8))
    found = scenes.load(tmp_path, 2, RGB)
    assert found.class_names == ("unchanged", "changed") and len(found.scenes[0].images) == 2
    np.testing.assert_array_equal(found.scenes[0].mask, truth)
    assert not found.scenes[1].mask.any()


def test_names_of_classes(tmp_path):
    write(tmp_path)
    assert scenes.load(tmp_path, 1, RGB, class_names=("x", "y", "z")).class_names == ("x", "y", "z")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # one more than the masks hold
        (tmp_path / "classes.txt").write_bytes("road\r\nroof \r\ntree\r\nwater\r\n\r\n".encode(encoding))
        assert scenes.load(tmp_path, 1, RGB, class_names=("x",)).class_names == ("road", "roof", "tree", "water")


@pytest.mark.parametrize("number", [2, 3, 7])
@pytest.mark.parametrize("folds", [0, 2, 3, 5, 100])
def test_each_scene_is_tested_once_and_never_trained_on_then(tmp_path, number, folds):
    write(tmp_path, stems=[f"s{index}" for index in range(number)])
    found = scenes.load(tmp_path, 1, RGB, folds).folds
    assert len(found) == (folds if 0 < folds <= number else number)
    assert sorted(place for _, test in found for place in test) == list(range(number))
    for train, test in found:
        assert test and not set(train) & set(test) and len(train) + len(test) == number


def test_splits_are_one_fold(tmp_path):
    write(tmp_path / "train", "ab")
    write(tmp_path / "test", "acd")
    found = scenes.load(tmp_path, 1, RGB, folds=5)
    assert found.folds == (((0, 1), (2, 3, 4)),) and [scene.key for scene in found.scenes] == list("abacd")
    assert found.fingerprints[0] != found.fingerprints[1]
    (tmp_path / "test").rename(tmp_path / "val")
    assert scenes.load(tmp_path, 1, RGB, splits=("train", "val")).fingerprints == found.fingerprints


def test_without_a_test_split_scenes_are_tested_in_turn(tmp_path):
    write(tmp_path, "xyz")
    assert [scene.key for scene in scenes.load(tmp_path, 1, RGB, splits=("train", "")).scenes] == list("xyz")
    write(tmp_path / "train", "ab")
    write(tmp_path / "test", "c")
    found = scenes.load(tmp_path, 1, RGB, splits=("train", ""))
    assert [scene.key for scene in found.scenes] == list("ab") and found.folds == (((1,), (0,)), ((0,), (1,)))
    assert len(scenes.load(tmp_path, 1, RGB, splits=("", "")).folds) == 3
    with pytest.raises(UserError, match="test has only one scene"):
        scenes.load(tmp_path, 1, RGB, splits=("", "test"))


def test_the_fingerprint_tells_names_and_contents(tmp_path):
    folders = [write(tmp_path / name) for name in ("one", "same", "renamed", "edited")]
    (folders[2] / "image" / "d.png").rename(folders[2] / "image" / "e.png")
    (folders[2] / "label" / "d.png").rename(folders[2] / "label" / "e.png")
    save(folders[3] / "label" / "a.png", np.arange(120, dtype=np.uint8).reshape(12, 10) % 3)
    one, same, renamed, edited = (scenes.load(folder, 1, RGB).fingerprints[0] for folder in folders)
    assert one == same and len({one, renamed, edited}) == 3


def image(*shape, value=0):
    return np.full(shape, value, np.uint8)


BAD = {
    "no folder": (1, lambda f: (f / "label").rename(f / "labels"), r"the folder FOLDER/label does not exist"),
    "empty": (1, lambda f: [p.unlink() for p in (f / "image").iterdir()], r"FOLDER/image has no files \*\.jpg"),
    "no label": (1, lambda f: (f / "label/b.png").unlink(), r"FOLDER/image/b\.png has no counterpart 'b' in .*/label"),
    "no image": (1, lambda f: (f / "image/b.png").unlink(), r"FOLDER/label/b\.png has no counterpart 'b' in .*/image"),
    "no date": (2, lambda f: (f / "B/b.png").unlink(), r"FOLDER/A/b\.png has no counterpart 'b' in .*/B"),
    "two of a name": (1, lambda f: save(f / "image/b.tif", image(12, 10, 3)), r"b\.png and .*b\.tif have the same "
                                                                              r"name"),
    "mask of another size": (1, lambda f: save(f / "label/b.png", image(12, 11)),
                             r"FOLDER/label/b\.png is 11 x 12 px and .*image/b\.png is 10 x 12 px"),
    "date of another size": (2, lambda f: save(f / "B/b.png", image(9, 10, 3)),
                             r"FOLDER/B/b\.png is 10 x 9 px and .*A/b\.png is 10 x 12 px"),
    "class beyond names": (1, lambda f: (f / "classes.txt").write_text("x\ny"),
                           r"FOLDER/label/a\.png has the class 2; expected 0 to 1, or 255"),
    "a line that shifts the classes": (1, lambda f: (f / "classes.txt").write_text("x\n\ny\n"),
    "line 2 of .*classes.txt is blank"),
    "one name twice": (1, lambda f: (f / "classes.txt").write_text("x\ny\nx\n"), "two classes with the same name: x"),
    "no names": (1, lambda f: (f / "classes.txt").write_text("\n"), r"FOLDER/classes\.txt has 0 class names"),
    "names that are not text": (1, lambda f: (f / "classes.txt").write_bytes(b"\xff\xfe\xfa"), "cannot be read as "
                                                                                               "text"),
    "value of change": (2, lambda f: save(f / "label/c.png", image(12, 10, value=7)),
                        r"FOLDER/label/c\.png has the values 7; a change mask must have 0 and 255, or 0 and 1"),
    "colored mask": (1, lambda f: save(f / "label/c.png", image(12, 10, 3)), r"c\.png has 3 bands of uint8; a mask "
                                                                             r"must have one"),
    "undecodable image": (1, lambda f: (f / "image/c.png").write_bytes(b"no image"), r"image/c\.png cannot be decoded"),
    "cut image": (1, lambda f: (f / "image/c.png").write_bytes((f / "image/c.png").read_bytes()[:90]),
                  r"image/c\.png cannot be decoded"),
    "undecodable mask": (2, lambda f: (f / "label/c.png").write_bytes(b"no image"), r"label/c\.png cannot be decoded"),
    "bands": (1, lambda f: [(f / "image/a.png").unlink(), save(f / "image/a.tif", image(12, 10, 4))],
              r"image/a\.tif does not fit the encoder: expected 3 bands of uint8 \(red, green, blue\), got 4 of uint8"),
    "dtype": (1, lambda f: [(f / "image/a.png").unlink(), save(f / "image/a.tif", np.zeros((12, 10, 3), np.float32))],
              r"image/a\.tif does not fit the encoder: expected 3 bands of uint8 .*, got 3 of float32"),
    "one class": (1, lambda f: [save(f / f"label/{s}.png", image(12, 10)) for s in "abcd"],
                  r"the training scenes b, c, d of FOLDER have fewer than two classes"),
    "no labels": (1, lambda f: [save(f / f"label/{s}.png", image(12, 10, value=255)) for s in "abcd"],
                  r"the training scenes b, c, d of FOLDER have fewer than two classes"),
    "one split": (1, lambda f: write(f / "train"), r"FOLDER has the split 'train' but not 'test'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(tmp_path, name):
    dates, spoil, sentence = BAD[name]
    write(tmp_path, kinds=("image",) if dates == 1 else ("A", "B"))
    scenes.load(tmp_path, dates, RGB)
    spoil(tmp_path)
    with pytest.raises(UserError, match=sentence.replace("FOLDER", re.escape(str(tmp_path)))) as error:
        scenes.load(tmp_path, dates, RGB)
    assert "\n" not in str(error.value)


def test_folds_that_cannot_be(tmp_path):
    write(tmp_path)
    for folds in (1, -2):
        with pytest.raises(UserError, match=f"folds={folds} is invalid; choose 0"):
            scenes.load(tmp_path, 1, RGB, folds)
    with pytest.raises(UserError, match="has only one scene"):
        scenes.load(write(tmp_path / "one", "a"), 1, RGB)
    with pytest.raises(UserError, match="does not exist"):
        scenes.load(tmp_path / "missing", 1, RGB)
    write(tmp_path / "train")
    with pytest.raises(UserError, match="both 'train'"):
        scenes.load(tmp_path, 1, RGB, splits=("train", "train"))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
def test_real_scenes():
    zurich = scenes.load(REAL / "zurich_summer", 1, RGB, folds=5)
    assert [scene.mask.shape for scene in zurich.scenes] == [(926, 943), (1639, 1672)]
    assert zurich.folds == (((1,), (0,)), ((0,), (1,))) and len(zurich.class_names) == 8
    levir = scenes.load(REAL / "levir_cd", 2, RGB, folds=0)
    assert len(levir.folds) == 11 and sum(not scene.mask.any() for scene in levir.scenes) == 1
