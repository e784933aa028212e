"""`init_from`: missing parts, other grids and bands, the estimate of the center."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import labelled_toys
import numpy as np
import pytest
import tiny
import toy_data
import toy_states
import toy_weights

from pera_jax import train
from pera_jax.bands import RGB, Bands
from pera_jax.common.errors import UserError
from pera_jax.data import mixture, pipeline
from pera_jax.data.labelled import samples
from pera_jax.encoder import extract, load
from pera_jax.formats import arrays, tables
from pera_jax.objectives.base import Streams
from pera_jax.objectives.pera import objective as pera
from pera_jax.parallel import sharding
from pera_jax.probes.classification import knn
from pera_jax.training import step as steps
from pera_jax.weights import imports, released, warm_start


def config_like_the_dictionary(**changes):
    sizes = dict(
        model__width=16, model__depth=3, model__heads=2, model__patch=4, crops__global_size=16, crops__local_size=8,
        pera__heads__hidden=12, pera__heads__bottleneck=8, pera__heads__prototypes=32,
    )  # fmt: skip
    return tiny.config(**sizes | changes)


@functools.cache
def born_on(mesh, bands: int, global_size: int):
    names = ("a", "b", "c", "d", "e")[:bands]
    gray = dict(pera__views__saturation=0.0, pera__views__hue=0.0, pera__views__student_grayscale=0.0)
    config = config_like_the_dictionary(crops__global_size=global_size, **gray)
    objective = pera.PerA.from_config(config, Bands.plain(names))
    optimizer = steps.make_optimizer(objective, config.optimizer)
    return toy_states.random_state(objective, optimizer, mesh, seed=5)


def new_state(config, bands: Bands, mesh=None):
    """The objective, and a state whose values depend on nothing but the shapes."""
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    return pera.PerA.from_config(config, bands), born_on(mesh, len(bands.names), config.crops.global_size)


def encoded(objective, backbone, images):
    apply = jax.jit(lambda backbone, images: objective.encoder.apply({"params": backbone}, images))
    return apply(jax.device_get(backbone), images)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Runs of the same dictionary: {teacher_only: folder}."""
    folder = tmp_path_factory.mktemp("imported")
    arrays.write(folder / "pera.safetensors", toy_weights.dictionary(np.random.default_rng(4)))
    for alone in (True, False):
        imports.import_released(folder / "pera.safetensors", folder / str(alone), imports.Options(heads=2), alone)
    return {alone: str(folder / str(alone)) for alone in (True, False)}


def test_a_teacher_alone_becomes_both_backbones_with_new_heads(imported, capsys):
    objective, born = new_state(config_like_the_dictionary(), Bands.plain(), sharding.make_mesh(data=4, fsdp=2))
    state = warm_start.with_weights(born, imported[True], objective)
    backbone = load.load_weights(imported[True]).backbone
    for found, new in ((state.params, born.params), (state.teacher, born.teacher)):
        toy_weights.assert_same(found, new | {"backbone": backbone})
        assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, found, new))
    toy_weights.assert_same(state.opt_state, born.opt_state)
    assert "the backbone, with new heads" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no student, only the teacher's backbone; choose another network"):
        load.load_weights(imported[True], which="student")


def test_other_grids_and_bands_are_fitted(imported, capsys):
    old = pera.PerA.from_config(config_like_the_dictionary(), Bands.plain())
    bands = Bands.plain(("a", "b", "c", "d", "e"))
    config = config_like_the_dictionary(
        crops__global_size=24, pera__views__saturation=0.0, pera__views__hue=0.0, pera__views__student_grayscale=0.0
    )
    objective, born = new_state(config, bands)
    state = warm_start.with_weights(born, imported[False], objective)
    for which, found in (("student", state.params), ("teacher", state.teacher)):
        given = load.load_weights(imported[False], which=which).params
        gray = np.random.default_rng(0).normal(size=(2, 24, 24, 1)).astype(np.float32)
        outputs = [
            encoded(network, tree["backbone"], np.tile(gray, (1, 1, 1, len(network.bands))))
            for network, tree in ((old, given), (objective, found))
        ]  # the same image in all bands, at the new size, gives what it gave before
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *outputs)
        toy_weights.assert_same(found["prototype_head"], given["prototype_head"])
    given = load.load_weights(imported[False], which="student").params["pixel_head"]
    born = born.params["pixel_head"]
    toy_weights.assert_same(state.params["pixel_head"], given | {name: born[name] for name in ("direction", "gain")})
    said = capsys.readouterr().err
    assert "from 4 x 4 to 6 x 6 patches" in said and "averaged over 3 bands for each of 5 bands; new layers" in said


def test_bands_in_another_order_are_matched_by_name(imported):
    names = ("blue", "red", "green")
    old = pera.PerA.from_config(config_like_the_dictionary(), Bands.plain())
    objective, born = new_state(config_like_the_dictionary(data__rgb=RGB), Bands.plain(names))
    state = warm_start.with_weights(born, imported[False], objective)
    given = load.load_weights(imported[False], which="student").params
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    wanted = encoded(old, given["backbone"], image)["class_token"]
    found = encoded(objective, state.params["backbone"], image[..., [2, 0, 1]])["class_token"]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    rows = np.asarray(given["pixel_head"]["direction"]).reshape(16, 3, -1)[:, [2, 0, 1]].reshape(48, -1)
    np.testing.assert_array_equal(state.params["pixel_head"]["direction"], rows)


def test_what_does_not_fit_is_named(imported):
    config = config_like_the_dictionary(
        pera__heads__prototypes=64, model__width=32, model__patch=8, crops__global_size=32, crops__local_size=24
    )
    objective = pera.PerA.from_config(config, Bands.plain())
    optimizer = steps.make_optimizer(objective, config.optimizer)
    born = jax.eval_shape(lambda: steps.new_state(objective, optimizer, 0))
    with pytest.raises(
        UserError, match="does not fit this config: expected backbone/class_token .32,., got .16,."
    ) as error:
        warm_start.with_weights(born, imported[False], objective)
    assert str(error.value).count("expected ") > 20 and "expected prototype_head/gain (64,), got (32,)" in str(
        error.value
    )


def test_the_center_begins_as_the_mean_of_the_teachers_outputs(imported, tmp_path, capsys):
    config = config_like_the_dictionary(pera__center_batches=2, accumulate=2, crops__local_number=0)
    config.data.path = toy_data.write(tmp_path / "toy")
    data, mesh = mixture.open_mixture(config.data), sharding.make_mesh(data=4, fsdp=2)
    objective, born = new_state(config, data.bands, mesh)
    state = warm_start.with_weights(born, imported[False], objective)
    found = warm_start.with_estimate(state, config, objective, data, mesh)

    outputs = []
    stream = pipeline.make_pipeline(data, toy_data.crops(config.crops), batch_size=config.batch_size, seed=config.seed)
    teacher, params = jax.device_get((state.teacher, state.params))

    @jax.jit
    def teacher_outputs(batch, number):
        views = objective.make_views(objective.prepare(Streams.at(config.seed, "warm_start", number), batch))
        return objective.outputs(params, teacher, views, None)[1]

    for number in range(2):
        batch = {kind: value for kind, value in next(stream).items() if kind in objective.crops}
        out = teacher_outputs(batch, number)
        outputs.append(np.einsum("bvd,kd->bvk", out.units, out.weights))
    stream.close()
    np.testing.assert_allclose(found.objective["center"], np.concatenate(outputs).mean((0, 1)), atol=1e-5)
    assert float(jnp.linalg.norm(found.objective["center"])) > 1e-2
    assert found.objective["center"].sharding == born.objective["center"].sharding
    assert "estimated over 2 batches" in capsys.readouterr().err
    never = dataclasses.replace(objective, warm_start_batches=0)
    assert warm_start.with_estimate(state, config, never, data, mesh) is state


def test_going_on_forgets_nothing(one_device, tmp_path):
    """25 steps at a small rate, from a whole import and from its teacher alone: neighbors as good as the import's."""
    labels = {"train": list(range(3)) * 32, "test": list(range(3)) * 16}
    data = str(labelled_toys.write_shards(tmp_path / "data", labels))

    def settings(steps, rate, start=""):
        config = config_like_the_dictionary(
            batch_size=16, data__path=data, init_from=start, pera__center_batches=4, crops__local_number=0
        )
        config.update_from_flattened_dict(
            {"total": f"{steps} steps", "log_every": "20 steps", "checkpoint.every": "100 percent"}
        )
        config.schedules.learning_rate.update(dict(start=rate, peak=rate, end=rate))
        return config

    extractor = None

    def neighbors(run):
        nonlocal extractor
        weights = load.load_weights(run, parts=("backbone",))
        extractor = extractor or extract.Extractor(weights.backbone, weights.meta)
        extractor.take(weights.backbone)
        tokens = {
            split: extract.extract(extractor, samples.open_samples(data, split), 48, 96).class_tokens[:, -1]
            for split in labels
        }
        found = knn.predict(tokens["train"], np.array(labels["train"]), tokens["test"], 3, (20,))[20]
        return np.mean(found == labels["test"])

    train.train(settings(40, 3e-3), str(tmp_path / "first"))
    shape = load.load_weights(tmp_path / "first").meta["model"]
    tree = {
        root: jax.tree.map(np.asarray, load.load_weights(tmp_path / "first", which=which).params)
        for root, which in (("params", "student"), ("teacher", "teacher"))
    }
    table = released.table(shape["depth"], shape["split"])
    arrays.write(tmp_path / "first.safetensors", tables.to_named(tree, table, shape["heads"], shape["patch"]))
    before = None
    for alone in (True, False):
        start = tmp_path / f"import_{alone}"
        options = imports.Options(heads=2, mean=(0.4,) * 3, std=(0.1,) * 3)
        imports.import_released(tmp_path / "first.safetensors", start, options, alone)
        train.train(settings(25, 4e-5, str(start)), str(tmp_path / f"on_{alone}"))
        before = neighbors(start) if before is None else before  # the teacher is the same in both
        after = neighbors(tmp_path / f"on_{alone}")
        assert before > 0.5 and after >= before - 1 / 48, (alone, before, after)
