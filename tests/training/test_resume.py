"""Resuming: which changes are allowed and reported, config.json as a config, statistics of the resumed run."""

import importlib
import json
import logging

import pytest
import toy_data

from pera_jax import config as configs
from pera_jax.common.errors import UserError
from pera_jax.config import flags as config_flags
from pera_jax.config import run_file
from pera_jax.data import mixture
from pera_jax.training import opening, resume
from pera_jax.training.checkpoints import run_meta


def meta_of(config, data="f", **changes):
    return {
        "model": {"width": 32}, "bands": ["red"], "dtype": "uint8", "ranges": [[0, 255]], "mean": [0.5], "std": [0.2],
        "git": "abc", "data": {"name": "toy", "fingerprint": data, "records": 48},
        "config": json.loads(config.to_json()),
    } | changes  # fmt: skip


def changed(**fields):
    config = importlib.import_module("configs.demo").get_config("smoke")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def check(before, now, **options):
    changes = resume.check_same_run(before, now, "runs/a", options.pop("allow_changed_data", False), **options)
    return [str(change) for change in changes]


def test_what_changes_no_number_may_change_and_is_listed():
    fields = dict(data__workers=3, checkpoint__every="1 steps", model__remat="block", stall_seconds=7, accumulate=2)
    said = check(meta_of(changed()), meta_of(changed(**fields), git="def"))
    assert sorted(said) == sorted([
        "data.workers 0 -> 3", "checkpoint.every 2 steps -> 1 steps", "model.remat none -> block",
        "stall_seconds 1800 -> 7", "accumulate 1 -> 2", "program abc -> def",
    ])  # fmt: skip


@pytest.mark.parametrize("field, value", [
    ("total", "9 steps"), ("batch_size", 8), ("schedules.learning_rate.peak", 2e-3), ("optimizer.clip_norm", 1.0),
    ("pera.loss.koleo_weight", 0.2), ("crops.local_number", 1), ("pera.masks.student", 0.3), ("pera.views.hue", 0.0),
    ("drop_path.rate", 0.1), ("precision", "bfloat16"), ("data.weights", (1.0,)), ("data.split", "other"),
])  # fmt: skip
def test_what_shapes_the_run_changes_only_when_told_to_and_is_listed_first(field, value):
    before, now = meta_of(changed()), meta_of(changed(**{field: value, "data.workers": 3}))
    with pytest.raises(
        UserError, match=f"runs/a belongs to another run: expected {field} .*, or pass --allow-config-change"
    ):
        check(before, now)
    first, second = check(before, now, allow_config_change=True)
    assert first.startswith(f"{field} ") and second == "data.workers 0 -> 3"


def test_what_makes_another_run_never_changes():
    for field, value in {"seed": 4, "pera.heads.prototypes": 32, "parameter_precision": "float64"}.items():
        with pytest.raises(UserError, match=f"belongs to another run: expected {field} "):
            check(
                meta_of(changed()),
                meta_of(changed(**{field: value})),
                allow_config_change=True,
                allow_changed_data=True,
            )


def test_a_config_of_an_earlier_version_had_the_default_of_fields_that_it_did_not_know():
    before = meta_of(changed())
    del before["config"]["stall_seconds"], before["config"]["pera"]["loss"]["pixel_weight"]
    assert check(before, meta_of(changed())) == []
    with pytest.raises(UserError, match="expected pera.loss.pixel_weight 0.5 from this config, got 0.01"):
        check(before, meta_of(changed(pera__loss__pixel_weight=0.5)))


def test_another_batch_size_goes_on_after_the_images_that_were_seen():
    assert resume.place_in_stream({"batches": 10}, 16, 16) == (10, 160)
    assert resume.place_in_stream({"batches": 10}, 16, 32) == (5, 160)
    assert resume.place_in_stream({"batches": 7, "images": 224}, 32, 16) == (14, 224)  # which had changed before
    assert resume.sentence(4, 6, [resume.Change("total", "4 steps", "6 steps")]) == (
        "resuming from step 4 of 6; changed: total 4 steps -> 6 steps"
    )


def test_changed_data_keep_the_statistics_that_the_run_was_trained_with(tmp_path):
    settings = changed(data__normalize="dataset").data
    paths = [toy_data.write(tmp_path / name, fingerprint=name) for name in ("first", "second")]
    info = json.loads((tmp_path / "second" / "info.json").read_text())
    info["splits"]["train"] |= {"mean": [0.1] * 3, "std": [0.4] * 3}
    (tmp_path / "second" / "info.json").write_text(json.dumps(info))
    first, second = (mixture.open_mixture(dataclasses_of(settings, path=path)) for path in paths)
    found = meta_of(changed(data__normalize="dataset"), "first", **first.bands.to_dict())
    assert second.bands != first.bands
    assert resume.with_own_statistics(second, found, settings) is second  # not asked for
    settings.allow_changed_data = True
    assert resume.with_own_statistics(second, found, settings).bands == first.bands
    assert resume.with_own_statistics(second, None, settings) is second
    settings.normalize = "imagenet"  # asked for other ones, which is another run
    assert resume.with_own_statistics(second, found, settings) is second
    before, now = found, found | {"data": second.card()}
    (said,) = check(before, now, allow_changed_data=True)
    assert said == "dataset toy (48 images) -> second (48 images)"


def dataclasses_of(settings, **changes):
    settings = settings.copy_and_resolve_references()
    settings.update(changes)
    return settings


def test_the_config_of_before_stays(tmp_path):
    first, second = meta_of(changed()), meta_of(changed(total="9 steps"))
    resume.keep_earlier(str(tmp_path), first, 0)
    run_meta.write(str(tmp_path), first)
    resume.keep_earlier(str(tmp_path), first, 4)
    assert not (tmp_path / resume.EARLIER).exists()
    for meta in (second, first, second):
        resume.keep_earlier(str(tmp_path), meta, 4)
        run_meta.write(str(tmp_path), meta)
    kept = {
        path.name: json.loads(path.read_text())["config"]["total"] for path in (tmp_path / resume.EARLIER).iterdir()
    }
    assert kept == {"until_step_000004.json": "4 steps", "until_step_000004_2.json": "9 steps"}


def test_config_json_is_a_config(tmp_path):
    config = changed(data__bands=("nir", "red"), data__ranges=((0, 10),), total="9 steps")
    file = tmp_path / "config.json"
    run_meta.write(str(tmp_path), meta_of(config))
    read = configs.load(str(file), ["batch_size=8"])
    assert read.batch_size == 8 and read.data.ranges == ((0, 10),)
    read.batch_size = config.batch_size
    assert read.to_json() == config.to_json()
    bridged = f"{config_flags.__file__}:{file}"
    assert config_flags.resolve(["x", "--config", str(file), "--config.total=1 steps"]) == [
        "x", "--config", bridged, "--config.total=1 steps"
    ]  # fmt: skip
    assert config_flags.resolve([f"--config={file}", "--config=demo:smoke"]) == [
        f"--config={bridged}",
        f"--config={config_flags.__file__}:demo:smoke",
    ]


@pytest.mark.parametrize("content, sentence", [
    ("{", "cannot be read: it is not valid JSON"), ("[]", "is not the config.json of a run"),
    ('{"config": 3}', "is not the config.json"),
    ('{"config": {"totl": 1}}', "has an unknown field totl"),
    ('{"config": {"data": {"workers": "three"}}}', "expected data.workers in .* as int, such as the default -1, got "
                                                   "three"),
    ('{"config": {"data": 3}}', "expected data in .* as a group of fields, got 3"),
    ('{"config": {"total": null}}', "expected total in .* as str, such as the default .*, got None"),
])  # fmt: skip
def test_a_config_json_that_is_none_is_one_sentence(content, sentence, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        run_file.get_config(str(tmp_path / "config.json"))


def test_jax_says_that_an_accelerator_is_not_used(capsys):
    logger = logging.getLogger("jax._src.xla_bridge")
    before = logger.level, logger.propagate, list(logger.handlers)
    root = logging.root.level
    try:
        logging.root.setLevel(logging.FATAL)  # as the training does
        opening.show_device_warnings()
        opening.show_device_warnings()
        logger.warning("An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed.")
        assert capsys.readouterr().err == (
            "warning: An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed.\n"
        )
    finally:
        logging.root.setLevel(root)
        logger.level, logger.propagate, logger.handlers = before
