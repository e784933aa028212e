"""What a checkpoint says of its run, the `meta`: JSON, enough to use the weights without the config's file."""

import json
import pathlib
import subprocess
from typing import Any

from ml_collections import ConfigDict

from pera_jax.common import files
from pera_jax.common.errors import UserError
from pera_jax.models import vit
from pera_jax.objectives.base import Objective
from pera_jax.training.checkpoints import intact


def git_revision() -> str:
    """The revision of the program's checkout with `-dirty` for local changes, or "unknown" outside of one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(config: ConfigDict, objective: Objective, data: dict[str, Any]) -> dict[str, Any]:
    """The `meta` of a run's checkpoints: JSON, enough to use the weights without the config's file.

    Args:
      data: the data set's card, from `Mixture.card`.
    """
    return {
        "format_version": intact.FORMAT_VERSION,
        "model": vit.description(objective.encoder),
        **objective.bands.to_dict(),
        "networks": ["teacher", "student"] if objective.teacher_keys else ["student"],
        "data": data,
        "git": git_revision(),
        "config": json.loads(config.to_json()),
    }


def as_bytes(meta: dict[str, Any]) -> bytes:
    """The content of config.json."""
    return (json.dumps(meta, indent=2) + "\n").encode("ascii")


def write(workdir: str, meta: dict[str, Any]) -> None:
    """Writes `meta` to `workdir`/config.json, for people to read, and for the report of a run without a checkpoint.

    Raises:
      UserError: the workdir cannot be written.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        files.write(path, as_bytes(meta))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space or choose another workdir") from error


def mark_finished(workdir: str, step: int | None) -> None:
    """Writes `workdir`/FINISHED, the sign that a run has come to its last `step`; None takes it away."""
    path = pathlib.Path(workdir) / "FINISHED"
    if step is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(f"{step}\n")
