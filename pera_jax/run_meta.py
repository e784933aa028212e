"""What a checkpoint says of its run, the `meta`: JSON, enough to use the weights without the config's file."""

import json
import os
import pathlib
import subprocess
from typing import Any

from ml_collections import ConfigDict

from pera_jax import intact
from pera_jax.errors import UserError
from pera_jax.models import vit
from pera_jax.objectives import pera


def git_revision() -> str:
    """The revision of the program's checkout with `-dirty` for local changes, or "unknown" outside of one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(config: ConfigDict, objective: pera.PerA, data: dict[str, Any]) -> dict[str, Any]:
    """The `meta` of a run's checkpoints: JSON, enough to use the weights without the config's file.

    Args:
      data: the data set's card, from `Mixture.card`.
    """
    return {
        "format_version": intact.FORMAT_VERSION,
        "model": vit.description(objective.vit),
        **objective.bands.described(),
        "data": data,
        "git": git_revision(),
        "config": json.loads(config.to_json()),
    }


def write(workdir: str, meta: dict[str, Any]) -> None:
    """Writes `meta` to `workdir`/config.json, for people to read, and for the report of a run without a checkpoint.

    Raises:
      UserError: the workdir cannot be written.
    """
    path = pathlib.Path(workdir) / "config.json"
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(meta, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; make room or choose another workdir") from error


def mark_finished(workdir: str, step: int | None) -> None:
    """Writes `workdir`/FINISHED, the sign that a run has come to its last `step`; None takes it away."""
    path = pathlib.Path(workdir) / "FINISHED"
    if step is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(f"{step}\n")


def check_same_run(found: dict[str, Any], wanted: dict[str, Any], workdir: str, allow_changed_data: bool) -> None:
    """Refuses to go on with a checkpoint of another model or data set.

    Args:
      found: the checkpoint's `meta`; wanted: the one that this run would write.

    Raises:
      UserError: names the first thing that differs and both values.
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
    for name in ("objective", "heads", "seed", "batch_size", "crops", "parameter_precision"):
        was, now = found["config"][name], wanted["config"][name]
        if was != now:
            raise UserError(f"{other} run: its {name} is {was}, this config gives {now}; {mend}")
    if found["data"]["fingerprint"] != wanted["data"]["fingerprint"] and not allow_changed_data:
        raise UserError(
            f"{other} data set: {found['data']['name']} with fingerprint {found['data']['fingerprint']}, this is "
            f"{wanted['data']['name']} with {wanted['data']['fingerprint']}; {mend}, or set "
            "data.allow_changed_data=True"
        )
