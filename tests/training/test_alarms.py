"""Alarms: none in a healthy run; with each planted failure, the right one, in time, and only once."""

import io
import json
import math
import shutil

import numpy as np
import pytest
from run_files import assert_same_bits, everything, metrics_of

from configs import demo
from data_prep import demo_scenes, images
from pera_jax import train
from pera_jax.common.errors import UserError
from pera_jax.objectives import watched
from pera_jax.objectives.pera import health
from pera_jax.training import alarms, metrics

HEALTHY = {
    "loss": 5.0, "teacher/entropy": 3.0, "teacher/entropy_of_mean": 4.5, "teacher/prototypes_in_use": 25.0,
    "teacher/feature_variance": 0.5, "norm/update": 0.15, "norm/parameters": 60.0,
}  # fmt: skip
ILL = {
    "collapse to few prototypes": {"teacher/entropy": 0.05, "teacher/entropy_of_mean": 0.1, "loss": 2.0},
    "prototypes unused": {"teacher/prototypes_in_use": 1.0},
    "uniform teacher": {
        "teacher/entropy": math.log(1024) - 0.01,
        "teacher/entropy_of_mean": math.log(1024),
        "loss": 9.0,
    },
    "features collapse": {"teacher/feature_variance": 0.001},
    "updates too large": {"norm/update": 5.0},
    "loss diverges": {"loss": 20.0},
}


def watch(state=None):
    return alarms.Alarms(health.checks(prototypes=1024, images=32), peak=1e-3, state=state)


def feed(watch, steps, changes=None, rate=1e-3, noise=None):
    """The alarms that begin in so many steps, with their steps from 1."""
    begun = []
    for step in range(1, steps + 1):
        values = HEALTHY | (changes or {})
        if noise:
            values = {name: value * noise.uniform(0.8, 1.2) for name, value in values.items()}
        begun += [(step, alarm) for alarm in watch.update(values, rate)]
    return begun


def test_every_condition_is_tried():
    assert set(ILL) == {condition.name for condition in health.CONDITIONS}
    assert set(watch().metrics()) == {alarms.metric(name) for name in ILL}


@pytest.mark.parametrize("name", ILL)
def test_an_alarm_begins_once_ends_and_begins_again(name):
    rng, run = np.random.default_rng(0), watch()
    assert not feed(run, 300, noise=rng)
    for _ in range(2):
        ((step, alarm),) = feed(run, 300, ILL[name])
        assert alarm.name == name and 30 <= step <= 50
        assert run.metrics()[alarms.metric(name)] == 1 and sum(run.metrics().values()) == 1
        assert "nan" not in alarm.text and "{" not in alarm.text
        assert not feed(run, 300, noise=rng)
        assert sum(run.metrics().values()) == 0


@pytest.mark.parametrize("name", ILL)
def test_a_moment_is_no_alarm(name):
    """Nor a value that comes and goes, nor what is normal until the learning rate has come to its peak."""
    run = watch()
    assert not feed(run, 100) and not feed(run, 30, ILL[name]) and not feed(run, 300)
    condition = next(condition for condition in health.CONDITIONS if condition.name == name)
    before_peak = feed(watch(), 300, ILL[name], rate=0.9e-3)
    # which was as large at the start
    assert bool(before_peak) == (not condition.after_peak and name != "loss diverges")


def test_around_a_bound_it_is_said_once():
    run, said = watch(), []
    for i in range(40):
        size = 0.021 if i % 2 else 0.012  # of the parameters: beyond the bound, and within it but not by much
        said += feed(run, 60, {"norm/update": size * HEALTHY["norm/parameters"]})
    assert [alarm.name for _, alarm in said] == ["updates too large"]


@pytest.mark.parametrize("seed", range(5))
def test_state_goes_on_where_it_was(seed):
    """Through JSON, as a checkpoint keeps it, at a random step of a random run."""
    rng = np.random.default_rng(seed)
    steps = [HEALTHY | ILL.get(name, {}) for name in rng.choice([*ILL, "healthy"], 10) for _ in range(60)]
    rates = np.linspace(0, 2e-3, len(steps)).clip(max=1e-3)
    whole, cut = watch(), int(rng.integers(len(steps)))
    expected = [(whole.update(*each), whole.metrics()) for each in zip(steps, rates, strict=True)]
    parts = watch()
    found = [(parts.update(*each), parts.metrics()) for each in zip(steps[:cut], rates[:cut], strict=True)]
    parts = watch(json.loads(json.dumps(parts.state())))
    found += [(parts.update(*each), parts.metrics()) for each in zip(steps[cut:], rates[cut:], strict=True)]
    assert found == expected and any(begun for begun, _ in expected)


@pytest.mark.parametrize(("prototypes", "images"), [(256, 1), (256, 16), (1024, 32), (131072, 1024), (131072, 4096)])
def test_bounds_hold_for_any_size(prototypes, images):
    """A prototype of its own for each image is healthy, and one for all of them is not."""
    healthy = HEALTHY | {
        "teacher/entropy": 0.2 * math.log(prototypes), "teacher/prototypes_in_use": images,
        "teacher/entropy_of_mean": max(math.log(min(prototypes, images)), 0.2 * math.log(prototypes)),
    }  # fmt: skip
    run = alarms.Alarms(health.checks(prototypes, images), 1e-3)
    assert not feed(run, 300, healthy)
    collapsed = {"loss": 2.0, "teacher/entropy": 0.0, "teacher/entropy_of_mean": 1e-3, "teacher/prototypes_in_use": 1.0}
    names = {alarm.name for _, alarm in feed(run, 300, healthy | collapsed)}
    assert names == ({"collapse to few prototypes", "prototypes unused"} if images > 1 else set())


@pytest.mark.parametrize("first, last, begins", [
    (0.2, 2.0, True), (0.2, 0.6, False), (-0.9, -0.3, True), (-0.9, -0.5, False), (-8.0, -3.0, True), (4.0, 6.1, True),
    (4.0, 5.9, False),
])  # fmt: skip
def test_a_loss_of_any_size_and_sign_that_rises_is_seen(first, last, begins):
    """From 1 on at 1.5 times its first value; else at a rise by a half, or by half of what a negative one was."""
    own = watched.HealthChecks(watched.COMMON_CONDITIONS, watched.common_averages, lambda _: {"excess_name": "loss"})
    run = alarms.Alarms(own, 1e-3)
    feed(run, 30, {"loss": first})
    said = [alarm for _, alarm in feed(run, 200, {"loss": last})]
    assert [alarm.name for alarm in said] == ["loss diverges"] * begins
    if begins:
        assert f"the loss has risen from {first:.2f} in the first steps to " in said[0].text


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The demo's data, smaller."""
    folder = tmp_path_factory.mktemp("scenes")
    demo_scenes.main(["--output", str(folder / "scenes"), "--images", "300", "--size", "64"])
    images.main(["--input", str(folder / "scenes" / "train"), "--output", str(folder / "shards"), "--split", "train"])
    return str(folder / "shards")


def small(scenes, total, **changes):
    """configs/demo.py with a smaller network on smaller crops."""
    config = demo.get_config()
    config.total, config.batch_size, config.log_every = total, 16, "10 steps"
    config.data.update(dict(path=scenes, workers=0))
    config.crops.update(dict(global_size=32, local_number=0))
    config.model.update(dict(width=48, depth=2))
    config.pera.heads.update(dict(hidden=64, bottleneck=32, prototypes=128))
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def alarms_of(workdir):
    return [json.loads(line) for line in (workdir / "alarms.jsonl").read_text().splitlines()]


def assert_said(workdir, name: str, err: str) -> int:
    """One alarm of each kind, the one of `name` on for a while; returns its first step."""
    found = alarms_of(workdir)
    (begun,) = (alarm["step"] for alarm in found if alarm["alarm"] == name)
    assert len({alarm["alarm"] for alarm in found}) == len(found)
    said = [line for line in err.splitlines() if line.startswith("alarm")]
    assert said == [f"alarm at step {alarm['step']}, {alarm['alarm']}: {alarm['text']}" for alarm in found]
    on = {line["step"]: line[alarms.metric(name)] for line in metrics_of(workdir)}
    assert not any(value for step, value in on.items() if step < begun)
    assert all(on[step] for step in on if begun <= step < begun + 30)  # it cannot end earlier
    return begun


def test_a_learning_rate_that_is_300_times_too_high_is_named(scenes, one_device, tmp_path, capsys):
    train.train(small(scenes, "80 steps", schedules__learning_rate__peak=0.3), str(tmp_path / "run"))
    assert_said(tmp_path / "run", "updates too large", capsys.readouterr().err)


def test_a_healthy_run_raises_none_from_start_to_end(scenes, one_device, tmp_path, capsys):
    train.train(small(scenes, "120 steps"), str(tmp_path / "run"))
    assert not alarms_of(tmp_path / "run") and "alarm" not in capsys.readouterr().err
    assert not any(value for line in metrics_of(tmp_path / "run") for key, value in line.items() if "alarm/" in key)


def test_a_collapse_is_named_and_its_alarm_survives_a_resume(scenes, one_device, tmp_path, capsys):
    """Without a center and with sharp targets; resumed from a checkpoint at which the alarm was about to begin."""
    temperature = dict(pera__teacher_temperature__start=0.02, pera__teacher_temperature__end=0.02)
    config = small(
        scenes, "80 steps", checkpoint__every="20 steps", log_every="1 steps", pera__loss__center_momentum=1.0,
        **temperature,
    )
    train.train(config, str(tmp_path / "whole"))
    assert 40 < assert_said(tmp_path / "whole", "collapse to few prototypes", capsys.readouterr().err) < 80
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in (60, 80):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    train.train(config, str(tmp_path / "run"))
    assert alarms_of(tmp_path / "run") == alarms_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert_same_bits(everything(tmp_path / "run", 80), everything(tmp_path / "whole", 80))


# ---------------------------------------------------------------- files


def test_alarms_lie_in_a_file_that_is_cut_back(tmp_path):
    def write(resume_step, steps):
        stream = io.StringIO()
        writer = metrics.MetricsWriter(tmp_path, resume_step=resume_step, total=9, batch_size=4, stream=stream)
        for step in steps:
            writer.write_alarm(step, "a", "too much")
        writer.close()
        return stream.getvalue()

    assert write(0, (3, 7)) == "alarm at step 3, a: too much\nalarm at step 7, a: too much\n"
    write(5, (6,))
    assert [alarm["step"] for alarm in alarms_of(tmp_path)] == [3, 6]
    assert alarms_of(tmp_path)[1] == {"step": 6, "alarm": "a", "text": "too much"}
    (tmp_path / "alarms.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"line 1 of .*alarms\.jsonl is not a valid record of alarms"):
        write(0, ())
