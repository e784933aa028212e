"""Checkpoints as the official programs of DINO, DINOv2, MAE and MoCo v3 save them, around ViTs of timm.

Needs requirements-torch.txt: `make test-torch`; skipped where torch and timm are not installed.
"""

import argparse

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run make test-torch")
timm = pytest.importorskip("timm", reason="timm is not installed: run make test-torch")

import toy_weights  # noqa: E402

from pera_jax import config as configs  # noqa: E402
from pera_jax import export, objectives
from pera_jax.bands import Bands  # noqa: E402
from pera_jax.encoder import load
from pera_jax.formats import arrays, tables  # noqa: E402
from pera_jax.models import vit  # noqa: E402

SIZES = dict(width=96, depth=4, heads=3, patch=8)


def under(prefix: str, named: dict) -> dict:
    return {f"{prefix}{name}": each for name, each in named.items()}


def only(prefix: str, named: dict) -> dict:
    return {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}


def as_saved(method: str, named: dict) -> dict:
    """The dictionary that the official program of `method` passes to torch.save."""
    beside = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 7, "args": argparse.Namespace(lr=1.0)}
    if method == "dino":
        networks = {"student": under("module.", only("student.", named)), "teacher": only("teacher.", named)}
        return networks | beside | {"dino_loss": only("dino_loss.", named)}
    if method == "mocov3":
        averages = {"base_encoder.head.1.running_mean": torch.zeros(3),
                    "base_encoder.head.1.num_batches_tracked": torch.tensor(5)}  # fmt: skip
        return {"arch": "vit_base", "state_dict": under("module.", named | averages)} | beside
    return {"model": named} | beside


@pytest.mark.parametrize("method", [name for name in objectives.METHODS if objectives.method(name).official])
def test_features_are_those_of_timm_and_the_arrays_come_back(method, tmp_path):
    torch.manual_seed(0)
    config = configs.smoke(configs.default(method))
    config.precision = "float32"
    config.model.update(SIZES)
    config.crops.update(dict(global_size=32, local_size=16))
    objective, rng = objectives.from_config(config, Bands.plain()), np.random.default_rng(0)
    params = toy_weights.filled(jax.eval_shape(objective.init, jax.random.key(0)), rng)
    teacher = toy_weights.filled({key: params[key] for key in objective.teacher_keys}, rng)
    tree = {"params": params, "teacher": teacher, "objective": toy_weights.filled(
        jax.eval_shape(objective.init_state), rng)}  # fmt: skip
    named = tables.to_named(tree, objective.official.entries(objective), SIZES["heads"], SIZES["patch"])
    constants = {name: np.asarray(each, np.float32) for name, each in objective.official.constants(objective).items()}
    named = {name: torch.tensor(np.asarray(each)) for name, each in (named | constants).items()}
    models = {}
    for which in ("student", *(["teacher"] if objective.teacher_keys else [])):
        scaled = {"init_values": 0.5} if vit.description(objective.encoder).get("layer_scale") else {}
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=0,
            **scaled,
        ).eval()  # fmt: skip
        prefix = objective.official.backbone
        if which == "teacher":
            prefix = {"student.backbone.": "teacher.backbone.", "base_encoder.": "momentum_encoder."}[prefix]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
                if f"{prefix}{name}" in constants:
                    parameter.copy_(named[f"{prefix}{name}"])
                named[f"{prefix}{name}"] = parameter.detach().clone()
        models[which] = model

    torch.save(as_saved(method, named), tmp_path / "official.pth")
    flags = ["--method", method, "--heads", "3", "--output", str(tmp_path / "run")]
    export.main(["import-official", str(tmp_path / "official.pth"), *flags])
    images = torch.randn(2, 3, 32, 32)
    for which, model in models.items():
        weights = load.load_weights(tmp_path / "run", which=which)
        network = vit.build(weights.meta["model"])
        found = network.apply({"params": weights.backbone}, images.numpy().transpose(0, 2, 3, 1))
        with torch.no_grad():
            theirs = model.forward_features(images).numpy()
        np.testing.assert_allclose(found["class_token"], theirs[:, 0], atol=1e-4)
        np.testing.assert_allclose(found["patch_tokens"], theirs[:, 1:], atol=1e-4)

    export.main(["official", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "again.safetensors")])
    again = arrays.read(tmp_path / "again.safetensors")
    assert again.keys() == named.keys()
    for name, array in again.items():
        np.testing.assert_array_equal(array, named[name].numpy(), err_msg=name)
