"""The numbers of the authors' released program, and that the check can fail."""

import pathlib

import numpy as np
import pytest

import check_reference

FILE = pathlib.Path(__file__).parent / "data" / "reference_tiny.npz"


def test_agrees_with_the_released_program():
    assert check_reference.check(str(FILE)).failed() == []


@pytest.mark.parametrize("name", ["step2/loss/total", "final/center", "eval/other/teacher_cls"])
def test_a_changed_number_is_found(name, tmp_path):
    arrays = dict(np.load(FILE))
    arrays[name] = arrays[name] * 1.0002
    np.savez(tmp_path / "changed.npz", **arrays)
    assert name in check_reference.check(str(tmp_path / "changed.npz")).failed()
