"""Views of independent crops: which draws a crop gets, their probabilities, order of rows, independence of sharding.

The operations themselves are in tests/augment/test_photometric.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_photographs import drawings

from pera_jax.augment import photometric
from pera_jax.bands import RGB, Bands, rgb_indices
from pera_jax.common.errors import UserError
from pera_jax.objectives import independent_views as views
from pera_jax.objectives.base import CropSpec
from pera_jax.parallel import sharding

# global 1 has no blur (its kernel has one weight), global 2 is always solarized
SETTINGS = {
    "global_1": views.fields(blur=0.0, solarize=0.0) | {"jitter": 0.0, "grayscale": 0.0},
    "global_2": views.fields(blur=0.3, solarize=1.0) | {"sigma": (0.5, 1.5)},
    "local": views.fields(blur=1.0, solarize=0.4) | {"grayscale": 1.0, "jitter": 0.6},
}
NAMES = {"global": ("global_1", "global_2"), "local": ("local",)}
CROPS = {"global": CropSpec(2, 32, (0.4, 1.0)), "local": CropSpec(3, 16, (0.05, 0.4))}
BANDS = Bands.plain(RGB, mean=0.4, std=0.2)
COLORS = rgb_indices((), RGB)


def test_each_view_has_the_probabilities_of_its_spec():
    number = 4000
    draws = views.draw(jax.random.key(0), number, CROPS, views.specs_from(SETTINGS, NAMES))
    draws = jax.device_get(draws)
    for kind, at, name in [
        ("global", 0, "global_1"), ("global", 1, "global_2"), ("local", 0, "local"), ("local", 2, "local"),
    ]:  # fmt: skip
        drawn, fields = jax.tree.map(lambda leaf: leaf[:, at], draws[kind]), SETTINGS[name]  # noqa: B023
        found = {
            "jitter": (drawn.jitter.factors != (1, 1, 1, 0)).any(-1), "grayscale": drawn.grayscale,
            "blur": drawn.weights[:, 0] < 1, "solarize": drawn.solarize,
        }  # fmt: skip
        for operation, happened in found.items():
            assert happened.shape == (number,)
            p = fields[operation]
            assert abs(happened.mean() - p) <= 5 * np.sqrt(p * (1 - p) / number), (name, operation)
    pairs = draws["local"].solarize[:, 0], draws["local"].solarize[:, 1]
    assert abs(np.mean(pairs[0] & pairs[1]) - 0.16) < 0.03  # crops of an image are independent


def test_a_row_is_its_crop_with_its_own_draws_on_any_number_of_devices():
    number = 4
    pixels = drawings()
    rng = np.random.default_rng(0)
    crops = {
        kind: np.stack([
            [_cut(pixels[rng.integers(len(pixels))], rng, spec.size) for _ in range(spec.number)]
            for _ in range(number)
        ])
        for kind, spec in CROPS.items()
    }  # fmt: skip
    specs = views.specs_from(SETTINGS, NAMES)
    draws = views.draw(jax.random.key(1), number, CROPS, specs)

    def made(crops, draws):
        return views.make(crops, draws, BANDS, COLORS, jnp.float32)

    result = jax.device_get(jax.jit(made)(crops, draws))
    for kind, spec in CROPS.items():
        for image in range(number):
            for v in range(spec.number):
                one = jax.tree.map(lambda leaf: leaf[image, v][None], draws[kind])  # noqa: B023
                alone = photometric.apply(crops[kind][image, v][None], one, BANDS, COLORS)[0]
                np.testing.assert_allclose(result[kind][image * spec.number + v], alone, atol=2e-6)
    plain = BANDS.normalized(crops["global"][:, 0])  # nothing changes global 1
    np.testing.assert_allclose(result["global"][::2], plain, atol=1e-6)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        np.testing.assert_allclose(jax.jit(made)(crops, draws)["local"], result["local"], atol=1e-6)
    shown = views.pictures(result, CROPS, BANDS, (0, 1, 2))
    assert list(shown) == ["global 1", "global 2", "local 1", "local 2"]
    np.testing.assert_allclose(shown["global 1"], crops["global"][:, 0], atol=1)
    assert shown["local 2"].shape == (number, 16, 16, 3) and shown["local 2"].dtype == np.uint8


def _cut(image, rng, size):
    top, left = rng.integers(image.shape[0] - size + 1), rng.integers(image.shape[1] - size + 1)
    return image[top : top + size, left : left + size]


def test_wrong_fields_are_refused():
    wrong = SETTINGS | {"local": SETTINGS["local"] | {"blur": 1.5}}
    with pytest.raises(UserError, match=r"dino.views.local.blur=1.5 must lie in \[0, 1\]"):
        views.check(wrong, "dino.views", (), RGB)
    views.check(SETTINGS, "dino.views", (), RGB)
    with pytest.raises(ValueError, match="3 global crops, but 2 specs"):
        views.draw(
            jax.random.key(0), 2, {"global": CropSpec(3, 32, (0.4, 1.0))}, views.specs_from(SETTINGS, NAMES)
        )
