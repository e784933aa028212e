"""Reads probe results from their JSON files and checks the types of all fields that the program uses."""

import dataclasses
import pathlib
from typing import Any

from pera_jax.common import json_files
from pera_jax.common.errors import UserError
from pera_jax.common.json_files import Count, Finite, Name
from pera_jax.common.text import printable

_MOST_CLASSES = 1 << 20


@dataclasses.dataclass
class _Score:
    value: Finite
    low: Finite | None
    high: Finite | None
    seeds: list[Finite]


@dataclasses.dataclass
class _Checkpoint:
    step: Count
    encoder: Name
    run: str = ""
    saved: str = ""
    weights: str = ""
    origin: str = ".."
    image_size: Count = 0


@dataclasses.dataclass
class _Data:
    path: str
    name: str = ""
    class_names: list[str] = dataclasses.field(default_factory=list)
    train_split: str = ""
    test_split: str = ""
    train_fingerprint: str | None = None
    test_fingerprint: str | None = None
    train_images: Count | None = None
    test_images: Count | None = None


@dataclasses.dataclass
class _Spec:
    task: Name


@dataclasses.dataclass
class _Entry:
    name: Name
    task: Name
    checkpoint: _Checkpoint
    data: _Data
    spec: _Spec
    scores: dict[str, _Score] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: str = ""


def read(file: pathlib.Path) -> dict[str, Any]:
    """Reads the entry in a result file, see `results`. Raises UserError if the file cannot be read or is not a probe
    result."""
    try:
        entry = json_files.loads(file.read_bytes())
        typed = json_files.convert(entry, _Entry)
        if len(typed.data.class_names) > _MOST_CLASSES:
            raise json_files.Invalid(f"data.class_names: {len(typed.data.class_names):,} names")
        if "failure" not in entry and "scores" not in entry:
            raise json_files.Invalid("expected scores or a failure, got neither")
    except OSError as error:
        raise UserError(
            f"{printable(file)} cannot be read: {error.strerror or error}; check its permissions"
        ) from error
    except json_files.Invalid as error:
        raise UserError(
            f"{printable(file)} is not a probe result ({error}); move the file away or choose another --output"
        ) from error
    checkpoint = {"run": "", "saved": ""} | entry["checkpoint"]
    return entry | {"checkpoint": checkpoint, "data": {"class_names": []} | entry["data"]}
