"""Disjoint masks: which patches of a crop the student sees, predicts, and the teacher sees.

Shen et al., arXiv:2505.19447, section III-B: the two networks never see the same patch of the pair.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pera_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many of a crop's `total` patches go to whom. Static, so that gathers have fixed shapes."""

    student: int
    learnable: int
    teacher: int

    @property
    def total(self) -> int:
        return self.student + self.learnable + self.teacher


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Patch indices (raster order) for N crops: disjoint, and together every patch. All int32."""

    student: jax.Array  # [N, n_s]
    learnable: jax.Array  # [N, n_l]
    teacher: jax.Array  # [N, n_t]


def counts(patches: int, student_share: float, teacher_share: float, needs_learnable: bool = True) -> Counts:
    """`n_s = round(s L)`, `n_l = round(L (1 - t)) - n_s`, `n_t` the rest; `round` is half to even.

    Args:
      needs_learnable: whether the learnable part is used; local crops leave theirs unused, so it may be empty there.

    Raises:
      UserError: a part that is used would be empty.
    """
    n_student = round(student_share * patches)
    n_learnable = round(patches * (1 - teacher_share)) - n_student
    result = Counts(n_student, n_learnable, patches - n_student - n_learnable)
    if min(n_student, result.teacher) < 1 or n_learnable < int(needs_learnable):
        raise UserError(
            f"pera.masks.student={student_share} and pera.masks.teacher={teacher_share} cut {patches} patches into {n_student} for "
            f"the student, {n_learnable} learnable and {result.teacher} for the teacher; each part needs at least one "
            "patch: use larger crops, smaller patches or other shares"
        )
    return result


def cut(order: jax.Array, parts: Counts) -> Masks:
    """Cuts permutations `order` [N, L] (the j-th entry is a patch) into student | learnable | teacher."""
    student, learnable, teacher = jnp.split(order, (parts.student, parts.student + parts.learnable), axis=1)
    return Masks(student, learnable, teacher)


def sample(key: jax.Array, crops: int, parts: Counts) -> Masks:
    """One uniformly random permutation per crop, cut into the three parts."""
    # Ranks of random 32-bit words; ties (about L^2 / 2^33 of the crops) keep raster order, which no statistic can see.
    words = jax.random.bits(key, (crops, parts.total))
    return cut(jnp.argsort(words, axis=1).astype(jnp.int32), parts)
