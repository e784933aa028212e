"""Going on with a run: which fields of its config may change on the way, what is said about it, what is kept.

The policy, for each field of the config:

* `FREE`: changes neither the numbers that the run computes nor their order. May change.
* `FIXED`, the objective's `fixed_fields`, and what `meta` says of model and bands: with another value it is another run. May not change.
* all others shape what comes: `total`, `batch_size`, `schedules`, `optimizer`, crops, the objective's own, ... They may
  change with `--allow-config-change`. With `data.allow_changed_data` the fields of `data` may, too; the run then keeps
  the ranges, mean and std with which it has been trained so far.

Whatever has changed is listed as the run goes on, and the config of before stays in the workdir.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.data.mixture import Mixture
from pera_jax.training.checkpoints import run_meta

FREE = (
    "name", "accumulate", "mesh", "model.scan", "model.remat", "model.attention", "log_every", "stall_seconds",
    "checkpoint", "monitor", "resume_from", "init_from", "data.path", "data.workers",
    "data.skip_damaged", "data.allow_changed_data",
)  # fmt: skip
FIXED = ("objective", "seed", "parameter_precision")
BY_MODEL = tuple(f"model.{name}" for name in ("variant", "width", "depth", "heads", "patch"))  # `meta["model"]` counts
_MOST = 8  # changes that a line names
EARLIER = "earlier_configs"


@dataclasses.dataclass(frozen=True)
class Change:
    """A field of the config, or another thing, that is not as it was."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} {_short(self.before)} -> {_short(self.now)}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def check_same_run(
    found: dict[str, Any], wanted: dict[str, Any], workdir: str, allow_changed_data: bool, allow_config_change: bool = False
) -> list[Change]:
    """Refuses to go on with a checkpoint of another model, run or data set; returns what has changed and may.

    Args:
      found: the checkpoint's `meta`; wanted: the one that this run would write.

    Raises:
      UserError: names what differs and both values.
    """
    if "imported" in found:
        raise UserError(
            f"{workdir} holds weights imported from {found['imported']['file']} and no run to go on with; begin from them "
            "with init_from and another --workdir"
        )
    other = f"the checkpoint in {workdir} is of another"
    mend = "use another --workdir, or the config that began it"
    for name in ("model", "bands", "dtype", "ranges", "mean", "std"):
        if found[name] != wanted[name]:
            raise UserError(f"{other} model: its {name} is {found[name]}, this config gives {wanted[name]}; {mend}")
    changes = _changes(found["config"], wanted["config"])
    method = objectives.method(wanted["config"]["objective"])
    own = {kind: tuple(f"{method.name}.{field}" for field in getattr(method, kind)) for kind in ("fixed_fields", "free_fields")}
    for change in changes:
        if _within(change.field, (*FIXED, *own["fixed_fields"])):
            raise UserError(f"{other} run: its {change.field} is {change.before}, this config gives {change.now}; {mend}")
    free = (*FREE, *own["free_fields"], *(("data",) if allow_changed_data else ()))
    shaping = [change for change in changes if not _within(change.field, free)]
    if shaping and not allow_config_change:
        first, *rest = shaping
        also = f" (and {several(rest, _MOST)})" if rest else ""
        raise UserError(
            f"{other} run: its {first.field} is {first.before}, this config gives {first.now}{also}; {mend}, or go on with "
            "this one by --allow-config-change"
        )
    if found["data"]["fingerprint"] != wanted["data"]["fingerprint"]:
        if not allow_changed_data:
            raise UserError(
                f"{other} data set: {found['data']['name']} with fingerprint {found['data']['fingerprint']}, this is "
                f"{wanted['data']['name']} with {wanted['data']['fingerprint']}; {mend}, or set "
                "data.allow_changed_data=True"
            )
        was, now = (f"{card['name']} ({card['records']:,} images)" for card in (found["data"], wanted["data"]))
        changes.append(Change("data set", was, now))
    if found["git"] != wanted["git"]:
        changes.append(Change("program", found["git"], wanted["git"]))
    return sorted(changes, key=lambda change: change not in shaping)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Fields that differ, in the config's order; a field that `before` did not know had its default."""
    default = _flat(json.loads(configs.default(now["objective"]).to_json()))
    before, now = default | _flat(before), _flat(now)
    return [Change(name, before.get(name), value) for name, value in now.items() if name not in BY_MODEL and before.get(name) != value]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _within(field: str, names: tuple[str, ...]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def sentence(step: int, total: int, changes: list[Change]) -> str:
    """What is said as a run goes on."""
    return f"resuming from step {step:,} of {total:,}" + (f"; changed: {several(changes, _MOST)}" if changes else "")


def with_own_statistics(data: Mixture, found: dict[str, Any] | None, settings) -> Mixture:
    """The data with the ranges, mean and std that a run has been trained with, where only its data set is another.

    Args:
      found: the `meta` of the run's checkpoint; None for a new run.
      settings: `config.data`.
    """
    if found is None or "imported" in found or not settings.allow_changed_data:
        return data
    was, own = found["config"]["data"], Bands.from_metadata(found)
    same = all(was[name] == json.loads(json.dumps(settings[name])) for name in ("bands", "ranges", "normalize"))
    if not same or (own.names, own.dtype) != (data.bands.names, data.bands.dtype):
        return data
    return dataclasses.replace(data, bands=own)


def place_in_stream(position: dict[str, Any], before: int, now: int) -> tuple[int, int]:
    """Where to go on in the stream of batches of `now` images: (the number of the batch, images trained on so far).

    Args:
      position: of a checkpoint; before: its batch size.

    With another batch size the stream is another: within an epoch the same shuffle, of which other images are left out.
    """
    images = position.get("images", position["batches"] * before)
    return (position["batches"], images) if before == now else (images // now, images)


def keep_earlier(workdir: str, meta: dict[str, Any], step: int) -> None:
    """Copies `workdir`/config.json to `workdir`/earlier_configs/until_step_STEP.json, where it is not as `meta`.

    Raises:
      UserError: the workdir cannot be written.
    """
    current, folder = pathlib.Path(workdir) / "config.json", pathlib.Path(workdir) / EARLIER
    try:
        content = current.read_bytes() if current.exists() else b""
        if not content or content == run_meta.as_bytes(meta):
            return
        folder.mkdir(exist_ok=True)
        place, number = folder / f"until_step_{step:06d}.json", 1
        while place.exists() and place.read_bytes() != content:
            number += 1
            place = folder / f"until_step_{step:06d}_{number}.json"
        temporary = place.with_name(place.name + ".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, place)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; make room or choose another workdir") from error
