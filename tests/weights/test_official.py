"""State dictionaries of the methods' official programs: in, the same features, and out again bit for bit."""

import jax
import numpy as np
import pytest
import toy_weights

from pera_jax import config as configs
from pera_jax import export, features, objectives
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.formats import arrays, tables

UNKNOWN = {"mae": ["mae.decoder.heads=2"], "dinov2": ["dinov2.targets=centering"]}  # which no file says
NAMES = [name for name in objectives.METHODS if objectives.method(name).official]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def objective(name):
    """Sizes unlike the defaults, and unlike each other."""
    config = configs.smoke(configs.default(name))
    config.precision = "float32"
    config.model.update(dict(width=64, depth=3, heads=4, patch=8))
    config.crops.update(dict(global_size=32, local_size=16))
    config = configs.load(config, UNKNOWN.get(name, ()))
    return objectives.from_config(config, Bands.plain())


@pytest.fixture(scope="module")
def named(objective):
    """A state dictionary of random numbers."""
    rng = np.random.default_rng(0)
    params = toy_weights.filled(jax.eval_shape(objective.init, jax.random.key(0)), rng)
    teacher = toy_weights.filled({key: params[key] for key in objective.teacher_keys}, rng)
    state = toy_weights.filled(jax.eval_shape(objective.init_state), rng)
    entries = objective.official.entries(objective)
    found = tables.to_named({"params": params, "teacher": teacher, "objective": state}, entries, 4, 8)
    found |= {key: np.asarray(value, np.float32) for key, value in objective.official.constants(objective).items()}
    return {key: np.asarray(value) for key, value in found.items()}


def written(folder, named):
    arrays.write(folder / "weights.safetensors", named)
    return str(folder / "weights.safetensors")


def test_it_comes_in_with_all_networks_and_goes_out_the_same(name, objective, named, tmp_path, capsys):
    unused = {"base_encoder.head.1.running_mean": np.ones(3, np.float32)} if name == "mocov3" else {}
    wrapped = {f"module.{key}": value for key, value in (named | unused).items()}
    file = written(tmp_path, wrapped)
    flags = ["--method", name, "--heads", "4", *[f"--set={each}" for each in UNKNOWN.get(name, ())]]
    export.main(["import-official", file, *flags, "--output", str(tmp_path / "run")])
    assert ("ignored: base_encoder.head.1.running_mean" in capsys.readouterr().out) == bool(unused)
    export.main(["official", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "again.safetensors")])
    again = arrays.read(tmp_path / "again.safetensors")
    toy_weights.assert_same(named, again)

    prefix = objective.official.backbone.replace("student", "teacher")  # the evaluated network
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    plain = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    kept = tables.backbone("", ("backbone",), 3, 1)
    alone = {entry.name for entry in kept} | {key for key in plain if ".ls" in key}
    (tmp_path / "alone").mkdir()
    backbone = written(tmp_path / "alone", {key: value for key, value in plain.items() if key in alone})
    export.main(["import-timm", backbone, "--heads", "4", "--output", str(tmp_path / "timm")])
    ours, theirs = (features.load(tmp_path / folder)(image) for folder in ("run", "timm"))
    np.testing.assert_allclose(ours.class_token, theirs.class_token, atol=1e-4)
    np.testing.assert_allclose(ours.patch_map, theirs.patch_map, atol=1e-4)


def test_a_file_of_another_kind_is_refused_with_what_is_wrong(name, objective, named, tmp_path):
    def refused(changed, words):
        file = written(tmp_path, changed)
        with pytest.raises(UserError, match=words):
            flags = ["--method", name, "--heads", "4", "--output", str(tmp_path / "run")]
            export.main(["import-official", file, *flags])
        assert not (tmp_path / "run").exists()

    last = f"{objective.official.backbone}norm.bias"
    refused({key: value for key, value in named.items() if key != last}, f"lacks the arrays .*{last}")
    refused(named | {"other": np.ones(2, np.float32)}, "has unexpected arrays: other")
    refused({f"x.{key}": value for key, value in named.items()}, "has no array .*cls_token, so it is not a state")
    for constant in objective.official.constants(objective):
        refused(named | {constant: named[constant] + 0.1}, f"has fixed positions that differ .*: .*{constant}")


def test_methods_without_an_official_format_are_told_what_to_use(tmp_path):
    with pytest.raises(UserError, match="pera has no official format here; expected one of dino"):
        export.main(["import-official", "x.safetensors", "--method", "pera", "--output", str(tmp_path / "run")])
