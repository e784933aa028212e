"""Block masks: their statistics on the grid of ViT-B/16 at 448 px, and the buffer of masked patches."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from pera_jax.common.errors import UserError
from pera_jax.objectives import base, batches, ibot_masks
from pera_jax.parallel import sharding

SIDE, GROUP, GROUPS = 28, 4, 500


def drawn(side: int, group: int, groups: int, **settings) -> np.ndarray:
    """Masks [groups, 2 group, L]."""
    masks = ibot_masks.BlockMasks(side, group, **settings)
    found = [masks.draw(np.random.default_rng(seed))["masks"] for seed in range(groups)]
    assert {(each.shape, each.dtype) for each in found} == {((group, *masks.shapes()["masks"][0]), np.dtype(np.uint8))}
    return np.stack(found).reshape(groups, 2 * group, side**2)


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    return drawn(SIDE, GROUP, GROUPS)


def test_half_of_the_crops_are_masked_one_in_each_stratum(masks):
    counts = masks.sum(axis=2, dtype=int)  # [groups, 2 g]
    assert masks.max() == 1
    np.testing.assert_array_equal((counts > 0).sum(axis=1), GROUP)
    ordered = np.sort(counts, axis=1)[:, GROUP:]  # [groups, g], one of each stratum, short of it by up to three
    edges = np.linspace(0.1, 0.5, GROUP + 1) * SIDE**2
    assert np.all(ordered <= edges[1:]) and np.all(ordered >= np.floor(edges[:-1]) - 3)
    # uniform in its stratum, for which being short of it matters little
    within = (ordered - edges[:-1]) / np.diff(edges)
    np.testing.assert_allclose(within.mean(axis=0), 0.5, atol=0.08)  # six standard errors
    np.testing.assert_allclose(within.std(axis=0), 12**-0.5, atol=0.04)
    assert abs(counts[counts > 0].mean() / SIDE**2 - 0.3) < 0.005
    # shuffled: each place is masked in half of the groups, and the largest ratio is at any place
    np.testing.assert_allclose((counts > 0).mean(axis=0), 0.5, atol=0.14)
    largest = np.bincount(counts.argmax(axis=1), minlength=2 * GROUP) / GROUPS
    np.testing.assert_allclose(largest, 1 / (2 * GROUP), atol=0.09)
    assert np.any(masks[0] != masks[1])


def test_masks_are_exact_or_a_little_short_and_favor_the_middle():
    number, wanted = 2000, int(0.3 * SIDE**2)
    uniform = iter(np.random.default_rng(0).random((4_000_000,)).tolist())
    found = np.stack([ibot_masks.block_mask(uniform, wanted, SIDE, 4, 0.3) for _ in range(number)])
    short = wanted - found.sum(axis=1, dtype=int)
    assert short.min() >= 0 and short.max() <= 3
    assert 0.85 <= np.mean(short == 0) <= 0.97
    share = found.reshape(number, SIDE, SIDE).mean(axis=0)
    half = SIDE // 2
    corner = share[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    edge = np.mean([share[0, half - 1 : half + 1], share[-1, half - 1 : half + 1],
                    share[half - 1 : half + 1, 0], share[half - 1 : half + 1, -1]])  # fmt: skip
    assert abs(corner - 0.015) < 0.008 and abs(edge - 0.09) < 0.02
    assert abs(share[half - 1 : half + 1, half - 1 : half + 1].mean() - 0.57) < 0.06
    np.testing.assert_allclose(share.sum(axis=1), share.sum(axis=0), atol=1.5)  # height and width alike
    np.testing.assert_allclose(share, share[::-1, ::-1], atol=0.09)


def of_numbers(wanted: int, numbers: list[float], side: int = SIDE) -> np.ndarray:
    """The mask [side, side] made of these random numbers, all of which must be used."""
    uniform = iter(numbers)
    mask = ibot_masks.block_mask(uniform, wanted, side, 4, 0.3).reshape(side, side)
    assert next(uniform, None) is None
    return mask


def with_blocks(*blocks: tuple[slice, slice], side: int = SIDE) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    for block in blocks:
        mask[block] = 1
    return mask


TWICE_AS_WIDE = 0.5 - 0.5 * np.log(0.5) / np.log(0.3)  # the number that gives height / width = 0.5


def test_blocks_have_the_sizes_and_positions_of_their_draws():
    square = of_numbers(49, [1.0, 0.5, 0.999, 0.0])
    np.testing.assert_array_equal(square, with_blocks(np.s_[21:, :7]))
    # area 48 and height / width = 1 / 0.3: sqrt(160) rounds to 13, sqrt(14.4) to 4
    np.testing.assert_array_equal(of_numbers(52, [44 / 48, 1.0, 0.0, 0.999]), with_blocks(np.s_[:13, 24:]))
    np.testing.assert_array_equal(of_numbers(52, [44 / 48, 0.0, 0.0, 0.0]), with_blocks(np.s_[:4, :13]))
    # 52 patches are more than 50 wanted, the next try fits
    tries = [44 / 46, 1.0, 0.0, 0.0, 1.0, TWICE_AS_WIDE, 0.0, 0.0]
    np.testing.assert_array_equal(of_numbers(50, tries), with_blocks(np.s_[:5, :10]))
    # at most half of a grid of 8, although 40 are wanted: 4 x 8 is too wide, 6 x 6 is placed, then 2 x 2 adds nothing
    tries = [[1.0, TWICE_AS_WIDE], *[[1.0, 0.5, 0.0, 0.0]] * 11]
    mask = of_numbers(40, sum(tries, []), side=8)
    np.testing.assert_array_equal(mask, with_blocks(np.s_[:6, :6], side=8))


def test_only_new_patches_count():
    first = [45 / 49, 0.5, 0.0, 0.0]  # 7 x 7 of 53
    overlapping = [0.5, 0.5, 0.0, 6.5 / 27]  # 2 x 2, of which 2 are new
    nothing_new, new = [1.0, TWICE_AS_WIDE, 0.0, 0.0], [1.0, TWICE_AS_WIDE, 0.999, 0.0]  # 1 x 2
    mask = of_numbers(53, first + overlapping + nothing_new + new)
    np.testing.assert_array_equal(mask, with_blocks(np.s_[:7, :7], np.s_[:2, 6:8], np.s_[27:, :2]))


def test_ten_failures_end_a_mask():
    # area 18 and height / width = 0.3: width 8, on a grid of 6
    np.testing.assert_array_equal(of_numbers(18, [1.0, 0.0] * 10, side=6), 0)


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_small_wants_give_small_masks_that_may_stay_empty(wanted):
    uniform = iter(np.random.default_rng(1).random((200_000,)).tolist())
    counts = np.array([ibot_masks.block_mask(uniform, wanted, 6, 4, 0.3).sum(dtype=int) for _ in range(300)])
    assert counts.max() <= wanted
    assert np.mean(counts == wanted) > 0.3


def test_the_bound_is_the_sum_of_the_upper_ends_and_is_never_exceeded(masks):
    assert ibot_masks.BlockMasks(SIDE, GROUP).bound == sum(int(784 * r) for r in (0.2, 0.3, 0.4, 0.5))
    assert masks.sum(axis=(1, 2), dtype=int).max() <= ibot_masks.BlockMasks(SIDE, GROUP).bound
    odd = ibot_masks.BlockMasks(7, 3, probability=0.7, ratio=(0.2, 0.6))
    assert odd.edges == np.linspace(0.2, 0.6, 5).tolist()  # floor(0.7 * 6) = 4
    assert drawn(7, 3, 50, probability=0.7, ratio=(0.2, 0.6)).sum(axis=(1, 2), dtype=int).max() <= odd.bound
    assert len(ibot_masks.BlockMasks(7, 5, probability=0.7).edges) == 8  # 0.7 * 10 is 7, not 6.999


def test_drawing_is_fast_beside_decoding():
    """It takes 0.1 ms per image, and decoding and cropping a photograph takes 5 to 20."""
    masks, began = ibot_masks.BlockMasks(SIDE, 8), time.thread_time()
    for seed in range(20):
        masks.draw(np.random.default_rng(seed))
    assert (time.thread_time() - began) / 160 < 0.002


@pytest.mark.parametrize("devices", [1, 4])
def test_the_buffer_holds_the_masked_patches_of_each_group_in_order(devices):
    group, groups, side = 2, 4, 6
    source = ibot_masks.BlockMasks(side, group, ratio=(0.05, 0.5))
    masks = np.concatenate([source.draw(np.random.default_rng(seed))["masks"] for seed in range(groups)])  # [B, 2, L]
    masks[2:4] = 0  # a group of empty masks

    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    function = jax.jit(lambda masks: ibot_masks.index_buffer(masks, group, source.bound))
    with jax.set_mesh(mesh):
        given = jax.device_put(masks, jax.sharding.NamedSharding(mesh, sharding.BATCH))
        compiled = function.lower(given).compile()
        indices, weights = jax.device_get(compiled(given))
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "permute"))
    assert (indices.dtype, weights.dtype) == (np.int32, np.float32)
    assert indices.shape == weights.shape == (groups, source.bound)
    for g in range(groups):
        flat = masks[g * group : (g + 1) * group].reshape(2 * group, -1)
        wanted = np.flatnonzero(flat)
        np.testing.assert_array_equal(indices[g], np.pad(wanted, (0, source.bound - len(wanted))))
        counts = flat.sum(axis=1, dtype=int)[wanted // side**2]
        np.testing.assert_allclose(weights[g], np.pad(1 / counts, (0, source.bound - len(wanted))), rtol=1e-7)
        assert weights[g].sum() == pytest.approx(np.count_nonzero(flat.any(axis=1)))


def test_weights_have_the_dtype_of_the_objective():
    with jax.enable_x64(True):
        masks = jnp.asarray(ibot_masks.BlockMasks(4, 1).draw(np.random.default_rng(0))["masks"])
        weights = ibot_masks.index_buffer(masks, 1, ibot_masks.BlockMasks(4, 1).bound, jnp.float64)[1]
    assert weights.dtype == np.float64 and np.asarray(weights).max() == 1 / int(masks.sum())


SETTINGS = dict(mask_probability=0.5, mask_ratio=(0.1, 0.5), mask_group=2)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(mask_group=0), r"dinov2.mask_group=0 must be >= 1"),
        (dict(mask_probability=0.0), r"dinov2.mask_probability=0.0 must lie in \(0, 1\]"),
        (dict(mask_ratio=(0.5, 0.1)), r"dinov2.mask_ratio=\(0.5, 0.1\) must be \(low, high\)"),
        (dict(mask_ratio=(0.5, 1.0)), r"with 0 < low <= high < 1"),
        (dict(mask_probability=0.2), r"masks none of the 4 global crops of dinov2.mask_group=2"),
    ],
)
def test_a_wrong_field_is_named(wrong, sentence):
    ibot_masks.check(ConfigDict(SETTINGS), "dinov2")
    with pytest.raises(UserError, match=sentence):
        ibot_masks.check(ConfigDict(SETTINGS | wrong), "dinov2")


def test_crops_without_a_masked_patch_are_an_error():
    assert ibot_masks.from_config(ConfigDict(SETTINGS), "dinov2", 4) == ibot_masks.BlockMasks(4, 2)
    with pytest.raises(UserError, match=r"dinov2.mask_ratio=\(0.1, 0.5\) masks no patch of global crops of 1 patch"):
        ibot_masks.from_config(ConfigDict(SETTINGS), "dinov2", 1)


def test_a_group_must_lie_in_a_microbatch_of_a_device():
    layout = base.Layout(batch_shards=2, weight_shards=1, hosts=1)
    batches.check_group("dinov2.mask_group", 4, 32, 2, layout)
    for group in (3, 16, 0):
        with pytest.raises(UserError, match=rf"dinov2.mask_group={group} does not divide the 8 images per device"):
            batches.check_group("dinov2.mask_group", group, 32, 2, layout)
