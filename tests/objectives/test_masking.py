"""Masks: number of patches, disjoint and complete, uniformly distributed."""

import jax
import numpy as np
import pytest

from pera_jax.common.errors import UserError
from pera_jax.objectives.pera import masks as masking


@pytest.mark.parametrize(
    "patches, shares, expected",
    [
        (784, (0.2, 0.6), (157, 157, 470)),  # 448 px in patches of 16
        (36, (0.2, 0.6), (7, 7, 22)),  # 96 px
        (16, (0.2, 0.6), (3, 3, 10)),
        (25, (0.1, 0.5), (2, 10, 13)),  # 2.5 and 12.5: half goes to even
        (35, (0.1, 0.5), (4, 14, 17)),  # 3.5 and 17.5 (17.5 -> 18)
    ],
)
def test_counts(patches, shares, expected):
    parts = masking.counts(patches, *shares)
    assert (parts.student, parts.learnable, parts.teacher) == expected
    assert parts.total == patches


@pytest.mark.parametrize("shares", [(0.02, 0.6), (0.4, 0.6), (0.2, 0.0), (0.5, 0.7)], ids=str)
def test_an_empty_part_is_an_error_that_names_the_fields(shares):
    with pytest.raises(UserError, match="pera.masks.student.*at least one"):
        masking.counts(16, *shares)


def test_a_learnable_part_that_is_not_used_may_be_empty():
    parts = masking.counts(4, 0.3, 0.7, needs_learnable=False)
    assert (parts.student, parts.learnable, parts.teacher) == (1, 0, 3)
    masks = masking.sample(jax.random.key(0), 5, parts)
    assert (masks.student.shape, masks.learnable.shape, masks.teacher.shape) == ((5, 1), (5, 0), (5, 3))
    with pytest.raises(UserError, match="at least one"):
        masking.counts(4, 0.6, 0.7, needs_learnable=False)  # the three parts would overlap


def test_parts_are_disjoint_and_cover_every_crop():
    parts = masking.counts(36, 0.2, 0.6)
    masks = masking.sample(jax.random.key(0), 50, parts)
    together = np.concatenate([masks.student, masks.learnable, masks.teacher], axis=1)
    assert [x.shape[1] for x in (masks.student, masks.learnable, masks.teacher)] == [7, 7, 22]
    np.testing.assert_array_equal(np.sort(together, axis=1), np.tile(np.arange(36), (50, 1)))
    assert together.dtype == np.int32


def test_parts_are_uniform_and_independent_between_crops():
    crops, patches, parts = 6000, 16, masking.Counts(3, 3, 10)
    masks = masking.sample(jax.random.key(1), crops, parts)
    for indices in (masks.student, masks.learnable, masks.teacher):
        member = np.zeros((crops, patches))
        np.put_along_axis(member, np.asarray(indices), 1, axis=1)
        n = indices.shape[1]
        # How often a patch, and a pair of patches, belong to the part: 5 standard deviations of a binomial.
        share, pair = n / patches, n * (n - 1) / (patches * (patches - 1))
        together = member.T @ member / crops
        apart = ~np.eye(patches, dtype=bool)
        assert np.abs(np.diag(together) - share).max() < 5 * np.sqrt(share * (1 - share) / crops)
        assert np.abs(together[apart] - pair).max() < 5 * np.sqrt(pair * (1 - pair) / crops)
        # One crop says nothing of the next: the overlap of neighbors is hypergeometric.
        overlap = np.sum(member[1:] * member[:-1], axis=1)
        variance = n * share * (1 - share) * (patches - n) / (patches - 1)
        assert abs(overlap.mean() - n * share) < 5 * np.sqrt(variance / crops)


def test_keys_decide():
    parts = masking.Counts(3, 3, 10)
    first, again, other = (masking.sample(jax.random.key(k), 8, parts).student for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))
