"""A run of an earlier version: its checkpoint of format 3 resumes, and its weights can be used.

tests/files/format_3.tar.xz holds step 2 of 4 and the metrics of all four, of `configs/demo.py:smoke` on the images of
`toy_data`, with width 16, depth 2, crops of 32 and 16 px, hidden 16, bottleneck 8 and 32 prototypes.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest
import toy_data

from pera_jax import config as configs
from pera_jax import export, features, probe, train
from pera_jax.config import renamed
from pera_jax.training.checkpoints import checkpoint

FILE = pathlib.Path(__file__).parents[1] / "files" / "format_3.tar.xz"


@pytest.fixture
def run(tmp_path):
    with tarfile.open(FILE) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path):
    return toy_data.write(tmp_path / "toy")


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_resumes_where_it_was(run, data, one_device, capsys):
    before = lines_of(run)
    config = configs.load(str(run / "config.json"), [f"data.path={data}"])
    assert config.pera.heads.prototypes == 32 and config.optimizer.clip_norm == 3.0
    train.train(config, str(run))
    assert "resuming from step 2 of 4" in capsys.readouterr().err
    after = lines_of(run)
    assert after[:2] == before[:2] and len(after) == 4
    for one, other in zip(before, after, strict=True):
        one, other = ({name: line[name] for name in line if not name.startswith("time/")} for line in (one, other))
        assert one.keys() == other.keys()
        for name in one:  # CPUs of other kinds round otherwise
            np.testing.assert_allclose(other[name], one[name], rtol=1e-4, err_msg=name)


def test_its_weights_are_used_and_begin_another_run(run, data, one_device, tmp_path, capsys):
    image = np.zeros((32, 32, 3), np.uint8)
    token = features.load(run)(image).class_token
    found = probe.probe(str(run), ["knn"], data=data, test_split="", changes=["knn.k=(3,)"])
    assert "failure" not in found[0]
    export.main(["timm", "--run", str(run), "--output", str(tmp_path / "timm")])
    np.testing.assert_allclose(features.load(tmp_path / "timm")(image).class_token, token, atol=1e-5)
    config = configs.load(str(run / "config.json"), [f"data.path={data}", "total=1 steps", f"init_from={run}"])
    config.pera.teacher_temperature.warmup = "1 steps"
    train.train(config, str(tmp_path / "next"))
    assert "all networks and heads" in capsys.readouterr().err
    assert checkpoint.saved_steps(tmp_path / "next") == [1]


def test_every_field_of_its_config_has_a_place_now(run):
    before = json.loads((run / "config.json").read_text())["config"]
    now = renamed.migrated(before)
    assert renamed.migrated(now) == now
    known = json.loads(configs.default().to_json())
    left = [field for field, _ in renamed.leaves(now) if not _has(known, field)]
    assert not left
    assert len(list(renamed.leaves(now))) == len(list(renamed.leaves(before)))


def _has(tree: dict, field: str) -> bool:
    for name in field.split("."):
        if name not in tree:
            return False
        tree = tree[name]
    return True
