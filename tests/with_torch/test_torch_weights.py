"""Weights in and out against PyTorch and timm, and the numbers of the authors' released program.

Needs requirements-torch.txt: `make test-torch`; skipped where torch and timm are not installed.
"""

import argparse
import io
import json
import pathlib
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run make test-torch")
timm = pytest.importorskip("timm", reason="timm is not installed: run make test-torch")

import toy_data  # noqa: E402
import toy_weights  # noqa: E402

from pera_jax import config as configs  # noqa: E402
from pera_jax import export, train
from pera_jax.common.errors import UserError  # noqa: E402
from pera_jax.encoder import load
from pera_jax.formats import arrays, pickles  # noqa: E402
from pera_jax.models import vit  # noqa: E402

REFERENCE = dict(np.load(pathlib.Path(__file__).parents[1] / "files" / "reference_tiny.npz"))
NAMED = {name[6:]: array for name, array in REFERENCE.items() if name.startswith("final/") and name != "final/center"}
CLOSE = 1e-4


def save(path: pathlib.Path, named=NAMED, prefix: str = "", dtype=torch.float32, legacy: bool = False) -> pathlib.Path:
    """As training programs save: parameters beside an optimizer whose settings are NumPy scalars."""
    model = {prefix + name: torch.from_numpy(array).to(dtype) for name, array in named.items()}
    group = {"lr": np.float64(1e-3), "weight_decay": np.float32(0.04), "step": np.int64(3), "on": np.bool_(True)}
    moments = {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(3.0)}}
    held = {
        "model": model,
        "optimizer": {"state": moments, "param_groups": [group | {"betas": (0.9, 0.999)}]},
        "epoch": 199,
    }
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    return path


def run_of(file: pathlib.Path, folder: pathlib.Path, *extra: str) -> str:
    export.main(["import-released", str(file), "--output", str(folder), "--heads", "3", *extra])
    return str(folder)


def ours(weights: load.Weights, images: np.ndarray) -> dict[str, np.ndarray]:
    return vit.build(weights.meta["model"]).apply({"params": weights.backbone}, images.transpose(0, 2, 3, 1))


# ---------------------------------------------------------------- in


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("legacy", [False, True])
def test_features_agree_with_the_released_program(prefix, dtype, legacy, tmp_path):
    run = run_of(save(tmp_path / "a.params", prefix=prefix, dtype=dtype, legacy=legacy), tmp_path / "run")
    for which in ("teacher", "student"):
        weights = load.load_weights(run, which=which)
        for size in ("same", "other") if dtype == torch.float32 else ():
            tokens = ours(weights, REFERENCE[f"eval/{size}/image"])
            for name, token in (("cls", "class_token"), ("patch", "patch_tokens")):
                np.testing.assert_allclose(tokens[token], REFERENCE[f"eval/{size}/{which}_{name}"], atol=CLOSE)
        token = np.asarray(weights.backbone["class_token"])
        theirs = NAMED[f"{which}.backbone.cls_token"].reshape(-1)
        np.testing.assert_array_equal(token, torch.from_numpy(theirs).to(dtype).float().numpy())


def test_numpy_scalars_of_before_numpy_2_are_read(tmp_path):
    save(tmp_path / "new.params", legacy=True)
    content = (tmp_path / "new.params").read_bytes()
    assert b"cnumpy._core.multiarray\n" in content
    (tmp_path / "old.params").write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    group = pickles.load(tmp_path / "old.params")["optimizer"]["param_groups"][0]
    assert (group["lr"], group["step"], group["on"]) == (1e-3, 3, True)


def test_more_than_arrays_and_numbers_is_refused(tmp_path):
    torch.save({"model": {}, "array": np.zeros(3), "path": pathlib.PurePosixPath("a")}, tmp_path / "a.params")
    with pytest.raises(UserError, match="refers to numpy._core.multiarray._reconstruct, numpy.ndarray, pathlib"):
        pickles.load(tmp_path / "a.params")
    torch.save({"model": {"a": torch.zeros(2), "b": 3, "c": torch.zeros(2, dtype=torch.int32)}}, tmp_path / "b.params")
    with pytest.raises(UserError, match="not floating-point arrays: b, c$"):
        arrays.read(tmp_path / "b.params")
    save(tmp_path / "c.params")
    content = (tmp_path / "c.params").read_bytes()
    for cut in (content[:-1], content[: len(content) // 2], content[:1000]):
        (tmp_path / "c.params").write_bytes(cut)
        with pytest.raises(UserError, match="is not a torch.save file, or is truncated; get another copy$"):
            pickles.load(tmp_path / "c.params")
    with (
        zipfile.ZipFile(io.BytesIO(content)) as stored,
        zipfile.ZipFile(tmp_path / "d.params", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(UserError, match="is a compressed zip, which torch.save never writes"):
        pickles.load(tmp_path / "d.params")


def test_the_options_of_a_command_are_inert_and_other_networks_are_told(tmp_path):
    held = {"student": {"a": torch.ones(2)}, "teacher": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(1)}, "epoch": 3,
            "args": argparse.Namespace(lr=1e-3, arch="vit_small", inner=argparse.Namespace(x=[1])),
            "step": torch.ones(1)}  # fmt: skip
    torch.save(held, tmp_path / "dino.pth")
    found = pickles.load(tmp_path / "dino.pth")["args"]
    assert type(found).__module__ == pickles.__name__ and vars(found).keys() == {"lr", "arch", "inner"}
    assert found.arch == "vit_small" and found.inner.x == [1]
    notes = []
    assert arrays.read(tmp_path / "dino.pth", notes=notes).keys() == {"student.a", "teacher.a"}
    assert notes == ["imported teacher, student of the file; ignored: ema.*, step"]
    torch.save({"model": held["teacher"], "model_ema": held["student"], "epoch": 1}, tmp_path / "mae.pth")
    arrays.read(tmp_path / "mae.pth", notes=notes)
    assert notes[1:] == ["imported model of the file; ignored: model_ema.*"]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch14_dinov2", {"init_values": 0.5}),  # LayerScale
        ("vit_tiny_patch16_224", {"in_chans": 5, "num_classes": 0}),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_vits_of_timm_give_the_same_features_after_import(name, changes, suffix, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": 56, "patch_size": 14, "depth": 3} | changes).eval()
    with torch.no_grad():  # else LayerScale, biases and norms are all alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    named, file = model.state_dict(), tmp_path / f"vit{suffix}"
    if suffix == ".pth":
        torch.save(named, file)
    else:
        arrays.write(file, {key: value.numpy() for key, value in named.items()})
    bands = model.patch_embed.proj.in_channels
    flags = ["--bands", "a,b,c,d,e", "--mean", "0,0,0,0,0", "--std", "1,1,1,1,1"] if bands == 5 else []
    export.main(["import-timm", str(file), "--output", str(tmp_path / "run"), *flags])
    weights = load.load_weights(tmp_path / "run")
    images = torch.randn(2, bands, 56, 56)
    with torch.no_grad():
        theirs = model.forward_features(images).numpy()
    found = ours(weights, images.numpy())
    np.testing.assert_allclose(found["class_token"], theirs[:, 0], atol=CLOSE)
    np.testing.assert_allclose(found["patch_tokens"], theirs[:, 1:], atol=CLOSE)


def test_other_vits_are_refused_with_the_names_that_this_one_lacks(tmp_path):
    small = dict(img_size=28, patch_size=14, depth=2, embed_dim=64, num_heads=1)
    for changes, words in (
        ({"reg_tokens": 4}, "has unexpected arrays: reg_token"),
        ({"qkv_bias": False}, "lacks the arrays blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias"),
        (
            {"global_pool": "avg"},
            "lacks the arrays norm.bias, norm.weight; .* unexpected arrays: fc_norm.bias, fc_norm.weight",
        ),
        ({"no_embed_class": True}, "is not a ViT .*: pos_embed "),
    ):
        file = tmp_path / "vit.pth"
        torch.save(timm.create_model("vit_tiny_patch16_224", **small | changes).state_dict(), file)
        with pytest.raises(UserError, match=words):
            export.main(["import-timm", str(file), "--output", str(tmp_path / "run")])
        assert [path.name for path in tmp_path.iterdir()] == ["vit.pth"]


# ---------------------------------------------------------------- out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    return run_of(save(folder / "pera.params"), folder / "run")


@pytest.mark.parametrize("size, key", [(None, "same"), ("96", "other"), ("96x48", None)])
def test_timm_gives_the_same_features(run, size, key, tmp_path):
    for which in ("teacher", "student"):
        folder = tmp_path / which
        flags = ["--image-size", size] if size else []
        export.main(["timm", "--run", run, "--which", which, "--output", str(folder), *flags])
        config = json.loads((folder / "config.json").read_text())
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        by_path = timm.create_model(
            config["architecture"], checkpoint_path=str(folder / "model.safetensors"), **config["model_args"]
        ).eval()
        assert list(loaded.pretrained_cfg["mean"]) == [0.485, 0.456, 0.406]
        assert loaded.num_classes == 0
        random = np.random.default_rng(0).normal(size=(2, 3, 96, 48)).astype(np.float32)
        images = REFERENCE[f"eval/{key}/image"] if key else random
        expected = ours(load.load_weights(run, which=which), images)
        for model in (loaded, by_path):
            with torch.no_grad():
                tokens = model.forward_features(torch.from_numpy(images)).numpy()
                pooled = model(torch.from_numpy(images)).numpy()
            np.testing.assert_array_equal(pooled, tokens[:, 0])
            np.testing.assert_allclose(tokens[:, 0], expected["class_token"], atol=CLOSE)
            np.testing.assert_allclose(tokens[:, 1:], expected["patch_tokens"], atol=CLOSE)
            if key:
                np.testing.assert_allclose(tokens[:, 0], REFERENCE[f"eval/{key}/{which}_cls"], atol=CLOSE)
                np.testing.assert_allclose(tokens[:, 1:], REFERENCE[f"eval/{key}/{which}_patch"], atol=CLOSE)


def test_the_input_of_the_card_is_that_of_the_probes(run, tmp_path):
    """The card's code block, run as it stands, on stored values."""
    from pera_jax.encoder import extract as features

    export.main(["timm", "--run", run, "--output", str(tmp_path / "out")])
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    stored = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8)
    code = code.replace("FOLDER", str(tmp_path / "out")).replace("images = ...", "")
    names = {"images": torch.from_numpy(stored)}
    with torch.no_grad():
        exec(code, names)
    weights = load.load_weights(run)
    found = features.Extractor(weights.backbone, weights.meta)(stored.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(names["features"].numpy(), found.class_tokens[:, -1], atol=CLOSE)
    np.testing.assert_allclose(names["tokens"][:, 1:].mean(1).numpy(), found.patch_means[:, -1], atol=CLOSE)


def test_the_released_dictionary_out_and_in_again_is_the_same_bits(run, tmp_path):
    export.main(["released", "--run", run, "--output", str(tmp_path / "again.params")])
    held = torch.load(tmp_path / "again.params", weights_only=True)
    assert held.keys() == {"model"} and held["model"].keys() == NAMED.keys()
    for name, tensor in held["model"].items():
        np.testing.assert_array_equal(tensor.numpy(), NAMED[name], err_msg=name, strict=True)
    again = run_of(tmp_path / "again.params", tmp_path / "again")
    for which in ("teacher", "student"):
        one, other = (load.load_weights(folder, which=which).params for folder in (run, again))
        toy_weights.assert_same(one, other)


# ---------------------------------------------------------------- pre-training goes on


@pytest.mark.parametrize("alone", [True, False])
def test_a_training_begins_from_an_import(alone, tmp_path, capsys):
    file = save(tmp_path / "pera.params")
    given = run_of(file, tmp_path / "import", *["--teacher-only"] * alone)
    config = configs.smoke(configs.default())
    config.total, config.init_from, config.pera.center_batches = "2 steps", given, 2
    config.data.path = toy_data.write(tmp_path / "toy")
    config.model.update(dict(width=48, depth=4, heads=3, patch=16))
    config.crops.update(dict(global_size=96, local_size=32))  # another grid than the release's
    config.pera.heads.update(dict(hidden=64, bottleneck=32, prototypes=96))
    config.schedules.learning_rate.update(dict(start=0.0, peak=0.0, end=0.0))
    config.pera.teacher_momentum.update(dict(start=1.0, end=1.0))
    train.train(config, str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert (
        "positions interpolated from 4 x 4 to 6 x 6" in said
        and "the center starts as the teacher's mean output" in said
    )
    assert ("with new heads" in said) == alone
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(np.isfinite(line["loss"]) for line in lines)
    # Neither network moved: at the release's other size the teacher is still the release's.
    tokens = ours(load.load_weights(tmp_path / "run"), REFERENCE["eval/other/image"])
    np.testing.assert_allclose(tokens["class_token"], REFERENCE["eval/other/teacher_cls"], atol=CLOSE)
    with pytest.raises(UserError, match="holds weights imported from pera.params, not a run that can be resumed"):
        config.init_from, config.resume_from = "", given
        train.train(config, str(tmp_path / "other"))


def test_mean_std_and_bands_come_back_with_a_released_dictionary(tmp_path, capsys):
    save(tmp_path / "pera.params")
    flags = ["--mean", "0.2,0.3,0.4", "--std", "0.1,0.2,0.3", "--bands", "nir,red,green"]
    export.main(
        ["import-released", str(tmp_path / "pera.params"), "--output", str(tmp_path / "one"), "--heads", "3", *flags]
    )
    assert "ImageNet" not in capsys.readouterr().out
    export.main(["released", "--run", str(tmp_path / "one"), "--output", str(tmp_path / "again.params")])
    export.main(["import-released", str(tmp_path / "again.params"), "--output", str(tmp_path / "two")])
    assert "heads, bands, mean, std, dtype, ranges from again.params.json" in capsys.readouterr().out
    one, two = (load.load_weights(tmp_path / name).meta for name in ("one", "two"))
    assert all(one[name] == two[name] for name in ("model", "bands", "dtype", "ranges", "mean", "std"))
    beside = tmp_path / "again.params.json"
    beside.write_text(beside.read_text().replace("0.2", "0.3", 1))
    with pytest.raises(UserError, match="again.params.json is damaged"):
        export.main(["import-released", str(tmp_path / "again.params"), "--output", str(tmp_path / "three")])


def test_a_flipped_bit_in_a_file_of_torch_save_is_noticed_or_changes_nothing(tmp_path):
    save(tmp_path / "whole.params")
    whole, rng, noticed = arrays.read(tmp_path / "whole.params"), np.random.default_rng(0), 0
    for _ in range(40):
        content = bytearray((tmp_path / "whole.params").read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.params").write_bytes(content)
        try:
            found = arrays.read(tmp_path / "a.params")
        except UserError:
            noticed += 1
            continue
        assert found.keys() == whole.keys() and all(np.array_equal(found[name], whole[name]) for name in whole)
    assert noticed > 20


def test_the_teacher_of_checkpoints_of_dino_is_taken(tmp_path, capsys):
    torch.manual_seed(0)
    models = [timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval() for _ in "ts"]
    teacher, student = (model.state_dict() for model in models)
    under = lambda prefix, named: {prefix + name: each for name, each in named.items()}  # noqa: E731
    head = {"head.mlp.0.weight": torch.zeros(3), "head.mlp.1.num_batches_tracked": torch.tensor(3)}
    nested = {"teacher": under("backbone.", teacher) | head, "student": under("module.backbone.", student)}
    flat = {"model": under("teacher.backbone.", teacher) | under("student.backbone.", student)}
    for name, held in {"dino": nested | {"epoch": 3, "args": argparse.Namespace(lr=1)}, "dinov2": flat}.items():
        torch.save(held, tmp_path / f"{name}.pth")
        export.main(["import-timm", str(tmp_path / f"{name}.pth"), "--output", str(tmp_path / name)])
        assert "imported teacher.backbone.* of the file" in capsys.readouterr().out
        images = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            theirs = models[0].forward_features(images).numpy()
        found = ours(load.load_weights(tmp_path / name), images.numpy())
        np.testing.assert_allclose(found["class_token"], theirs[:, 0], atol=CLOSE)
