"""The terms of the loss, on unit vectors `u` and last layers `W`, where the prototype output is `z = W u`.

Shen et al., arXiv:2505.19447, section III-D; the spreading term is KoLeo (Sablayrolles et al., arXiv:1806.03198).
Each docstring is the plain loop; the code computes the same without arrays of crops x prototypes all alive at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pera_jax.precision import Precision

_KOLEO_EPS = 1e-8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prototypes:
    """One network's class outputs in factored form: `z[b, v] = weights @ units[b, v]`."""

    units: jax.Array  # [B, V, D], L2-normalised
    weights: jax.Array  # [K, D]


def class_term(
    student: Prototypes,
    teacher: Prototypes,
    center: jax.Array,
    student_temperature: jax.Array,
    teacher_temperature: jax.Array,
    precision: Precision,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of each pair's student to the same pair's teacher, mean over pairs and batch.

        loss = 0
        for v in range(V):                                     # pairs: all global, then all local crops
            for b in range(B):
                p_t = softmax((teacher.z[b, v] - center) / teacher_temperature)     # no gradient
                loss -= sum(p_t * log_softmax(student.z[b, v] / student_temperature)) / (B * V)

    Args:
      student, teacher: units [B, V, D], weights [K, D].
      center: [K].
      student_temperature, teacher_temperature: scalars.

    Returns:
      The loss [V] of each pair of crops (its mean is the term), and statistics of the teacher's probabilities, over all
      pairs: `teacher_entropy` (mean over samples), `teacher_entropy_of_mean` (of the mean distribution), `kl` (teacher
      to student), `prototypes_in_use` (that are the most probable of at least one crop).
    """
    teacher, center = jax.lax.stop_gradient((teacher, center))
    prototypes = teacher.weights.shape[0]

    # One pair at a time, recomputed in the backward pass: the probabilities [B, K] of one pair are alive, not of all.
    @jax.checkpoint
    def pair(student_weights, student_units, teacher_units):
        z_s = precision.logits(student_units, student_weights) / student_temperature  # [B, K]
        z_t = (precision.logits(teacher_units, teacher.weights) - center) / teacher_temperature  # [B, K]
        log_p_t = jax.nn.log_softmax(z_t)  # [B, K]
        p_t = jnp.exp(log_p_t)
        # sum_k p_t log p_s with p_t summing to 1: the log-partition comes out of the sum.
        loss = jnp.mean(jax.nn.logsumexp(z_s, axis=-1) - jnp.sum(p_t * z_s, axis=-1))
        entropy = -jnp.mean(jnp.sum(p_t * log_p_t, axis=-1))
        return loss, jax.lax.stop_gradient((entropy, jnp.mean(p_t, axis=0), jnp.argmax(z_t, axis=-1)))

    def body(seen, units):
        mean_p, used = seen
        loss, (entropy, mean_of_pair, best) = pair(student.weights, *units)
        return (mean_p + mean_of_pair, used.at[best].set(True)), (loss, entropy)

    pairs = student.units.shape[1]
    start = (jnp.zeros((prototypes,), precision.wide), jnp.zeros((prototypes,), bool))
    per_pair = (jnp.moveaxis(student.units, 1, 0), jnp.moveaxis(teacher.units, 1, 0))  # [V, B, D] each
    (mean_p, used), (loss, entropy) = jax.lax.scan(body, start, per_pair)
    mean_p = mean_p / pairs
    statistics = {
        "teacher_entropy": jnp.mean(entropy),
        "teacher_entropy_of_mean": -jnp.sum(mean_p * jnp.log(jnp.maximum(mean_p, 1e-30))),
        "kl": jnp.mean(loss) - jnp.mean(entropy),
        "prototypes_in_use": jnp.sum(used),
    }
    return loss, jax.lax.stop_gradient(statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gram(precision: Precision, weights: jax.Array) -> jax.Array:
    """`W^T W` [D, D] of `weights` [K, D]."""
    return precision.wide_einsum("kd,ke->de", weights, weights)


# One product over the prototypes instead of the two that the product rule gives.
_gram.defvjp(
    lambda precision, weights: (_gram(precision, weights), weights),
    lambda precision, weights, cotangent: (precision.wide_einsum("kd,de->ke", weights, cotangent + cotangent.T),),
)


def koleo(units: jax.Array, weights: jax.Array, group: int, precision: Precision) -> jax.Array:
    """The spreading term, summed over crops: minus the mean log distance to the nearest other sample of the group.

        for v in range(V):
            x = [z / norm(z) for z in units[:, v] @ weights.T]
            for i in group:
                j = the other sample of the group with the largest inner product x[i] @ x[j]
                loss -= log(norm(x[i] - x[j] + 1e-8) + 1e-8) / B

    Inner products of `z = W u` are `u^T (W^T W) v`, so no array of batch x prototypes is made.

    Args:
      units: [B, V, D]; weights: [K, D]; group: samples per group, a divisor of B. Gradients flow through both samples.

    Returns:
      A scalar; 0 for groups of one sample, which have no neighbour.
    """
    if group == 1:
        return jnp.zeros((), units.dtype)
    wide_einsum = precision.wide_einsum
    gram = _gram(precision, weights)  # [D, D]
    total = jnp.sum(weights, axis=0)  # [D], W^T 1
    square = wide_einsum("bvd,de,bve->bv", units, gram, units)
    scaled = units * jax.lax.rsqrt(jnp.maximum(square, precision.norm_floor**2))[..., None]  # x = W scaled
    scaled = scaled.reshape(-1, group, *units.shape[1:])  # [G, g, V, D]
    inner = wide_einsum("givd,de,gjve->gvij", *map(jax.lax.stop_gradient, (scaled, gram, scaled)))  # [G, V, g, g]
    inner = jnp.where(jnp.eye(group, dtype=bool), -jnp.inf, inner)
    nearest = jnp.argmax(inner, axis=-1).swapaxes(1, 2)  # [G, g, V]
    # The difference is taken before the map: 2 - 2 cos would lose near neighbours to rounding.
    gap = scaled - jnp.take_along_axis(scaled, nearest[..., None], axis=1)  # [G, g, V, D]
    prototypes = weights.shape[0]
    squared_distance = wide_einsum("givd,de,give->giv", gap, gram, gap)
    squared_distance += 2 * _KOLEO_EPS * wide_einsum("givd,d->giv", gap, total) + prototypes * _KOLEO_EPS**2
    distance = jnp.sqrt(jnp.maximum(squared_distance, prototypes * _KOLEO_EPS**2))
    return -jnp.sum(jnp.log(distance + _KOLEO_EPS)) / len(units)


def pixel_term(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error, summed over the values of a patch, mean over patches and samples.

        for n in range(N):
            for t in range(T):
                loss += sum((predicted[n, t] - target[n, t]) ** 2) / (N * T)

    Args:
      predicted, target: [N, T, p p C], values by row, column, channel.
    """
    return jnp.mean(jnp.sum(jnp.square(predicted - target), axis=-1))


def new_center(center: jax.Array, teacher: Prototypes, momentum: float, precision: Precision) -> jax.Array:
    """`momentum c + (1 - momentum) mean(z)` over all crops and the whole batch, [K]; the mean of `W u` is `W mean(u)`."""
    mean_unit = jnp.mean(teacher.units, axis=(0, 1))  # [D]
    return momentum * center + (1 - momentum) * precision.wide_einsum("kd,d->k", teacher.weights, mean_unit)
