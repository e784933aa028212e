"""Schema of the `meta` of checkpoints, and of the config.json of runs and exports."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import msgspec
from ml_collections import ConfigDict

from pera_jax import config as configs
from pera_jax.common import json_files
from pera_jax.common.errors import UserError
from pera_jax.common.json_files import Count, Finite, Name, Positive
from pera_jax.data import codecs
from pera_jax.models import vit

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 17)]
_Depth = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
_Ratio = Annotated[float, msgspec.Meta(gt=0, le=1 << 10)]
_LayerScale = Annotated[float, msgspec.Meta(ge=0, le=1 << 10)]
_Deviation = Annotated[float, msgspec.Meta(gt=0, le=1e300)]

# Config fields that reports use. (`objectives.from_metadata` checks those that define the network.)
_REQUIRED = ("name", "objective", "total", "seed", "batch_size", "data.path", "data.split", "data.rgb")


@dataclasses.dataclass
class _Model:
    width: _Size
    depth: _Depth
    heads: _Size
    patch: _Size
    image_size: _Size
    bands: _Size
    split: _Depth
    mlp_ratio: _Ratio
    position: Literal[vit.POSITIONS] = "learned"  # type: ignore[valid-type]
    layer_scale: _LayerScale = 0.0


@dataclasses.dataclass
class _Used:
    """The fields needed to use an encoder."""

    format_version: int
    model: _Model
    bands: list[Name]
    dtype: Literal[codecs.DTYPES]  # type: ignore[valid-type]
    ranges: list[tuple[Finite, Finite]]
    mean: list[Finite]
    std: list[_Deviation]
    git: str

    def __post_init__(self):
        lengths = {
            "ranges": len(self.ranges),
            "mean": len(self.mean),
            "std": len(self.std),
            "model.bands": self.model.bands,
        }
        for name, length in lengths.items():
            if length != len(self.bands):
                raise ValueError(f"{name} has {length} bands, but bands has {len(self.bands)} names")
        if not all(low < high for low, high in self.ranges):
            raise ValueError("expected ranges with low < high")


@dataclasses.dataclass
class _Set:
    name: str
    records: Count
    share: Finite


@dataclasses.dataclass
class _Data:
    name: str
    split: str | None
    records: Count | None
    fingerprint: str
    class_names: list[str] | None = None
    sets: list[_Set] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Imported:
    file: str
    backbone_alone: bool


@dataclasses.dataclass
class _Method:
    name: Name
    citation: str


@dataclasses.dataclass
class _Meta(_Used):
    data: _Data
    config: dict[str, Any]
    imported: _Imported | None = None
    method: _Method | None = None  # checkpoints of earlier versions lack it


@dataclasses.dataclass
class _Exported(_Used):
    network: Name
    step: Count
    image_size: tuple[Positive, Positive]


def check_meta(meta: Any) -> None:
    """Checks the `meta` of a checkpoint or of a run's config.json.

    Raises:
      json_files.Invalid: names a field that is missing, has another type, or contradicts the others.
    """
    used = json_files.convert(meta, _Meta)
    _check_config(used.config, _reference(used.config), "config")
    for field in _REQUIRED:
        value = used.config
        for name in field.split("."):
            value = value.get(name)
            if value is None:
                raise json_files.Invalid(f"config: missing field {field}")
    asked = {name: value for name, value in used.config.get("model", {}).items() if value}  # 0: set by model.variant
    asked |= {"image_size": used.config.get("crops", {}).get("global_size")}
    for name, value in dataclasses.asdict(used.model).items():
        if asked.get(name) not in (None, value):
            raise json_files.Invalid(f"model.{name} is {value}, but the config has {asked[name]}")


def _reference(config: dict[str, Any]) -> ConfigDict:
    """The default config of the method that a config names, or the default config if that method is not installed.

    (An encoder can be used without the method that trained it.)
    """
    try:
        return configs.default(config.get("objective", ""))
    except UserError:
        return configs.default()


def check_exported(entry: Any) -> None:
    """Like `check_meta`, for the entry that an export for timm adds to config.json."""
    json_files.convert(entry, _Exported)


def _check_config(found: dict[str, Any], reference: ConfigDict, place: str) -> None:
    """Checks the types of the fields that are present. (An older config lacks fields that were added later.)"""
    for name, default in reference.items():
        if name not in found or name == "schedules":  # a schedule is a number or a group of fields
            continue
        value, where = found[name], f"{place}.{name}"
        if isinstance(default, ConfigDict):
            if not isinstance(value, dict):
                raise json_files.Invalid(f"{where}: expected a group of fields, got {type(value).__name__}")
            _check_config(value, default, where)
        elif not _same_type(value, default):
            raise json_files.Invalid(f"{where}: expected {type(default).__name__}, got {type(value).__name__}")


def _same_type(value: Any, default: Any) -> bool:
    """Whether a value from JSON has the type of a config's default."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return False
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not math.isnan(value)
    if isinstance(default, (tuple, list)):
        return isinstance(value, (tuple, list))
    return default is None or isinstance(value, type(default))
