"""Disjoint masks: the patches of a crop that the student sees, those that it predicts, and those that the teacher sees.

Shen et al., arXiv:2505.19447, section III-B: the two networks never see the same patch of a pair.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Int32, Key

from pera_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Counts:
    """The number of patches of each part; together `total`. Static, so that gathers have fixed shapes."""

    student: int
    learnable: int
    teacher: int

    @property
    def total(self) -> int:
        return self.student + self.learnable + self.teacher


@no_type_check  # as a pytree, it also holds what JAX puts in place of arrays: shapes, shardings, None
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Patch indices (raster order) of N crops, int32: disjoint, and together all patches."""

    student: jax.Array  # [N, n_s]
    learnable: jax.Array  # [N, n_l]
    teacher: jax.Array  # [N, n_t]


def counts(patches: int, student_fraction: float, teacher_fraction: float, needs_learnable: bool = True) -> Counts:
    """`n_s = round(s L)`, `n_l = round(L (1 - t)) - n_s`, `n_t` the rest; `round` is half to even.

    Args:
      patches: L. student_fraction: s. teacher_fraction: t.
      needs_learnable: whether the learnable part is used; local crops do not use it, so theirs may be empty.

    Raises:
      UserError: a part that is used would be empty.
    """
    n_student = round(student_fraction * patches)
    n_learnable = round(patches * (1 - teacher_fraction)) - n_student
    result = Counts(n_student, n_learnable, patches - n_student - n_learnable)
    if min(n_student, result.teacher) < 1 or n_learnable < int(needs_learnable):
        raise UserError(
            f"pera.masks.student={student_fraction} and pera.masks.teacher={teacher_fraction} split {patches} patches "
            f"into {n_student} student, {n_learnable} learnable and {result.teacher} teacher patches, but each part "
            "needs at least one; use larger crops, smaller patches or other fractions"
        )
    return result


def cut(order: Int32[jax.Array, "N L"], parts: Counts) -> Masks:
    """Splits permutations `order` of patch indices into student | learnable | teacher."""
    student, learnable, teacher = jnp.split(order, (parts.student, parts.student + parts.learnable), axis=1)
    return Masks(student, learnable, teacher)


def sample(key: Key[jax.Array, ""], crops: int, parts: Counts) -> Masks:
    """A uniformly random permutation of the patches of each crop, split into the three parts."""
    # Ranks of random 32-bit words; ties (in about L^2 / 2^33 of the crops) keep raster order, a negligible bias.
    words = jax.random.bits(key, (crops, parts.total))
    return cut(jnp.argsort(words, axis=1).astype(jnp.int32), parts)
