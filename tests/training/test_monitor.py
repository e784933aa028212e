"""The monitor: kNN on labeled images with the training's teacher, which does not change the training."""

import shutil

import jax
import numpy as np
import pytest
import tiny
import toy_data
import toy_shards
import toy_states
from conftest import on_one_device
from run_files import assert_same_bits, everything, metrics_of

from pera_jax import config as configs
from pera_jax import train
from pera_jax.common.errors import UserError
from pera_jax.parallel import sharding
from pera_jax.probes import online as monitor
from pera_jax.probes.classification import knn
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint

leave_one_out = jax.jit(knn.leave_one_out, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data.write(tmp_path_factory.mktemp("data") / "toy")


def settings(data, **changes):
    return tiny.config(monitor__data=data, **{f"monitor__{name}": value for name, value in changes.items()}).monitor


@pytest.mark.parametrize("seed", range(4))
def test_leave_one_out_is_the_loop(seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(60, 8)) * 5 + rng.normal(size=8)
    features[:: 2 + seed] = features[0]  # more images that are the same than there are neighbors, or fewer
    labels = rng.integers(0, 4, 60)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    right = 0
    for i in range(60):
        similarity = np.float32(unit) @ np.float32(unit[i])
        others = sorted((j for j in range(60) if j != i), key=lambda j: (-round(float(similarity[j]), 5), j))[:20]
        votes = [sum(np.exp(similarity[j] / 0.07) for j in others if labels[j] == label) for label in range(4)]
        right += int(np.argmax(votes) == labels[i])
    found = leave_one_out(features, labels, 4, 20)
    assert float(found) == pytest.approx(right / 60, abs=1.5 / 60)  # equal neighbors


def test_leave_one_out_leaves_the_image_out():
    """Each image is its own best neighbor, and here the only one of its class."""
    features = np.random.default_rng(0).normal(size=(30, 5))
    assert leave_one_out(features, np.arange(30), 30, 20) == 0
    features[:] = 1  # a collapsed teacher: itself is not even among its neighbors
    assert leave_one_out(features, np.repeat([0, 1], 15), 2, 20) <= 0.5


def test_the_small_set_has_as_many_images_of_each_class(data):
    bands = tiny.objective(tiny.config()).bands
    images, labels = monitor.labeled_subset(settings(data, images=24), bands, 40)
    assert images.shape == (24, 40, 40, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [6, 6, 6, 6]
    for one, other in zip((images, labels), monitor.labeled_subset(settings(data, images=24), bands, 40), strict=True):
        np.testing.assert_array_equal(one, other)
    everything = monitor.labeled_subset(settings(data), bands, 40)[1]
    assert np.bincount(everything).tolist() == [12, 12, 12, 12]


def test_bad_sets_are_one_sentence(data, tmp_path):
    bands = tiny.objective(tiny.config()).bands
    for name, content, wrong in (
        ("few", dict(images=20), "needs at least 21 labeled images in split .*, got 20"),
        ("infrared", dict(bands=("red", "green", "nir")), "has no band 'blue'"),
        ("damaged", dict(undecodable=(3,)), "record 3 of .* is damaged"),
    ):
        folder = toy_data.write(tmp_path / name, **content)
        with pytest.raises(UserError, match=wrong):
            monitor.labeled_subset(settings(folder), bands, 40)
    folder = toy_data.write(tmp_path / "unlabeled")
    toy_shards.edit_info(tmp_path / "unlabeled", class_names=None)
    with pytest.raises(UserError, match="needs at least two classes"):
        monitor.labeled_subset(settings(folder), bands, 40)


@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=2, fsdp=2, tensor=2)])
def test_features_are_the_teachers_and_padding_does_not_count(data, mesh):
    """27 images on 8 or 4 parts of the batch; the teacher stays cut as it is."""
    config, objective = tiny.config(), tiny.objective(tiny.config())
    mesh = sharding.make_mesh(**mesh)
    teacher = toy_states.random_state(objective, steps.make_optimizer(objective, config.optimizer), mesh).teacher
    with jax.set_mesh(mesh):
        watch = monitor.Monitor(settings(data, images=27), objective, teacher, mesh)
        found, said = watch.features(teacher), watch(teacher)
    images = objective.bands.mapped(watch.images)
    images = (images - np.float32(objective.bands.mean)) / np.float32(objective.bands.std)
    plain = objective.encoder.apply({"params": jax.device_get(teacher["backbone"])}, images)["class_token"]
    assert found.shape == (27, 16)
    np.testing.assert_allclose(found, plain, atol=2e-5)
    assert np.abs(plain - plain.mean(axis=0)).max() > 1e-2  # images differ by more than the bound
    predicted = knn.predict(found, watch.labels, found, 4, ks=(20,), own=np.arange(27))[20]
    assert said == {monitor.METRIC: pytest.approx(np.mean(predicted == watch.labels))}


def with_monitor(train_data, **changes):
    config = configs.smoke(configs.default("toy_mae"))
    config.data.path = train_data
    config.log_every = "3 steps"
    config.monitor.update(dict(data=train_data, images=24, every="2 steps") | changes)
    return config


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("watched") / "run"
    with on_one_device():
        train.train(with_monitor(data), str(workdir))
    return workdir


def test_the_training_is_the_same_with_and_without(watched, data, one_device, tmp_path):
    train.train(with_monitor(data, data=""), str(tmp_path / "run"))
    assert_same_bits(everything(tmp_path / "run", 4), everything(watched, 4))
    with_, without = ({line["step"]: line for line in metrics_of(run)} for run in (watched, tmp_path / "run"))
    assert sorted(with_) == [2, 3, 4] and sorted(without) == [3, 4]
    assert [step for step in with_ if monitor.METRIC in with_[step]] == [2, 4]
    assert 0 <= with_[4][monitor.METRIC] <= 1
    for step, line in without.items():
        assert line == {name: value for name, value in with_[step].items() if name != monitor.METRIC}


def test_a_resumed_run_says_the_same(watched, data, one_device, tmp_path):
    shutil.copytree(watched, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "FINISHED").unlink()
    assert checkpoint.saved_steps(tmp_path / "run") == [2]
    train.train(with_monitor(data), str(tmp_path / "run"))
    assert metrics_of(tmp_path / "run") == metrics_of(watched)
    assert_same_bits(everything(tmp_path / "run", 4), everything(watched, 4))


def test_a_bad_monitor_leaves_nothing_behind(data, tmp_path):
    for changes, wrong in (
        (dict(data=str(tmp_path / "none")), "does not exist"),
        (dict(split="test"), "has no split 'test'"),
        (dict(every="0 steps"), "monitor.every='0 steps' is less than one step"),
        (dict(images=8), "needs at least 21 labeled images .*, got 8"),
    ):
        with pytest.raises(UserError, match=wrong):
            train.train(with_monitor(data, **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
