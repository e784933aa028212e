"""Import and export without PyTorch: exact round trips, other sizes, LayerScale, the exported folder."""

import json

import jax
import numpy as np
import pytest
import toy_weights

from pera_jax import export
from pera_jax.common.errors import UserError
from pera_jax.encoder import load
from pera_jax.formats import arrays, tables
from pera_jax.models import vit
from pera_jax.training import resume
from pera_jax.weights import imports, released, timm

NAMES = ("red", "green", "blue", "nir", "swir")


def options(description: dict) -> imports.Options:
    n = description["bands"]
    return imports.Options(description["heads"], NAMES[:n], tuple(np.linspace(0.3, 0.5, n)), (0.25,) * n)


@pytest.mark.parametrize("seed", range(4))
def test_any_backbone_comes_back_bit_for_bit_from_either_format(seed, tmp_path):
    rng = np.random.default_rng(seed)
    description = toy_weights.shape(rng)
    born = toy_weights.backbone(description, rng)
    side, file = description["image_size"], tmp_path / "model.safetensors"
    arrays.write(file, timm.to_timm(born, description, side, side))

    imports.import_timm(file, tmp_path / "run", options(description))
    weights = load.load_weights(tmp_path / "run")
    toy_weights.assert_same(jax.tree.map(np.asarray, weights.backbone), born)
    assert weights.meta["model"] == description | {"mlp_ratio": weights.meta["model"]["mlp_ratio"]}
    assert weights.meta["bands"] == list(NAMES[: description["bands"]])

    timm.export(weights, "teacher", None, tmp_path / "exported")
    again = tmp_path / "exported" / "model.safetensors"
    assert again.read_bytes() == file.read_bytes()
    # config.json beside it tells heads, mean and std
    meta, _ = imports.import_timm(again, tmp_path / "again", imports.Options(bands=NAMES[: description["bands"]]))
    for name in ("model", "bands", "mean", "std"):
        assert meta[name] == weights.meta[name]


def test_a_released_dictionary_comes_back_bit_for_bit_with_what_a_run_has(tmp_path):
    named = toy_weights.dictionary(np.random.default_rng(0))
    file = tmp_path / "pera.safetensors"
    arrays.write(file, {f"module.{name}": array for name, array in named.items()})
    imports.import_released(file, tmp_path / "run", imports.Options(heads=2), teacher_only=False)
    student, teacher = (load.load_weights(tmp_path / "run", which=which) for which in ("student", "teacher"))
    tree = jax.tree.map(np.asarray, {"params": student.params, "teacher": teacher.params})
    again = tables.to_named(tree, released.table(3, 1), heads=2, patch=4)
    assert again.keys() == named.keys()
    toy_weights.assert_same(again, named)
    assert student.meta["config"]["pera"]["heads"] == {"hidden": 12, "bottleneck": 8, "prototypes": 32}
    with pytest.raises(UserError, match="holds weights imported from pera.safetensors, not a run that can be resumed"):
        resume.check_same_run(student.meta, student.meta, "runs/a", allow_changed_data=True)


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
            arrays.write(tmp_path / "a.safetensors", timm.to_timm(tree, description | {"split": split}, side, side))
            contents.add((tmp_path / "a.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("rows, columns", [(3, 3), (5, 2), (1, 7)])
def test_another_size_is_baked_in_as_the_network_interpolates(rows, columns):
    """Our own networks have square grids only; what is exported may have any."""
    rng = np.random.default_rng(1)
    description = toy_weights.shape(rng)
    born, patch = toy_weights.backbone(description, rng), description["patch"]
    named = timm.to_timm(born, description, rows * patch, columns * patch)
    wanted = vit.build(description).apply({"params": born}, rows, columns, method="positions")
    np.testing.assert_array_equal(named["pos_embed"][0], wanted)
    for height, width in ((rows * patch + 1, columns * patch), (rows * patch, 0)):
        with pytest.raises(UserError, match=f"{height}x{width} is not a multiple of the patch size {patch} px"):
            timm.to_timm(born, description, height, width)


def test_layer_scale_is_multiplied_in_and_heads_are_left_out(tmp_path):
    rng = np.random.default_rng(2)
    description = toy_weights.shape(rng) | {"bands": 3}
    side = description["image_size"]
    named = timm.to_timm(toy_weights.backbone(description, rng), description, side, side)
    width, extras = description["width"], ["decoder_embed.weight", "head.bias", "head.weight", "mask_token"]
    scaled = named | {name: np.ones(3, np.float32) for name in extras}
    blocks = range(description["depth"])
    gammas = {f"blocks.{i}.ls{j}.gamma": rng.normal(size=width).astype(np.float32) for i in blocks for j in (1, 2)}
    arrays.write(tmp_path / "a.safetensors", scaled | gammas)
    wanted = imports.Options(description["heads"])
    meta, left_out = imports.import_timm(tmp_path / "a.safetensors", tmp_path / "run", wanted)
    assert left_out == extras and "LayerScale of" in "".join(meta["imported"]["told"])
    found = timm.to_timm(load.load_weights(tmp_path / "run").backbone, description, side, side)
    x = rng.normal(size=width).astype(np.float64)
    for i in blocks:
        for j, layer in ((1, "attn.proj"), (2, "mlp.fc2")):
            weight, bias = (named[f"blocks.{i}.{layer}.{part}"].astype(np.float64) for part in ("weight", "bias"))
            x = rng.normal(size=weight.shape[1])
            ours = found[f"blocks.{i}.{layer}.weight"] @ x + found[f"blocks.{i}.{layer}.bias"]
            np.testing.assert_allclose(
                ours, gammas[f"blocks.{i}.ls{j}.gamma"] * (weight @ x + bias), rtol=1e-5, atol=1e-5
            )
    odd = {"blocks.0.ls1.gamma": np.ones(1, np.float32), "blocks.9.ls2.gamma": x, "blocks.1.ls2.gamma": x[:1] * np.inf}
    lacking = sorted(gammas.keys() - {"blocks.0.ls1.gamma", "blocks.1.ls2.gamma"} | {"blocks.9.ls1.gamma"})
    arrays.write(tmp_path / "b.safetensors", named | odd)
    with pytest.raises(UserError) as error:
        imports.import_timm(tmp_path / "b.safetensors", tmp_path / "other", wanted)
    assert str(error.value).endswith(
        f"lacks {', '.join(lacking)}; has NaN or infinite values in blocks.1.ls2.gamma; has factors that do not fit "
        "the preceding layer: blocks.0.ls1.gamma, blocks.1.ls2.gamma, blocks.9.ls2.gamma"
    )


def test_sizes_that_config_json_tells_are_those_of_the_file(tmp_path):
    rng = np.random.default_rng(4)
    description = toy_weights.shape(rng) | {"bands": 3, "depth": 3, "split": 1}
    side = description["image_size"]
    named = timm.to_timm(toy_weights.backbone(description, rng), description, side, side)
    without_the_last = {
        name: each.astype(np.float64) for name, each in named.items() if not name.startswith("blocks.2.")
    }
    arrays.write(tmp_path / "a.safetensors", without_the_last)
    told = dict(depth=3, embed_dim=description["width"], patch_size=[description["patch"]] * 2, in_chans=3)
    wanted = imports.Options(description["heads"])
    for change, words in (
        ({}, "expected depth 3, got 2.;"),
        ({"depth": 2, "patch_size": 9, "in_chans": 1}, "expected bands 1, got 3; expected patch"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {}, "model_args": told | change}))
        with pytest.raises(UserError, match=words):
            imports.import_timm(tmp_path / "a.safetensors", tmp_path / "run", wanted)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {}, "model_args": told | {"depth": 2}}))
    meta, _ = imports.import_timm(tmp_path / "a.safetensors", tmp_path / "run", wanted)
    assert f"{len(without_the_last)} float64 arrays are rounded to float32" in meta["imported"]["told"]


def test_the_command_writes_what_timm_and_a_reader_need(tmp_path):
    arrays.write(tmp_path / "a.safetensors", toy_weights.dictionary(np.random.default_rng(0)))
    export.main(["import-released", str(tmp_path / "a.safetensors"), "--heads", "2", "--output", str(tmp_path / "run")])
    out = tmp_path / "out"
    export.main(
        ["timm", "--run", str(tmp_path / "run"), "--which", "student", "--image-size", "8x24", "--output", str(out)]
    )
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((out / "config.json").read_text())
    assert config["num_classes"] == 0 and config["pretrained_cfg"]["input_size"] == [3, 8, 24]
    assert config["model_args"] | {"img_size": [8, 24], "num_heads": 2, "depth": 3} == config["model_args"]
    named = arrays.read(out / "model.safetensors")
    assert named["pos_embed"].shape == (1, 13, 16)
    wanted = arrays.read(tmp_path / "a.safetensors")["student.backbone.blocks.2.mlp.fc1.weight"]
    np.testing.assert_array_equal(named["blocks.2.mlp.fc1.weight"], wanted)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError,
        match=r"config.json is not a timm config \(missing field pretrained_cfg\); move a.safetensors to a folder "
              r"without it",
    ):
        timm.read_config(tmp_path / "a.safetensors")
    card = (out / "README.md").read_text()
    assert (
        "| 1 | green | 0.0 | 255.0 | 0.456 | 0.224 |" in card
        and "interpolated from 16 x 16 px, the size in training" in card
    )
    assert "student at step 0" in card and "imported from the file a.safetensors" in card
