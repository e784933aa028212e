"""Photometric operations compared with Pillow's and torchvision's, their order, probabilities, and bands."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from PIL import Image, ImageFilter, ImageOps
from toy_photographs import photographs, scenes

from pera_jax.augment import color, photometric
from pera_jax.augment.photometric import PhotometricSpec
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.cost import flops
from pera_jax.parallel import sharding

FIELDS = dict(
    jitter=0.8, grayscale=0.2, blur=0.5, solarize=0.2, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
    sigma=(0.1, 2.0),
)  # fmt: skip
SPEC = PhotometricSpec(**FIELDS)
RGB = (0, 1, 2)
PLAIN = Bands.plain(mean=0.0, std=1.0)
FLOAT = dataclasses.replace(PLAIN, dtype="float32", ranges=((0.0, 1.0),) * 3)  # what comes out can go in again
PATHS = {
    name: jax.jit(functools.partial(path, wide=jnp.float32, dtype=jnp.float32), static_argnames=("bands", "rgb"))
    for name, path in {"by crop": photometric.apply_by_crop, "together": photometric.apply_together}.items()
}


def none(number, kernel="boxes"):
    """Draws of `number` crops that change nothing, which can be replaced; R is 2 or 4."""
    reach = {"boxes": 2, "gaussian": 4}[kernel]
    jitter = color.Jitter(jnp.tile(color.UNCHANGED, (number, 1)), jnp.tile(jnp.arange(4), (number, 1)))
    no = jnp.zeros(number, bool)
    return photometric.Photometric(jitter, no, jnp.tile(jnp.eye(1, reach + 1), (number, 1)), no, kernel)


def blur(sigma, kernel="boxes"):
    spec = dataclasses.replace(SPEC, kernel=kernel)
    return {"weights": photometric.blur_weights(jnp.asarray(sigma, jnp.float32), spec)}


def grays(path, crops, bands=PLAIN, rgb=RGB, kernel="boxes", **draws):
    """Values in [0, 255] of crops [N, H, W, C] with these draws."""
    drawn = dataclasses.replace(none(len(crops), kernel), **draws)
    return 255 * np.asarray(PATHS[path](jnp.asarray(crops), drawn, bands=bands, rgb=rgb))


def torchvision_blur(crop, sigma):
    """GaussianBlur(9) by its definition: the product of two sampled Gaussians, as one sum over 81 shifts."""
    at = np.linspace(-4, 4, 9)
    weights = np.exp(-0.5 * (at / sigma) ** 2)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    height, width, _ = crop.shape
    padded = np.pad(crop.astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    return sum(weights[i, j] * padded[i : i + height, j : j + width] for i in range(9) for j in range(9))


@pytest.mark.parametrize("images", [photographs, scenes])
@pytest.mark.parametrize("path", PATHS)
def test_blur_is_pillows_or_torchvisions(path, images):
    crops = images()[:12, :90]  # higher than wide or not
    sigmas = np.array([0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.4, 1.45, 1.6, 1.8, 2.0])
    ours = grays(path, crops, **blur(sigmas))
    filters = [ImageFilter.GaussianBlur(float(sigma)) for sigma in sigmas]
    theirs = [Image.fromarray(crop).filter(f) for crop, f in zip(crops, filters, strict=True)]
    theirs = np.stack([np.asarray(image, np.float64) for image in theirs])
    difference = np.abs(ours - theirs)
    # Pillow rounds six times. The last alone makes up to 0.5 and 0.25 on average; the earlier ones are smoothed.
    assert difference.max() <= 3 and difference.mean(axis=(1, 2, 3)).max() <= 0.75
    assert (difference[sigmas >= 1.25].mean(axis=(1, 2, 3)) <= 0.4).all()
    blurred = np.abs(crops - theirs).mean(axis=(1, 2, 3))
    assert (blurred[sigmas >= 0.75] > 2).all()

    ours = grays(path, crops, kernel="gaussian", **blur(sigmas, "gaussian"))
    expected = np.stack([torchvision_blur(crop, s) for crop, s in zip(crops, sigmas, strict=True)])
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert np.abs(expected - theirs).max() > 6  # the kernels differ


def test_the_boxes_have_the_variance_of_the_gaussian():
    for highest in (0.3, 1.4, 2.0, 2.6, 5.0):
        sigma = np.linspace(0.05, highest, 200).astype(np.float32)
        weights = np.asarray(_weights_up_to(sigma, highest), np.float64)  # [200, R + 1]
        assert (weights >= 0).all()
        np.testing.assert_allclose(2 * weights.sum(axis=1) - weights[:, 0], 1, atol=1e-6)
        variance = 2 * weights @ np.arange(weights.shape[1]) ** 2
        np.testing.assert_allclose(3 * variance, sigma.astype(np.float64) ** 2, rtol=2e-5, atol=1e-6)


def _weights_up_to(sigma, highest):
    return photometric.blur_weights(jnp.asarray(sigma), dataclasses.replace(SPEC, sigma=(0.05, highest)))


@pytest.mark.parametrize("path", PATHS)
def test_solarize_and_grayscale_are_pillows(path):
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    crops = np.concatenate([every, every[:, ::-1], every.swapaxes(1, 2)], axis=3)  # [1, 16, 16, 3]
    yes = jnp.ones(1, bool)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(crops[0]), 128))
    solarized = grays(path, crops, solarize=yes)[0]
    np.testing.assert_allclose(solarized, expected, atol=1e-4)
    between = np.random.default_rng(0).uniform(0, 1, (1, 16, 16, 3)).astype(np.float32)
    rounded = np.round(255 * between[0]).astype(np.uint8)
    expected = np.asarray(ImageOps.solarize(Image.fromarray(rounded), 128))
    assert np.abs(grays(path, between, FLOAT, solarize=yes)[0] - expected).max() <= 0.5 + 1e-4
    gray = grays(path, crops, grayscale=yes)[0]
    assert np.abs(gray - np.asarray(Image.fromarray(crops[0]).convert("L"))[..., None]).max() <= 0.51
    assert gray.max() <= 255


@pytest.mark.parametrize("path", PATHS)
def test_jitter_grayscale_blur_solarize_in_this_order(path):
    crops = scenes()[:6, :64, :64] / np.float32(255)
    factors = np.array([[1.4, 1.3, 0.8, 0.1], [0.7, 1.4, 1.2, -0.1]] * 3, np.float32)
    orders = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] * 2)
    operations = {
        "jitter": {"jitter": color.Jitter(jnp.asarray(factors), jnp.asarray(orders, jnp.int32))},
        "grayscale": {"grayscale": jnp.ones(6, bool)},
        "blur": blur(np.linspace(1, 2, 6)),
        "solarize": {"solarize": jnp.ones(6, bool)},
    }

    def one_by_one(names):
        state = crops
        for name in names:
            state = grays(path, state, FLOAT, **operations[name]) / 255
        return state

    at_once = {key: value for operation in operations.values() for key, value in operation.items()}
    together = grays(path, crops, FLOAT, **at_once) / 255
    names = list(operations)
    np.testing.assert_allclose(together, one_by_one(names), atol=1e-5)
    for place in range(3):  # grayscale and blur would commute, but for rounding
        swapped = names[:place] + [names[place + 1], names[place]] + names[place + 2 :]
        if swapped[1:3] != ["blur", "grayscale"]:
            assert np.abs(together - one_by_one(swapped)).max() > 0.02, swapped
    jittered = color.apply(jnp.asarray(crops), operations["jitter"]["jitter"], FLOAT, RGB)
    np.testing.assert_allclose(one_by_one(["jitter"]), jittered, atol=2e-6)


def sigma_of(weights):
    """The sigma of the kernel "boxes", 0 where a crop is not blurred."""
    weights = np.asarray(weights, np.float64)
    return np.sqrt(6 * weights @ np.arange(weights.shape[1]) ** 2)


def test_what_is_drawn():
    number = 40_000
    drawn = jax.tree.map(np.asarray, jax.jit(photometric.draw, static_argnums=(1, 2))(jax.random.key(1), number, SPEC))

    def share(happened, expected, of=number):
        assert abs(happened.sum() / of - expected) < 4.5 * (expected * (1 - expected) / of) ** 0.5

    happened = {
        "jitter": (drawn.jitter.factors != color.UNCHANGED).any(axis=1),
        "grayscale": drawn.grayscale,
        "blur": drawn.weights[:, 0] < 1,
        "solarize": drawn.solarize,
    }
    for name, rows in happened.items():
        share(rows, FIELDS[name])
        share(rows[1:] & rows[:-1], FIELDS[name] ** 2)  # neighbors are independent
        for other, its_rows in happened.items():
            if other != name:
                share(rows & its_rows, FIELDS[name] * FIELDS[other])
    sigma = sigma_of(drawn.weights)[happened["blur"]]
    assert 0.0999 < sigma.min() and sigma.max() < 2.0001
    deciles = np.histogram(sigma, bins=10, range=(0.0999, 2.0001))[0] / len(sigma)
    np.testing.assert_allclose(deciles, 0.1, atol=4.5 * (0.09 / len(sigma)) ** 0.5)
    jittered = happened["jitter"] & happened["blur"]
    amounts = np.column_stack(
        [drawn.jitter.factors[jittered], drawn.jitter.order[jittered, 0], sigma_of(drawn.weights)[jittered]]
    )
    drawn_amounts = (amounts[:, :4] - color.UNCHANGED) / (0.4, 0.4, 0.2, 0.1)
    assert np.abs(drawn_amounts).max() <= 1 + 1e-6 and (np.abs(drawn_amounts).max(axis=0) > 0.99).all()
    correlated = np.corrcoef(amounts.T) - np.eye(6)
    assert np.abs(correlated).max() < 4.5 / jittered.sum() ** 0.5
    neighbors = np.corrcoef(amounts[1:].T, amounts[:-1].T)[:6, 6:]
    assert np.abs(neighbors).max() < 4.5 / jittered.sum() ** 0.5
    orders = np.unique(drawn.jitter.order[jittered], axis=0, return_counts=True)[1]
    np.testing.assert_allclose(orders / jittered.sum(), 1 / 24, atol=4.5 * (1 / 24 / jittered.sum()) ** 0.5)


def test_sharded_crops_and_parts_of_a_batch_get_the_same_views():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    rows, whole = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, jax.sharding.PartitionSpec())
    crops = np.random.default_rng(0).integers(0, 256, (32, 12, 12, 3), np.uint8)
    key = jax.random.key(2)
    view = functools.partial(photometric.apply, bands=PLAIN, rgb=RGB)

    def make(key, crops):
        drawn = photometric.draw(key, crops.shape[0], SPEC)
        return drawn, sharding.per_shard(view, crops, drawn)

    one = jax.jit(make)(key, crops)
    with jax.set_mesh(mesh):
        eight = jax.jit(make, out_shardings=rows)(jax.device_put(key, whole), jax.device_put(crops, rows))
    assert len(eight[1].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, eight[0], one[0])
    np.testing.assert_allclose(eight[1], one[1], atol=5e-6, rtol=0)
    part = jax.jit(view)(crops[8:16], jax.tree.map(lambda x: x[8:16], one[0]))
    np.testing.assert_allclose(part, one[1][8:16], atol=5e-6, rtol=0)
    assert np.abs(np.asarray(one[1]) - crops / 255).max(axis=(1, 2, 3)).min() < 1e-6  # some stay
    assert np.abs(np.asarray(one[1]) - crops / 255).max() > 0.3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_nothing_changes_where_nothing_happens(dtype):
    ranges = ((0.0, 255.0),) * 4 if dtype == np.uint8 else ((100.0, 3000.0), (0.0, 500.0)) * 2
    bands = Bands(("a", "b", "c", "d"), np.dtype(dtype).name, ranges, (0.3, 0.4, 0.5, 0.2), (0.2, 0.1, 0.3, 0.2))
    crops = np.random.default_rng(0).uniform(0, 5000, (4, 8, 6, 4)).astype(dtype)
    zero = PhotometricSpec(**FIELDS | dict.fromkeys(("jitter", "grayscale", "blur", "solarize"), 0.0))
    drawn = photometric.draw(jax.random.key(0), 4, zero)
    assert drawn.weights.shape == (4, 1)
    expected = jax.jit(bands.normalized)(jnp.asarray(crops))
    np.testing.assert_array_equal(jax.jit(lambda c, d: photometric.apply(c, d, bands, None))(crops, drawn), expected)
    if dtype == np.uint8:
        for path in PATHS.values():
            np.testing.assert_array_equal(path(jnp.asarray(crops), none(4), bands=bands, rgb=None), expected)
    half = jax.jit(lambda c, d: photometric.apply(c, d, bands, None, jnp.bfloat16))(crops, drawn)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_blur_and_solarize_change_all_bands_and_grayscale_three(path):
    crops = scenes()[:2, :32, :32]
    crops = np.concatenate([crops, crops[..., ::-1]], axis=3)[..., :5]  # red, green, blue, blue, green
    bands = Bands.plain([f"b{i}" for i in range(5)], mean=0.0, std=1.0)
    yes = jnp.ones(2, bool)
    got = grays(path, crops, bands, (3, 1, 0), grayscale=yes)
    np.testing.assert_allclose(got[..., [2, 4]], crops[..., [2, 4]], atol=1e-4)
    luma = crops[..., [3, 1, 0]] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(got[..., [3, 1, 0]], np.repeat(luma[..., None], 3, axis=3), atol=1e-3)
    five = grays(path, crops, bands, None, solarize=yes, **blur([0.8, 1.7]))
    three = grays(path, crops[..., :3], solarize=yes, **blur([0.8, 1.7]))
    np.testing.assert_allclose(five, three[..., [0, 1, 2, 2, 1]], atol=1e-4)


def test_only_cpu_takes_the_crops_one_by_one_and_the_cost_is_small():
    shape, side = (2, 96, 96, 3), 96
    draws = photometric.draw(jax.random.key(0), 2, SPEC)
    program = jax.jit(lambda c, d: photometric.apply(c, d, PLAIN, RGB))
    traced = program.trace(jnp.zeros(shape, jnp.uint8), draws)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    loops = {platform: text.count("stablehlo.while") for platform, text in texts.items()}
    assert loops == {"cpu": 2, "cuda": 1, "tpu": 1}  # over crops and each crop's operations; over the places only
    assert flops.matrix_products(traced.jaxpr.jaxpr) == 0
    counted = PATHS["together"].lower(jnp.zeros(shape, jnp.uint8), draws, bands=PLAIN, rgb=RGB).cost_analysis()
    assert counted["flops"] / (2 * side * side * 3) < 150  # per value


def test_spec_from_a_config():
    settings = ConfigDict(FIELDS | {"solarize": 0})
    assert photometric.spec_from(settings) == dataclasses.replace(SPEC, solarize=0.0)
    assert photometric.spec_from(FIELDS, "gaussian") == dataclasses.replace(SPEC, kernel="gaussian")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blur": 1.2}, r"dino\.views\.local\.blur=1\.2 must lie in \[0, 1\]"),
        ({"brightness": -0.1}, r"dino\.views\.local\.brightness=-0\.1 must lie in \[0, 1\]"),
        ({"hue": 0.6}, r"dino\.views\.local\.hue=0\.6 must lie in \[0, 0\.5\]"),
        ({"sigma": (0.0, 2.0)}, r"dino\.views\.local\.sigma=0,2 must be two values in \(0, 5\] px"),
        ({"sigma": (2.0, 0.1)}, r"dino\.views\.local\.sigma=2,0\.1 must be two values in \(0, 5\] px"),
        ({"sigma": (0.1, 9.0)}, r"dino\.views\.local\.sigma=0\.1,9 must be two values in \(0, 5\] px"),
    ],
)
def test_fields_out_of_range_are_named(changed, message):
    photometric.check(SPEC, "dino.views.local", (), PLAIN.names)
    with pytest.raises(UserError, match=message):
        photometric.check(dataclasses.replace(SPEC, **changed), "dino.views.local", (), PLAIN.names)


@pytest.mark.parametrize("field", ["saturation", "hue", "grayscale"])
def test_fields_for_red_green_blue_only(field):
    names = ("B02", "B03", "B04", "B08")
    plain = dataclasses.replace(SPEC, saturation=0.0, hue=0.0, grayscale=0.0)
    photometric.check(plain, "mocov3.views", (), names)
    colored = dataclasses.replace(plain, **{field: 0.1})
    photometric.check(colored, "mocov3.views", ("B04", "B03", "B02"), names)
    with pytest.raises(UserError, match=rf"mocov3\.views\.{field}=0\.1 needs red, green and blue bands, .*data\.rgb"):
        photometric.check(colored, "mocov3.views", (), names)
