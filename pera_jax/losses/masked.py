"""The patch term of iBOT (Zhou et al., arXiv:2111.07832, equation 2) and DINOv2: the student's outputs at masked
patches against the teacher's at the same patches.

Written per device; the communication is that of `prototypes`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import ArrayLike, Float

from pera_jax.losses.per_device import gather_units, highest, in_chunks, log_softmax, log_sum_exp, total, vary
from pera_jax.losses.prototypes import Prototypes
from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding


@jax.named_scope("masked_term")
def masked_term(
    student: Prototypes,
    teacher: Prototypes,
    bias: Float[jax.Array, " K"],
    row_weights: Float[jax.Array, "G M"],
    student_temperature: Float[ArrayLike, ""],
    teacher_temperature: Float[ArrayLike, ""],
    precision: Precision,
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, "..."]]]:
    """Weighted sum of the cross-entropies between the teacher's and the student's output of each row.

        loss = 0
        for g in range(G):
            for m in range(M):
                p = softmax(teacher.z[g, m] / teacher_temperature + bias)               # no gradient
                loss -= row_weights[g, m] * sum(p * log_softmax(student.z[g, m] / student_temperature))

    Computed for one chunk of rows after the other, which the backward pass recomputes.

    Args:
      student, teacher: units [G, M, D] (M rows for each of G groups of images), weights [K, D].
      bias: `-center / teacher_temperature`, or `sinkhorn.sinkhorn_bias` of the teacher's units.
      row_weights: 1 / (number of masked patches of the row's crop), 0 for rows that pad a group.

    Returns:
      The sum, to be divided by the number of crops; and statistics of the teacher's probabilities as those of
      `prototypes.class_term`: means weighted by `row_weights` (0 without any row), `used` over rows of weight above 0.
    """
    teacher, bias, row_weights = jax.lax.stop_gradient((teacher, bias, row_weights))
    rows, columns = sharding.axes_in_use()
    whole, cut, data = P(), P(columns), rows[:1]

    def local(student_units, teacher_units, row_weights, student_weights, teacher_weights, bias, temperatures):
        # [G / data, M, D] each
        student_units, teacher_units = (gather_units(x, rows, precision) for x in (student_units, teacher_units))
        # [K / (tensor fsdp), D]; its gradient is summed over `data` once
        student_weights = vary(student_weights, data)
        ts, tt = temperatures

        @jax.checkpoint
        def chunk(student_weights, student_units, teacher_units, row_weights):
            z_s = precision.logits(student_units, student_weights) / ts  # [n, K]
            z_t = precision.logits(teacher_units, teacher_weights) / tt + bias  # [n, K]
            log_p, best = log_softmax(z_t, columns)  # [n, K], [n]
            p = jnp.exp(log_p)
            # Each row of p sums to 1: the log-partition can be taken out of the sum.
            loss = log_sum_exp(z_s, columns)[0] - total(jnp.sum(p * z_s, axis=-1), columns)  # [n]
            entropy = -total(jnp.sum(p * log_p, axis=-1), columns)  # [n]
            summed = jnp.sum(row_weights[:, None] * p, axis=0)  # [K]
            best = jnp.where(row_weights > 0, best, len(bias))  # or on no prototype
            return jnp.sum(row_weights * loss), jax.lax.stop_gradient((jnp.sum(row_weights * entropy), summed, best))

        def body(seen, rows_of_chunk):
            summed, used = seen
            loss, (entropy, summed_of_chunk, best) = chunk(student_weights, *rows_of_chunk)
            return (summed + summed_of_chunk, used.at[best].set(1.0, mode="drop")), (loss, entropy)

        flat = (x.reshape(-1, *x.shape[2:]) for x in (student_units, teacher_units, row_weights))
        start = vary(jnp.zeros((2, len(bias)), precision.wide), (*data, *columns))
        (summed, used), (loss, entropy) = jax.lax.scan(body, tuple(start), in_chunks(tuple(flat), len(bias)))
        loss, entropy, summed = (total(value, data) for value in (jnp.sum(loss), jnp.sum(entropy), summed))
        weight = total(jnp.sum(row_weights), data)
        weight = jnp.where(weight > 0, weight, 1.0)
        return loss, entropy / weight, summed / weight, highest(used, data)

    # The weights of the rows are small; the compiler gathers them over `fsdp`.
    shape = dict(
        in_specs=(sharding.BATCH, sharding.BATCH, P(data), cut, cut, cut, whole), out_specs=(whole, whole, cut, cut)
    )
    loss, entropy, mean_p, used = (jax.shard_map(local, **shape) if rows else local)(
        student.units, teacher.units, row_weights, student.weights, teacher.weights, bias,
        (student_temperature, teacher_temperature),
    )  # fmt: skip
    return loss, jax.lax.stop_gradient({"entropy": entropy, "mean": mean_p, "used": used})
