"""`features.load`: equal to the network's tokens, pure, the same from a run and from an export; invalid input."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import labelled_toys
import numpy as np
import pytest

from pera_jax import export
from pera_jax.bands import Bands
from pera_jax.common import digests
from pera_jax.common.errors import UserError
from pera_jax.encoder import load
from pera_jax.encoder import model as features
from pera_jax.formats import arrays
from pera_jax.models import vit
from pera_jax.weights import imports

REFERENCE = pathlib.Path(__file__).parents[1] / "files" / "reference_tiny.npz"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return labelled_toys.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("exported") / "weights"
    export.main(["timm", "--run", str(run), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def model(run) -> features.Model:
    return features.load(run)


def stored(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def tokens_of(run, images: np.ndarray) -> list[np.ndarray]:
    """The output of every block [B, 1 + h w, D] after the final norm, by the checkpoint's own module."""
    weights = load.load_weights(run)
    network = vit.build(weights.meta["model"])
    normalized = (images / 255.0 - 0.4) / 0.1
    apply = jax.jit(lambda params, images: network.apply({"params": params}, images, blocks=network.depth)["blocks"])
    return jax.device_get(apply(weights.backbone, np.float32(normalized)))


@pytest.mark.parametrize("height, width", [(48, 48), (40, 72)])
def test_tokens_are_the_networks(run, model, height, width):
    images = stored(3, height, width)
    tokens, depth = tokens_of(run, images), model.network.depth
    last = model(images, blocks=2)
    few = model(jnp.asarray(images), blocks=(1, 0))
    shape = (3, height // 8, width // 8, model.network.width)
    assert last.patch_map.shape == shape and last.class_token.shape == (3, shape[3])
    for found, blocks in ((last, (depth - 2, depth - 1)), (few, (1, 0))):
        np.testing.assert_allclose(found.class_token, tokens[-1][:, 0], atol=1e-5)
        np.testing.assert_allclose(found.patch_map, tokens[-1][:, 1:].reshape(shape), atol=1e-5)
        for block, class_token, block_map in zip(blocks, found.block_class_tokens, found.block_maps, strict=True):
            np.testing.assert_allclose(class_token, tokens[block][:, 0], atol=1e-5)
            np.testing.assert_allclose(block_map, tokens[block][:, 1:].reshape(shape), atol=1e-5)
    np.testing.assert_array_equal(last.block_maps[-1], last.patch_map)
    alone = model(images[1], blocks=2)
    jax.tree.map(lambda one, all_: np.testing.assert_allclose(one, all_[1], atol=1e-5), alone, last)


@pytest.mark.parametrize("height, width", [(41, 48), (3, 9)])
def test_other_sizes_are_reflected_or_refused(model, height, width):
    images = stored(2, height, width)
    padded = np.pad(images, ((0, 0), (0, -height % 8), (0, -width % 8), (0, 0)), "symmetric")
    found, wanted = model(images, size="pad", blocks=1), model(padded, blocks=1)
    assert found.patch_map.shape[1:3] == (-(-height // 8), -(-width // 8))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), found, wanted)
    with pytest.raises(
        UserError, match=f"the image size {height} x {width} px is not a multiple of the patch size 8 px"
    ):
        model(images)


def test_batches_change_nothing(model):
    images = stored(100, 16, 24)
    whole = model(images)
    for size in (7, 32):
        parts = [model(images[first : first + size]) for first in range(0, 100, size)]
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), joined, whole)


def test_pure_in_the_code_of_others(model):
    """Inside jit, vmap and grad, and under a mesh with axes of one's own."""
    images, direction = stored(8, 16, 16), np.random.default_rng(1).normal(size=model.network.width).astype(np.float32)

    def score(params):
        return (model.apply(params, images).class_token @ direction).mean()

    gradients = jax.jit(jax.grad(score))(model.params)
    gradients = jax.device_get(gradients)
    size = 1e-3 / sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradients))
    moved = [
        jax.jit(score)(jax.tree.map(lambda leaf, by: np.asarray(leaf) + sign * size * by, model.params, gradients))
        for sign in (1, -1)
    ]
    assert (moved[0] - moved[1]) / 2e-3 == pytest.approx(1, rel=0.02)  # the derivative along the gradient is its square
    wanted = model(images)
    each = jax.jit(jax.vmap(lambda image: model.apply(model.params, image)))(images)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), each, wanted)
    mesh = jax.make_mesh((8,), ("mine",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        cut, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["mine"], []))
        found = jax.jit(model.apply)(jax.device_put(model.params, whole), jax.device_put(images, cut))
        assert found.class_token.sharding.device_set == set(jax.devices())
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), found, wanted)


def test_an_exported_folder_gives_the_same(model, exported):
    again = features.load(exported)
    assert again.bands == model.bands and again.network == model.network
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    images = stored(2, 40, 56)
    jax.tree.map(np.testing.assert_array_equal, again(images, blocks=(1,)), model(images, blocks=(1,)))


def test_agrees_with_the_released_program(tmp_path):
    """The features of the reference, through stored values whose normalization gives the inputs that it has."""
    numbers = dict(np.load(REFERENCE))
    heads = json.loads(str(numbers["meta"]))["cfg"]["heads"]
    named = {name[6:]: array for name, array in numbers.items() if name.startswith("final/") and name != "final/center"}
    arrays.write(tmp_path / "released.safetensors", named)
    imports.import_released(tmp_path / "released.safetensors", tmp_path / "run", imports.Options(heads), False)
    for which in features.NETWORKS:
        model = features.load(tmp_path / "run", which=which)
        for size in ("same", "other"):
            images = numbers[f"eval/{size}/image"].transpose(0, 2, 3, 1)
            low, high = float(images.min()), float(images.max())
            ranges, mean, std = ((low, high),) * 3, (-low / (high - low),) * 3, (1 / (high - low),) * 3
            bands = Bands(model.bands.names, "float32", ranges, mean, std)
            found = dataclasses.replace(model, bands=bands)(images)
            cls, patch = (numbers[f"eval/{size}/{which}_{name}"] for name in ("cls", "patch"))
            np.testing.assert_allclose(found.class_token, cls, atol=1e-5 * np.abs(cls).max())
            np.testing.assert_allclose(found.patch_map.reshape(patch.shape), patch, atol=1e-5 * np.abs(patch).max())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("images", "options", "sentence"),
    [
        (stored(2, 16, 16)[..., :2], {}, "expected 3 bands on the last axis of the images .red, green, blue., got 2"),
        (stored(2, 16, 16).astype(np.float32), {}, "expected images of dtype uint8, got float32"),
        (stored(2, 16, 16).astype(np.int64), {}, "expected images of dtype uint8, got int64"),
        (stored(0, 16, 16), {}, r"expected images of shape .*, got \(0, 16, 16, 3\)"),
        ([1, 2], {}, "expected images as a uint8 array .*, got list"),
        (stored(16), {}, r"expected images of shape .*, got \(16, 3\)"),
        (stored(16, 16), {"blocks": (1, 4)}, "block 4 does not exist; the network has blocks 0 to 3"),
        (stored(16, 16), {"blocks": (-1,)}, "block -1 does not exist"),
        (stored(16, 16), {"blocks": 5}, "blocks=5 is out of range; expected a number of last blocks from 0 to 4"),
        (stored(16, 16), {"size": "crop"}, "unknown size='crop'; expected one of refuse, pad"),
    ],
)
def test_bad_images_are_one_sentence(model, images, options, sentence):
    for call in (model, lambda *args, **options: model.apply(model.params, *args, **options)):
        with pytest.raises(UserError, match=sentence):
            call(images, **options)


def change_config(folder: pathlib.Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    entry = content["pera_jax"]
    entry.update(changes)
    entry["digest"] = digests.json_digest({name: value for name, value in entry.items() if name != "digest"})
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (lambda folder: None, {"which": "student"}, "has only the teacher of step 12; leave out step and network"),
        (lambda folder: None, {"step": 4}, "has only the teacher of step 12; leave out step and network"),
        (lambda folder: None, {"which": "both"}, "unknown network 'both'; expected one of teacher, student"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            {},
            "is not a run folder .no checkpoints/. and not an exported folder .no model.safetensors.",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), {}, "is not a safetensors file"),
        (
            lambda folder: (folder / "config.json").unlink(),
            {},
            "config.json was not written by pera-jax export timm",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{}"),
            {},
            "config.json was not written by .* export the weights again",
        ),
        (lambda folder: change_config(folder, format_version=9), {}, "expected 1 or 2, got 9"),
        (lambda folder: change_config(folder, image_size=[48, 64]), {}, "was exported for 48 x 64 px"),
        (lambda folder: [path.unlink() for path in folder.iterdir()] and folder.rmdir(), {}, "does not exist"),
    ],
)
def test_bad_folders_are_one_sentence(exported, tmp_path, change, options, sentence):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    with pytest.raises(UserError, match=sentence) as raised:
        features.load(folder, **options)
    assert "\n" not in str(raised.value) and re.search("copy|network", str(raised.value))


def test_what_runs_lack_is_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint of step 5; choose one of 4, 12"):
        features.load(run, step=5)
    with pytest.raises(UserError, match="nothing does not exist"):
        features.load(tmp_path / "nothing")
