"""Results with different data, sizes or settings have separate files, rows and labels; results of earlier versions."""

import copy
import json
import os

import pytest

from pera_jax.common import errors
from pera_jax.probes.runner import keys, results

ENTRY = {
    "name": "knn", "task": "knn",
    "checkpoint": {"run": "r", "origin": "..", "step": 640, "encoder": "teacher", "image_size": 48, "weights": "w",
    "git": ""},
    "data": {"path": "aid", "name": "aid", "train_split": "train", "test_split": "test", "labels": "",
    "train_images": 45,
             "test_images": 21, "train_fingerprint": "a" * 64, "test_fingerprint": "b" * 64, "class_names": ["x", "y"]},
    "settings": {"k": [10, 20]}, "spec": {"task": "knn"}, "seconds": 0.1, "details": {},
    "scores": {"knn20": {"value": 0.5, "low": 0.4, "high": 0.6, "seeds": []}},
}  # fmt: skip
OTHERS = {
    "data.train_fingerprint": "c" * 64, "data.test_fingerprint": "c" * 64, "data.train_split": "more",
    "data.test_split": "val", "data.class_names": ["x", "z"], "checkpoint.image_size": 96, "settings.k": [5],
    "name": "knn/2|", "task": "linear",
}  # fmt: skip
SAME = {
    "data.path": "elsewhere/aid",
    "data.name": "AID",
    "checkpoint.run": "./r",
    "checkpoint.weights": "v",
    "seconds": 9,
}


def changed(change: tuple[str, object]) -> dict:
    entry, (place, value) = copy.deepcopy(ENTRY), change
    *parts, last = place.split(".")
    (entry[parts[0]] if parts else entry)[last] = value
    return entry


def test_what_was_measured_otherwise_never_gives_way_and_has_words_of_its_own(tmp_path):
    entries = [ENTRY, *map(changed, OTHERS.items()), changed(("checkpoint.origin", "../b"))]
    entries[-1]["checkpoint"]["run"] = "b"
    for number, entry in enumerate(entries, start=1):
        results.write(tmp_path, entry, {})
        assert len(results.read(tmp_path)) == number
    for change in SAME.items():  # the same measurement again takes its place
        results.write(tmp_path, changed(change), {})
        assert len(results.read(tmp_path)) == len(entries)
    lines = results.markdown(results.read(tmp_path)).splitlines()
    assert (
        len(lines) == len({line for line in lines}) == 2 + len(entries)
        and len({line.count(" | ") for line in lines}) == 1
    )
    words = keys.data_labels(results.read(tmp_path))
    assert len(words) == len(entries) - 1  # another run measures the same
    assert sum("k=5" in text for text in words.values()) == 1 and sum("96 px" in text for text in words.values()) == 1
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + len(entries)


def test_a_single_result_is_told_plainly():
    assert list(keys.data_labels([ENTRY]).values()) == ["aid, 21 images, 48 px"]


def test_a_run_is_the_same_however_it_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "runs" / "aid").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert (
        keys.origin("runs/aid/probe", tmp_path / "link" / "aid")
        == keys.origin("link/aid/probe", "runs/aid/")
        == keys.OWN
    )
    assert keys.origin("runs/aid/probe", "runs/other") != keys.OWN


def test_results_of_earlier_versions_are_read_and_give_way_to_the_same(tmp_path):
    """They are named by the task alone and tell no origin."""
    old = copy.deepcopy(ENTRY)
    del old["checkpoint"]["origin"]
    place = tmp_path / "step_000640"
    (place / "knn").mkdir(parents=True)
    (place / "knn" / "scene.png").write_bytes(b"")
    (place / "knn.json").write_text(json.dumps(old))
    [found] = results.read(tmp_path)
    assert results.read_step(tmp_path, 640, "knn") == [found] and found["scores"] == old["scores"]
    results.write(tmp_path, changed(("checkpoint.image_size", 96)), {})
    assert (place / "knn.json").exists() and "48 px" in results.markdown(results.read(tmp_path))
    results.write(tmp_path, ENTRY, {})
    assert not (place / "knn.json").exists() and not (place / "knn").exists() and len(results.read(tmp_path)) == 2


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path):
    results.check_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())  # and leaves nothing behind
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file" / "probe", "/proc/probe"):
        with pytest.raises(errors.UserError, match="cannot write to .*; free disk space or choose another --output"):
            results.check_writable(type(tmp_path)(os.fspath(place)))
