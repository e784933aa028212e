"""The `meta` of a run: JSON with everything needed to use its weights, without the config file."""

import json
import pathlib
import subprocess
from typing import Any

from ml_collections import ConfigDict

from pera_jax.common import files
from pera_jax.common.errors import UserError
from pera_jax.models import vit
from pera_jax.objectives.base import Objective, networks
from pera_jax.training.checkpoints import intact


def git_revision() -> str:
    """The git revision of this checkout, with `-dirty` if there are local changes; "unknown" outside of a checkout."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(config: ConfigDict, objective: Objective, data: dict[str, Any]) -> dict[str, Any]:
    """The `meta` of a run's checkpoints.

    Args:
      data: the dataset's card, from `Mixture.card`.
    """
    return {
        "format_version": intact.FORMAT_VERSION,
        "model": vit.description(objective.encoder),
        **objective.bands.to_dict(),
        "method": {"name": objective.name, "citation": objective.citation},
        "networks": list(networks(objective)),
        "data": data,
        "git": git_revision(),
        "config": json.loads(config.to_json()),
    }


def as_bytes(meta: dict[str, Any]) -> bytes:
    """The content of config.json."""
    return (json.dumps(meta, indent=2) + "\n").encode("ascii")


def write(workdir: str, meta: dict[str, Any]) -> None:
    """Writes `meta` to `workdir`/config.json, for people, and for the report of a run without checkpoints.

    Raises:
      UserError: the workdir cannot be written.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        files.write(path, as_bytes(meta))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space or choose another workdir") from error


def mark_finished(workdir: str, step: int | None) -> None:
    """Writes `step` to `workdir`/FINISHED, which marks a run that has reached its last step; None removes the file."""
    path = pathlib.Path(workdir) / "FINISHED"
    if step is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(f"{step}\n")
