"""The optimizer: clipping, AdamW, learning-rate factors, frozen parameters; rules by the path of a parameter.

A block's slice of a stack of blocks counts as a parameter of its own, as it does for networks that are lists of blocks.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pera_jax.common.errors import UserError
from pera_jax.models.blocks import STACK
from pera_jax.objectives.base import BACKBONE, Objective
from pera_jax.objectives.declared import Freeze
from pera_jax.parallel import sharding

_BIAS_OR_NORM = re.compile(r"(bias|(^|/)norm[^/]*/scale|layer_scale_\d+)$")
_EPS = 1e-6  # added to the norm that "groups" and "parameter" divide by, as in PyTorch
_AT_ONCE = "from_start"


def make_optimizer(objective: Objective, settings: Any) -> optax.GradientTransformationExtraArgs:
    """Clipping, then Adam's direction. `updates` applies learning rate and weight decay.

    Args:
      settings: `config.optimizer`.
    """

    thawing = {freeze.until: freeze for freeze in objective.frozen if freeze.until and not freeze.moments}
    if not thawing:
        return optax.with_extra_args_support(optax.chain(_clip(objective, settings), _adam(settings)))

    def label(path, _):
        found = freeze_of(sharding.path_of(path), objective.frozen)
        return found.until if found in thawing.values() else _AT_ONCE

    by_label = {_AT_ONCE: _adam(settings)} | {until: _held(_adam(settings), until) for until in thawing}
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    return optax.chain(_clip(objective, settings), optax.partition(by_label, labels))


def _adam(settings: Any) -> optax.GradientTransformation:
    """Adam's direction (Kingma and Ba, arXiv:1412.6980, algorithm 1)."""
    plain = optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2, eps=settings.eps)
    if not settings.exact_bias_correction:
        return plain

    def update(gradients, state, params=None):
        _, state = plain.update(gradients, state, params)  # moments and count

        def correction(decay):  # 1 - decay ** count, without the cancellation of float32
            return -jnp.expm1(state.count.astype(float) * math.log(decay)) if decay else 1.0

        first, second = correction(settings.beta1), correction(settings.beta2)

        def direction(mean, square):
            return (mean / first) / (jnp.sqrt(square / second) + settings.eps)

        return jax.tree.map(lambda *moments: direction(*moments).astype(moments[0].dtype), state.mu, state.nu), state

    return optax.GradientTransformation(plain.init, update)


def freeze_of(path: str, frozen: tuple[Freeze, ...]) -> Freeze | None:
    """The first entry of `Objective.frozen` that matches the path of a parameter; None if it is always trained."""
    return next((freeze for freeze in frozen if re.search(freeze.pattern, path)), None)


def _held(inner: optax.GradientTransformation, until: str) -> optax.GradientTransformationExtraArgs:
    """`inner`, which neither runs nor counts a step while the scalar `until` is 0; its direction is 0 until then."""

    def update(gradients, state, params=None, *, scalars, **_):
        direction, after = inner.update(gradients, state, params)
        trained = scalars[until] > 0
        state = jax.tree.map(lambda new, old: jnp.where(trained, new, old), after, state)
        return jax.tree.map(lambda leaf: jnp.where(trained, leaf, 0), direction), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


# ---------------------------------------------------------------- clipping


def _clip(objective: Objective, settings: Any) -> optax.GradientTransformation:
    """Clipping by `config.optimizer.clip`: by the norm of all gradients, of groups of parameters, or of each one."""
    limit = settings.clip_norm
    if settings.clip == "none":
        return optax.identity()
    if settings.clip == "global":
        return optax.clip_by_global_norm(limit)

    def by_group(gradients):
        groups = objective.clip_groups or tuple((key,) for key in gradients)
        for group in groups:
            part = {key: gradients[key] for key in group}
            factor = _factor(optax.tree.norm(part), limit)
            gradients = gradients | jax.tree.map(lambda leaf: leaf * factor, part)  # noqa: B023
        return gradients

    def by_parameter(gradients):
        def clipped(path, leaf):
            axes = tuple(range(1, leaf.ndim)) if re.search(STACK, sharding.path_of(path)) else None
            norm = jnp.sqrt(jnp.sum(jnp.square(leaf), axis=axes, keepdims=True))  # [depth, 1, ...] of a stack
            return leaf * _factor(norm, limit)

        return jax.tree_util.tree_map_with_path(clipped, gradients)

    return optax.stateless(lambda gradients, _: (by_group if settings.clip == "groups" else by_parameter)(gradients))


def _factor(norm: jax.Array, limit: float) -> jax.Array:
    return jnp.minimum(limit / (norm + _EPS), 1.0)


# ---------------------------------------------------------------- rules by path


def decayed(params: Any, decay: str, rules: tuple[tuple[str, bool], ...]) -> Any:
    """The weight-decay mask: 1.0 where weight decay applies, 0.0 elsewhere; `decay` as `config.optimizer.decay`."""

    def applies(path, _):
        name = sharding.path_of(path)
        matrix = sharding.first_match(name, rules, "weight-decay")
        chosen = {"all": True, "matrices": matrix, "no_bias_or_norm": not _BIAS_OR_NORM.search(name)}
        return 1.0 if chosen[decay] else 0.0

    return jax.tree_util.tree_map_with_path(applies, params)


def rate_factors(params: Any, rules: tuple[tuple[str, float], ...], layer_decay: float = 1.0) -> Any:
    """The learning-rate factor of each parameter, a float, or one for each block of a stack: [depth, 1, ...].

    That of the first rule of `config.optimizer.rate_factors` that matches its path, else 1.0; times
    `layer_decay ** (n + 1 - place)` in a backbone of n blocks, where patch projection, tokens and positions have place
    0, block i has place i + 1, and the final norm and all heads have place n + 1. 0.0 freezes the parameter, including
    its weight decay.

    Raises:
      UserError: a rule that matches no parameter.
    """
    used = set()

    def factor(path, leaf):
        name, result = sharding.path_of(path), 1.0
        for index, (pattern, value) in enumerate(rules):
            if re.search(pattern, name):
                used.add(index)
                result = float(value)
                break
        return result if layer_decay == 1.0 else result * _layer_factor(name, leaf, params, layer_decay)

    factors = jax.tree_util.tree_map_with_path(factor, params)
    unused = [pattern for index, (pattern, _) in enumerate(rules) if index not in used]
    if unused:
        raise UserError(f"optimizer.rate_factors: {unused[0]!r} matches no parameter; fix or remove the rule")
    return factors


def _layer_factor(name: str, leaf: Any, params: Any, layer_decay: float) -> float | np.ndarray:
    lower, upper = (len(params[BACKBONE][stack]["norm_1"]["scale"]) for stack in ("lower", "upper"))
    if name == "mask_token":
        return layer_decay ** (lower + upper + 1)
    if not name.startswith(f"{BACKBONE}/") or name.startswith(f"{BACKBONE}/norm/"):
        return 1.0
    stack = name.split("/")[1]
    if stack not in ("lower", "upper"):
        return layer_decay ** (lower + upper + 1)
    first = 0 if stack == "lower" else lower
    powers = layer_decay ** (lower + upper - (first + np.arange(len(leaf), dtype=np.float64)))
    return powers.reshape(-1, *[1] * (leaf.ndim - 1))


# ---------------------------------------------------------------- a step


def trained_gradients(gradients: Any, frozen: tuple[Freeze, ...]) -> Any:
    """The gradients with zeros for parameters that are frozen for good."""
    return _where_frozen(jnp.zeros_like, gradients, frozen)


def following(teacher: Any, student: Any, rate: jax.Array, frozen: tuple[Freeze, ...]) -> Any:
    """`teacher + rate (student - teacher)`; parameters that are frozen for good stay, to the last bit."""
    moved = jax.tree.map(lambda t, s: t + rate * (s - t), teacher, student)
    return _where_frozen(lambda leaf: leaf, moved, frozen, teacher)


def _where_frozen(change: Callable, tree: Any, frozen: tuple[Freeze, ...], source: Any = None) -> Any:
    """`tree` with `change` applied to the leaves of `source` (by default `tree`) that are frozen for good."""

    def choose(path, leaf, other):
        found = freeze_of(sharding.path_of(path), frozen)
        return change(other) if found and not found.until else leaf

    return jax.tree_util.tree_map_with_path(choose, tree, tree if source is None else source) if frozen else tree


def updates(
    directions: Any, params: Any, objective: Objective, settings: Any, scalars: dict[str, jax.Array], rules: Any
) -> Any:
    """What is added to each parameter: `-rate * (direction + weight_decay * parameter)`.

    Args:
      settings: `config.optimizer`. scalars: `learning_rate`, `weight_decay` and those that `Objective.frozen` names.
      rules: `step.decay_rules` of the objective.
    """
    rate, weight_decay = scalars["learning_rate"], scalars["weight_decay"]

    def update(path, direction, parameter, on, factor):
        step = rate if isinstance(factor, float) and factor == 1.0 else jnp.asarray(factor, rate.dtype) * rate
        found = freeze_of(sharding.path_of(path), objective.frozen)
        if found:
            step = step * (scalars[found.until] if found.until else 0.0)
        return -step * (direction + on * weight_decay * parameter)

    mask = decayed(params, settings.decay, rules)
    factors = rate_factors(params, settings.rate_factors, settings.layer_decay)
    return jax.tree_util.tree_map_with_path(update, directions, params, mask, factors)
