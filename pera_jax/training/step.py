"""What every objective needs: the training state, its birth (already sharded), and the pure train step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from pera_jax.parallel import sharding

# Streams of randomness: numbers are made by fold_in(fold_in(key(seed), stream), step), nothing random is stored.
INIT, LOSS, CENTER = 0, 1, 2


@flax.struct.dataclass
class TrainState:
    """Everything that training changes."""

    step: jax.Array  # int32 scalar: optimiser steps done
    params: Any
    teacher: Any  # the moving average of `params[k]` for k in the objective's `teacher_keys`
    opt_state: Any
    objective: Any  # what the objective keeps beside parameters


def make_optimiser(config) -> optax.GradientTransformation:
    """Clipping to a global norm, then Adam's direction. Rate and decay come in with each step's `hyper`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
    )


def new_state(objective, optimiser: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student."""
    params = objective.init(jax.random.fold_in(jax.random.key(seed), INIT))
    teacher = jax.tree.map(jnp.copy, {k: params[k] for k in objective.teacher_keys})
    return TrainState(jnp.zeros((), jnp.int32), params, teacher, optimiser.init(params), objective.init_state())


def abstract_state(objective, optimiser, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its values."""
    shapes = jax.eval_shape(lambda: new_state(objective, optimiser, 0))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def born_sharded(objective, optimiser, mesh: Mesh, seed: int) -> TrainState:
    """`new_state`, each leaf made where it will live: no device ever holds what it does not keep."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(objective, optimiser, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(lambda: new_state(objective, optimiser, seed), out_shardings=where)()


def _decayed(params: Any, exclude_vectors: bool) -> Any:
    """1 where weight decay applies, 0 elsewhere; stacked blocks carry a leading axis that is none of the parameter's."""

    def applies(path, leaf):
        ndim = leaf.ndim - bool({"lower", "upper"} & set(sharding.path_of(path).split("/")))
        is_bias = sharding.path_of(path).endswith("bias")
        return 0.0 if exclude_vectors and (ndim < 2 or is_bias) else 1.0

    return jax.tree_util.tree_map_with_path(applies, params)


def apply_gradients(
    state: TrainState, grads: Any, objective_state: Any, hyper: dict, optimiser, teacher_keys, decay: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """AdamW, then `teacher <- m teacher + (1 - m) student`.

    Args:
      hyper: scalars `learning_rate`, `weight_decay`, `one_minus_momentum` (computed in float64 before it came here).
      decay: "all" parameters are decayed, or "matrices" only: no biases, norms, tokens, gains.
    """
    direction, opt_state = optimiser.update(grads, state.opt_state, state.params)
    rate, weight_decay = hyper["learning_rate"], hyper["weight_decay"]
    updates = jax.tree.map(
        lambda d, p, on: -rate * (d + on * weight_decay * p), direction, state.params,
        _decayed(state.params, exclude_vectors=decay == "matrices"),
    )
    params = optax.apply_updates(state.params, updates)
    teacher = jax.tree.map(
        lambda t, s: t + hyper["one_minus_momentum"] * (s - t), state.teacher, {k: params[k] for k in teacher_keys}
    )
    metrics = {
        "norm/gradient": optax.tree.norm(grads),
        "norm/parameters": optax.tree.norm(params),
        "norm/update": optax.tree.norm(updates),
    }
    return TrainState(state.step + 1, params, teacher, opt_state, objective_state), metrics


def make_step(objective, optimiser, seed: int, decay: str = "all", accumulate: int = 1) -> Callable:
    """The pure step `(state, batch, hyper) -> (state, metrics)`; jit it with `jit_step`.

    Args:
      accumulate: parts that a batch is worked on in, one after the other: with the memory of a part, the loss and the
        gradients of the whole.
    """

    def step(state: TrainState, batch: dict[str, jax.Array], hyper: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), LOSS), state.step)
        draw_key, depth_key = jax.random.split(key)
        examples = objective.examples(draw_key, batch)

        def gradients(part):
            grad_fn = jax.grad(objective.loss, has_aux=True)
            grads, means = grad_fn(state.params, state.teacher, state.objective, part, depth_key, hyper)
            return sharding.constrain_tree(grads), means

        if accumulate == 1:
            grads, means = gradients(examples)
        else:
            parts = sharding.split_batch(examples, accumulate)
            part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), parts)
            shapes = jax.eval_shape(gradients, part)
            grads, means = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            zeros = (sharding.constrain_tree(grads), means)
            sums, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, gradients(part)), None), zeros, parts)
            grads, means = jax.tree.map(lambda total: total / accumulate, sums)
        objective_state, metrics = objective.finish(state.objective, means)
        state, norms = apply_gradients(
            state, grads, objective_state, hyper, optimiser, objective.teacher_keys, decay
        )
        return state, metrics | norms

    return step


def jit_step(step: Callable, state_shardings: TrainState, mesh: Mesh) -> Callable:
    """The step compiled over `mesh`; the old state's memory is given to the new one."""
    replicated = NamedSharding(mesh, sharding.P())
    batch = NamedSharding(mesh, sharding.BATCH)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )
