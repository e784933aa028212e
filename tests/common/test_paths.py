"""URLs raise a one-sentence error wherever a path is expected, and nothing is written."""

import pathlib
import re

import pytest

from data_prep import browse, demo_mosaics, demo_scenes, images, scenes, stats, tfds, verify
from pera_jax import config, export, plan, probe, report, train
from pera_jax.common import errors, paths
from pera_jax.data import records
from pera_jax.data.labelled import samples
from pera_jax.encoder import load
from pera_jax.encoder import model as features
from pera_jax.probes.runner import specs
from pera_jax.training.checkpoints import checkpoint, checkpoint_store

ADDRESSES = (
    "gs://bucket/x",
    "s3://bucket/x",
    "https://host/x",
    "file:///x",
    "hdfs://host/x",
    "GS://bucket",
    "abfs+s://x",
)
LOCAL = ("", "runs/aid", "/data/x", "runs/a:b/c", "tfds:eurosat/rgb", "tfds:/data/eurosat/2.0.0", "C:/x", "a,b", "..")
COMMANDS = (
    (images, "--input {} --output out --split train"), (images, "--input in --output {} --split train"),
    (scenes, "--input {} --output out --split train --tile 64"), (scenes, "--input in --output {} --split train --tile "
                                                                          "64"),
    (tfds, "--dataset {} --output out --split train"), (tfds, "--dataset x --output {} --split train"),
    (tfds, "--dataset x --output out --split train --data-dir {}"), (demo_scenes, "--output {}"),
    (demo_mosaics, "--output {}"),
    (verify, "{}"), (verify, "in --json {}"), (stats, "{}"), (stats, "in --output {}"), (browse, "{} --output "
                                                                                                 "out.html"),
    (browse, "in --output {}"), (report, "--run {} --output out"), (report, "--run in --output {}"),
    (report, "--run in --output out --data {}"), (probe, "--run {} --data in"), (probe, "--run in --data {}"),
    (probe, "--run in --data in --output {}"), (probe, "--run in --data in --labels {}"), (probe, "--run in --config "
                                                                                                  "{}"),
    (probe, "--run in --data in --set knn.data={}"), (probe, "--run {} --show"),
    (plan, "--config {} --topology v5e:2x2"), (plan, "--config c --topology v5e:2x2 --json {}"),
    (export, "timm --run {} --output out"), (export, "timm --run in --output {}"), (export, "stablehlo --run in "
                                                                                            "--output {}"),
    (export, "released --run in --output {}"), (export, "features --run in --input {} --output out"),
    (export, "features --run in --input in --output {}"), (export, "import-released {} --output out"),
    (export, "import-released in --output {}"), (export, "import-timm {} --output out"), (export, "import-timm in "
                                                                                                  "--output {}"),
)  # fmt: skip


def test_what_is_an_address():
    for name in LOCAL:
        assert paths.local(name) == name
    for name in (
        *ADDRESSES,
        *(pathlib.Path(name) for name in ADDRESSES),
        "shards/aid, gs://bucket/x",
        "tfds:gs://bucket/x",
    ):
        with pytest.raises(errors.UserError, match="is a URL, and only local paths"):
            paths.local(name)


@pytest.mark.parametrize(("command", "line"), COMMANDS, ids=[f"{of.__name__} {line}" for of, line in COMMANDS])
def test_every_command_refuses_it(command, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: command.main(line.format("gs://bucket/x").split()))
    said = capsys.readouterr().err
    assert ended.value.code == 1 and re.fullmatch(r"error: .*gs:/.*bucket/x is a URL, .*\n", said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", config.PATHS)
def test_every_field_of_a_config_that_is_a_path(field):
    settings = config.default()
    settings.update_from_flattened_dict({field: "shards/aid,s3://bucket/x"})
    with pytest.raises(errors.UserError, match=f"config.{field}=s3://bucket/x is a URL"):
        config.check(settings, 1, 1, 1)


def test_every_function_of_the_library_that_takes_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for take in (
        features.load, checkpoint.saved_steps, load.load_weights, records.load_info, samples.open_images,
        lambda path: checkpoint_store.Store(path, 1, 1), lambda path: train.train(config.default(), path),
        lambda path: specs.from_names(["segmentation"], {"data": path}, []),
    ):  # fmt: skip
        with pytest.raises(errors.UserError, match="gs:/+bucket/x is a URL"):
            take("gs://bucket/x")
    assert not list(tmp_path.iterdir())
