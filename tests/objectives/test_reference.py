"""The reference values of the authors' released program, and that the check can fail."""

import pathlib

import check_reference
import numpy as np

FILE = pathlib.Path(__file__).parents[1] / "files" / "reference_tiny.npz"


def test_agrees_with_the_released_program():
    assert check_reference.check(str(FILE)).failed() == []


def test_changed_numbers_are_found_and_no_others(tmp_path):
    arrays, names = dict(np.load(FILE)), ["step2/loss/total", "final/center", "eval/other/teacher_cls"]
    for name in names:
        arrays[name] = arrays[name] * 1.0002
    np.savez(tmp_path / "changed.npz", **arrays)
    assert sorted(check_reference.check(str(tmp_path / "changed.npz")).failed()) == sorted(names)
