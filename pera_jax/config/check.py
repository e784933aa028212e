"""Checks a config before data and model are built."""

import functools
import math
import re

from ml_collections import ConfigDict

from pera_jax import objectives
from pera_jax.common import paths
from pera_jax.common.errors import UserError
from pera_jax.config.defaults import default
from pera_jax.config.renamed import new_name
from pera_jax.objectives.base import Layout

PATHS = ("resume_from", "init_from", "data.path", "monitor.data")
"""The fields that hold paths."""

_FRACTION = "in [0, 1)", lambda value: 0 <= value < 1
_POSITIVE = "> 0", lambda value: value > 0
_AT_LEAST_0 = ">= 0", lambda value: value >= 0
_AT_LEAST_1 = ">= 1", lambda value: value >= 1
_AREA = "two ascending numbers in (0, 1]", lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1
_ASPECT = "two ascending numbers > 0", lambda value: len(value) == 2 and 0 < value[0] <= value[1] < float("inf")
_RANGES = {
    "data.workers": (">= 0, or -1 to choose by the number of cores", lambda value: value >= -1),
    "crops.global_size": _AT_LEAST_1, "crops.global_number": _AT_LEAST_1, "crops.global_area": _AREA,
    "crops.local_size": _AT_LEAST_1, "crops.local_number": _AT_LEAST_0, "crops.local_area": _AREA,
    "crops.aspect": _ASPECT, "crops.flip": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "model.width": _AT_LEAST_0, "model.depth": _AT_LEAST_0, "model.heads": _AT_LEAST_0, "model.patch": _AT_LEAST_0,
    "model.mlp_ratio": _POSITIVE, "drop_path.rate": _FRACTION, "optimizer.beta1": _FRACTION,
    "optimizer.beta2": _FRACTION, "optimizer.eps": _POSITIVE, "optimizer.clip_norm": _POSITIVE,
    "optimizer.layer_decay": ("in (0, 1]", lambda value: 0 < value <= 1),
    "monitor.images": _AT_LEAST_1, "stall_seconds": (">= 0 (0 disables it)", lambda value: value >= 0),
    "checkpoint.keep_last": _AT_LEAST_1, "seed": (f"in [0, {2**32})", lambda value: 0 <= value < 2**32),
}  # fmt: skip
"""Field -> (valid values in words, whether a value is valid). Sizes and groups of batches, the mesh and the schedules
are checked where they are used together."""


def check(config: ConfigDict, batch_shards: int, weight_shards: int, hosts: int) -> None:
    """Checks everything in a config that does not depend on data or model.

    Args:
      batch_shards: number of shards of a batch (data x fsdp).
      weight_shards: number of shards of the prototypes (fsdp x tensor).
      hosts: number of processes that read data.

    Raises:
      UserError: names the first invalid field.
    """
    check_fields(config)
    for field in PATHS:
        paths.local(_value(config, field), f"config.{field}")
    _check_batch(config, batch_shards, hosts)
    _check_ranges(config)
    _check_numbers(config, default(config.objective), "")
    _check_weights(config.data)
    _one_of(config.model, "remat", ("none", "dots", "block"), "model.")
    _one_of(config.model, "attention", ("auto", "cudnn", "xla"), "model.")
    _one_of(config, "precision", ("bfloat16", "float32", "float64"))
    _one_of(config, "parameter_precision", ("float32", "float64"))
    _one_of(config.data, "normalize", ("imagenet", "dataset"), "data.")
    _one_of(config.optimizer, "clip", ("none", "global", "groups", "parameter"), "optimizer.")
    _one_of(config.optimizer, "decay", ("all", "matrices", "no_bias_or_norm"), "optimizer.")
    _check_rate_factors(config.optimizer.rate_factors)
    objectives.validate(config, Layout(batch_shards, weight_shards, hosts))


def _value(config: ConfigDict, field: str):
    return functools.reduce(getattr, field.split("."), config)


def _check_ranges(config: ConfigDict) -> None:
    for field, (words, is_valid) in _RANGES.items():
        value = _value(config, field)
        try:
            valid = is_valid(value)
        except TypeError:  # no numbers
            valid = False
        if not valid:
            raise UserError(f"{field}={value!r} must be {words}")


def _check_numbers(config: ConfigDict, reference: ConfigDict, prefix: str) -> None:
    """Raises UserError for a number that is NaN or infinite, and for a tuple of numbers whose default has others."""
    for name, value in reference.items():
        found, field = config[name], f"{prefix}{name}"
        if isinstance(value, ConfigDict):
            _check_numbers(found, value, f"{field}.")
        elif isinstance(value, tuple) and value and all(_is_number(each) for each in value):
            if len(found) != len(value) or not all(_is_number(each) and math.isfinite(each) for each in found):
                raise UserError(f"{field}={found!r} must be {len(value)} finite numbers, such as {value}")
        elif isinstance(found, float) and not math.isfinite(found):
            raise UserError(f"{field}={found} must be a finite number, such as {value}")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_weights(data: ConfigDict) -> None:
    weights, folders = tuple(data.weights), data.path.count(",") + 1
    if not weights or not data.path:
        return
    if folders == 1:
        raise UserError(f"data.weights={weights} has no effect on the one dataset of data.path; remove data.weights")
    positive = (isinstance(weight, int | float) and 0 < weight < float("inf") for weight in weights)
    if len(weights) != folders or not all(positive):
        raise UserError(
            f"data.weights={weights} must have a positive number for each of the {folders} datasets of data.path, or "
            "be empty to weight datasets by their number of records"
        )


def check_fields(config: ConfigDict) -> None:
    """Checks that a config has exactly the fields of a training. Raises UserError for the first that differs."""
    if "tasks" in config and "objective" not in config:
        raise UserError(
            "the config is a probe config, with tasks; use it with pera-jax probe, or choose another config"
        )
    reference = default(config.get("objective", "pera"))
    _same_fields(config, reference, "", reference)


def _check_rate_factors(rules) -> None:
    for rule in rules:
        try:
            pattern, factor = rule
            re.compile(pattern)
            valid = not isinstance(factor, bool) and isinstance(factor, int | float) and 0 <= factor < float("inf")
        except (TypeError, ValueError, re.error):
            valid = False
        if not valid:
            raise UserError(f"optimizer.rate_factors holds {rule!r}; each must be (path regex, factor >= 0)")


def _check_batch(config: ConfigDict, batch_shards: int, hosts: int) -> None:
    batch, parts = config.batch_size, config.accumulate
    group = config.drop_path.group
    if batch < 1 or batch % batch_shards or batch % hosts:
        raise UserError(
            f"batch_size={batch} is not divisible by the {batch_shards} shard(s) of the mesh (data x fsdp) and the "
            f"{hosts} host(s); choose a multiple of both"
        )
    local = batch // batch_shards
    if parts < 1 or local % parts:
        raise UserError(
            f"accumulate={parts} does not divide the {local} images per device; choose a divisor of {local}"
        )
    local //= parts
    if group < 0 or (group and batch % group):
        raise UserError(
            f"batch_size={batch} is not divisible by drop_path.group={group}; use a divisor, or 0 for the whole batch"
        )
    if not config.drop_path.rate:
        return
    if not group and batch_shards * parts > 1:
        raise UserError(
            f"drop_path.group=0 draws from the whole batch, but it is split over {batch_shards} device(s) and {parts} "
            f"microbatch(es); choose a divisor of {local}"
        )
    if group and local % group:
        raise UserError(
            f"drop_path.group={group} does not divide the {local} images per device and microbatch; choose a divisor "
            f"of {local}"
        )


def _one_of(config: ConfigDict, field: str, allowed: tuple[str, ...], prefix: str = "") -> None:
    if config[field] not in allowed:
        raise UserError(f"{prefix}{field}={config[field]!r} is invalid; expected one of {', '.join(allowed)}")


def _same_fields(config: ConfigDict, reference: ConfigDict, prefix: str, known: ConfigDict) -> None:
    unknown = sorted(set(config) - set(reference))
    if unknown:
        now = new_name(f"{prefix}{unknown[0]}", known)
        fix = f"it is now called {now}" if now else f"known here: {', '.join(sorted(reference))}"
        raise UserError(f"the config has no field {prefix}{unknown[0]}; {fix}")
    missing = sorted(set(reference) - set(config))
    if missing:
        raise UserError(
            f"the config lacks the field {prefix}{missing[0]}; start from pera_jax.config.default(objective)"
        )
    for name, value in reference.items():
        if isinstance(value, ConfigDict):
            if not isinstance(config[name], ConfigDict):
                raise UserError(f"the config's field {prefix}{name} must be a group of fields, got {config[name]!r}")
            _same_fields(config[name], value, f"{prefix}{name}.", known)
