"""Weights in and out without PyTorch: exact round trips, damaged and hostile files, what `init_from` makes of them."""

import functools
import io
import os
import pathlib
import pickle
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_data
import toy_weights

from pera_jax import checkpoint, export, run_meta, sharding
from pera_jax import step as steps
from pera_jax.bands import Bands
from pera_jax.data import mixture, pipeline
from pera_jax.errors import UserError
from pera_jax.models import vit
from pera_jax.objectives import pera
from pera_jax.weights import arrays, imports, init, timm

NAMES = ("red", "green", "blue", "nir", "swir")


def options(description: dict) -> imports.Options:
    n = description["bands"]
    return imports.Options(description["heads"], NAMES[:n], tuple(np.linspace(0.3, 0.5, n)), (0.25,) * n)


def assert_same(one, other) -> None:
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), one, other)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("seed", range(6))
def test_any_backbone_comes_back_bit_for_bit_from_either_format(seed, tmp_path):
    rng = np.random.default_rng(seed)
    description = toy_weights.shape(rng)
    born = toy_weights.backbone(description, rng)
    side, file = description["image_size"], tmp_path / "model.safetensors"
    arrays.write(file, timm.of_backbone(born, description, side, side))

    imports.import_timm(file, tmp_path / "run", options(description))
    weights = checkpoint.load_weights(tmp_path / "run")
    assert_same(jax.tree.map(np.asarray, weights.backbone), born)
    assert weights.meta["model"] == description | {"mlp_ratio": weights.meta["model"]["mlp_ratio"]}
    assert weights.meta["bands"] == list(NAMES[: description["bands"]])

    timm.export(weights, "teacher", None, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == file.read_bytes()


def test_a_released_dictionary_comes_back_bit_for_bit_with_what_a_run_has(tmp_path):
    named = toy_weights.dictionary(np.random.default_rng(0))
    file = tmp_path / "pera.safetensors"
    arrays.write(file, {f"module.{name}": array for name, array in named.items()})
    imports.import_released(file, tmp_path / "run", imports.Options(heads=2), teacher_only=False)
    student, teacher = (checkpoint.load_weights(tmp_path / "run", which=which) for which in ("student", "teacher"))
    tree = jax.tree.map(np.asarray, {"params": student.params, "teacher": teacher.params})
    again = toy_weights.tables.to_named(tree, toy_weights.released.table(3, 1), heads=2, patch=4)
    assert again.keys() == named.keys()
    assert_same(again, named)
    assert student.meta["config"]["heads"] == {"hidden": 12, "bottleneck": 8, "prototypes": 32}
    with pytest.raises(UserError, match="holds weights imported from pera.safetensors and no run to go on with"):
        run_meta.check_same_run(student.meta, student.meta, "runs/a", allow_changed_data=True)


def test_the_file_depends_neither_on_the_split_nor_on_scanning(tmp_path):
    description = toy_weights.shape(np.random.default_rng(3)) | {"depth": 5, "split": 2}
    side = description["image_size"]
    contents = set()
    for scan in (True, False):
        born = toy_weights.backbone(description, np.random.default_rng(7), scan)
        blocks = jax.tree.map(lambda a, b: np.concatenate([a, b]), born["lower"], born["upper"])
        for split in range(1, 5):
            lower, upper = (jax.tree.map(lambda x, s=s: x[s], blocks) for s in (slice(split), slice(split, None)))
            tree = born | {"lower": lower, "upper": upper}
            arrays.write(tmp_path / "a.safetensors", timm.of_backbone(tree, description | {"split": split}, side, side))
            contents.add((tmp_path / "a.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("rows, columns", [(3, 3), (5, 2), (1, 7)])
def test_another_size_is_baked_in_as_the_network_interpolates(rows, columns):
    """Our own networks have square grids only; what is exported may have any."""
    rng = np.random.default_rng(1)
    description = toy_weights.shape(rng)
    born, patch = toy_weights.backbone(description, rng), description["patch"]
    named = timm.of_backbone(born, description, rows * patch, columns * patch)
    wanted = vit.build(description).apply({"params": born}, rows, columns, method="positions")
    np.testing.assert_array_equal(named["pos_embed"][0], wanted)
    for height, width in ((rows * patch + 1, columns * patch), (rows * patch, 0)):
        with pytest.raises(UserError, match=f"{height}x{width} is not a multiple of the patch of {patch} px"):
            timm.of_backbone(born, description, height, width)


def test_layer_scale_is_multiplied_in_and_heads_are_left_out(tmp_path):
    rng = np.random.default_rng(2)
    description = toy_weights.shape(rng) | {"bands": 3}
    side = description["image_size"]
    named = timm.of_backbone(toy_weights.backbone(description, rng), description, side, side)
    width, extras = description["width"], ["decoder_embed.weight", "head.bias", "head.weight", "mask_token"]
    scaled = named | {name: np.ones(3, np.float32) for name in extras}
    gammas = {f"blocks.{i}.ls{j}.gamma": rng.normal(size=width).astype(np.float32) for i in (0, 1) for j in (1, 2)}
    arrays.write(tmp_path / "a.safetensors", scaled | gammas)
    wanted = imports.Options(description["heads"])
    assert imports.import_timm(tmp_path / "a.safetensors", tmp_path / "run", wanted)[1] == extras
    found = timm.of_backbone(checkpoint.load_weights(tmp_path / "run").backbone, description, side, side)
    x = rng.normal(size=width).astype(np.float64)
    for i in (0, 1):
        for j, layer in ((1, "attn.proj"), (2, "mlp.fc2")):
            weight, bias = (named[f"blocks.{i}.{layer}.{part}"].astype(np.float64) for part in ("weight", "bias"))
            x = rng.normal(size=weight.shape[1])
            ours = found[f"blocks.{i}.{layer}.weight"] @ x + found[f"blocks.{i}.{layer}.bias"]
            np.testing.assert_allclose(ours, gammas[f"blocks.{i}.ls{j}.gamma"] * (weight @ x + bias), rtol=1e-5, atol=1e-5)
    arrays.write(tmp_path / "b.safetensors", named | {"blocks.0.ls1.gamma": np.ones(1, np.float32), "blocks.9.ls2.gamma": x})
    with pytest.raises(UserError, match="does not fit the layer before it: blocks.0.ls1.gamma, blocks.9.ls2.gamma$"):
        imports.import_timm(tmp_path / "b.safetensors", tmp_path / "other", wanted)


# ---------------------------------------------------------------- damaged and hostile files


class Touch:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Run:
    def __reduce__(self):
        return eval, ("1",)


def refused(file: pathlib.Path, tmp_path: pathlib.Path, *extra: str) -> str:
    """The sentence with which the command refuses a file; nothing is written."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        export.main(["import-released", str(file), "--output", str(tmp_path / "run"), "--heads", "2", *extra])
    assert {path.name for path in tmp_path.iterdir()} == before
    assert "\n" not in str(error.value) and file.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_with_code_is_refused_and_not_run(protocol, tmp_path):
    marker = tmp_path / "marker"
    content = pickle.dumps({"model": {"a": Touch(marker)}, "b": Run()}, protocol)
    (tmp_path / "plain.params").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "zip.params", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    (tmp_path / "legacy.params").write_bytes(b"".join(pickle.dumps(x, 2) for x in (1, 1001, {})) + content)
    for name in ("plain", "zip", "legacy"):
        said = refused(tmp_path / f"{name}.params", tmp_path)
        assert "posix.mkdir" in said and "eval" in said and "nothing of it was loaded" in said
    assert not marker.exists()


def test_without_pytorch_an_honest_dictionary_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.params").write_bytes(pickle.dumps({"model": {}}, 2))
    assert "needs PyTorch" in refused(tmp_path / "a.params", tmp_path)


def test_cut_files_and_other_files_are_refused(tmp_path):
    content = pickle.dumps({"model": list(range(1000))}, 2)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", content)
    file = tmp_path / "cut.params"
    for cut in (content[:-100], archive.getvalue()[:-100], b"", b"no weights at all", bytes(1000)):
        file.write_bytes(cut)
        assert "no file of torch.save, or is cut off" in refused(file, tmp_path)
    arrays.write(tmp_path / "whole.safetensors", toy_weights.dictionary(np.random.default_rng(0)))
    whole = (tmp_path / "whole.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    for cut in (whole[:-1], whole[: len(whole) // 2], whole[:100], whole[:5], b"", b"\xff" * 8 + whole[8:]):
        file.write_bytes(cut)
        assert "no safetensors file, or is cut off" in refused(file, tmp_path)
    assert "cannot read" in refused(tmp_path / "nowhere.params", tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_every_name_that_is_wrong_is_told(seed, tmp_path):
    rng = np.random.default_rng(seed)
    named = toy_weights.dictionary(rng)
    # Not those that tell the sizes: with them wrong all others are.
    plain = sorted(name for name in named if name.endswith(("norm1.weight", "proj.bias", "qkv.weight", "mlp.2.weight")))
    first, second, third = np.array_split(rng.permutation(plain), 3)
    lacking = {name: array for name, array in named.items() if name not in first}
    lacking |= {f"{name}.extra": named[name] for name in second}
    for name in third:
        lacking[name] = np.full_like(named[name], rng.choice([np.nan, np.inf]))
    arrays.write(tmp_path / "a.safetensors", lacking)
    said = refused(tmp_path / "a.safetensors", tmp_path)
    missing, extra, wrong = said.split("; ")
    for text, names in ((missing, first), (extra, [f"{name}.extra" for name in second]), (wrong, third)):
        listed = text.split(": ")[-1].split(" lacks ")[-1].split(" in ")[-1]
        assert sorted(listed.split(", ")) == sorted(names)

    misshapen = named | {name: np.concatenate([named[name]] * 2) for name in first}
    arrays.write(tmp_path / "a.safetensors", misshapen)
    said = refused(tmp_path / "a.safetensors", tmp_path)
    assert all(f"{name} is {list(misshapen[name].shape)} instead of {list(named[name].shape)}" in said for name in first)
    assert said.count(" instead of ") == len(first)


def test_sizes_that_make_no_network_are_refused(tmp_path):
    named, file = toy_weights.dictionary(np.random.default_rng(0)), tmp_path / "a.safetensors"
    name = "teacher.backbone.pos_embed"
    arrays.write(file, named | {name: named[name][:, :-1], "teacher.backbone.cls_token": np.zeros(16, np.float32)})
    assert "of no ViT" in refused(file, tmp_path) and "teacher.backbone.cls_token [16]" in refused(file, tmp_path)
    arrays.write(file, named | {name: named[name][:, :-1]})
    assert f"{name} [1, 16, 16]" in refused(file, tmp_path)
    arrays.write(file, named | {"s_mask_token": np.zeros((1, 1, 16), np.int32), "steps": np.zeros(1, np.int64)})
    assert "no array of floats: s_mask_token, steps" in refused(file, tmp_path)
    arrays.write(file, named)
    assert "no multiple of 3 heads" in refused(file, tmp_path, "--heads", "3")
    assert "is for 3 band(s), and a, b are 2" in refused(file, tmp_path, "--bands", "a,b")
    assert "needs --mean and --std with one number for each of a, b, c" in refused(file, tmp_path, "--bands", "a,b,c")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(UserError, match="run is already there; choose another --output"):
        imports.import_released(file, tmp_path / "run", imports.Options(heads=2), teacher_only=False)


# ---------------------------------------------------------------- init_from


def config_like_the_dictionary(**changes):
    sizes = dict(
        model__width=16, model__depth=3, model__heads=2, model__patch=4, crops__global_size=16, crops__local_size=8,
        heads__hidden=12, heads__bottleneck=8, heads__prototypes=32,
    )  # fmt: skip
    return tiny.config(**sizes | changes)


def new_state(config, bands: Bands, mesh=None):
    objective, optimiser = pera.from_config(config, bands), steps.make_optimiser(config.optimiser)
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    return objective, steps.born_sharded(objective, optimiser, mesh, seed=5)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Runs of the same dictionary: {teacher_only: folder}."""
    folder = tmp_path_factory.mktemp("imported")
    arrays.write(folder / "pera.safetensors", toy_weights.dictionary(np.random.default_rng(4)))
    for alone in (True, False):
        imports.import_released(folder / "pera.safetensors", folder / str(alone), imports.Options(heads=2), alone)
    return {alone: str(folder / str(alone)) for alone in (True, False)}


def test_a_teacher_alone_becomes_both_backbones_with_new_heads(imported, capsys):
    objective, born = new_state(config_like_the_dictionary(), Bands.plain(), sharding.make_mesh(fsdp=8))
    state = init.with_weights(born, imported[True], objective)
    backbone = checkpoint.load_weights(imported[True]).backbone
    for found, new in ((state.params, born.params), (state.teacher, born.teacher)):
        assert_same(found, new | {"backbone": backbone})
        assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, found, new))
    assert_same(state.opt_state, born.opt_state)
    assert "the teacher's backbone for both networks, with new heads" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds the teacher's backbone alone, and no student"):
        checkpoint.load_weights(imported[True], which="student")


def test_other_grids_and_bands_are_fitted(imported, capsys):
    old, _ = new_state(config_like_the_dictionary(), Bands.plain())
    bands = Bands.plain(("a", "b", "c", "d", "e"))
    config = config_like_the_dictionary(
        crops__global_size=24, views__saturation=0.0, views__hue=0.0, views__student_grey=0.0
    )
    objective, born = new_state(config, bands)
    state = init.with_weights(born, imported[False], objective)
    for which, found in (("student", state.params), ("teacher", state.teacher)):
        given = checkpoint.load_weights(imported[False], which=which).params
        grey = np.random.default_rng(0).normal(size=(2, 24, 24, 1)).astype(np.float32)
        outputs = [
            network.vit.apply({"params": jax.device_get(tree["backbone"])}, np.tile(grey, (1, 1, 1, len(network.bands))))
            for network, tree in ((old, given), (objective, found))
        ]  # the same image in all bands, at the new size, gives what it gave before
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *outputs)
        assert_same(found["prototype_head"], given["prototype_head"])
    given = checkpoint.load_weights(imported[False], which="student").params["pixel_head"]
    born = born.params["pixel_head"]
    assert_same(state.params["pixel_head"], given | {name: born[name] for name in ("direction", "gain")})
    said = capsys.readouterr().err
    assert "from 4 x 4 to 6 x 6 patches" in said and "mean over 3 bands for each of 5, with a new last layer" in said


def test_bands_in_another_order_are_matched_by_name(imported):
    names = ("blue", "red", "green")
    old, _ = new_state(config_like_the_dictionary(), Bands.plain())
    objective, born = new_state(config_like_the_dictionary(views__rgb=NAMES[:3]), Bands.plain(names))
    state = init.with_weights(born, imported[False], objective)
    given = checkpoint.load_weights(imported[False], which="student").params
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    wanted = old.vit.apply({"params": given["backbone"]}, image)["class_token"]
    found = objective.vit.apply({"params": jax.device_get(state.params["backbone"])}, image[..., [2, 0, 1]])["class_token"]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    rows = np.asarray(given["pixel_head"]["direction"]).reshape(16, 3, -1)[:, [2, 0, 1]].reshape(48, -1)
    np.testing.assert_array_equal(state.params["pixel_head"]["direction"], rows)


def test_what_does_not_fit_is_named_whole(imported):
    objective, born = new_state(config_like_the_dictionary(heads__prototypes=64, model__width=32), Bands.plain())
    with pytest.raises(UserError, match="prototype_head/direction is .32, 8. there and .64, 8. here") as error:
        init.with_weights(born, imported[False], objective)
    assert "backbone/norm/scale is (16,) there and (32,) here" in str(error.value)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_centre_begins_as_the_mean_of_the_teachers_outputs(accumulate, imported, tmp_path, capsys):
    config = config_like_the_dictionary(init_center_batches=2, accumulate=accumulate, loss__koleo_group=1)
    config.data.path = toy_data.write(tmp_path / "toy")
    data, mesh = mixture.open_mixture(config.data), sharding.make_mesh(data=4, fsdp=2)
    objective, born = new_state(config, data.bands, mesh)
    state = init.with_weights(born, imported[False], objective)
    found = init.with_center(state, config, objective, data, mesh)

    outputs = []
    stream = pipeline.make_pipeline(data, config.crops, batch_size=config.batch_size, seed=config.seed)
    teacher, params = jax.device_get((state.teacher, state.params))
    for number in range(2):
        batch = {kind: value for kind, value in next(stream).items() if kind in pera.KINDS}
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), steps.CENTER), number)
        views = objective.make_views(objective.examples(key, batch))
        _, out, _ = jax.jit(lambda views: objective.outputs(params, teacher, views, None))(views)
        outputs.append(np.einsum("bvd,kd->bvk", out.units, out.weights))
    stream.close()
    np.testing.assert_allclose(found.objective["center"], np.concatenate(outputs).mean((0, 1)), atol=1e-5)
    assert float(jnp.linalg.norm(found.objective["center"])) > 1e-2
    assert found.objective["center"].sharding == born.objective["center"].sharding
    assert "teacher's mean output over 2 batches" in capsys.readouterr().err
    config.init_center_batches = 0
    assert init.with_center(state, config, objective, data, mesh) is state
