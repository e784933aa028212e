"""Invalid input ends a training or probe with one sentence, a nonzero status, and nothing written."""

import importlib
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest
import toy_data
import toy_runs
import toy_shards
import toy_states
from conftest import FAST

from pera_jax import config as configs
from pera_jax import objectives, probe, train
from pera_jax.bands import Bands
from pera_jax.common import errors
from pera_jax.common.errors import UserError
from pera_jax.data import mixture
from pera_jax.encoder import load
from pera_jax.objectives.pera import objective as pera
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, checkpoint_store, run_meta

ROOT = pathlib.Path(train.__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data.write(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def config(data):
    config = importlib.import_module("configs.demo").get_config("smoke")
    config.data.path = data
    return config


def refuse(config, workdir: pathlib.Path, message: str) -> None:
    """The training ends with the sentence before it writes anything."""
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        train.train(config, str(workdir))
    assert "\n" not in str(error.value)
    assert sorted(workdir.rglob("*")) == before


def test_a_user_error_is_one_line_and_status_1(capsys):
    def main():
        raise UserError("the thing is wrong; fix it")

    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "error: the thing is wrong; fix it\n")


def test_no_name_in_an_error_forges_a_line_or_controls_the_terminal(capsys):
    def main():
        raise UserError("cannot read a\nerror: \x1b[31mforged\x9b\u202e\udce9.png; remove it" + "x" * 10**6)

    with pytest.raises(SystemExit):
        errors.run(main)
    shown = capsys.readouterr().err
    assert shown.startswith("error: cannot read a\\nerror: \\x1b[31mforged\\x9b\\u202e\\udce9.png; remove it")
    assert shown.count("\n") == 1
    assert len(shown) < 2100


def test_an_undecodable_name_is_printed_in_any_locale():
    code = "from pera_jax.common import errors; errors.run(lambda: print('caf\\udce9 \\u65e5'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"},
                           capture_output=True, text=True)  # fmt: skip
    assert (found.returncode, found.stdout, found.stderr) == (0, "caf\\udce9 \\u65e5\n", "")


def test_ctrl_c_is_one_line_too(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")


WRONG_SETTINGS = {
    "batch_size=12 is not divisible by the 8 shard": {"batch_size": 12},
    "has 48 images in split 'train', fewer than batch_size=64": {"batch_size": 64},
    "crops.global_size=50 is not a multiple of model.patch=8": {"crops.global_size": 50},
    "crops.local_size=20 is not a multiple of the patch size 8": {"crops.local_size": 20},
    "split 36 patches into 0 student": {"pera.masks.student": 0.01},
    "14 learnable and 0 teacher": {"pera.masks.teacher": 0.0, "pera.masks.student": 0.6},
    "split 36 patches into 7 student, 0 learnable": {"pera.masks.teacher": 0.8},
    "model.width=32 is not a multiple of model.heads=3": {"model.heads": 3},
    "pera.heads.prototypes=60 is not divisible by the 8 shards": {
        "pera.heads.prototypes": 60,
        "mesh.data": 1,
        "mesh.fsdp": 8,
    },
    "is not divisible by pera.loss.koleo_group=5": {"pera.loss.koleo_group": 5},
    "precision='float8' is invalid; expected one of": {"precision": "float8"},
    "mesh data=3, fsdp=1, tensor=1 does not fit 8 device": {"mesh.data": 3},
    "total": {"total": "4"},
    r"seed=-1 must be in \[0, 4294967296\)": {"seed": -1},
    "data.workers=-2 must be >= 0": {"data.workers": -2},
    r"crops.global_area=\(2.0, 3.0\) must be two ascending numbers in \(0, 1\]": {"crops.global_area": (2.0, 3.0)},
    r"crops.local_area=\(1,\) must be two ascending numbers": {"crops.local_area": (1,)},
    r"crops.aspect=\(1.3, 0.7\) must be two ascending numbers > 0": {"crops.aspect": (1.3, 0.7)},
    r"crops.aspect=\('a', 'b'\) must be two ascending": {"crops.aspect": ("a", "b")},
    "crops.global_size=0 must be >= 1": {"crops.global_size": 0},
    r"crops.flip=1.5 must be in \[0, 1\]": {"crops.flip": 1.5},
    "model.depth=-1 must be >= 0": {"model.depth": -1},
    r"optimizer.beta1=2.0 must be in \[0, 1\)": {"optimizer.beta1": 2.0},
    r"optimizer.beta2=nan must be in \[0, 1\)": {"optimizer.beta2": float("nan")},
    "optimizer.eps=0.0 must be > 0": {"optimizer.eps": 0.0},
    "optimizer.eps=inf must be a finite number": {"optimizer.eps": float("inf")},
    "pera.loss.koleo_weight=nan must be a finite number": {"pera.loss.koleo_weight": float("nan")},
    "pera.loss.koleo_weight=-1.0 must be >= 0": {"pera.loss.koleo_weight": -1.0},
    r"pera.heads.hidden=0 must be a number in \[1, 2": {"pera.heads.hidden": 0},
    "optimizer.rate_factors: 'nowhere' matches no parameter": {"optimizer.rate_factors": (("nowhere", 0.1),)},
    "optimizer.clip_norm=-3.0 must be > 0": {"optimizer.clip_norm": -3.0},
    "checkpoint.keep_last=0 must be >= 1": {"checkpoint.keep_last": 0},
    r"data.weights=\(3,\) has no effect on the one dataset": {"data.weights": (3,)},
    "a positive number for each of the 2 datasets": {"data.path": "a,b", "data.weights": (3,)},
    "dataset folder nowhere does not exist": {"data.path": "nowhere"},
    "has no split 'test'; it has train": {"data.split": "test"},
    "init_from|nowhere is not a run folder": {"init_from": "nowhere"},
    "nowhere is not a run folder": {"resume_from": "nowhere"},
}


@pytest.mark.parametrize("message", WRONG_SETTINGS)
def test_wrong_settings_end_before_anything_is_written(message, config, tmp_path):
    config.update_from_flattened_dict(WRONG_SETTINGS[message])
    refuse(config, tmp_path / "run", message)


def test_a_field_that_is_unknown_or_missing_is_named(config, tmp_path):
    with config.unlocked():
        config.data.pth = "x"
    refuse(config, tmp_path / "run", "has no field data.pth; known here: .*path")
    del config.data["pth"], config.data["path"]
    refuse(config, tmp_path / "run", "lacks the field data.path")


def cut_short(folder):
    shard = folder / toy_shards.shard("toy", "train")
    shard.write_bytes(shard.read_bytes()[:-1000])


DAMAGE = {
    "is damaged: expected": cut_short,
    "shard .* is missing": lambda folder: (folder / toy_shards.shard("toy", "train")).unlink(),
    "has ranges for 3 bands, expected 4": lambda folder: toy_shards.edit_info(
        folder, bands=["red", "green", "blue", "infrared"]
    ),
    "has format version 99": lambda folder: toy_shards.edit_info(folder, format_version=99),
    "info.json is damaged: it is not valid JSON": lambda folder: (folder / "info.json").write_text('{"name": '),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_or_foreign_data_set_is_refused(message, config, data, tmp_path):
    folder = tmp_path / "toy"
    shutil.copytree(data, folder)
    DAMAGE[message](folder)
    config.data.path = str(folder)
    refuse(config, tmp_path / "run", message)


def begin(config, workdir: pathlib.Path) -> None:
    """Makes `workdir` a run that has done 1 step: a state of random numbers, saved under that step."""
    data = mixture.open_mixture(config.data)
    objective = objectives.from_config(config, data.bands)
    state = toy_states.random_state(objective, steps.make_optimizer(objective, config.optimizer))
    store = checkpoint_store.Store(str(workdir), keep_last=3, keep_every=100)
    meta = run_meta.describe(config, objective, data.card())
    store.save(state.replace(step=state.step + 1), meta, {"batches": 1, "replaced": 0, "drawn": [16]})
    store.close()


def test_the_workdir_of_another_run_is_refused_and_left_alone(config, tmp_path):
    workdir = tmp_path / "run"
    begin(config, workdir)
    other = config.copy_and_resolve_references()
    other.model.width = 64
    refuse(other, workdir, "belongs to another model: expected model.width 64 from this config, got 32; use another")
    other = config.copy_and_resolve_references()
    other.data.path = toy_data.write(tmp_path / "other", fingerprint="other")
    refuse(other, workdir, "belongs to another dataset: expected other with fingerprint other, got toy with toy")
    other = config.copy_and_resolve_references()
    other.resume_from = str(workdir)
    other.seed = 5
    refuse(other, tmp_path / "new", "belongs to another run: expected seed 5 from this config, got 0")


# ---------------------------------------------------------------- the commands


def command(*arguments: str) -> subprocess.Popen:
    environment = os.environ | toy_runs.PATH | {"XLA_FLAGS": FAST}  # one device
    words = [sys.executable, "-m", "pera_jax.train", *arguments]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def sentence(process: subprocess.Popen, status: int = errors.INPUT) -> str:
    """What a command that failed with this status said, besides progress: exactly one line."""
    lines = process.stderr.read().splitlines()
    assert process.wait(60) == status, lines
    said = ("step ", "devices: ", "data: ", "training: ", "model: ", "compiling ", "resuming from step ")
    (line,) = [line for line in lines if not line.startswith(said)]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_wrong_flags_end_with_one_sentence(data, tmp_path):
    bad_file = tmp_path / "bad.py"
    bad_file.write_text(
        "from pera_jax import config as configs\n\n\ndef get_config():\n    config = configs.default()\n"
        "    config.data.pth = 'x'\n    return config\n"
    )
    workdir = ("--workdir", str(tmp_path / "run"))
    started = {
        """flag or config: 'pth' Did you mean "path" """: command(
            "--config", "configs/demo.py:smoke", f"--config.data.pth={data}", *workdir
        ),
        "no config; choose one": command(*workdir),
        "no folder for checkpoints": command("--config", "demo:smoke"),
        "Unknown command line flag 'confg'": command("--confg", "demo:smoke", *workdir),
    }
    for message, process in started.items():
        assert message.strip() in sentence(process, errors.USAGE)
    assert not (tmp_path / "run").exists()
    wrong = {"configs/nowhere.py": "nowhere.py", "configs/demo.py:small": "no argument 'small'", str(bad_file): "pth"}
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            train.train(name, tmp_path / "run")
    with pytest.raises(UserError, match="is not a run folder"):
        probe.probe(tmp_path / "run", data=data)


@pytest.fixture
def tiny_device(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "device"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_names_the_last_good_checkpoint_and_leaves_it_whole(data, tiny_device, tmp_path):
    workdir, file = tiny_device / "run", toy_runs.write_config(tmp_path)
    begin(configs.load(file, {"data.path": data}), workdir)
    filler = shutil.disk_usage(tiny_device).free - (300 << 10)  # too little for a checkpoint, enough for the metrics
    (tiny_device / "filler").write_bytes(bytes(filler))
    message = sentence(command("--config", file, f"--config.data.path={data}", "--workdir", str(workdir)))
    assert (
        "checkpoint of step 2 could not be written" in message and "no space left on device; free disk space" in message
    )
    assert message.endswith("the last good checkpoint is step 1")
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]
    assert load.load_weights(workdir).step == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from threads of Orbax and TensorStore
def test_a_save_that_fails_half_way_leaves_the_last_checkpoint(config, data, tmp_path):
    """What statistics of the file system do not tell beforehand, here a limit on the size of files."""
    begin(config, tmp_path / "run")
    store = checkpoint_store.Store(str(tmp_path / "run"), keep_last=3, keep_every=100)
    folder, _ = checkpoint.folder_of(tmp_path / "run", 1)
    objective = pera.PerA.from_config(config, Bands.plain())
    state = toy_states.random_state(objective, steps.make_optimizer(objective, config.optimizer))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match="checkpoint of step 2 could not be written .* last good checkpoint is step 1"
        ):
            store.save(
                state.replace(step=state.step + 2),
                checkpoint.load_meta(folder),
                {"batches": 2, "replaced": 0, "drawn": [32]},
            )
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.close()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert load.load_weights(tmp_path / "run").step == 1
