"""Which bands a network sees, in which order, and how their values map to [0, 1] and are normalised.

Settled once, when a run begins, from the config and the data set; stored with the weights, so that whoever uses them maps
raw values as the training did.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pera_jax.data import statistics
from pera_jax.errors import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of red, green, blue
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

    def mapped(self, values, dtype=np.float32):
        """Stored values [..., C], of NumPy or JAX, to [0, 1] in `dtype`."""
        low, high = np.asarray(self.ranges, dtype).T  # [C] each
        return ((values.astype(dtype) - low) / (high - low)).clip(0, 1)

    def places(self, info, folder) -> list[int]:
        """Where these bands stand among those of a data set (a `records.DatasetInfo`).

        Raises:
          UserError: a band that the data set lacks, values of another dtype.
        """
        for name in self.names:
            if name not in info.bands:
                raise UserError(f"{folder} has no band {name!r}; it has {', '.join(info.bands)}")
        if info.dtype != self.dtype:
            raise UserError(f"{folder} holds {info.dtype}, and {self.dtype} is needed; convert it to the same dtype")
        return [info.bands.index(name) for name in self.names]


def choose(settings, sources: Sequence[Any], shares: Sequence[float]) -> Bands:
    """The bands of a run.

    Args:
      settings: `config.data`: `bands`, `ranges` and `normalise`.
      sources: a `records.RecordSource` of each data set; shares: of the examples that are drawn from each, adding up to 1.

    Raises:
      UserError: a band that is missing or named twice, values of several dtypes, ranges that do not fit.
    """
    first = sources[0]
    names = tuple(settings.bands) or tuple(first.info.bands)
    if len(set(names)) < len(names):
        raise UserError(f"data.bands={','.join(names)} names a band twice")
    bands = Bands(names, first.info.dtype, ((0.0, 1.0),) * len(names), (0.0,) * len(names), (1.0,) * len(names))
    places = [bands.places(source.info, source.path) for source in sources]
    ranges = _ranges(settings.ranges, names, sources, places)
    if settings.normalise == "imagenet":
        if names != RGB:
            raise UserError(
                f"data.normalise=imagenet is for the bands red, green, blue, and these are {', '.join(names)}; use "
                "data.normalise=dataset"
            )
        mean, std = IMAGENET
    else:
        means, stds = zip(*(_moments(*of, ranges) for of in zip(sources, places, strict=True)), strict=True)
        mean = np.average(means, axis=0, weights=shares)  # [C]
        square = np.average(np.square(means) + np.square(stds), axis=0, weights=shares)
        std = np.sqrt(square - mean**2)
        if not std.all():
            name = names[int(np.argmin(std))]
            raise UserError(f"band {name!r} has the same value everywhere, or its range holds none; leave it out")
        mean, std = (tuple(round(float(value), 6) for value in values) for values in (mean, std))
    return dataclasses.replace(bands, ranges=ranges, mean=tuple(mean), std=tuple(std))


def _ranges(wanted, names, sources, places) -> tuple[tuple[float, float], ...]:
    """The ranges that the config gives, one for all bands or one for each; else those stored with the data."""
    if not wanted:
        stored = [[source.split_info.ranges[at] for at in where] for source, where in zip(sources, places, strict=True)]
        if any(ranges != stored[0] for ranges in stored[1:]):
            raise UserError(
                f"{sources[0].path} and the other data sets have ranges of their own (percentiles 1 and 99); say with "
                "data.ranges what maps to [0, 1] in all of them, as in ((0, 10000),)"
            )
        return tuple((float(low), float(high)) for low, high in stored[0])
    pairs = [tuple(pair) if isinstance(pair, (tuple, list)) else () for pair in wanted]
    if len(pairs) not in (1, len(names)) or any(len(pair) != 2 or not pair[0] < pair[1] for pair in pairs):
        raise UserError(
            f"data.ranges={wanted} must be one (low, high) for all bands or one for each of {', '.join(names)}, as in "
            "((0, 10000),), with low < high"
        )
    return tuple((float(low), float(high)) for low, high in pairs) * (len(names) if len(pairs) == 1 else 1)


def _moments(source, places, ranges) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of each band of one data set, for these ranges."""
    stored = source.split_info
    if all(list(pair) == stored.ranges[at] for pair, at in zip(ranges, places, strict=True)):
        return np.array(stored.mean)[places], np.array(stored.std)[places]
    counts = statistics.load(source.path, source.split)[places]
    return statistics.moments(counts, source.info.dtype, ranges)


def rgb_places(wanted: Sequence[str], names: Sequence[str]) -> tuple[int, int, int] | None:
    """The channels that are red, green and blue.

    Args:
      wanted: `config.views.rgb`: the names of the three, or (): the bands are just red, green and blue, or none is.
      names: of the channels.

    Raises:
      UserError: not three names, or one that is no band.
    """
    wanted = tuple(wanted) or (RGB if tuple(names) == RGB else ())
    if not wanted:
        return None
    for name in wanted:
        if name not in names:
            raise UserError(f"views.rgb names {name!r}, which is not among the bands {', '.join(names)}")
    if len(wanted) != 3 or len(set(wanted)) != 3:
        raise UserError(f"views.rgb={','.join(wanted)} must name the bands that are red, green and blue")
    return tuple(names.index(name) for name in wanted)
