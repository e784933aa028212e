"""Digests: independent of the mesh, different after any change; detection of damaged files."""

import json
import pathlib
import random
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import toy_weights
from jax.sharding import NamedSharding, PartitionSpec

from pera_jax import export
from pera_jax.common import digests
from pera_jax.common.errors import UserError
from pera_jax.encoder import model as features
from pera_jax.encoder.cache import Cache
from pera_jax.formats import arrays
from pera_jax.parallel import sharding
from pera_jax.weights import timm

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.float64, np.int32, np.int64, np.uint8, np.bool_)


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {np.dtype(kind).name: (100 * rng.normal(size=(8, 6))).astype(kind) for kind in DTYPES}


def test_sums_are_the_same_on_the_host_on_one_device_and_on_any_mesh():
    held = {name: each for name, each in tree(0).items() if each.dtype.itemsize < 8}
    wanted = digests.leaf_digests(held)
    assert wanted["float32"].startswith("float32[8,6] ") and len(set(wanted.values())) == len(held)
    assert digests.leaf_digests(jax.device_put(held, jax.devices()[3])) == wanted
    for mesh, spec in (
        ({"data": 4, "fsdp": 2}, ("fsdp",)),
        ({"fsdp": 8}, ("fsdp",)),
        ({"fsdp": 2, "data": 4}, ("data", "fsdp")),
    ):
        where = NamedSharding(sharding.make_mesh(**mesh), PartitionSpec(*spec))
        assert digests.leaf_digests(jax.device_put(held, where)) == wanted
    with jax.enable_x64(True):
        assert digests.leaf_digests(jax.device_put(tree(0))) == digests.leaf_digests(tree(0))


def test_every_change_of_a_value_changes_both_sums():
    rng = np.random.default_rng(1)
    one = rng.normal(size=(64,)).astype(np.float32)
    changed = []
    for bit in range(32):
        changed.append(one.copy())
        changed[-1].view(np.uint32)[rng.integers(64)] ^= np.uint32(1 << bit)
    swapped, negated, shifted = one.copy(), one.copy(), np.roll(one, 1)
    swapped[[3, 40]], negated[[3, 40]] = one[[40, 3]], -one[[3, 40]]
    changed += [swapped, negated, shifted, np.zeros_like(one), one.reshape(8, 8)]
    found = [digests.leaf_digests([each])["0"].split(" ")[1] for each in [one, *changed]]
    found.remove(found[-1])  # the same values in another shape, which the words before the sums tell
    assert len({each[:8] for each in found}) == len({each[8:] for each in found}) == len(found)
    assert digests.not_finite({"a": {"b": np.float32([1, np.inf])}, "c": one, "d": np.int32([1])}) == ["a/b"]


def test_json_is_the_same_with_its_keys_in_any_order_and_its_tuples_as_lists():
    assert digests.json_digest({"a": (1, 2.5), "b": None}) == digests.json_digest({"b": None, "a": [1, 2.5]})
    assert digests.json_digest({"a": 1}) != digests.json_digest({"a": 1.0}) != digests.json_digest({"a": True})


# ---------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("exported")
    rng = np.random.default_rng(0)
    shape = toy_weights.shape(rng) | {"bands": 3}
    named = timm.to_timm(toy_weights.backbone(shape, rng), shape, *(shape["image_size"],) * 2)
    arrays.write(folder / "vit.safetensors", named)
    export.main(
        [
            "import-timm",
            str(folder / "vit.safetensors"),
            "--output",
            str(folder / "run"),
            "--heads",
            str(shape["heads"]),
        ]
    )
    export.main(["timm", "--run", str(folder / "run"), "--output", str(folder / "out")])
    return folder / "out"


def test_a_flipped_bit_in_an_export_is_noticed_or_changes_nothing(exported, tmp_path):
    rng, noticed = random.Random(0), 0
    whole = features.load_weights(exported)
    wanted = digests.leaf_digests(whole.params)
    for number in range(24):
        copy = pathlib.Path(shutil.copytree(exported, tmp_path / str(number)))
        file = copy / ("config.json" if number % 2 else "model.safetensors")
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        try:
            found = features.load_weights(copy)
        except UserError:
            noticed += 1
            continue
        assert digests.leaf_digests(found.params) == wanted and found.meta == whole.meta
    assert noticed >= 12  # all of the weights


def test_weights_on_their_own_know_their_digest_and_haste_passes_it(exported, tmp_path):
    file = tmp_path / "a.safetensors"
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="a.safetensors is damaged: its arrays do not match their digest"):
        arrays.read(file)
    assert arrays.read(file, verify=False).keys() == arrays.read(exported / "model.safetensors").keys()


def test_an_export_comes_back_with_its_own_mean_and_ranges_and_is_told(exported, tmp_path, capsys):
    copy = pathlib.Path(shutil.copytree(exported, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    entry = config["pera_jax"]
    del entry["digest"]
    entry |= {"dtype": "uint16", "ranges": [[0.0, 3000.0]] * 3, "mean": [0.2] * 3, "std": [0.1] * 3}
    config["pretrained_cfg"] |= {"mean": [0.2] * 3, "std": [0.1] * 3}
    config["pera_jax"] = entry | {"digest": digests.json_digest(entry)}
    (copy / "config.json").write_text(json.dumps(config))
    export.main(["import-timm", str(copy / "model.safetensors"), "--output", str(tmp_path / "run")])
    assert "mean, std, dtype, ranges from config.json" in capsys.readouterr().out.replace("heads, bands, ", "")
    bands = features.load(tmp_path / "run").bands
    assert (bands.dtype, bands.ranges[0], bands.mean[0]) == ("uint16", (0.0, 3000.0), 0.2)


def test_positions_of_a_rectangle_are_refused_by_what_config_json_says(exported, tmp_path):
    config = {"pretrained_cfg": {"input_size": [3, 32, 128]}, "model_args": {"num_heads": 1}}
    rng = np.random.default_rng(0)
    shape = {
        "width": 8,
        "depth": 2,
        "heads": 1,
        "patch": 16,
        "image_size": 64,
        "bands": 3,
        "split": 1,
        "mlp_ratio": 1.0,
    }
    named = timm.to_timm(toy_weights.backbone(shape, rng), shape, 64, 64)  # 4 x 4 positions, or 2 x 8
    arrays.write(tmp_path / "vit.safetensors", named)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="has a position embedding for 2 x 8 patches .images of 32 x 128 px in config.json."
    ):
        export.main(["import-timm", str(tmp_path / "vit.safetensors"), "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prefix", ["teacher.backbone.", "backbone.", "module."])
def test_the_backbone_of_a_checkpoint_with_heads_is_taken_and_told(prefix, tmp_path, capsys):
    rng = np.random.default_rng(0)
    shape = {"width": 8, "depth": 2, "heads": 1, "patch": 4, "image_size": 8, "bands": 3, "split": 1, "mlp_ratio": 1.0}
    named = timm.to_timm(toy_weights.backbone(shape, rng), shape, 8, 8)
    chunks = {name.replace("blocks.", "blocks.0."): each for name, each in named.items()}  # as DINOv2 saves them
    rest = {} if prefix == "module." else {"teacher.dino_head.mlp.0.weight": np.zeros(3, np.float32)}
    student = (
        {f"student.backbone.{name}": -each for name, each in named.items()} if prefix.startswith("teacher") else {}
    )
    arrays.write(tmp_path / "a.safetensors", {prefix + name: each for name, each in chunks.items()} | rest | student)
    export.main(["import-timm", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "run"), "--heads", "1"])
    said = capsys.readouterr().out
    assert (f"imported {prefix}* of the file" in said) == (prefix != "module.") and "ImageNet's" in said
    assert bool(rest) == ("teacher.dino_head.*" in said) and bool(student) == ("student.backbone.*, " in said)
    kernel = features.load_weights(tmp_path / "run").backbone["lower"]["mlp"]["in"]["kernel"]
    np.testing.assert_array_equal(np.asarray(kernel)[0], named["blocks.0.mlp.fc1.weight"].T)


# ---------------------------------------------------------------- caches


def test_a_damaged_cache_is_made_anew(tmp_path):
    rng, cache, made = random.Random(0), Cache(tmp_path), {"a": np.arange(300.0), "b": np.ones((3, 4), np.float32)}
    cache.arrays({"of": "x"}, lambda: made)
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        found = Cache(tmp_path).arrays({"of": "x"}, lambda: made)
        assert found.keys() == made.keys()
        for name in made:
            np.testing.assert_array_equal(found[name], made[name], strict=True)
