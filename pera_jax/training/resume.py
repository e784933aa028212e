"""Resuming a run: which fields of its config may change, what is reported, and what is kept.

The policy for each field of the config:

* `FREE` and the objective's `free_fields`: do not change any computed number. May change.
* `FIXED`, the objective's `fixed_fields`, and the model and bands in `meta`: another value makes it another run. May
  not change.
* All others influence the rest of the run: `total`, `batch_size`, `schedules`, `optimizer`, crops, the objective's own
  fields, ... They may change with `--allow-config-change`. The fields of `data` may also change with
  `data.allow_changed_data`; the run then keeps the ranges, mean and std with which it has been trained so far.

All changes are listed when the run resumes, and the earlier config is kept in the workdir.
"""

import dataclasses
import json
import pathlib
from typing import Any

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common import files
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
_MOST = 8  # number of changes listed in one line
EARLIER = "earlier_configs"


@dataclasses.dataclass(frozen=True)
class Change:
    """A field of the config, or another property of the run, that has changed."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} {_short(self.before)} -> {_short(self.now)}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def check_same_run(
    found: dict[str, Any],
    wanted: dict[str, Any],
    workdir: str,
    allow_changed_data: bool,
    allow_config_change: bool = False,
) -> list[Change]:
    """Refuses to resume from a checkpoint of another model, run or dataset; returns the changes that are allowed.

    Args:
      found: the checkpoint's `meta`. wanted: the `meta` that this run would write.

    Raises:
      UserError: names the difference and both values.
    """
    if "imported" in found:
        raise UserError(
            f"{workdir} holds weights imported from {found['imported']['file']}, not a run that can be resumed; set "
            "init_from to it and use another --workdir"
        )
    other = f"the checkpoint in {workdir} belongs to another"
    fix = "use another --workdir, or the config that the run was started with"
    was, now = found["config"]["objective"], wanted["config"]["objective"]
    shapes = [(f"model.{name}", wanted["model"].get(name), found["model"].get(name))
              for name in wanted["model"] | found["model"]]  # fmt: skip
    bands = [(name, wanted[name], found[name]) for name in ("bands", "dtype", "ranges", "mean", "std")]
    different = [each for each in (("objective", now, was), *shapes, *bands) if each[1] != each[2]]
    if different:
        said = several([f"{name} {expected} from this config, got {got}" for name, expected, got in different], _MOST)
        raise UserError(f"{other} model: expected {said}; {fix}")
    changes = _changes(found["config"], wanted["config"])
    method = objectives.method(wanted["config"]["objective"])
    own = {
        kind: tuple(f"{method.name}.{field}" for field in getattr(method, kind))
        for kind in ("fixed_fields", "free_fields")
    }
    for change in changes:
        if _within(change.field, (*FIXED, *own["fixed_fields"])):
            raise UserError(
                f"{other} run: expected {change.field} {change.now} from this config, got {change.before}; {fix}"
            )
    free = (*FREE, *own["free_fields"], *(("data",) if allow_changed_data else ()))
    shaping = [change for change in changes if not _within(change.field, free)]
    if shaping and not allow_config_change:
        first, *rest = shaping
        also = f" (and {several(rest, _MOST)})" if rest else ""
        raise UserError(
            f"{other} run: expected {first.field} {first.now} from this config, got {first.before}{also}; {fix}, or "
            "pass --allow-config-change to resume with the changed config"
        )
    if found["data"]["fingerprint"] != wanted["data"]["fingerprint"]:
        if not allow_changed_data:
            raise UserError(
                f"{other} dataset: expected {wanted['data']['name']} with fingerprint {wanted['data']['fingerprint']}, "
                f"got {found['data']['name']} with {found['data']['fingerprint']}; {fix}, or set "
                "data.allow_changed_data=True"
            )
        was, now = (f"{card['name']} ({card['records']:,} images)" for card in (found["data"], wanted["data"]))
        changes.append(Change("dataset", was, now))
    if found["git"] != wanted["git"]:
        changes.append(Change("program", found["git"], wanted["git"]))
    return sorted(changes, key=lambda change: change not in shaping)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Fields that differ, in the config's order; fields missing in `before` had their default."""
    default = _flat(json.loads(configs.default(now["objective"]).to_json()))
    before, now = default | _flat(before), _flat(now)
    return [
        Change(name, before.get(name), value)
        for name, value in now.items()
        if name not in BY_MODEL and before.get(name) != value
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _within(field: str, names: tuple[str, ...]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def sentence(step: int, total: int, changes: list[Change]) -> str:
    """The line that is printed when a run resumes."""
    return f"resuming from step {step:,} of {total:,}" + (f"; changed: {several(changes, _MOST)}" if changes else "")


def with_own_statistics(data: Mixture, found: dict[str, Any] | None, settings) -> Mixture:
    """`data` with the ranges, mean and std that the run was trained with so far, if only its dataset has changed.

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
    """The position in the stream of batches of `now` images: (index of the next batch, images trained on so far).

    With another batch size the stream changes: an epoch has the same shuffle, but drops other images at its end.

    Args:
      position: the data position of a checkpoint. before: its batch size.
    """
    images = position.get("images", position["batches"] * before)
    return (position["batches"], images) if before == now else (images // now, images)


def keep_earlier(workdir: str, meta: dict[str, Any], step: int) -> None:
    """Copies `workdir`/config.json to `workdir`/earlier_configs/until_step_STEP.json if it differs from `meta`.

    Raises:
      UserError: the workdir cannot be written.
    """
    current, folder = pathlib.Path(workdir) / "config.json", pathlib.Path(workdir) / EARLIER
    try:
        content = current.read_bytes() if current.exists() else b""
        if not content or content == run_meta.as_bytes(meta):
            return
        place, number = folder / f"until_step_{step:06d}.json", 1
        while place.exists() and place.read_bytes() != content:
            number += 1
            place = folder / f"until_step_{step:06d}_{number}.json"
        files.write(place, content)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free disk space or choose another workdir"
        ) from error
