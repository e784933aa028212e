"""Views: color operations compared with Pillow's, random draws, and independence of sharding and platform."""

import colorsys
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from toy_photographs import drawings, photographs

from pera_jax.augment import color
from pera_jax.augment.color import BRIGHTNESS, CONTRAST, HUE, SATURATION, Jitter
from pera_jax.bands import Bands, rgb_indices
from pera_jax.common.errors import UserError
from pera_jax.objectives.pera import views

SETTINGS = {
    "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
    "student_change": 0.8, "student_grayscale": 0.1, "teacher_jitter": 0.1, "rgb": (),
}  # fmt: skip
NONE = dict.fromkeys(SETTINGS, 0.0) | {"rgb": ()}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNCHANGED = (1.0, 1.0, 1.0, 0.0)
PATHS = {
    name: jax.jit(functools.partial(path, wide=jnp.float32, dtype=jnp.float32), static_argnames=("bands", "rgb"))
    for name, path in {"by crop": color.apply_by_crop, "together": color.apply_together}.items()
}
COLORS = (0, 1, 2)
PLAIN, NORMALIZED = Bands.plain(mean=0.0, std=1.0), dataclasses.replace(Bands.plain(), mean=MEAN, std=STD)


def changed(**factors):
    names = ("brightness", "contrast", "saturation", "hue")
    return [factors.get(name, same) for name, same in zip(names, UNCHANGED, strict=True)]


def looked_at(crops, factors, orders, path, rgb=COLORS):
    """Values in [0, 1] of uint8 crops [N, H, W, C], changed by the code that `make_views` runs on some platform."""
    jitter = Jitter(jnp.asarray(factors, jnp.float32), jnp.asarray(orders, jnp.int32))
    bands = Bands.plain([f"b{i}" for i in range(crops.shape[-1])], mean=0.0, std=1.0)
    return np.asarray(PATHS[path](jnp.asarray(crops), jitter, bands=bands, rgb=rgb))


def pillow_hue(image, turn):
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue).astype(np.int32) + round(turn * 255)) % 256  # Pillow's hue is 8 bits for one turn
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")


OPERATIONS = {
    "brightness up": (changed(brightness=1.37), lambda image: ImageEnhance.Brightness(image).enhance(1.37)),
    "brightness down": (changed(brightness=0.63), lambda image: ImageEnhance.Brightness(image).enhance(0.63)),
    "contrast up": (changed(contrast=1.4), lambda image: ImageEnhance.Contrast(image).enhance(1.4)),
    "contrast down": (changed(contrast=0.6), lambda image: ImageEnhance.Contrast(image).enhance(0.6)),
    "saturation up": (changed(saturation=1.2), lambda image: ImageEnhance.Color(image).enhance(1.2)),
    "saturation down": (changed(saturation=0.8), lambda image: ImageEnhance.Color(image).enhance(0.8)),
    "hue forward": (changed(hue=25 / 255), lambda image: pillow_hue(image, 25 / 255)),
    "hue back": (changed(hue=-20 / 255), lambda image: pillow_hue(image, -20 / 255)),
    "gray": (changed(saturation=0.0), lambda image: image.convert("L").convert("RGB")),
}


def make_views(key, crops, settings, bands=NORMALIZED, dtype=jnp.float32):
    """The student's and the teacher's view of each crop, as the objective makes them."""
    views.check(settings, settings["rgb"], bands.names)
    jitters, rgb = views.draw_jitter(key, len(crops), settings), rgb_indices(settings["rgb"], bands.names)
    return tuple(color.apply(crops, jitter, bands, rgb, dtype) for jitter in jitters)


@pytest.mark.parametrize("images", [photographs, drawings])
@pytest.mark.parametrize("path", PATHS)
def test_each_operation_is_pillows(path, images):
    crops = images()
    for name, (factors, pillow) in OPERATIONS.items():
        ours = 255 * looked_at(crops, [factors] * len(crops), [(0, 1, 2, 3)] * len(crops), path)
        theirs = np.stack([np.asarray(pillow(Image.fromarray(crop))) for crop in crops])
        difference = np.abs(ours - theirs)  # Pillow's are cut to whole gray levels, which alone makes up to 0.5
        assert difference.mean() <= 0.5, name
        assert np.percentile(difference, 99) <= 2, name
        assert np.abs(crops - theirs.astype(np.float64)).mean() > 3 * difference.mean(), f"{name} changed too little"


def reference(crop, factors, order):
    """The definition, pixel by pixel, in float64, hue by the standard library."""
    x = crop.astype(np.float64) / 255  # [H, W, 3]
    for operation in order:
        factor, luma = float(factors[operation]), x @ [0.299, 0.587, 0.114]
        if operation == BRIGHTNESS:
            x = x * factor
        elif operation == CONTRAST:
            x = factor * x + (1 - factor) * luma.mean()
        elif operation == SATURATION:
            x = factor * x + (1 - factor) * luma[..., None]
        else:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
            x = np.array([colorsys.hsv_to_rgb((h + factor) % 1.0, s, v) for h, s, v in hsv]).reshape(x.shape)
        x = np.clip(x, 0, 1)
    return x


@pytest.mark.parametrize("path", PATHS)
def test_every_order_with_clipping_after_each_operation(path):
    rng = np.random.default_rng(3)
    orders = np.array(list(itertools.permutations(range(4))))  # [24, 4]
    crops = rng.integers(0, 256, (24, 10, 12, 3), dtype=np.uint8)
    crops[:, :2] = rng.integers(0, 256, (24, 2, 12, 1), dtype=np.uint8)  # no hue
    crops[:, 2:4] = rng.choice([0, 255], (24, 2, 12, 3)).astype(np.uint8)  # the corners of the color cube
    low, high = [0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1]
    factors = np.where(rng.random((24, 4)) < 0.5, rng.uniform(low, high, (24, 4)), rng.choice([low, high], 24))
    factors = factors.astype(np.float32)
    factors[rng.random((24, 4)) < 0.15] = 0.5  # a turn by half; stronger than any draw
    expected = np.stack([reference(*row) for row in zip(crops, factors, orders, strict=True)])
    np.testing.assert_allclose(looked_at(crops, factors, orders, path), expected, atol=5e-6)
    one_order = np.stack([reference(crop, f, orders[0]) for crop, f in zip(crops, factors, strict=True)])
    assert np.abs(one_order - expected).max() > 0.1  # the order matters on these


def test_what_is_drawn():
    number = 40_000
    student, teacher = jax.tree.map(np.asarray, views.draw_jitter(jax.random.key(1), number, SETTINGS))

    def share(happened, expected, of=number):
        assert abs(happened.sum() / of - expected) < 4.5 * (expected * (1 - expected) / of) ** 0.5

    student_changed, teacher_changed = ((j.factors != UNCHANGED).any(axis=1) for j in (student, teacher))
    gray = (student.factors == (1, 1, 0, 0)).all(axis=1)
    share(student_changed, 0.8)
    share(gray, 0.1, of=student_changed.sum())
    share(teacher_changed, 0.1)
    share(student_changed & teacher_changed, 0.08)
    both = student_changed & teacher_changed & ~gray  # about 2,900
    for jitter, colored in ((student, student_changed & ~gray), (teacher, teacher_changed)):
        drawn = (jitter.factors[colored] - UNCHANGED) / (0.4, 0.4, 0.2, 0.1)
        assert (np.abs(drawn) <= 1 + 1e-6).all()
        deciles = np.stack([np.histogram(column, bins=10, range=(-1.000001, 1.000001))[0] for column in drawn.T])
        np.testing.assert_allclose(deciles / colored.sum(), 0.1, atol=4.5 * (0.09 / colored.sum()) ** 0.5)
        assert (np.sort(jitter.order, axis=1) == range(4)).all()
        counts = np.unique(jitter.order[colored], axis=0, return_counts=True)[1]
        np.testing.assert_allclose(counts / colored.sum(), 1 / 24, atol=4.5 * (1 / 24 / colored.sum()) ** 0.5)
    draws = np.concatenate([draw[both] for jitter in (student, teacher) for draw in jitter], axis=1)  # [crops, 16]
    between = np.corrcoef(draws.T)[:8, 8:]
    assert np.abs(between).max() < 4.5 / both.sum() ** 0.5  # student and teacher draw independently
    among = np.corrcoef(student.factors[both].T) - np.eye(4)
    assert np.abs(among).max() < 4.5 / both.sum() ** 0.5


def test_views_of_crops_that_stay_change_or_go_gray():
    crops = np.random.default_rng(0).integers(0, 256, (400, 8, 6, 3), dtype=np.uint8)
    key = jax.random.key(5)
    looks = jax.jit(lambda k, c: make_views(k, c, SETTINGS))(key, crops)
    jitters = views.draw_jitter(key, len(crops), SETTINGS)
    mean, std = jnp.asarray(MEAN), jnp.asarray(STD)
    plain = np.asarray((jnp.asarray(crops, jnp.float32) / 255 - mean) / std)
    for look, jitter in zip(looks, jitters, strict=True):
        stays = (np.asarray(jitter.factors) == UNCHANGED).all(axis=1)
        assert 0 < stays.sum() < len(crops)
        for seen in (
            np.asarray(look),
            np.asarray(PATHS["together"](jnp.asarray(crops), jitter, bands=NORMALIZED, rgb=COLORS)),
        ):
            np.testing.assert_array_equal(seen[stays], plain[stays])
            assert (np.abs(seen - plain).max(axis=(1, 2, 3))[~stays] > 1e-3).all()
    gray = (np.asarray(jitters[0].factors) == (1, 1, 0, 0)).all(axis=1)
    values = np.asarray(looks[0])[gray] * STD + MEAN
    luma = crops[gray] @ np.array([0.299, 0.587, 0.114]) / 255
    np.testing.assert_allclose(values, np.repeat(luma[..., None], 3, axis=-1), atol=1e-5)
    again = make_views(jax.random.key(6), crops, SETTINGS)
    assert np.abs(np.asarray(again[0]) - np.asarray(looks[0])).max() > 0.1
    half = jax.jit(lambda k, c: make_views(k, c, SETTINGS, dtype=jnp.bfloat16))(key, crops)
    for narrow, wide in zip(half, looks, strict=True):
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=2**-8, atol=1e-6)  # colors were in float32


def test_sharded_crops_get_the_same_views():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    rows, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for spec in (("data",), ()))
    crops = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3), dtype=np.uint8)
    key = jax.random.key(2)

    def every_look(key, crops):
        drawn = views.draw_jitter(key, crops.shape[0], SETTINGS)
        together = color.apply_together(crops, drawn[0], PLAIN, COLORS, jnp.float32, jnp.float32)
        return drawn, make_views(key, crops, SETTINGS), together

    one = jax.jit(every_look)(key, crops)
    eight = jax.jit(every_look, out_shardings=rows)(jax.device_put(key, whole), jax.device_put(crops, rows))
    assert len(eight[2].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, eight[0], one[0])
    # The mean gray of a crop may be summed in another order: as near as the looks below, divided by the deviation.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 / min(STD), rtol=0), eight[1], one[1])
    np.testing.assert_allclose(eight[2], one[2], atol=2e-6, rtol=0)


def test_only_cpu_takes_the_crops_one_by_one():
    crops = jnp.zeros((4, 8, 8, 3), jnp.uint8)
    jitter = Jitter(jnp.ones((4, 4)), jnp.tile(jnp.arange(4), (4, 1)))
    traced = jax.jit(lambda c, j: color.apply(c, j, NORMALIZED, COLORS)).trace(crops, jitter)
    loops = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops == {"cpu": 2, "cuda": 1, "tpu": 1}  # over crops and each crop's operations; over the places only


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bands", [1, 4])
def test_other_bands_know_brightness_and_contrast(path, bands):
    crops = np.random.default_rng(0).integers(0, 256, (3, 6, 6, bands), dtype=np.uint8)
    factors = [changed(brightness=1.3, contrast=0.7), changed(contrast=1.4), UNCHANGED]
    got = looked_at(crops, factors, [(BRIGHTNESS, HUE, SATURATION, CONTRAST)] * 3, path, rgb=None)
    x = crops / 255
    bright, strong = np.clip(1.3 * x[0], 0, 1), np.clip(1.4 * x[1] - 0.4 * x[1].mean(axis=(0, 1)), 0, 1)
    np.testing.assert_allclose(got, [0.7 * bright + 0.3 * bright.mean(axis=(0, 1)), strong, x[2]], atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
def test_three_colors_among_five_bands_change_as_if_alone(path):
    rng = np.random.default_rng(4)
    crops = rng.integers(0, 256, (24, 8, 8, 5), dtype=np.uint8)
    factors = rng.uniform([0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1], (24, 4)).astype(np.float32)
    factors[:3, 2:] = (0, 0)  # gray
    orders = np.array(list(itertools.permutations(range(4))))
    got = looked_at(crops, factors, orders, path, rgb=(3, 0, 2))
    alone = looked_at(crops[..., [3, 0, 2]], factors, orders, path)
    np.testing.assert_allclose(got[..., [3, 0, 2]], alone, atol=1e-6)
    others = factors.copy()
    others[:, 2:] = UNCHANGED[2:]
    np.testing.assert_allclose(
        got[..., [1, 4]], looked_at(crops[..., [1, 4]], others, orders, path, rgb=None), atol=1e-6
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_stored_values_are_mapped_by_the_ranges_of_their_bands(dtype):
    ranges, mean, std = ((1000.0, 3000.0), (0.0, 500.0)), (0.3, 0.4), (0.2, 0.1)
    bands = Bands(("a", "b"), np.dtype(dtype).name, ranges, mean, std)
    crops = np.random.default_rng(0).uniform(0, 5000, (4, 6, 6, 2)).astype(dtype)
    low, high = np.array(ranges).T
    expected = (np.clip((crops - low) / (high - low), 0, 1) - mean) / std
    for look in make_views(jax.random.key(0), jnp.asarray(crops), NONE, bands):
        np.testing.assert_allclose(look, expected, atol=1e-5)


@pytest.mark.parametrize("field", ["saturation", "hue", "student_grayscale"])
def test_fields_for_red_green_blue_only(field):
    names = ("B02", "B03", "B04", "B08", "red")
    crops, bands = jnp.zeros((2, 4, 4, 5), jnp.uint8), Bands.plain(names)
    for rgb, message in {
        (): rf"pera\.views\.{field}=0\.1 needs red, green and blue bands, .* B02, .*data\.rgb",
        ("B04", "B03", "B2"): "data.rgb names 'B2', which is not among the bands B02",
        ("B04", "B03"): "data.rgb=B04,B03 must name three distinct bands: red, green and blue",
    }.items():
        with pytest.raises(UserError, match=message):
            make_views(jax.random.key(0), crops, NONE | {"brightness": 0.4, field: 0.1, "rgb": rgb}, bands)
    for settings in ({"brightness": 0.4}, {field: 0.1, "rgb": ("B04", "B03", "B02")}):
        assert make_views(jax.random.key(0), crops, NONE | settings, bands)[0].shape == (2, 4, 4, 5)


@pytest.mark.parametrize(("field", "value"), [("hue", 0.6), ("brightness", -0.1), ("student_change", 1.2)])
def test_fields_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=rf"pera\.views\.{field}={value} must lie"):
        make_views(jax.random.key(0), jnp.zeros((2, 4, 4, 3), jnp.uint8), SETTINGS | {field: value})
