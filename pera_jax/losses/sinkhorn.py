"""Sinkhorn-Knopp targets (Caron et al., arXiv:2006.09882, section 3.1; Oquab et al., arXiv:2304.07193, section 4)."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import ArrayLike, Float, Shaped

from pera_jax.losses.per_device import gather_units, highest, in_chunks, log_sum_exp, total, vary
from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding


@jax.named_scope("sinkhorn_bias")
def sinkhorn_bias(
    units: Float[jax.Array, "*rows D"],
    weights: Float[jax.Array, "K D"],
    row_weights: Shaped[jax.Array, "*rows"] | None,
    teacher_temperature: Float[ArrayLike, ""],
    precision: Precision,
    iterations: int = 3,
) -> Float[jax.Array, " K"]:
    """`log r`, with which the Sinkhorn-Knopp targets of all rows are `softmax(z / teacher_temperature + log r)`.

        Q = exp(z / teacher_temperature)                       # [rows, K], z = units @ weights.T
        for _ in range(iterations):
            Q /= K * sum(Q, axis=0)                            # each prototype's sum becomes 1 / K
            Q /= rows * sum(Q, axis=1)                         # each row's sum becomes 1 / rows
        targets = rows * Q

    Throughout, `Q[b, k] = c[b] exp(z[b, k] / teacher_temperature) r[k]`, so the scalings `r` and `c` are enough. A
    factor common to all rows or prototypes (K, the number of rows) does not change the targets, because the next
    division of the rows by their sums removes it; the last one is the softmax of the targets. Each iteration is one
    pass over chunks of rows, which takes `c` from the last `r` and adds to the sums that give the next one, all in the
    log domain; `Q` is not held.

    Args:
      units: rows of the whole batch, with any leading axes, of which the first is sharded like a batch.
      row_weights: numbers or bools; rows of weight 0 are outside all sums, the others count alike. None: all rows
        count.
      iterations: at least 1.

    Returns:
      `log r`, without gradient; zeros if no row counts.
    """
    units, weights = jax.lax.stop_gradient((units, weights))
    valid = jnp.ones(units.shape[:-1], bool) if row_weights is None else row_weights > 0
    rows, columns = sharding.axes_in_use()
    cut, data = P(columns), rows[:1]

    def local(units, valid, weights, temperature):
        units = gather_units(units, rows, precision)  # [rows / data, D]
        chunks = in_chunks((units.reshape(-1, units.shape[-1]), valid.reshape(-1)), len(weights))
        weights = weights.astype(precision.compute)  # [K / (tensor fsdp), D]
        lowest = float(jnp.finfo(precision.wide).min)  # finite, so that differences of two are
        start = tuple(vary(jnp.full(len(weights), value, precision.wide), (*data, *columns)) for value in (lowest, 0.0))

        def log_r(last):  # from the last one, None at first: [K] -> [K]
            def body(seen, chunk):
                top, summed = seen  # [K] each: log sum exp over the rows seen so far is top + log(summed)
                z = precision.logits(chunk[0], weights) / temperature  # [n, K]
                if last is not None:  # c is 1 before
                    z -= log_sum_exp(z + last, columns)[0][:, None]
                z = jnp.where(chunk[1][:, None], z, -jnp.inf)
                higher = jnp.maximum(top, jnp.max(z, axis=0))
                return (higher, summed * jnp.exp(top - higher) + jnp.sum(jnp.exp(z - higher), axis=0)), None

            (top, summed), _ = jax.lax.scan(body, start, chunks)
            top_of_all = highest(top, data)
            summed = total(summed * jnp.exp(top - top_of_all), data)
            return jnp.where(summed > 0, -top_of_all - jnp.log(summed), 0.0)

        return jax.lax.scan(lambda last, _: (log_r(last), None), log_r(None), length=iterations - 1)[0]

    # The marks of the rows are small; the compiler gathers them over `fsdp`.
    shape = dict(in_specs=(sharding.BATCH, P(data), cut, P()), out_specs=cut)
    return (jax.shard_map(local, **shape) if rows else local)(units, valid, weights, teacher_temperature)
