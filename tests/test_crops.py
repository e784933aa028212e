"""Boxes against their distribution, resampling against Pillow."""

import math

import numpy as np
import pytest
from PIL import Image

from pera_jax.data import crops

GLOBAL, LOCAL, ASPECT = (0.4, 1.0), (0.05, 0.4), (0.75, 1.33)


class Counting:
    """A generator that counts its draws."""

    def __init__(self, seed: int):
        self.rng, self.draws = np.random.default_rng(seed), 0

    def random(self) -> float:
        self.draws += 1
        return self.rng.random()


def expected(area, aspect):
    """Share of draws that fit a square, and mean area of those that do, by integration over the two ranges."""
    fraction, log_ratio = np.meshgrid(np.linspace(*area, 2001), np.linspace(*np.log(aspect), 2001))
    fits = fraction <= np.exp(-np.abs(log_ratio))
    return fits.mean(), fraction[fits].mean(), log_ratio[fits].std()


@pytest.mark.parametrize("area", [GLOBAL, LOCAL])
def test_boxes_follow_the_rejection_sampler(area):
    rng, number, side = Counting(0), 20_000, 512
    boxes = np.array([crops.sample_box(rng, side, side, area, ASPECT) for _ in range(number)])
    tops, lefts, heights, widths = boxes.T
    assert (tops >= 0).all() and (lefts >= 0).all()
    assert (tops + heights <= side).all() and (lefts + widths <= side).all()

    share, mean_area, ratio_std = expected(area, ASPECT)
    attempts = (rng.draws - 2 * number) / 2  # Two draws per attempt, two for the position.
    rejected = 1 - number / attempts
    assert rejected == pytest.approx(1 - share, abs=0.01)
    if area == GLOBAL:
        assert 0.19 < rejected < 0.24
    assert (heights * widths).mean() / side**2 == pytest.approx(mean_area, abs=0.004)
    ratios = np.log(widths / heights)
    assert ratios.mean() == pytest.approx(0, abs=0.01)
    assert ratios.std() == pytest.approx(ratio_std, rel=0.03)
    assert math.log(0.74) < ratios.min() and ratios.max() < math.log(1.35)
    inner = widths < side
    assert (lefts[inner] / (side - widths[inner])).mean() == pytest.approx(0.5, abs=0.02)


def test_positions_are_uniform_over_all_places():
    rng = np.random.default_rng(1)
    boxes = [crops.sample_box(rng, 8, 8, (0.25, 0.25), (1.0, 1.0)) for _ in range(25_000)]
    assert all(box[2:] == (4, 4) for box in boxes)
    counts = np.bincount([5 * box.top + box.left for box in boxes], minlength=25)
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-square, 24 degrees of freedom: p < 1e-4


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 300, (0, 83, 100, 133)), (300, 100, (83, 0, 133, 100)), (90, 100, (0, 0, 90, 100)), (1, 1, (0, 0, 1, 1))],
)
def test_a_box_that_never_fits_becomes_the_largest_central_one(height, width, box):
    assert crops.sample_box(np.random.default_rng(0), height, width, (4.0, 4.0), ASPECT) == box


def pictures(height: int, width: int) -> dict[str, np.ndarray]:
    """Test images uint8 [H, W, 3] up to the highest frequencies that pixels can hold."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:height, :width]
    spectrum = rng.normal(size=(height, width, 3)) + 1j * rng.normal(size=(height, width, 3))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) + 1 / width
    natural = np.fft.ifft2(spectrum / frequency[..., None], axes=(0, 1)).real
    natural = 127.5 + 50 * (natural - natural.mean()) / natural.std()
    zones = 127.5 + 127.5 * np.cos(np.pi * (x**2 + y**2) / (2 * max(height, width)))
    checks = 255.0 * ((x + y) % 2)
    images = {
        "natural": natural,
        "noise": rng.integers(0, 256, (height, width, 3)),
        "zones": np.repeat(zones[..., None], 3, -1),
        "checks": np.repeat(checks[..., None], 3, -1),
        "edges": np.repeat(255.0 * ((x // 37 + y // 23) % 2)[..., None], 3, -1),
    }
    return {name: image.clip(0, 255).astype(np.uint8) for name, image in images.items()}


def resize(image: np.ndarray, box: crops.Box, size: int, horizontal=False, vertical=False) -> np.ndarray:
    out = np.full((size, size, image.shape[-1]), 77, image.dtype)
    crops.crop_resize(crops.Image(image), box, size, horizontal, vertical, out)
    return out


@pytest.mark.parametrize(
    ("box", "size"),
    [  # enlarged; reduced a little, as global crops; reduced, as local crops; reduced much; another scale per axis
        (crops.Box(3, 5, 300, 330), 448),
        (crops.Box(0, 12, 512, 470), 448),
        (crops.Box(100, 50, 250, 190), 96),
        (crops.Box(200, 300, 140, 120), 96),
        (crops.Box(0, 0, 512, 600), 40),
        (crops.Box(500, 0, 12, 600), 48),
    ],
)
def test_resampling_agrees_with_pillow(box, size):
    for name, image in pictures(512, 600).items():
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        reference = np.asarray(Image.fromarray(image).crop(corners).resize((size, size), Image.Resampling.BILINEAR))
        difference = resize(image, box, size).astype(int) - reference
        assert np.abs(difference).mean() <= 0.5, name
        assert np.abs(difference).max() <= 4, name
        assert abs(difference.mean()) <= 0.25, name  # Never brighter or darker as a whole.


def test_what_is_too_fine_for_the_crop_turns_grey_instead_of_aliasing():
    image = pictures(512, 512)["checks"]
    inner = resize(image, crops.Box(10, 10, 300, 300), 96)[2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127.5).max() <= 8  # Taking every third pixel would give 0 and 255.


def test_a_box_of_the_crops_size_is_copied():
    image = pictures(64, 80)["noise"]
    np.testing.assert_array_equal(resize(image, crops.Box(7, 9, 48, 48), 48), image[7:55, 9:57])


def test_flips_mirror_the_crop():
    image, box = pictures(120, 90)["noise"], crops.Box(11, 3, 100, 77)
    plain = resize(image, box, 48)
    np.testing.assert_array_equal(resize(image, box, 48, horizontal=True), plain[:, ::-1])
    np.testing.assert_array_equal(resize(image, box, 48, vertical=True), plain[::-1])
    np.testing.assert_array_equal(resize(image, box, 48, True, True), plain[::-1, ::-1])


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_each_channel_is_resampled_by_itself(channels):
    image = np.random.default_rng(3).integers(0, 256, (70, 50, channels), dtype=np.uint8)
    box = crops.Box(4, 6, 60, 40)
    alone = [resize(np.ascontiguousarray(image[..., c : c + 1]), box, 32) for c in range(channels)]
    np.testing.assert_array_equal(resize(image, box, 32), np.concatenate(alone, axis=-1))


def dense(source: int, target: int) -> np.ndarray:
    """The resampling of one axis as a matrix, float64 [target, source]: a triangle as wide as the reduction."""
    scale = source / target
    centre = (np.arange(target)[:, None] + 0.5) * scale
    kernel = np.maximum(1 - np.abs(np.arange(source) + 0.5 - centre) / max(scale, 1), 0)
    return kernel / kernel.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("box", [crops.Box(3, 5, 40, 31), crops.Box(0, 0, 120, 90), crops.Box(60, 10, 17, 80)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 6, 13])
def test_wide_values_are_resampled_to_their_rounding(channels, box):
    rng = np.random.default_rng(channels)
    for dtype, error in ((np.uint8, 2.0), (np.uint16, 0.51), (np.float32, 0.02)):
        top = np.iinfo(dtype).max if dtype != np.float32 else 9000.0
        image = (rng.random((120, 90, channels)) * top).astype(dtype)
        cut = image[box.top : box.top + box.height, box.left : box.left + box.width].astype(np.float64)
        wanted = np.einsum("yh,xw,hwc->yxc", dense(box.height, 32), dense(box.width, 32), cut)
        found = resize(image, box, 32, horizontal=True)
        assert found.dtype == dtype
        assert np.abs(found[:, ::-1] - wanted).max() <= error
