"""Distribution of crop boxes; resampling compared with Pillow and float64; reduced JPEG decoding compared with full."""

import io
import math
import types

import numpy as np
import pytest
from PIL import Image

from pera_jax.data import codecs, crops, decode, pipeline

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
    noise = [np.fft.ifft2(spectrum / frequency[..., None] ** power, axes=(0, 1)).real for power in (1.0, 1.45)]
    natural, smooth = (127.5 + 50 * (each - each.mean()) / each.std() for each in noise)
    zones = 127.5 + 127.5 * np.cos(np.pi * (x**2 + y**2) / (2 * max(height, width)))
    checks = 255.0 * ((x + y) % 2)
    images = {
        "natural": natural,
        "smooth": smooth,
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


def test_what_is_too_fine_for_the_crop_turns_gray_instead_of_aliasing():
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


def dense(source: int, target: int) -> np.ndarray:
    """The resampling of one axis as a matrix, float64 [target, source]: a triangle as wide as the reduction."""
    scale = source / target
    center = (np.arange(target)[:, None] + 0.5) * scale
    kernel = np.maximum(1 - np.abs(np.arange(source) + 0.5 - center) / max(scale, 1), 0)
    return kernel / kernel.sum(axis=1, keepdims=True)


def exact(image: np.ndarray, box: crops.Box, size: int) -> np.ndarray:
    """The crop in float64 [size, size, C]."""
    cut = image[box.top : box.top + box.height, box.left : box.left + box.width].astype(np.float64)
    return np.einsum("yh,xw,hwc->yxc", dense(box.height, size), dense(box.width, size), cut, optimize=True)


@pytest.mark.parametrize(
    "box",
    [crops.Box(3, 5, 40, 33), crops.Box(0, 0, 120, 90), crops.Box(60, 10, 17, 80), crops.Box(99, 61, 21, 29)],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 13])
def test_every_dtype_and_number_of_bands_is_resampled_to_its_rounding(channels, box):
    rng = np.random.default_rng(channels)
    for dtype, top, error in ((np.uint8, 255, 2.0), (np.uint16, 65535, 0.52), (np.float32, 9000.0, 0.005)):
        image = (rng.random((120, 90, channels)) * top).astype(dtype)
        image[10:20, 10:20] = top  # White stays white: nothing wraps around.
        wanted = exact(image, box, 32)
        for horizontal, vertical in ((False, False), (True, False), (False, True), (True, True)):
            found = resize(image, box, 32, horizontal, vertical)
            assert found.dtype == dtype
            found = found[:: -1 if vertical else 1, :: -1 if horizontal else 1]
            assert np.abs(found - wanted).max() <= error


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_image_gives_the_crop_of_the_whole_one(reduction):
    """A ramp stays the same ramp: boxes start and end anywhere in the reduced pixels, and nothing shifts."""
    side = 400
    y, x = np.mgrid[: side + reduction, : side + reduction]
    ramp = np.stack([x, y, side - (x + y) / 2], -1) * (250 / side)
    whole = ramp[:side, :side]
    cells = side // reduction + 1
    means = ramp[: cells * reduction, : cells * reduction].reshape(cells, reduction, cells, reduction, 3).mean((1, 3))
    for dtype, error in ((np.float32, 0.3), (np.uint8, 1.6)):
        image = crops.Image(np.rint(means).astype(dtype) if dtype == np.uint8 else means.astype(dtype), 3, reduction)
        for box in (crops.Box(0, 0, 400, 400), crops.Box(3, 5, 391, 350), crops.Box(102, 1, 297, 398)):
            out = np.empty((24, 24, 3), dtype)
            crops.crop_resize(image, box, 24, False, False, out)
            difference = out - exact(whole, box, 24)
            assert np.abs(difference).max() <= error
            assert np.abs(difference.mean((0, 1))).max() <= (0.01 if dtype == np.float32 else 0.4)


INFO = types.SimpleNamespace(bands=["red", "green", "blue"], dtype="uint8")
CROPS = pipeline.Crops({"global": (2, 96, GLOBAL), "local": (3, 24, LOCAL)}, ASPECT, flip=0.5)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def filled(encoded: bytes, info=INFO, places=(0, 1, 2), seed=0) -> dict[str, np.ndarray]:
    out = {name: np.empty((n, size, size, len(places)), info.dtype) for name, (n, size, _) in CROPS.specs.items()}
    decode.fill_crops(encoded, info, places, np.random.default_rng(seed), CROPS, out)
    return out


def plain(pixels: np.ndarray, seed=0) -> dict[str, np.ndarray]:
    """The same crops of the whole image."""
    image, out = crops.Image(pixels), {}
    for name, drawn in decode.draw_crops(np.random.default_rng(seed), *pixels.shape[:2], CROPS).items():
        out[name] = np.empty((len(drawn), drawn[0][1], drawn[0][1], pixels.shape[2]), pixels.dtype)
        for place, crop in zip(out[name], drawn, strict=True):
            crops.crop_resize(image, *crop, place)
    return out


def test_what_is_not_reduced_keeps_its_bits():
    colors = pictures(150, 181)["natural"]
    gray = Image.fromarray(colors).convert("L")
    sets = {"tiff": types.SimpleNamespace(bands=list("abcde"), dtype="uint16")}
    wide = (pictures(150, 181)["noise"][..., [0, 1, 2, 0, 1]].astype(np.uint16)) * 257
    for encoded, info, places in (
        (jpeg(colors), INFO, (0, 1, 2)),
        (jpeg(colors), INFO, (2, 0)),
        (jpeg(np.asarray(gray)), INFO, (0, 1, 2)),
        (codecs.encode_tiff(wide), sets["tiff"], (4, 1)),
    ):
        found, wanted = filled(encoded, info, places), plain(codecs.decode_bands(encoded, info, places))
        for name in ("global", "local"):
            np.testing.assert_array_equal(found[name], wanted[name], strict=True)


@pytest.mark.parametrize(("height", "width", "reduction"), [(401, 457, 2), (803, 910, 4), (1630, 1701, 8)])
def test_large_jpegs_are_reduced_within_a_gray_level(height, width, reduction):
    images = pictures(height, width)
    for name, error in (("smooth", 1.0), ("natural", 2.5), ("zones", 4.0)):
        encoded = jpeg(images[name], progressive=name == "natural")
        read, drawn = decode.read_image(encoded, INFO, (0, 1, 2), np.random.default_rng(0), CROPS)
        assert read.reduction == reduction == decode.largest_reduction(drawn)
        found, wanted = filled(encoded), plain(codecs.decode_image(encoded))
        for kind in ("global", "local"):
            difference = found[kind].astype(int) - wanted[kind]
            assert np.abs(difference).mean() <= error, (name, kind)
            assert abs(difference.mean()) <= 0.25, (name, kind)


def test_what_is_too_fine_turns_gray_in_reduced_jpegs_too():
    for step in (1, 2, 3):
        y, x = np.mgrid[:900, :900]
        for pattern in ((x + y) // step % 2, x // step % 2):
            image = np.repeat((255 * pattern)[..., None], 3, -1).astype(np.uint8)
            crop = filled(jpeg(image, subsampling=0))["local"][:, 1:-1, 1:-1].astype(int)
            assert np.abs(crop - 127.5).max() <= 8, step


def test_damaged_jpegs_are_undecodable():
    encoded = jpeg(pictures(400, 400)["natural"])
    for damaged in (encoded[: len(encoded) // 2], encoded[:20], encoded[:3]):
        with pytest.raises(codecs.ImageDecodeError):
            filled(damaged)
    with pytest.raises(codecs.ImageDecodeError, match="bands"):
        filled(encoded, types.SimpleNamespace(bands=["red"], dtype="uint8"), (0,))
