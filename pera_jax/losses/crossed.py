"""The class term of DINO (Caron et al., arXiv:2104.14294, equation 3) and DINOv2: each crop of the student against the
other global crops of the teacher.

Written per device; the communication is that of `prototypes`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import ArrayLike, Float

from pera_jax.losses.per_device import gather_units, highest, log_softmax, log_sum_exp, mean, total, vary
from pera_jax.losses.prototypes import Prototypes
from pera_jax.models.precision import Precision
from pera_jax.parallel import sharding


@jax.named_scope("crossed_term")
def crossed_term(
    student: Prototypes,
    teacher: Prototypes,
    bias: Float[jax.Array, " K"],
    student_temperature: Float[ArrayLike, ""],
    teacher_temperature: Float[ArrayLike, ""],
    precision: Precision,
) -> tuple[Float[jax.Array, " V"], dict[str, Float[jax.Array, "..."]]]:
    """Cross-entropy between each of the teacher's crops and each other crop of the student, averaged over these
    T (V - 1) terms and the batch.

        loss = 0
        for v in range(V):                                     # the student's crops, of which the first T are
            for i in range(T):                                 # the teacher's crops
                for b in range(B):
                    if v != i:
                        p = softmax(teacher.z[b, i] / teacher_temperature + bias)       # no gradient
                        loss -= sum(p * log_softmax(student.z[b, v] / student_temperature)) / (B * T * (V - 1))

    The teacher's probabilities of all T crops are in memory, and the logits of one of the student's crops.

    Args:
      student: units [B, V, D], weights [K, D]. teacher: units [B, T, D], weights [K, D]; T <= V and V > 1.
      bias: `-center / teacher_temperature`, or `sinkhorn.sinkhorn_bias` of the teacher's units.

    Returns:
      The loss of each of the student's crops, its terms' sum times V / (T (V - 1)), so that the mean over crops is the
      term, as for `prototypes.class_term`; and the same statistics of the teacher's probabilities as that, over its T
      crops and all samples.
    """
    teacher, bias = jax.lax.stop_gradient((teacher, bias))
    crops, targets = student.units.shape[1], teacher.units.shape[1]
    others = np.arange(crops)[:, None] != np.arange(targets)  # [V, T]
    rows, columns = sharding.axes_in_use()
    whole, cut, data = P(), P(columns), rows[:1]

    def local(student_units, teacher_units, student_weights, teacher_weights, bias, temperatures):
        student_units, teacher_units = (gather_units(x, rows, precision) for x in (student_units, teacher_units))
        # [K / (tensor fsdp), D]; its gradient is summed over `data` once
        student_weights = vary(student_weights, data)
        ts, tt = temperatures

        def target(used, units):
            z_t = precision.logits(units, teacher_weights) / tt + bias  # [B, K]
            log_p, best = log_softmax(z_t, columns)  # [B, K], [B]
            p = jnp.exp(log_p)
            entropy = -jnp.mean(total(jnp.sum(p * log_p, axis=-1), columns))
            return used.at[best].set(1.0, mode="drop"), (p, entropy)

        start = vary(jnp.zeros(len(bias), precision.wide), (*data, *columns))
        used, (p, entropy) = jax.lax.scan(target, start, jnp.moveaxis(teacher_units, 1, 0))  # p: [T, B, K]

        # One crop at a time, recomputed in the backward pass, so that only the logits of one crop are in memory.
        @jax.checkpoint
        def crop(student_weights, p, units, others):
            z_s = precision.logits(units, student_weights) / ts  # [B, K]
            p_t = jnp.sum(p * others[:, None, None], axis=0)  # [B, K]
            # Each of the probabilities sums to 1: the log-partition can be taken out of the sum.
            log_sum = log_sum_exp(z_s, columns)[0]  # [B]
            return jnp.mean(jnp.sum(others) * log_sum - total(jnp.sum(p_t * z_s, axis=-1), columns))

        per_crop = (jnp.moveaxis(student_units, 1, 0), jnp.asarray(others, precision.wide))  # [V, B, D], [V, T]
        _, loss = jax.lax.scan(lambda _, crop_v: (None, crop(student_weights, p, *crop_v)), None, per_crop)
        loss *= crops / (targets * (crops - 1))
        mean_p, loss, entropy = (mean(value, data) for value in (jnp.mean(p, axis=(0, 1)), loss, entropy))
        return loss, entropy, mean_p, highest(used, data)

    shape = dict(in_specs=(sharding.BATCH, sharding.BATCH, cut, cut, cut, whole), out_specs=(whole, whole, cut, cut))
    loss, entropy, mean_p, used = (jax.shard_map(local, **shape) if rows else local)(
        student.units, teacher.units, student.weights, teacher.weights, bias,
        (student_temperature, teacher_temperature),
    )  # fmt: skip
    statistics = {"entropy": jnp.mean(entropy), "mean": mean_p, "used": used}
    return loss, jax.lax.stop_gradient(statistics)
