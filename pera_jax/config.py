"""The config: every field with its default, the checks on what a user sets, and `:smoke`.

The defaults are the published ViT-B/16. A file of `configs/` starts from `default()` and says what differs; a name that
is not here is refused. Durations are strings with their unit: "20 epochs", "1500 steps", "96000 examples", "10 percent".
"""

import ast
import functools
import os
import runpy
from collections.abc import Sequence

from ml_collections import ConfigDict

from pera_jax.common import paths
from pera_jax.common.errors import UserError

PATHS = ("resume_from", "init_from", "data.path", "monitor.data")
"""The fields that hold paths."""


def default() -> ConfigDict:
    """The published ViT-B/16 (Shen et al., arXiv:2505.19447, section IV-A and its released configuration)."""
    config = ConfigDict(
        dict(
            name="pera_vitb16",
            objective="pera",
            seed=0,
            total="200 epochs",
            batch_size=1024,  # global: all devices of all hosts
            accumulate=1,  # parts that a batch is worked on in, one after the other: memory of a part, result of the whole
            precision="bfloat16",  # of matrix products: bfloat16 or float32
            parameter_precision="float32",  # of everything else; float64 only with jax_enable_x64
            # Weights to start from when the workdir holds no checkpoint: a run to go on with (its state, optimiser and
            # step), or one whose weights only are taken, which may be an import of `pera_jax.export`. A folder of a run, ""
            # for none.
            resume_from="",
            init_from="",
            # Batches over which the teacher's mean output is taken before the first step after `init_from`: the centre to
            # begin with. 0: the centre begins at 0, as without `init_from`.
            init_center_batches=16,
        )
    )
    config.data = dict(
        path="",  # folder of shards; several, with commas between, are mixed
        weights=(),  # of several folders: how often to draw from each, as in (3, 1); (): as many as each has records
        split="train",
        workers=-1,  # processes that read, decode and crop; -1: one for each two cores of the host, 16 at most
        bands=(),  # names of the bands to use, in this order; (): all that the shards have
        # What maps to [0, 1], in stored units: ((low, high),) for all bands, or a pair for each; (): what the shards say,
        # the full range of uint8, percentiles 1 and 99 of others.
        ranges=(),
        skip_damaged=False,  # go on without shards that are missing or damaged: their records are replaced by others
        normalise="imagenet",  # "imagenet", or "dataset": the mean and std of the data
        allow_changed_data=False,  # go on from a checkpoint although the data set's fingerprint is another
    )
    config.crops = dict(
        global_size=448,
        global_number=2,
        global_area=(0.4, 1.0),
        local_size=96,
        local_number=8,
        local_area=(0.05, 0.4),
        aspect=(0.75, 1.33),
        flip=0.5,  # probability of each of the two flips
    )
    config.views = dict(
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        student_change=0.8,  # probability that the student's view is changed at all
        student_grey=0.1,  # share of the changed ones that turn grey; the others are jittered
        teacher_jitter=0.1,  # probability that the teacher's view is jittered
        # Names of the bands that are red, green and blue, for saturation, hue and grey; (): the bands are just these three,
        # or the three settings are 0.
        rgb=(),
    )
    config.masks = dict(student=0.2, teacher=0.6)  # shares of the patches; the rest is learnable
    config.model = dict(
        width=768,
        depth=12,
        heads=12,
        patch=16,
        mlp_ratio=4.0,
        scan=True,  # one block compiled, looped over; False: unrolled, which compiles slower and runs a little faster
        remat="block",  # computed again in the backward pass: "none", "dots" (all but the linear maps), whole "block"s
        attention="auto",  # "cudnn", "xla", or "auto": cuDNN's fused kernel on GPUs that have it
    )
    config.heads = dict(hidden=2048, bottleneck=384, prototypes=131072)
    config.stochastic_depth = dict(rate=0.3, group=16)  # group in images; 0 for the whole batch
    config.loss = dict(
        koleo_weight=0.1,
        koleo_group=16,  # images among which nearest neighbours are looked for; 0 for the whole batch
        pixel_weight=0.01,
        center_momentum=0.9,
    )
    config.optimiser = dict(
        beta1=0.9,
        beta2=0.999,
        eps=2e-5,
        clip_norm=3.0,
        decay="all",  # "all" parameters, or "matrices": no biases, norms, tokens and gains
    )
    config.schedules = dict(
        learning_rate=dict(start=0.0, peak=1e-3, end=1e-6, warmup="20 epochs"),
        weight_decay=dict(start=0.04, end=0.2),
        momentum=dict(start=0.992, end=1.0),
        teacher_temperature=dict(start=0.03, end=0.05, warmup="30 epochs"),
        student_temperature=0.1,
    )
    # Nearest neighbours among a few labelled images, from the teacher in training: the metric "monitor/knn20".
    config.monitor = dict(
        data="",  # folder of shards with classes, of the same bands; "": no monitor
        split="train",
        images=1000,  # at most, the same number of each class where there are as many; held in memory
        every="5 percent",
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # one of them may be -1: the devices that are left
    config.log_every = "50 steps"
    # Seconds without a finished step after which a process prints where its threads stand and ends; 0: never. The first
    # step compiles and the longest save must fit in.
    config.stall_seconds = 1800
    config.checkpoint = dict(
        every="1 epochs",
        keep_last=3,
        keep_every="50 epochs",  # kept for good besides the last ones
    )
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """The same config shrunk to run in seconds on a laptop: same code paths, tiny sizes."""
    config.name += "_smoke"
    config.total = "4 steps"
    config.batch_size = 16
    config.data.workers = 0
    config.crops.update(dict(global_size=48, local_size=32))
    config.crops.local_number = min(config.crops.local_number, 2)
    config.model.update(dict(width=32, depth=4, heads=2, patch=8))
    config.heads.update(dict(hidden=32, bottleneck=16, prototypes=64))
    config.stochastic_depth.group = min(config.stochastic_depth.group, 2)
    config.loss.koleo_group = min(config.loss.koleo_group, 2)
    config.schedules.learning_rate.warmup = "1 steps"
    config.schedules.teacher_temperature.warmup = "2 steps"
    config.log_every = "1 steps"
    config.checkpoint.update(dict(every="2 steps", keep_every="100 percent"))
    return config


def finish(config: ConfigDict, argument: str | None) -> ConfigDict:
    """Applies the argument after the colon of `--config FILE.py:ARGUMENT`: nothing, or `smoke`.

    Raises:
      UserError: another argument.
    """
    if argument not in (None, "", "smoke"):
        raise UserError(f"the config takes no argument {argument!r}; only `:smoke` is known")
    return smoke(config) if argument == "smoke" else config


def load(path: str, changes: Sequence[str] = ()) -> ConfigDict:
    """The config of `configs/NAME.py`, `configs/NAME.py:ARGUMENT` or `RUN/config.json`, for commands without absl's `--config`.

    Args:
      changes: "field.of.config=value" each, the value as Python writes it; words need no quotes.

    Raises:
      UserError: no such file, or a change that does not fit.
    """
    name, _, argument = paths.local(path).partition(":")
    if name.endswith(".json"):
        from pera_jax import config_file  # which imports this module

        name, argument = config_file.__file__, path
    if not os.path.isfile(name):
        raise UserError(f"config {name} does not exist; name a file of configs/")
    config = runpy.run_path(name)["get_config"](argument or None)
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"the change {change!r} is not of the form field.of.config=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            config.update_from_flattened_dict({field: value})
        except (KeyError, AttributeError) as error:
            raise UserError(f"the config has no field {field}") from error
        except TypeError as error:
            raise UserError(f"{field}={text} is of another type than its default") from error
    return config


def check(config: ConfigDict, batch_shards: int, weight_shards: int, hosts: int) -> None:
    """Everything about a config that can be known before data and model are built.

    Args:
      batch_shards: parts that a batch is cut into (data x fsdp).
      weight_shards: parts that the prototypes are cut into (fsdp x tensor).
      hosts: processes that read data.

    Raises:
      UserError: the first thing that is wrong.
    """
    _same_fields(config, default(), "")
    for field in PATHS:
        paths.local(functools.reduce(getattr, field.split("."), config), f"config.{field}")
    _check_batch(config, batch_shards, hosts)
    if config.heads.prototypes % weight_shards:
        raise UserError(
            f"heads.prototypes={config.heads.prototypes} do not divide by the {weight_shards} parts of the mesh that hold "
            "them (fsdp x tensor); choose a multiple, or a smaller mesh.fsdp"
        )
    if not 0 <= config.stochastic_depth.rate < 1:
        raise UserError(f"stochastic_depth.rate={config.stochastic_depth.rate} must lie in [0, 1)")
    crops = config.crops
    for kind, number in (("global", crops.global_number), ("local", crops.local_number)):
        size = crops[f"{kind}_size"]
        if number and size % config.model.patch:
            raise UserError(
                f"crops.{kind}_size={size} is not a multiple of model.patch={config.model.patch}; "
                "choose a crop size that the patch divides"
            )
    if crops.global_number < 1 or crops.local_number < 0:
        raise UserError("crops.global_number must be at least 1 and crops.local_number at least 0")
    if config.data.workers < -1:
        raise UserError(f"data.workers={config.data.workers} must be at least 0, or -1 for a number by the host's cores")
    if config.init_center_batches < 0:
        raise UserError(f"init_center_batches={config.init_center_batches} must be at least 0")
    if config.stall_seconds < 0:
        raise UserError(f"stall_seconds={config.stall_seconds} must be at least 0, which is never")
    if config.monitor.images < 1:
        raise UserError(f"monitor.images={config.monitor.images} must be at least 1")
    _one_of(config, "objective", ("pera",))
    _one_of(config.model, "remat", ("none", "dots", "block"), "model.")
    _one_of(config.model, "attention", ("auto", "cudnn", "xla"), "model.")
    _one_of(config, "precision", ("bfloat16", "float32", "float64"))
    _one_of(config, "parameter_precision", ("float32", "float64"))
    _one_of(config.data, "normalise", ("imagenet", "dataset"), "data.")
    _one_of(config.optimiser, "decay", ("all", "matrices"), "optimiser.")


def _check_batch(config: ConfigDict, batch_shards: int, hosts: int) -> None:
    batch, parts = config.batch_size, config.accumulate
    group, koleo = config.stochastic_depth.group, config.loss.koleo_group
    if batch < 1 or batch % batch_shards or batch % hosts:
        raise UserError(
            f"batch_size={batch} does not divide by the {batch_shards} part(s) of the mesh (data x fsdp) on {hosts} "
            "host(s); choose a multiple"
        )
    local = batch // batch_shards
    if parts < 1 or local % parts:
        raise UserError(
            f"accumulate={parts} does not divide the {local} images of one part of the mesh; choose a divisor"
        )
    local //= parts
    for name, size in (("stochastic_depth.group", group), ("loss.koleo_group", koleo)):
        if size < 0 or (size and batch % size):
            raise UserError(f"{name}={size} does not divide batch_size={batch}; use a divisor, or 0 for the whole batch")
    if koleo and local % koleo and (koleo % local or (batch // parts) % koleo):
        raise UserError(
            f"loss.koleo_group={koleo} neither divides nor is a multiple of the {local} images that one part of the mesh "
            f"works on at a time; choose a divisor of {local}, or 0 for the whole batch"
        )
    if not config.stochastic_depth.rate:
        return
    if not group and batch_shards * parts > 1:
        raise UserError(
            "stochastic_depth.group=0 draws from the whole batch, which lies on several devices or is worked on in "
            f"{parts} part(s); use a divisor of {local} images"
        )
    if group and local % group:
        raise UserError(
            f"stochastic_depth.group={group} does not divide the {local} images that one part of the mesh works on at a "
            "time; each device must hold whole groups: use a smaller group"
        )


def _one_of(config: ConfigDict, field: str, allowed: tuple[str, ...], prefix: str = "") -> None:
    if config[field] not in allowed:
        raise UserError(f"{prefix}{field}={config[field]!r} is not one of {', '.join(allowed)}")


def _same_fields(config: ConfigDict, reference: ConfigDict, prefix: str) -> None:
    unknown = sorted(set(config) - set(reference))
    if unknown:
        raise UserError(f"the config has no field {prefix}{unknown[0]}; known here: {', '.join(sorted(reference))}")
    missing = sorted(set(reference) - set(config))
    if missing:
        raise UserError(f"the config lacks the field {prefix}{missing[0]}; start from pera_jax.config.default()")
    for name, value in reference.items():
        if isinstance(value, ConfigDict):
            if not isinstance(config[name], ConfigDict):
                raise UserError(f"the config's field {prefix}{name} must hold fields of its own, not {config[name]!r}")
            _same_fields(config[name], value, f"{prefix}{name}.")
