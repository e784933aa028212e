"""The contract of objectives, for all registered methods and a toy method defined in the tests."""

import dataclasses
import importlib
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import labelled_toys
import numpy as np
import pytest
import toy_mae
import toy_states
from absl import flags
from conftest import on_one_device
from ml_collections import ConfigDict
from ml_collections import config_flags as config_flags_of
from run_files import assert_same_bits, everything, metrics_of

from pera_jax import config as configs
from pera_jax import export, features, objectives, plan, probe, report, train
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.config import flags as config_flags
from pera_jax.cost import flops as flop_counts
from pera_jax.encoder.load import Weights
from pera_jax.objectives import base, batches
from pera_jax.parallel import sharding
from pera_jax.training import alarms, schedules
from pera_jax.training import optimizer as optimizers
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, meta_fields, run_meta
from pera_jax.weights import card

NAMES = (*objectives.METHODS, "toy_mae")


def small(name: str, **changes):
    """The published config, so small that its step compiles in seconds; `changes` are written a__b=value."""
    published = name in objectives.METHODS
    config = configs.load(f"{name}_vitb16:smoke") if published else configs.smoke(configs.default(name))
    config.precision, config.batch_size = "float32", 16
    config.crops.update(dict(global_size=32, local_number=0))  # test_step has crops of two sizes
    config.model.update(dict(width=16, depth=2, heads=2, patch=8, remat="none"))
    config.update_from_flattened_dict({field.replace("__", "."): value for field, value in changes.items()})
    return config


def objective_of(config) -> base.Objective:
    bands = dataclasses.replace(Bands.plain(), mean=(0.4, 0.45, 0.5), std=(0.2, 0.22, 0.25))
    return objectives.from_config(config, bands)


def batch_of(objective, images: int):
    return batches.random(objective, images, np.random.default_rng(0))


def scalars_of(config, dtype=np.float32):
    run = schedules.scalars(
        config, objectives.method(config.objective).schedules(), steps_per_epoch=1000, total_steps=10**9
    )
    return {name: np.asarray(value, dtype) for name, value in (run.at(10**8) | {"learning_rate": 1e-2}).items()}


def two_steps(config, mesh, dtype):
    """State and metrics after two steps in float64, on the host."""
    config.update(dict(precision=dtype, parameter_precision=dtype))
    objective = objective_of(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    where = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract_state(objective, optimizer, mesh))
    step = steps.jit_step(steps.make_step(objective, optimizer, 0, config.optimizer, config.accumulate), where, mesh)
    state = toy_states.random_state(objective, optimizer, mesh)
    with jax.set_mesh(mesh):
        batch, scalars = batch_of(objective, config.batch_size), scalars_of(config, dtype)
        compiled = step.lower(state, batch, scalars).compile()
        batch = jax.device_put(batch, jax.sharding.NamedSharding(mesh, sharding.BATCH))
        for _ in range(2):
            state, metrics = compiled(state, batch, scalars)
    return jax.device_get((state, metrics))


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


# On eight devices, PerA has tests of its own: tests/training/test_step.py.
@pytest.fixture(scope="module", params=[name for name in NAMES if name != "pera"])
def other(request):
    return request.param


@pytest.fixture(scope="module")
def in_float64(other):
    with jax.enable_x64(True):
        return two_steps(small(other), sharding.make_mesh(devices=jax.devices()[:1]), "float64")


def assert_close(one, other, bound=1e-9):
    def same(a, b):
        scale = np.abs(np.float64(a)).max() if np.size(a) else 0.0
        np.testing.assert_allclose(b, a, rtol=0, atol=bound * max(scale, 1e-12))

    jax.tree.map(same, one, other)


def test_every_leaf_has_its_rules(name):
    config = small(name)
    objective = objective_of(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    state = steps.abstract_state(objective, optimizer, sharding.make_mesh(fsdp=8))  # raises for a leaf without a rule
    mask = jax.tree.leaves(optimizers.decayed(state.params, "matrices", steps.decay_rules(objective)))
    assert 0 < sum(mask) < len(mask)
    assert set(objective.teacher_keys) <= set(state.params) and "backbone" in state.params
    assert set(state.teacher) == set(objective.teacher_keys)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    for group, panels in objective.curves:
        assert group and all(panel.metrics for panel in panels)


def test_two_steps_on_eight_devices_in_microbatches_are_those_on_one(other, in_float64):
    """Two microbatches, if the method allows them; else a sentence says that it does not."""
    config = small(other, accumulate=2)
    try:
        configs.check(config, 4, 4, 1)
    except UserError as refusal:
        assert "accumulate" in str(refusal)
        config = small(other)
    with jax.enable_x64(True):
        state, metrics = two_steps(config, sharding.make_mesh(data=2, fsdp=2, tensor=2), "float64")
    assert_close(in_float64[0], state)
    if config.accumulate == 1:
        assert_close(in_float64[1], metrics)
    else:  # Only what is a mean over images adds up; norms of statistics need not.
        assert_close(in_float64[1]["loss"], metrics["loss"])
    assert np.isfinite(metrics["loss"]) and state.step == 2


def test_drawing_depends_on_seed_name_and_step_only():
    keys = {
        (seed, name, step): tuple(jax.random.key_data(base.Streams.at(seed, "step", step)(name)).tolist())
        for seed in (0, 1) for name in ("examples", "drop_path", "masks", "noise") for step in (0, 1)
    }  # fmt: skip
    assert len(set(keys.values())) == len(keys)
    again = base.Streams.at(1, "step", 1)("masks")
    assert tuple(jax.random.key_data(again).tolist()) == keys[1, "masks", 1]


def test_the_count_of_flops_is_near_what_is_traced(name):
    """Exactly, but for what a method names: see its own tests."""
    config = small(name, drop_path__rate=0.0)
    objective = objective_of(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    state = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
    step = steps.make_step(objective, optimizer, 0, config.optimizer)
    jaxpr = jax.make_jaxpr(step)(state, batch_of(objective, config.batch_size), scalars_of(config)).jaxpr
    counted = config.batch_size * sum(objective.flops_per_image().values())
    assert 1.0 <= flop_counts.matrix_products(jaxpr) / counted < 1.6


# ---------------------------------------------------------------- a run and what is done with it


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    labels = {"train": list(range(3)) * 12, "test": list(range(3)) * 8}
    return str(labelled_toys.write_shards(tmp_path_factory.mktemp("data") / "data", labels))


def settings(name, data, total=4):
    config = small(name)
    config.update_from_flattened_dict(
        {"data.path": data, "data.workers": 0, "total": f"{total} steps", "log_every": "1 steps",
        "checkpoint.every": "2 steps",
         "monitor.data": data, "monitor.images": 24, "monitor.every": "2 steps"}
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def run(name, data, tmp_path_factory):
    """Four steps on one device, saved at the second and the last."""
    workdir = tmp_path_factory.mktemp(name) / "run"
    with on_one_device():
        train.train(settings(name, data), str(workdir))
    return workdir


def test_a_run_resumes_bitwise(name, data, run, one_device, tmp_path):
    config = settings(name, data)
    config.resume_from = str(run)
    (run / "checkpoints" / "4").rename(tmp_path / "4")  # what is left is step 2
    try:
        train.train(config, str(tmp_path / "resumed"))
    finally:
        (tmp_path / "4").rename(run / "checkpoints" / "4")
    assert metrics_of(tmp_path / "resumed") == metrics_of(run)[2:]
    assert_same_bits(everything(tmp_path / "resumed", 4), everything(run, 4))


def test_its_state_is_restored_on_other_devices(name, run):
    config = small(name)
    objective = objective_of(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    one, eight = (
        checkpoint.restore(run / "checkpoints" / "4", steps.abstract_state(objective, optimizer, mesh))
        for mesh in (sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(data=2, fsdp=2, tensor=2))
    )
    assert one[1] == eight[1]
    for a, b in zip(*(jax.tree.leaves(jax.device_get(state)) for state, _ in (one, eight)), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight[0]))


def test_its_encoder_is_loaded_probed_and_exported(name, data, run, tmp_path, capsys):
    objective = objective_of(small(name))
    model = features.load(run)
    image = np.zeros((32, 32, 3), np.uint8)
    assert model(image).class_token.shape == (objective.encoder.width,)
    judged = features.load_weights(run)
    assert judged.network == base.networks(objective)[0]
    if objective.teacher_keys:
        assert features.load(run, which="teacher")(image).class_token.shape == (objective.encoder.width,)
    else:
        with pytest.raises(UserError, match="no teacher"):
            features.load(run, which="teacher")
    found = probe.probe(run, ["knn"], data=data, changes={"knn.k": (3,)}, output=tmp_path / "probe")
    assert found[0]["checkpoint"]["encoder"] == judged.network
    assert all(0.0 <= score["value"] <= 1.0 for score in found[0]["scores"].values())
    export.main(["timm", "--run", str(run), "--output", str(tmp_path / "timm")])
    np.testing.assert_allclose(features.load(tmp_path / "timm")(image).class_token, model(image).class_token, atol=1e-5)
    if name != "pera":
        with pytest.raises(
            UserError, match=f"trained by {name}, and the format .* holds PerA only; use .* export timm"
        ):
            export.main(["released", "--run", str(run), "--output", str(tmp_path / "released")])
    words = card.text(judged, judged.network, 32, 32)
    assert objectives.method(name).citation in words and "4 steps" in words


def test_it_is_reported_and_monitored(name, data, run, tmp_path):
    page = report.report(str(run), str(tmp_path / "report"), data=data, number=2, number_of_pairs=2).read_text()
    assert f">{name}<" in page
    for _, panels in objectives.method(name).curves:
        assert panels[0].title in page
    assert all("monitor/knn20" in line for line in metrics_of(run) if line["step"] % 2 == 0)


@pytest.mark.parametrize("name", ["toy_mae", "dino"])  # without and with a teacher; compiling another says no more
def test_it_is_planned(name, data, monkeypatch):
    monkeypatch.setattr(plan, "devices_of", lambda topology: jax.devices()[:1])
    found = plan.plan(settings(name, data), "local", 2, False, 1000, 0.4, say=lambda line: None)
    assert ("optimizer, teacher, batch" in plan.show(found)) == bool(objective_of(small(name)).teacher_keys)
    assert found["flops_per_image"] == objective_of(small(name)).flops_per_image()


def test_alarms_watch_its_metrics(name, run):
    objective = objective_of(small(name))
    watch = alarms.Alarms(objective.health_checks(16), 1e-3)
    line = metrics_of(run)[-1]
    # so small a network may well collapse
    before = {alarm.name for _ in range(100) for alarm in watch.update(line, 1e-3)}
    diverged = line | {"norm/update": line["norm/parameters"]}
    begun = [alarm for _ in range(100) for alarm in watch.update(diverged, 1e-3)]
    assert "updates too large" not in before
    assert [alarm.name for alarm in begun] == ["updates too large"] and "learning_rate.peak" in begun[0].text
    assert json.loads(json.dumps(watch.state())) == watch.state()


def test_a_run_of_another_method_gives_its_backbone(data, run, name, one_device, tmp_path, capsys):
    other = next(each for each in NAMES if each != name)
    config = settings(other, data, total=2)
    config.init_from = str(run)
    train.train(config, str(tmp_path / "run"))
    assert "the backbone, with new heads" in capsys.readouterr().err


def test_unknown_methods_are_refused_by_name(data, tmp_path):
    config = settings("pera", data)
    config.objective = "peraa"
    with pytest.raises(UserError, match="objective='peraa' is not one of pera"):
        train.train(config, str(tmp_path / "run"))
    config.objective = "toy_mae"
    with pytest.raises(UserError, match="no field pera"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- mistakes in a method of one's own


@pytest.fixture
def own(tmp_path):
    """Writes a module of a method and a config file beside it, in a folder that Python does not search."""
    written = []

    def write(module: str, text: str) -> str:
        importlib.invalidate_caches()
        written.append(module)
        (tmp_path / f"{module}.py").write_text(text)
        config = tmp_path / f"{module}_config.py"
        config.write_text(
            f"from pera_jax import config\ndef get_config(argument=None): return config.default({module!r})\n"
        )
        return str(config)

    yield write
    for module in written:
        sys.modules.pop(module, None)


METHOD = "import toy_mae\nclass Own(toy_mae.ToyMae):\n    name = 'own'\nOBJECTIVE = Own\n"


def test_a_method_beside_its_config_file_is_found(own):
    before = list(sys.path)
    assert configs.load(own("own_beside", METHOD), ["own.kept=0.5"]).own.kept == 0.5
    given = f"--config={own('own_by_flag', METHOD)}"
    values = flags.FlagValues()
    config_flags_of.DEFINE_config_file("config", None, "", flag_values=values)
    with mock.patch.object(flags, "FLAGS", values), mock.patch.object(sys, "argv", ["x", given]):
        config_flags.parse(["x", given])
        assert values.config.objective == "own_by_flag"
    assert sys.path == before
    with pytest.raises(UserError, match="'own_nowhere' is not .* the current folder, on PYTHONPATH or beside the conf"):
        configs.default("own_nowhere")


@pytest.mark.parametrize("module, text, sentence", [
    ("own_import", "import sys\nimport not_there\n", r"ModuleNotFoundError: .* 'not_there' \(.*own_import.py:2\);"),
    ("own_numpy", "import jax.numpy as jnp\n\njnp.nothere\n", r"AttributeError: .*'nothere' \(.*own_numpy.py:3\);"),
    ("own_syntax", "x = (\n", r"SyntaxError: .* \(.*own_syntax.py:1\); correct the module"),
    ("own_without", "x = 1\n", "own_without.py defines no OBJECTIVE; add a line OBJECTIVE = YourClass"),
    ("own_data", METHOD.replace("'own'", "'data'"), "name = 'data', but config.data is a common field"),
    ("own_nameless", METHOD.replace("'own'", "None"), "the class Own has no valid name; set its attribute"),
])  # fmt: skip
def test_a_module_that_cannot_be_used_is_refused_with_its_cause(module, text, sentence, own):
    with pytest.raises(UserError, match=sentence) as refused:
        configs.load(own(module, text))
    assert module in str(refused.value) or "class Own" in str(refused.value)


@pytest.mark.parametrize("attribute, value, sentence", [
    ("citation", None, "the class ToyMae of objective='toy_mae' has no citation; set its attribute"),
    ("flops_per_image", None, "the class ToyMae of objective='toy_mae' has no method flops_per_image; define it"),
    ("teacher_keys", ("backbone",), r"its schedules\(\) has no 'one_minus_momentum'; add a schedule"),
])  # fmt: skip
def test_what_a_method_lacks_is_named(attribute, value, sentence, monkeypatch):
    monkeypatch.setattr(toy_mae.ToyMae, attribute, value)
    with pytest.raises(UserError, match=sentence):
        configs.check(small("toy_mae"), 1, 1, 1)


@pytest.mark.parametrize("attribute, value, sentence", [
    ("update", lambda self, state, aux: (state, {"error": aux["loss"]}), "ToyMae.update must include 'loss', but are"),
    ("update", lambda self, state, aux: (state, aux | {"all": jnp.ones(3)}), r"'all' of .*ToyMae.update is .*\[3\]"),
    ("teacher_keys", ("backbone", "haed"), "ToyMae.init returns no parameters 'haed', .* backbone, decoder: correct"),
])  # fmt: skip
def test_what_a_method_returns_is_checked_when_the_step_is_traced(attribute, value, sentence, monkeypatch):
    config = small("toy_mae")
    monkeypatch.setattr(toy_mae.ToyMae, attribute, value)
    objective = objective_of(config)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    with pytest.raises(UserError, match=sentence):
        state = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
        step = steps.make_step(objective, optimizer, 0, config.optimizer)
        jax.eval_shape(step, state, batch_of(objective, config.batch_size), scalars_of(config))


def test_only_the_crops_of_a_method_are_checked():
    bad = dict(crops__local_size=20, crops__local_number=2)
    assert list(objective_of(small("toy_mae", **bad)).crops) == ["global"]
    with pytest.raises(UserError, match="crops.local_size=20 is not a multiple of the patch size 8"):
        objective_of(small("pera", **bad))


def test_earlier_names_of_pera_mean_nothing_to_other_methods(own, capsys):
    with pytest.raises(UserError, match="no field heads.hidden"):
        configs.load(small("toy_mae"), ["heads.hidden=4"])
    assert configs.load(small("pera"), ["heads.hidden=4"]).pera.heads.hidden == 4
    config = small("toy_mae")
    config.heads = ConfigDict()
    with pytest.raises(UserError, match="no field heads; known here"):
        configs.check(config, 1, 1, 1)
    with mock.patch.object(flags, "FLAGS", flags.FlagValues()), mock.patch.object(sys, "argv", ["x"]):
        config_flags_of.DEFINE_config_file("config", None, "", flag_values=flags.FLAGS)
        with pytest.raises(UserError, match="the config has no field 'heads'"):
            config_flags.parse(["x", f"--config={own('own_heads', METHOD)}", "--config.heads.hidden=4"])
    old, new = "--config.heads.hidden=4", "--config.pera.heads.hidden=4"
    named = own("own_flags", METHOD)
    assert config_flags.resolve(["x", "--config", named, old])[-1] == old
    assert not capsys.readouterr().err
    assert config_flags.resolve(["x", old, "--config=demo"])[1] == new
    assert "heads.hidden is now called pera.heads.hidden" in capsys.readouterr().err


def test_a_card_needs_no_module(data):
    config = settings("toy_mae", data)
    meta = run_meta.describe(config, objective_of(config), {"name": "x", "records": 3, "fingerprint": "f"})
    meta["config"]["objective"], meta["config"]["toy_mae"]["layer"] = "gone", -1  # a field that only the method knows
    meta["data"] |= {"split": "train"}
    meta_fields.check_meta(meta)
    words = card.text(Weights({}, meta, 4, "student"), "student", 32, 32)
    assert "of 16 images by a toy masked autoencoder on x" in words
