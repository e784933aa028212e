"""A result of a probe as it is read back from its file: every field that the program uses has its type."""

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
    """The entry in a file, see `results`. Raises UserError: the file cannot be read, or is no result; names the field."""
    try:
        entry = json_files.loads(file.read_bytes())
        typed = json_files.convert(entry, _Entry)
        if len(typed.data.class_names) > _MOST_CLASSES:
            raise json_files.Invalid(f"data.class_names: {len(typed.data.class_names):,} names")
        if "failure" not in entry and "scores" not in entry:
            raise json_files.Invalid("it has neither scores nor a failure")
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read: {error.strerror or error}") from error
    except json_files.Invalid as error:
        raise UserError(
            f"{printable(file)} is no result of a probe ({error}); move it away or choose another --output"
        ) from error
    checkpoint = {"run": "", "saved": ""} | entry["checkpoint"]
    return entry | {"checkpoint": checkpoint, "data": {"class_names": []} | entry["data"]}
