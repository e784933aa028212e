"""Checks a config before data and model are built."""

import functools
import re

from ml_collections import ConfigDict

from pera_jax import objectives
from pera_jax.common import paths
from pera_jax.common.errors import UserError
from pera_jax.config.defaults import default
from pera_jax.config.renamed import new_name
from pera_jax.models import variants
from pera_jax.objectives.base import Layout

PATHS = ("resume_from", "init_from", "data.path", "monitor.data")
"""The fields that hold paths."""


def check(config: ConfigDict, batch_shards: int, weight_shards: int, hosts: int) -> None:
    """Checks everything in a config that does not depend on data or model.

    Args:
      batch_shards: number of shards of a batch (data x fsdp).
      weight_shards: number of shards of the prototypes (fsdp x tensor).
      hosts: number of processes that read data.

    Raises:
      UserError: names the first invalid field.
    """
    _same_fields(config, default(config.get("objective", "pera")), "")
    for field in PATHS:
        paths.local(functools.reduce(getattr, field.split("."), config), f"config.{field}")
    _check_batch(config, batch_shards, hosts)
    if not 0 <= config.drop_path.rate < 1:
        raise UserError(f"drop_path.rate={config.drop_path.rate} must lie in [0, 1)")
    crops, patch = config.crops, variants.sizes(config.model)["patch"]
    for kind, number in (("global", crops.global_number), ("local", crops.local_number)):
        size = crops[f"{kind}_size"]
        if number and size % patch:
            raise UserError(
                f"crops.{kind}_size={size} is not a multiple of the patch size {patch}; choose a multiple of {patch}"
            )
    if crops.global_number < 1 or crops.local_number < 0:
        raise UserError("crops.global_number must be >= 1 and crops.local_number >= 0")
    if config.data.workers < -1:
        raise UserError(f"data.workers={config.data.workers} must be >= 0, or -1 to choose by the number of cores")
    if config.stall_seconds < 0:
        raise UserError(f"stall_seconds={config.stall_seconds} must be >= 0 (0 disables it)")
    if config.monitor.images < 1:
        raise UserError(f"monitor.images={config.monitor.images} must be >= 1")
    _one_of(config.model, "remat", ("none", "dots", "block"), "model.")
    _one_of(config.model, "attention", ("auto", "cudnn", "xla"), "model.")
    _one_of(config, "precision", ("bfloat16", "float32", "float64"))
    _one_of(config, "parameter_precision", ("float32", "float64"))
    _one_of(config.data, "normalize", ("imagenet", "dataset"), "data.")
    _one_of(config.optimizer, "decay", ("all", "matrices"), "optimizer.")
    _check_rate_factors(config.optimizer.rate_factors)
    objectives.validate(config, Layout(batch_shards, weight_shards, hosts))


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


def _same_fields(config: ConfigDict, reference: ConfigDict, prefix: str) -> None:
    unknown = sorted(set(config) - set(reference))
    if unknown:
        now = new_name(f"{prefix}{unknown[0]}")
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
            _same_fields(config[name], value, f"{prefix}{name}.")
