"""Trainings of one test process that run the same step share the jitted function: tracing takes longer than they do."""

import functools
import json
from typing import Any

import jax

from pera_jax import train
from pera_jax.training import step as steps
from pera_jax.weights import initial_state

_MOST = 12  # programs kept; each takes some 50 MB


class _Key:
    """Arguments of a function, equal where their text is."""

    def __init__(self, text: str, *arguments: Any):
        self.text, self.arguments = text, arguments

    def __hash__(self):
        return hash(self.text)

    def __eq__(self, other):
        return self.text == other.text


class SharedSteps:
    """Stands in for `pera_jax.training.step` where a run starts; other attributes are the module's own."""

    def __getattr__(self, name):
        return getattr(steps, name)

    def make_step(self, objective, optimizer, seed, settings, accumulate=1):
        text = repr((type(objective), objective, seed, json.loads(settings.to_json()), accumulate))
        return _make(_Key(text, objective, optimizer, seed, settings, accumulate))

    def jit_step(self, step, state_shardings, mesh):
        text = repr((id(step), mesh, jax.tree.leaves(state_shardings)))
        return _jit(_Key(text, step, state_shardings, mesh))

    def abstract_state(self, objective, optimizer, mesh):
        text = repr((type(objective), objective, mesh))
        return _abstract(_Key(text, objective, optimizer, mesh))

    def init_sharded(self, objective, optimizer, mesh, seed):
        text = repr((type(objective), objective, seed, mesh))
        state, where = _init(_Key(text, objective, optimizer, mesh, seed))
        return jax.device_put(state, where)


@functools.lru_cache(_MOST)
def _make(key):
    return steps.make_step(*key.arguments)


@functools.lru_cache(_MOST)
def _jit(key):
    return steps.jit_step(*key.arguments)


@functools.lru_cache(_MOST)
def _abstract(key):
    return steps.abstract_state(*key.arguments)


@functools.lru_cache(_MOST)
def _init(key):
    state = steps.init_sharded(*key.arguments)
    return jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, state)


def install() -> None:
    train.steps = initial_state.steps = SharedSteps()
