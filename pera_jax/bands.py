"""Which bands a network sees, in which order, and how their values map to [0, 1] and are normalised.

Settled once, when a run begins, from the config and the data set; stored with the weights, so that whoever uses them maps
raw values as the training did.
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
      names: of the bands, in the order of the channels.
      dtype: of the stored values: uint8, uint16 or float32.
      ranges: (low, high) of each band in stored units, mapped to 0 and 1; what lies outside is clipped.
      mean, std: of each band after that mapping: what is subtracted, then divided by.
    """

    names: tuple[str, ...]
    dtype: str
    ranges: tuple[tuple[float, float], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def plain(cls, names: Sequence[str] = RGB, mean: float = 0.5, std: float = 0.25) -> "Bands":
        """uint8 of full range, the same mean and std for all bands: for programs without data."""
        n = len(names)
        return cls(tuple(names), "uint8", ((0.0, 255.0),) * n, (mean,) * n, (std,) * n)

    @classmethod
    def of(cls, meta: dict[str, Any]) -> "Bands":
        """Those of a checkpoint's `meta`."""
        ranges = tuple((low, high) for low, high in meta["ranges"])
        return cls(tuple(meta["bands"]), meta["dtype"], ranges, tuple(meta["mean"]), tuple(meta["std"]))

    def described(self) -> dict[str, Any]:
        """The inverse of `of`, as JSON knows it."""
        return {
            "bands": list(self.names), "dtype": self.dtype, "ranges": [list(pair) for pair in self.ranges],
            "mean": list(self.mean), "std": list(self.std),
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    def are_colours(self) -> bool:
        """Whether pictures of any kind can be read for them: red, green and blue of 8 bits."""
        return self.dtype == "uint8" and set(self.names) <= set(RGB)

    def mapped(self, values, dtype=np.float32):
        """Stored values [..., C], of NumPy or JAX, to [0, 1] in `dtype`."""
        low, high = np.asarray(self.ranges, dtype).T  # [C] each
        return ((values.astype(dtype) - low) / (high - low)).clip(0, 1)

    def normalized(self, values, dtype=np.float32):
        """Stored values [..., C] as the network takes them: `mapped`, less the mean, over the std."""
        return (self.mapped(values, dtype) - np.asarray(self.mean, dtype)) / np.asarray(self.std, dtype)

    def denormalized(self, values):
        """What the network takes, [..., C], as values in [0, 1]."""
        return values * self.std + self.mean

    def places(self, info, folder) -> list[int]:
        """Where these bands stand among those of a data set (a `records.DatasetInfo`).

        Raises:
          UserError: a band that the data set lacks, values of another dtype.
        """
        for name in self.names:
            if name not in info.bands:
                raise UserError(f"{folder} has no band {name!r}; it has {several(info.bands, 20)}")
        if info.dtype != self.dtype:
            raise UserError(f"{folder} holds {info.dtype}, and {self.dtype} is needed; convert it to the same dtype")
        return [info.bands.index(name) for name in self.names]


def rgb_indices(wanted: Sequence[str], names: Sequence[str]) -> tuple[int, int, int] | None:
    """The channels that are red, green and blue.

    Args:
      wanted: `config.data.rgb`: the names of the three, or (): the bands are just red, green and blue, or none is.
      names: of the channels.

    Raises:
      UserError: not three names, or one that is no band.
    """
    wanted = tuple(wanted) or (RGB if tuple(names) == RGB else ())
    if not wanted:
        return None
    for name in wanted:
        if name not in names:
            raise UserError(f"data.rgb names {name!r}, which is not among the bands {', '.join(names)}")
    if len(wanted) != 3 or len(set(wanted)) != 3:
        raise UserError(f"data.rgb={','.join(wanted)} must name the bands that are red, green and blue")
    return tuple(names.index(name) for name in wanted)


def band_order(there: Sequence[str], here: Sequence[str]) -> list[int] | None:
    """Which of the bands `there` stands for each band `here`; None where their numbers differ.

    Bands of the same names are matched by name, others of the same number by their index.
    """
    if len(there) != len(here):
        return None
    return [there.index(name) for name in here] if set(there) == set(here) else list(range(len(here)))


def visible(bands: Bands, rgb: Sequence[str]) -> tuple[int, int, int]:
    """The channels that a picture shows as red, green and blue: those of `config.data.rgb` where they are known, else the
    first three, or one band as gray."""
    return rgb_indices(rgb, bands.names) or ((0, 1, 2) if len(bands) > 2 else (0, 0, 0))


def as_bytes(values: np.ndarray, channels: tuple[int, int, int]) -> np.ndarray:
    """Values in [0, 1], [..., C], as uint8 [..., 3] for a picture."""
    return np.round(255.0 * np.clip(values[..., channels], 0.0, 1.0)).astype(np.uint8)
