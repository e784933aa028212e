"""The contrastive term of MoCo v3 (Chen et al., arXiv:2104.02057, equation 1 and algorithm 1)."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import ArrayLike, Float

from pera_jax.losses.per_device import log_sum_exp, total
from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding


@jax.named_scope("contrastive_term")
def contrastive_term(
    queries: Float[jax.Array, "B D"],
    keys: Float[jax.Array, "B D"],
    temperature: Float[ArrayLike, ""],
    precision: Precision,
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """Cross-entropy of finding each query's own key among the keys of the whole batch.

        for i in range(B):
            loss -= 2 * temperature * log_softmax(keys @ queries[i] / temperature)[i] / B       # no gradient to keys

    Each device compares its own queries with the keys of all devices. Those along `tensor` compute the same, which is
    negligible beside the networks: 2 B D FLOPs per query.

    Args:
      queries, keys: L2-normalized; row i of both is the same image.

    Returns:
      The loss, and the fraction of the queries for which their own key is the nearest (of equally near ones, the first
      key counts, so that it is 1 / B if all keys are equal).
    """
    keys = jax.lax.stop_gradient(keys)
    batch, (rows, _) = len(queries), sharding.axes_in_use()

    def local(queries, keys, temperature):
        own = jnp.arange(len(queries))  # [b], the index of each query's key
        if rows:
            own += jax.lax.axis_index(rows) * len(queries)
            keys = jax.lax.all_gather(keys.astype(precision.compute), rows, axis=0, tiled=True)  # [B, D]
        z = precision.logits(queries, keys) / temperature  # [b, B]
        loss = log_sum_exp(z, ())[0] - jnp.take_along_axis(z, own[:, None], axis=1)[:, 0]  # [b]
        found = jnp.sum(jnp.argmax(z, axis=1) == own, dtype=z.dtype)
        return 2 * temperature * total(jnp.sum(loss), rows) / batch, total(found, rows) / batch

    shape = dict(in_specs=(sharding.BATCH, sharding.BATCH, P()), out_specs=(P(), P()))
    return (jax.shard_map(local, **shape) if rows else local)(queries, keys, temperature)
