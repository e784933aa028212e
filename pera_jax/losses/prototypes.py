"""The class term (cross-entropy between prototype outputs `z = W u`) on unit vectors `u` and weights `W`, and its
statistics.

Shen et al., arXiv:2505.19447, section III-D. The docstring of a term shows the naive loop; the code computes the same
without holding the logits of all crops at once.

On a mesh, the rows of `u` are sharded over `data` and `fsdp`, and those of `W` over `tensor` and `fsdp`. The term is
written per device (`shard_map`), which makes all communication explicit: `W` is not moved; each device gathers the unit
vectors of its `fsdp` group once and multiplies them with its own prototypes; sums over prototypes are reduced over
`tensor` and `fsdp`. Gradients are reduced once, after the loop over pairs.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import ArrayLike, Float, Real

from pera_jax.losses.per_device import gather_units, highest, log_softmax, log_sum_exp, mean, total, vary
from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding


@no_type_check  # as a pytree, it also holds what JAX puts in place of arrays: shapes, shardings, None
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prototypes:
    """One network's prototype outputs in factored form: `z[b, v] = weights @ units[b, v]`."""

    units: jax.Array  # [B, V, D], L2-normalized
    weights: jax.Array  # [K, D]


@jax.named_scope("class_term")
def class_term(
    student: Prototypes,
    teacher: Prototypes,
    center: Float[jax.Array, " K"],
    student_temperature: Float[ArrayLike, ""],
    teacher_temperature: Float[ArrayLike, ""],
    precision: Precision,
) -> tuple[Float[jax.Array, " V"], dict[str, Float[jax.Array, "..."]]]:
    """Cross-entropy between the teacher's and the student's output of each pair, averaged over pairs and batch.

        loss = 0
        for v in range(V):                                     # pairs: all global, then all local crops
            for b in range(B):
                p_t = softmax((teacher.z[b, v] - center) / teacher_temperature)     # no gradient
                loss -= sum(p_t * log_softmax(student.z[b, v] / student_temperature)) / (B * V)

    Args:
      student, teacher: units [B, V, D], weights [K, D].

    Returns:
      The loss of each pair (its mean is the term), and statistics of the teacher's probabilities over all pairs and
      samples: `entropy` (mean), `mean` [K], `used` [K] (1 if the prototype is the most probable one of any crop, else
        0).
    """
    teacher, center = jax.lax.stop_gradient((teacher, center))
    rows, columns = sharding.axes_in_use()
    whole, cut, data = P(), P(columns), rows[:1]

    def local(student_units, teacher_units, student_weights, teacher_weights, center, temperatures):
        student_units, teacher_units = (gather_units(x, rows, precision) for x in (student_units, teacher_units))
        # [K / (tensor fsdp), D]; its gradient is summed over `data` once
        student_weights = vary(student_weights, data)
        ts, tt = temperatures

        # One pair at a time, recomputed in the backward pass, so that only the probabilities of one pair are in memory.
        @jax.checkpoint
        def pair(student_weights, student_units, teacher_units):
            z_s = precision.logits(student_units, student_weights) / ts  # [B, K]
            z_t = (precision.logits(teacher_units, teacher_weights) - center) / tt  # [B, K]
            log_p_t, best = log_softmax(z_t, columns)  # [B, K], [B]
            p_t = jnp.exp(log_p_t)
            # sum_k p_t log p_s, where p_t sums to 1: the log-partition can be taken out of the sum.
            loss = jnp.mean(log_sum_exp(z_s, columns)[0] - total(jnp.sum(p_t * z_s, axis=-1), columns))
            entropy = -jnp.mean(total(jnp.sum(p_t * log_p_t, axis=-1), columns))
            return loss, jax.lax.stop_gradient((entropy, jnp.mean(p_t, axis=0), best))

        def body(seen, units):
            mean_p, used = seen
            loss, (entropy, mean_of_pair, best) = pair(student_weights, *units)
            return (mean_p + mean_of_pair, used.at[best].set(1.0, mode="drop")), (loss, entropy)

        start = vary(jnp.zeros((2, len(center)), precision.wide), (*data, *columns))
        per_pair = (jnp.moveaxis(student_units, 1, 0), jnp.moveaxis(teacher_units, 1, 0))  # [V, B, D] each
        (mean_p, used), (loss, entropy) = jax.lax.scan(body, tuple(start), per_pair)
        mean_p, loss, entropy = (mean(value, data) for value in (mean_p / len(loss), loss, entropy))
        return loss, entropy, mean_p, highest(used, data)

    shape = dict(in_specs=(sharding.BATCH, sharding.BATCH, cut, cut, cut, whole), out_specs=(whole, whole, cut, cut))
    loss, entropy, mean_p, used = (jax.shard_map(local, **shape) if rows else local)(
        student.units, teacher.units, student.weights, teacher.weights, center,
        (student_temperature, teacher_temperature),
    )  # fmt: skip
    statistics = {"entropy": jnp.mean(entropy), "mean": mean_p, "used": used}
    return loss, jax.lax.stop_gradient(statistics)


def teacher_statistics(
    loss: Float[jax.Array, " V"], statistics: dict[str, Float[jax.Array, "..."]]
) -> dict[str, Real[jax.Array, ""]]:
    """The logged statistics of the teacher's probabilities, from the results of `class_term` (averaged over
    microbatches).

    Returns:
      `teacher_entropy` (mean over samples), `teacher_entropy_of_mean` (of the mean distribution), `kl` (student from
      teacher), `prototypes_in_use` (number of prototypes that are the most probable one of at least one crop).
    """
    mean_p = statistics["mean"]
    return {
        "teacher_entropy": statistics["entropy"],
        "teacher_entropy_of_mean": -jnp.sum(mean_p * jnp.log(jnp.maximum(mean_p, 1e-30))),
        "kl": jnp.mean(loss) - statistics["entropy"],
        "prototypes_in_use": jnp.sum(statistics["used"] > 0),
    }


def mean_output(
    teacher: Prototypes, precision: Precision, row_weights: Float[jax.Array, "B V"] | None = None
) -> Float[jax.Array, " K"]:
    """`mean(z)` over all crops and samples, towards which the center moves; computed as `W mean(u)`.

    With `row_weights`, the mean is over the rows whose weight is not 0, each counted alike; 0 if there is none.
    """
    if row_weights is None:
        mean_unit = jnp.mean(teacher.units, axis=(0, 1))  # [D]
    else:
        valid = (row_weights > 0).astype(teacher.units.dtype)
        mean_unit = jnp.sum(teacher.units * valid[..., None], axis=(0, 1)) / jnp.maximum(jnp.sum(valid), 1)  # [D]
    return precision.wide_einsum("kd,d->k", teacher.weights, mean_unit)


def mean_direction(tokens: Float[jax.Array, "B V D"]) -> Float[jax.Array, " D"]:
    """Mean of `tokens / ||tokens||` over all crops and samples.

    Its squared norm is the mean cosine similarity of all pairs of tokens, so 1 minus it is the variance of their
    directions: 0 if all are equal, near 1 if they are spread out.
    """
    length = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    return jnp.mean(tokens / jnp.maximum(length, 1e-12), axis=(0, 1))
