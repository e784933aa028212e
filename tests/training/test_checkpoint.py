"""Checkpoints: exact on any number of devices, preserved by policy, usable on their own; errors."""

import errno
import importlib
import re
import shutil
import threading
import time
import types

import jax
import numpy as np
import pytest
import toy_states
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common import environment
from pera_jax.common.errors import UserError
from pera_jax.encoder import load
from pera_jax.objectives.pera import objective as pera
from pera_jax.parallel import sharding
from pera_jax.training import resume
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, checkpoint_store, run_meta
from pera_jax.weights import warm_start

DATA = {"name": "toy", "fingerprint": "f", "class_names": None, "records": 10, "split": "train"}


def parts(**model):
    """(config, objective, optimizer) of a tiny run."""
    config = importlib.import_module("configs.demo").get_config("smoke")
    config.model.update(model)
    objective = pera.PerA.from_config(config, Bands.plain())
    return config, objective, steps.make_optimizer(objective, config.optimizer)


def meta_of(config, objective):
    return run_meta.describe(config, objective, DATA)


@pytest.fixture(scope="module")
def state():
    """A state cut over eight devices, no two leaves of it alike."""
    _, objective, optimizer = parts()
    return toy_states.random_state(objective, optimizer, sharding.make_mesh(fsdp=8))


@pytest.fixture(scope="module")
def run(state, tmp_path_factory):
    """A run that saved steps 3, 5, 6 and 7; the last 2 are kept, and multiples of 3."""
    workdir = tmp_path_factory.mktemp("run")
    config, objective, _ = parts()
    store = checkpoint_store.Store(str(workdir), keep_last=2, keep_every=3)
    for step in (3, 5, 6, 7):  # back to back: none may be skipped
        current = state.replace(step=state.step + step)
        store.save(current, meta_of(config, objective), {"batches": step, "replaced": 10 * step})
    store.close()
    return workdir


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 4))
def test_the_first_save_at_or_after_each_multiple_stays_whatever_steps_are_saved(gaps, every, last):
    """As a store sees them: after each save, of what earlier decisions have left."""
    saved, there = np.cumsum(gaps).tolist(), []
    for step in saved:
        there.append(types.SimpleNamespace(step=step))
        kept = checkpoint_store._FirstOfEvery(every).should_preserve(there, context=None)
        there = [each for i, each in enumerate(there) if kept[i] or i >= len(there) - last]
    wanted = {next(step for step in saved if step >= multiple) for multiple in range(every, saved[-1] + 1, every)}
    assert {each.step for each in there} == wanted | set(saved[-last:])


def test_the_last_checkpoints_and_every_nth_are_kept(run):
    assert checkpoint.saved_steps(run) == [3, 6, 7]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "6", "7"]


@pytest.mark.parametrize(
    "mesh", [{"devices": 1}, {"fsdp": 2, "devices": 2}, {"data": 2, "tensor": 2, "devices": 4},
             {"fsdp": 4, "devices": 4}, {"data": 4, "fsdp": 2}, {"fsdp": 8}], ids=str,
)  # fmt: skip
def test_a_state_comes_back_exactly_on_any_mesh(run, state, mesh):
    _, objective, optimizer = parts()
    mesh = sharding.make_mesh(**mesh | {"devices": jax.devices()[: mesh.get("devices", 8)]})
    abstract = steps.abstract_state(objective, optimizer, mesh)
    restored, data = checkpoint.restore(checkpoint.folder_of(run, 6)[0], abstract)
    assert data == {"batches": 6, "replaced": 60}
    wanted = state.replace(step=np.int32(6))
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), restored, wanted)
    assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, restored, abstract))


def test_weights_come_with_what_is_needed_to_use_them(run, state):
    config, objective, _ = parts()
    for which, wanted in (("teacher", state.teacher), ("student", state.params)):
        weights = load.load_weights(run, step=6, which=which)
        jax.tree.map(np.testing.assert_array_equal, weights.params, wanted)
        assert weights.backbone is weights.params["backbone"]
        assert weights.meta == meta_of(config, objective) | {"step": 6}
    assert objectives.from_metadata(weights.meta).encoder == objective.encoder


def test_init_from_another_shape_names_leaves_that_differ(run, state):
    _, objective, optimizer = parts(width=64)
    other = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
    with pytest.raises(UserError) as error:
        warm_start.with_weights(other, str(run), objective)
    message = str(error.value)
    assert "expected backbone/class_token (64,), got (32,)" in message
    differing = [
        sharding.path_of(path)
        for (path, leaf), old in zip(
            jax.tree_util.tree_flatten_with_path(other.params)[0], jax.tree.leaves(state.params), strict=True
        )
        if leaf.shape != old.shape
    ]
    assert all(f"expected {path} " in message for path in differing) and len(differing) > 20


def test_restoring_into_another_shape_or_a_damaged_checkpoint_is_refused(run, tmp_path):
    _, objective, optimizer = parts(width=64)
    folder = checkpoint.folder_of(run, 7)[0]
    with pytest.raises(UserError, match=f"{folder} does not fit this config: .*mu/backbone/class_token .64"):
        checkpoint.restore(folder, steps.abstract_state(objective, optimizer, sharding.make_mesh()))
    damaged = tmp_path / "checkpoints" / "7"
    (damaged / "meta").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read"):
        load.load_weights(tmp_path)


def test_what_is_not_there_is_named(run, tmp_path, state):
    with pytest.raises(UserError, match=re.escape(f"{run} has no checkpoint of step 4; choose one of 3, 6, 7")):
        load.load_weights(run, step=4)
    with pytest.raises(UserError, match="is not a run folder"):
        load.load_weights(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no finished checkpoint yet"):
        load.load_weights(tmp_path)
    config, objective, _ = parts()
    store = checkpoint_store.Store(str(tmp_path), keep_last=1, keep_every=1)
    store.save(state, meta_of(config, objective) | {"format_version": 99}, {"batches": 0, "replaced": 0})
    store.close()
    with pytest.raises(UserError, match="has format version 99, expected 2 to 4"):
        load.load_weights(tmp_path)


def test_a_run_goes_on_only_with_its_own_model_settings_and_data():
    config, objective, _ = parts()
    meta = meta_of(config, objective)
    resume.check_same_run(meta, meta, "runs/a", allow_changed_data=False)
    changed = {
        "another model: expected model": meta | {"model": meta["model"] | {"depth": 9}},
        "another model: expected mean": meta | {"mean": [0.4] * 3},
        "another run: expected batch_size": meta | {"config": meta["config"] | {"batch_size": 3}},
        "another run: expected seed": meta | {"config": meta["config"] | {"seed": 3}},
        "another dataset: expected toy with fingerprint .*, got toy with g": meta
        | {"data": DATA | {"fingerprint": "g"}},
    }
    for message, found in changed.items():
        with pytest.raises(UserError, match=f"runs/a belongs to {message}"):
            resume.check_same_run(found, meta, "runs/a", allow_changed_data=False)
    resume.check_same_run(meta | {"data": DATA | {"fingerprint": "g"}}, meta, "runs/a", allow_changed_data=True)


def test_beside_a_training_that_removes_checkpoints_a_hundred_readings_succeed(run, tmp_path, monkeypatch):
    """Another thread puts a copy under the next step and removes the one before, file by file, all the time."""
    folder, done, steps_read = tmp_path / "run" / "checkpoints", threading.Event(), []
    monkeypatch.setattr(checkpoint, "_REMOVAL_SECONDS", 0.02)
    wanted = _read_all(run / "checkpoints" / "7", [])
    shutil.copytree(run / "checkpoints" / "7", folder / "7")

    def train():
        step = 7
        while not done.is_set():
            shutil.copytree(run / "checkpoints" / "7", tmp_path / "next")
            (tmp_path / "next").rename(folder / str(step + 1))
            shutil.rmtree(folder / str(step))
            step += 1
            done.wait(0.05)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(100):
            files = checkpoint.read_while_present(
                tmp_path / "run", None, lambda step: _read_all(folder / str(step), steps_read)
            )
            assert files == wanted
    finally:
        done.set()
        thread.join()
    assert len(steps_read) > 100  # some were removed while they were read
    last = checkpoint.saved_steps(tmp_path / "run")[-1]

    def removed(step):
        shutil.rmtree(folder / str(step))
        raise checkpoint.Damaged("half of it")

    with pytest.raises(
        checkpoint.Removed, match=f"training removed the checkpoint of step {last} of .* while it was read"
    ):
        checkpoint.read_while_present(tmp_path / "run", last, removed)


def _read_all(folder, steps_read):
    steps_read.append(folder.name)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    time.sleep(0.01)
    return [path.read_bytes() for path in files]


def test_a_checkpoint_without_digests_is_read_and_its_values_are_finite(run, state, tmp_path):
    config, objective, optimizer = parts()
    abstract = steps.abstract_state(objective, optimizer, sharding.make_mesh(devices=jax.devices()[:1]))
    spoiled = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), state.teacher["backbone"]["norm"])
    teachers = {"1": state.teacher, "2": state.teacher | {"backbone": state.teacher["backbone"] | {"norm": spoiled}}}
    for name, teacher in teachers.items():
        meta = meta_of(config, objective) | {"format_version": 2, "step": int(name)}
        items = checkpoint.split(state) | {"teacher": teacher, "data": {"batches": 3}, "meta": meta}
        ocp.save_checkpointables(tmp_path / "checkpoints" / name, items)
    restored, data = checkpoint.restore(tmp_path / "checkpoints" / "1", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert data == {"batches": 3}
    for read in (
        lambda: checkpoint.restore(tmp_path / "checkpoints" / "2", abstract),
        lambda: load.load_weights(tmp_path, 2),
    ):
        with pytest.raises(
            checkpoint.Damaged,
            match="its teacher has NaN or infinite values in backbone/norm/bias, backbone/norm/scale",
        ):
            read()
    assert len(jax.tree.leaves(load.load_weights(tmp_path, 2, verify=False).params)) > 20


@pytest.mark.parametrize(
    "fault", [OSError(errno.EMFILE, "Too many open files"), MemoryError(), RuntimeError("can't start new thread"),
              ValueError("UNKNOWN: Error opening file [OS error 24: Too many open files]")],
)  # fmt: skip
def test_a_machine_that_cannot_read_is_no_damage(fault, run, monkeypatch):
    tries, load = [], ocp.load_checkpointables

    def failing(*args, **kwargs):
        tries.append(args)
        if len(tries) == 1 or always:
            raise fault
        return load(*args, **kwargs)

    monkeypatch.setattr(environment, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(ocp, "load_checkpointables", failing)
    always = False
    assert checkpoint.load_meta(run / "checkpoints" / "7")["step"] == 7 and len(tries) == 2  # it was over in a moment
    always = True
    with pytest.raises(environment.EnvironmentFault, match="checkpoints/7 cannot be read: .*the data is not damaged"):
        checkpoint.load_meta(run / "checkpoints" / "7")
    assert checkpoint.saved_steps(run) == [3, 6, 7]


def test_a_folder_that_was_renamed_or_is_empty_is_damaged_and_one_that_is_no_step_is_none(run, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(run, work)
    folder = work / checkpoint.FOLDER
    (folder / "7").rename(folder / "9")
    (folder / "6").rename(folder / "7")
    for step, held in ((9, 7), (7, 6)):
        with pytest.raises(checkpoint.Damaged, match=f"is not of step {step}: it was saved at step {held}"):
            load.load_weights(work, step)
    for name in ("0012", "²", "1e3"):
        (folder / name).mkdir()
    (folder / "10").write_text("a file")
    assert checkpoint.saved_steps(work) == [3, 7, 9]
    (folder / "11").mkdir()
    began = time.monotonic()
    with pytest.raises(checkpoint.Damaged, match="checkpoints/11 cannot be read: the folder is empty"):
        load.load_weights(work)
    assert time.monotonic() - began < 10
