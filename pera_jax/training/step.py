"""The training state, its sharded initialization, and the pure train step; the same for every objective."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from pera_jax.models import vit
from pera_jax.objectives import check
from pera_jax.objectives.base import Context, Objective, Streams, stream
from pera_jax.parallel import sharding
from pera_jax.training import optimizer as optimizer_rules
from pera_jax.training.optimizer import make_optimizer as make_optimizer  # part of this module's interface


@flax.struct.dataclass
class TrainState:
    """Everything that a training step updates."""

    step: jax.Array  # int32 scalar: number of optimizer steps done
    params: Any
    teacher: Any  # the EMA of `params[k]` for k in the objective's `teacher_keys`
    opt_state: Any
    objective: Any  # the objective's own state, such as a center


def new_state(objective: Objective, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student."""
    params = objective.init(stream(jax.random.key(seed), "init"))
    check.parameters(objective, params)
    teacher = jax.tree.map(jnp.copy, {k: params[k] for k in objective.teacher_keys})
    return TrainState(jnp.zeros((), jnp.int32), params, teacher, optimizer.init(params), objective.init_state())


def sharding_rules(objective: Objective) -> sharding.Rules:
    """Sharding rules for every leaf of the objective's training state."""
    return (*sharding.STATE_RULES, *vit.SHARDING_RULES, *objective.sharding_rules)


def decay_rules(objective: Objective) -> tuple[tuple[str, bool], ...]:
    """Rules that say which of the objective's parameters are "matrices", for the weight-decay mask."""
    return (*vit.DECAY_RULES, *objective.decay_rules)


def _with_shardings(shapes: TrainState, objective: Objective, mesh: Mesh) -> TrainState:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.tree_shardings(shapes, mesh, sharding_rules(objective)),
    )


def abstract_state(objective, optimizer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its values."""
    return _with_shardings(jax.eval_shape(lambda: new_state(objective, optimizer, 0)), objective, mesh)


def init_sharded(objective, optimizer, mesh: Mesh, seed: int) -> TrainState:
    """`new_state`, with each leaf initialized directly in its sharding: no device ever holds an unsharded copy."""

    def init():  # one function, so that JAX traces it once for both
        return new_state(objective, optimizer, seed)

    with jax.set_mesh(mesh):
        abstract = _with_shardings(jax.eval_shape(init), objective, mesh)
        return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def apply_gradients(
    state: TrainState, grads: Any, objective: Objective, objective_state: Any, scalars: dict, optimizer, settings
) -> tuple[TrainState, dict[str, jax.Array]]:
    """AdamW, then `teacher <- m teacher + (1 - m) student`.

    Args:
      scalars: `learning_rate`, `weight_decay`, with a teacher `one_minus_momentum` (computed in float64 on the host),
        and those that `objective.frozen` names.
      settings: `config.optimizer`.
    """
    grads = optimizer_rules.trained_gradients(grads, objective.frozen)
    direction, opt_state = optimizer.update(grads, state.opt_state, state.params, scalars=scalars)
    updates = optimizer_rules.updates(direction, state.params, objective, settings, scalars, decay_rules(objective))
    params = optax.apply_updates(state.params, updates)
    teacher = state.teacher
    if objective.teacher_keys:
        followed = {k: params[k] for k in objective.teacher_keys}
        teacher = optimizer_rules.following(teacher, followed, scalars["one_minus_momentum"], objective.frozen)
    metrics = {
        "norm/gradient": optax.tree.norm(grads),
        "norm/parameters": optax.tree.norm(params),
        "norm/update": optax.tree.norm(updates),
    }
    return TrainState(state.step + 1, params, teacher, opt_state, objective_state), metrics


def make_step(objective: Objective, optimizer, seed: int, settings: Any, accumulate: int = 1) -> Callable:
    """The pure step `(state, batch, scalars) -> (state, metrics)`; compile it with `jit_step`.

    Args:
      settings: `config.optimizer`.
      accumulate: number of microbatches that a batch is split into, processed one after the other. Activations need the
        memory of one microbatch; loss and gradients are those of the whole batch.
    """
    rules = sharding_rules(objective)

    def step(state: TrainState, batch: dict[str, jax.Array], scalars: dict[str, jax.Array]):
        rngs = Streams.at(seed, "step", state.step)
        with jax.named_scope("prepare"):
            examples, context = objective.prepare(rngs, batch), Context(rngs, scalars)

        def gradients(part):
            grad_fn = jax.grad(objective.loss, has_aux=True)
            grads, aux = grad_fn(state.params, state.teacher, state.objective, part, context)
            return sharding.constrain_tree(grads, rules), aux

        if accumulate == 1:
            grads, aux = gradients(examples)
        else:
            parts = sharding.split_batch(examples, accumulate)
            part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), parts)
            shapes = jax.eval_shape(gradients, part)
            grads, aux = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            zeros = (sharding.constrain_tree(grads, rules), aux)
            sums, _ = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, gradients(part)), None), zeros, parts
            )
            grads, aux = jax.tree.map(lambda total: total / accumulate, sums)
        objective_state, metrics = objective.update(state.objective, aux)
        check.metrics(objective, metrics)
        with jax.named_scope("optimizer"):
            state, norms = apply_gradients(state, grads, objective, objective_state, scalars, optimizer, settings)
        return state, metrics | norms

    return step


def jit_step(step: Callable, state_shardings: TrainState, mesh: Mesh) -> Callable:
    """The step jitted over `mesh`; the old state's buffers are donated to the new one."""
    replicated = NamedSharding(mesh, sharding.P())
    batch = NamedSharding(mesh, sharding.BATCH)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )
