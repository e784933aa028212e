"""The reference values of the authors' released program, and that the check can fail."""

import pathlib

import check_reference
import numpy as np
import pytest

FILE = pathlib.Path(__file__).parents[1] / "files" / "reference_tiny.npz"


@pytest.fixture(scope="module")
def found():
    return list(check_reference.run(check_reference.load(str(FILE)), 1))


def test_agrees_with_the_released_program(found):
    table = check_reference.compare(check_reference.load(str(FILE)), found)
    assert len(table.rows) == 252 and table.failed() == []


def test_changed_numbers_are_found_and_no_others(found, tmp_path):
    arrays, names = dict(np.load(FILE)), ["step2/loss/total", "final/center", "eval/other/teacher_cls"]
    for name in names:
        arrays[name] = arrays[name] * 1.0002
    np.savez(tmp_path / "changed.npz", **arrays)
    changed = check_reference.load(str(tmp_path / "changed.npz"))
    assert sorted(check_reference.compare(changed, found).failed()) == sorted(names)
