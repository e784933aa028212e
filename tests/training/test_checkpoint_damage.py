"""Damaged checkpoints, a small in-process sample of `tests/fuzz/checkpoint_damage.py`."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "fuzz"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")  # of coroutines that Orbax gives up
def test_every_damage_is_noticed_or_changes_nothing(tmp_path, capfd):
    import checkpoint_damage

    counts, failures = checkpoint_damage.fuzz(5, seed=3, folder=tmp_path)
    assert not failures and sum(counts.values()) == 5
    assert "Traceback" not in capfd.readouterr().err
