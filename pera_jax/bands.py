"""The bands that a network takes, their order, and how stored values are mapped to [0, 1] and normalized.

Set once, at the start of a run, from the config and the dataset, and stored with the weights, so that raw values are
always mapped as they were in training.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.common.text import several

RGB = ("red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class Bands:
    """
    Attributes:
      names: band names, in channel order.
      dtype: dtype of the stored values: uint8, uint16 or float32.
      ranges: (low, high) of each band in stored units, mapped to 0 and 1; values outside are clipped.
      mean, std: per band, after that mapping; subtracted, then divided by.
    """

    names: tuple[str, ...]
    dtype: str
    ranges: tuple[tuple[float, float], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def plain(cls, names: Sequence[str] = RGB, mean: float = 0.5, std: float = 0.25) -> "Bands":
        """uint8 bands of full range with the same mean and std, for programs without data."""
        n = len(names)
        return cls(tuple(names), "uint8", ((0.0, 255.0),) * n, (mean,) * n, (std,) * n)

    @classmethod
    def from_metadata(cls, meta: dict[str, Any]) -> "Bands":
        """The bands stored in a checkpoint's `meta`."""
        ranges = tuple((low, high) for low, high in meta["ranges"])
        return cls(tuple(meta["bands"]), meta["dtype"], ranges, tuple(meta["mean"]), tuple(meta["std"]))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_metadata`; JSON types only."""
        return {
            "bands": list(self.names), "dtype": self.dtype, "ranges": [list(pair) for pair in self.ranges],
            "mean": list(self.mean), "std": list(self.std),
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    def is_rgb8(self) -> bool:
        """Whether the bands are 8-bit red, green and blue, so that ordinary image files can be read."""
        return self.dtype == "uint8" and set(self.names) <= set(RGB)

    def mapped(self, values, dtype=np.float32):
        """Maps stored values [..., C] (NumPy or JAX) to [0, 1] in `dtype`."""
        low, high = np.asarray(self.ranges, dtype).T  # [C] each
        return ((values.astype(dtype) - low) / (high - low)).clip(0, 1)

    def normalized(self, values, dtype=np.float32):
        """Maps stored values [..., C] to network inputs: `(mapped(values) - mean) / std`."""
        return (self.mapped(values, dtype) - np.asarray(self.mean, dtype)) / np.asarray(self.std, dtype)

    def denormalized(self, values):
        """Maps network inputs [..., C] back to values in [0, 1]."""
        return values * self.std + self.mean

    def indices_in(self, info, folder) -> list[int]:
        """The indices of these bands among those of a dataset (a `records.DatasetInfo`).

        Raises:
          UserError: the dataset lacks a band, or its dtype differs.
        """
        for name in self.names:
            if name not in info.bands:
                raise UserError(f"{folder} has no band {name!r}; it has {several(info.bands, 20)}")
        if info.dtype != self.dtype:
            raise UserError(
                f"expected {self.dtype} values in {folder}, got {info.dtype}; convert the dataset to {self.dtype}"
            )
        return [info.bands.index(name) for name in self.names]


def rgb_indices(wanted: Sequence[str], names: Sequence[str]) -> tuple[int, int, int] | None:
    """The indices of the red, green and blue channels; None if there are none.

    Args:
      wanted: `config.data.rgb`: the names of the three bands, or () to use `names` if they are exactly red, green,
        blue.
      names: band names, in channel order.

    Raises:
      UserError: not three distinct names, or a name that is not a band.
    """
    wanted = tuple(wanted) or (RGB if tuple(names) == RGB else ())
    if not wanted:
        return None
    for name in wanted:
        if name not in names:
            raise UserError(f"data.rgb names {name!r}, which is not among the bands {', '.join(names)}")
    if len(wanted) != 3 or len(set(wanted)) != 3:
        raise UserError(f"data.rgb={','.join(wanted)} must name three distinct bands: red, green and blue")
    return tuple(names.index(name) for name in wanted)


def band_order(source: Sequence[str], target: Sequence[str]) -> list[int] | None:
    """The index in `source` of each band of `target`; None if their lengths differ.

    Bands are matched by name if both hold the same names, else by index.
    """
    if len(source) != len(target):
        return None
    return [source.index(name) for name in target] if set(source) == set(target) else list(range(len(target)))


def visible(bands: Bands, rgb: Sequence[str]) -> tuple[int, int, int]:
    """The channels that a picture shows as red, green and blue: those of `config.data.rgb` if known, else the first
    three bands, or the first band as gray."""
    return rgb_indices(rgb, bands.names) or ((0, 1, 2) if len(bands) > 2 else (0, 0, 0))


def as_bytes(values: np.ndarray, channels: tuple[int, int, int]) -> np.ndarray:
    """Converts values in [0, 1], [..., C], to a uint8 picture [..., 3]."""
    return np.round(255.0 * np.clip(values[..., channels], 0.0, 1.0)).astype(np.uint8)
