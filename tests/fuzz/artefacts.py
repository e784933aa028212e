"""What the program reads, by name: how a sound one is made, what reads it, which of its files are damaged.

A reader may raise UserError and nothing else; where it returns something, that must be the same as of the sound one.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from data_artefacts import (
    make_archives,
    make_names,
    make_partial,
    make_pictures,
    make_shards,
    read_archives,
    read_names,
    read_partial,
    read_pictures,
    read_shards,
    read_tables,
    verify_shards,
)  # fmt: skip
from run_artefacts import (
    make_cache,
    make_export,
    make_features,
    make_meta,
    make_run,
    read_cache,
    read_export,
    read_features,
    read_foreign_weights,
    read_meta,
    read_run,
    resume_metrics,
    show_results,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], Any]
    damaged: str = "**/*"


TARGETS = {
    "shards": Target(make_shards, read_shards),
    "verify": Target(make_shards, verify_shards),
    "unfinished conversion": Target(make_partial, read_partial, "out/.train.partial/*"),
    "pictures": Target(make_pictures, read_pictures),
    "archives": Target(make_archives, read_archives, "in.*"),
    "names": Target(make_names, read_names, "in/*/*"),
    "tables": Target(make_names, read_tables, "*.*"),
    "results": Target(make_run, show_results, "run/probe/*/*.json"),
    "report": Target(make_run, read_run),
    "metrics": Target(make_run, resume_metrics, "run/*.jsonl"),
    "meta": Target(make_meta, read_meta),
    "feature cache": Target(make_cache, read_cache),
    "feature folder": Target(make_features, read_features),
    "export": Target(make_export, read_export, "out/*.*"),
    "foreign weights": Target(make_export, read_foreign_weights, "timm/*"),
}
