"""The optimizer's rules that no method's own tests show: bias correction, no clipping, freezing by a schedule."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pera_jax import config as configs
from pera_jax.objectives.base import Freeze, Schedule
from pera_jax.training import optimizer as optimizers
from pera_jax.training import schedules

PARAMS = {
    "backbone": {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3)}, "head": {"gain": jnp.ones(2)}
}  # fmt: skip


def settings(**changes):
    config = configs.default("toy_mae").optimizer
    config.update(dict(beta1=0.9, beta2=0.999, eps=1e-8, clip="none") | changes)
    return config


def method(*frozen: Freeze):
    return types.SimpleNamespace(frozen=frozen, clip_groups=())


def directions(optimizer, gradients, steps: int, scalars=None):
    """The direction of each of `steps` steps with the same gradients."""
    state, found = optimizer.init(PARAMS), []
    for step in range(steps):
        direction, state = optimizer.update(gradients, state, PARAMS, scalars=scalars(step) if scalars else {})
        found.append(direction)
    return found


@pytest.mark.parametrize("exact, low, high", [(True, 0.0, 3e-7), (False, 1e-5, 1e-4)])
def test_bias_correction_is_as_precise_as_it_says(exact, low, high):
    """With constant gradients g, every direction is g / (|g| + eps), here the sign of g."""
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.3), PARAMS)
    optimizer = optimizers.make_optimizer(method(), settings(exact_bias_correction=exact))
    found = [np.float64(each["backbone"]["kernel"]) for each in directions(optimizer, gradients, 3)]
    errors = [np.abs(each - 1.0).max() for each in found]
    assert low <= max(errors) <= high


def test_nothing_is_clipped_with_none():
    gradients = jax.tree.map(lambda leaf: 1e6 * leaf, PARAMS)
    clip = optimizers.make_optimizer(method(), settings(clip="none", beta1=0.0, exact_bias_correction=True))
    _, state = clip.update(gradients, clip.init(PARAMS), PARAMS, scalars={})
    squares = 1e-3 * np.square(gradients["backbone"]["kernel"])
    np.testing.assert_allclose(state[1].nu["backbone"]["kernel"], squares, rtol=1e-5)


def test_parameters_thaw_with_a_schedule_and_count_their_own_steps():
    config = configs.default("toy_mae")
    config.toy_mae.wait = "2 steps"
    declared = {"on": Schedule("after", "toy_mae.wait")}
    run = schedules.scalars(config, declared, steps_per_epoch=100, total_steps=10**6)
    after = lambda step: run.at(step)["on"]  # noqa: E731
    assert [after(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    optimizer = optimizers.make_optimizer(method(Freeze(r"head/", until="on")), settings(exact_bias_correction=True))
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.3), PARAMS)
    found = directions(optimizer, gradients, 4, lambda step: {"on": jnp.float32(after(step))})
    assert [float(each["head"]["gain"][0]) for each in found[:2]] == [0.0, 0.0]
    for each in found:
        np.testing.assert_allclose(each["backbone"]["bias"], 1.0, rtol=1e-6)
    for each in found[2:]:  # with a shared count, these would not be 1
        np.testing.assert_allclose(each["head"]["gain"], 1.0, rtol=1e-6)
