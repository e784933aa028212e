"""Schedules: exact values at their boundaries."""

import ml_collections
import pytest

from pera_jax.common.errors import UserError
from pera_jax.objectives.pera import PerA
from pera_jax.training import schedules

SETTINGS = {
    "learning_rate": {"start": 0.0, "peak": 1e-3, "end": 1e-6, "warmup": "20 epochs"},
    "weight_decay": {"start": 0.04, "end": 0.2},
}
OWN = {
    "teacher_momentum": {"start": 0.992, "end": 1.0},
    "teacher_temperature": {"start": 0.03, "end": 0.05, "warmup": "30 epochs"},
    "student_temperature": 0.1,
}


def build(steps_per_epoch=10, total_steps=2000, **changes):
    config = ml_collections.ConfigDict({"batch_size": 64, "schedules": SETTINGS, "pera": OWN})
    config.update_from_flattened_dict(changes)
    return schedules.scalars(config, PerA.schedules(), steps_per_epoch=steps_per_epoch, total_steps=total_steps)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=0)


def test_published_schedule_at_its_corners():
    # 200 epochs of 10 steps: 200 steps of warm-up, 1,800 of cosine; 300 steps of temperature ramp.
    run = build()
    assert run.at(0) == {
        "learning_rate": 0.0,
        "weight_decay": 0.04,
        "one_minus_momentum": close(0.008),
        "teacher_temperature": 0.03,
        "student_temperature": 0.1,
    }
    assert run.at(1)["learning_rate"] == close(1e-3 / 199)  # both end points are among the 200 values
    assert run.at(199)["learning_rate"] == 1e-3
    assert run.at(200)["learning_rate"] == 1e-3  # t = 0 of the cosine
    assert run.at(1100)["learning_rate"] == close(5.005e-4)  # its middle
    assert run.at(650)["learning_rate"] == close(1e-6 + 9.99e-4 * 0.8535533905932737)  # its first quarter
    assert run.at(1999)["learning_rate"] == close(1.00076078181279e-06)  # one step short of the end: not 1e-6 yet
    assert run.at(1000)["weight_decay"] == close(0.12)
    assert run.at(1000)["one_minus_momentum"] == close(0.004)
    assert run.at(150)["teacher_temperature"] == close(0.03 + 0.02 * 150 / 299)
    assert run.at(299)["teacher_temperature"] == 0.05
    assert run.at(300)["teacher_temperature"] == 0.05
    for past in (2000, 5000):
        assert run.at(past) == {
            "learning_rate": 1e-6,
            "weight_decay": 0.2,
            "one_minus_momentum": 0.0,
            "teacher_temperature": 0.05,
            "student_temperature": 0.1,
        }


def test_one_minus_momentum_keeps_its_digits_near_one():
    # One step before the end m is 1 - 1.97e-14: 1 - m taken from a float64 m would have three digits.
    run = build(total_steps=1_000_000)
    assert run.at(999_999)["one_minus_momentum"] == pytest.approx(0.008 * 2.4674011002703e-12, rel=1e-9)
    assert run.at(999_000)["one_minus_momentum"] == pytest.approx(0.008 * 2.46739907091694e-06, rel=1e-9)


def test_short_ramps():
    one = build(
        **{
            "schedules.learning_rate.warmup": "1 steps",
            "schedules.learning_rate.start": 1e-4,
            "schedules.learning_rate.peak": 2e-3,
        }
    )
    assert one.at(0)["learning_rate"] == 1e-4
    assert one.at(1)["learning_rate"] == 2e-3
    none = build(**{"schedules.learning_rate.warmup": "0 steps", "pera.teacher_temperature.warmup": "0 epochs"})
    assert none.at(0)["learning_rate"] == 1e-3
    assert none.at(0)["teacher_temperature"] == 0.05
    whole = build(total_steps=200, **{"pera.teacher_temperature.warmup": "100 percent"})
    assert whole.at(199)["learning_rate"] == 1e-3
    assert whole.at(200)["learning_rate"] == 1e-6


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        ("20 epochs", 260), ("1 epoch", 13), ("0.5 epochs", 6), ("1500 steps", 1500), (" 7steps ", 7), ("0 steps", 0),
        ("96000 examples", 1500), ("127 examples", 1), ("10 percent", 100), ("12.35 percent", 123),
        ("0.01 percent", 1), ("1 examples", 1),
    ],
)  # fmt: skip
def test_durations(value, steps):
    assert schedules.parse_duration(value, total_steps=1000, steps_per_epoch=13, batch_size=64) == steps


@pytest.mark.parametrize("value", [20, 20.0, "20", "epochs", "-3 steps", "3 days", "1e3 steps", "2 epochs 3", None])
def test_other_forms_are_refused_by_name(value):
    with pytest.raises(UserError, match=r"^train\.length=.*\"20 epochs\".*\"10 percent\""):
        schedules.parse_duration(value, total_steps=1000, steps_per_epoch=13, batch_size=64, name="train.length")


@pytest.mark.parametrize(
    ("value", "total", "per_epoch", "message"),
    [
        ("10 percent", None, 13, "a percentage of itself"),
        ("1.5 steps", 1000, 13, "must be a whole number of steps"),
        ("2 epochs", 1000, 0, "fewer images than batch_size=64"),
    ],
)
def test_durations_without_a_meaning(value, total, per_epoch, message):
    with pytest.raises(UserError, match=message):
        schedules.parse_duration(value, total_steps=total, steps_per_epoch=per_epoch, batch_size=64)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "schedules.learning_rate.warmup",
            "201 epochs",
            "schedules.learning_rate.warmup=.* 2010 steps, longer than the run",
        ),
        ("pera.teacher_temperature.warmup", "101 percent", "pera.teacher_temperature.warmup=.* longer than the run"),
        ("pera.teacher_momentum.start", 1.5, "pera.teacher_momentum.start=1.5 must be >= 0 and <= 1"),
        ("pera.teacher_temperature.start", 0.0, "pera.teacher_temperature.start=0.0 must be > 0"),
        ("pera.student_temperature", -0.1, "pera.student_temperature"),
        ("schedules.learning_rate.peak", float("nan"), "schedules.learning_rate.peak=nan must be a finite number"),
    ],
)
def test_values_out_of_range_are_named(field, value, message):
    with pytest.raises(UserError, match=message):
        build(**{field: value})
