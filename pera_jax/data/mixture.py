"""The datasets of a run: one, or several from which examples are drawn by weight."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pera_jax.bands import RGB, Bands
from pera_jax.common.errors import UserError
from pera_jax.data import records, statistics

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of red, green, blue


@dataclasses.dataclass(frozen=True)
class Mixture:
    """
    Attributes:
      sources: the records of each dataset.
      shares: the fraction of examples drawn from each dataset; they sum to 1.
      bands: the bands of the run.
      places: for each dataset, the channel indices of these bands in its images.
    """

    sources: tuple[records.RecordSource, ...]
    shares: tuple[float, ...]
    bands: Bands
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def from_source(cls, source: records.RecordSource, bands: Bands | None = None) -> "Mixture":
        """A single dataset, by default with its own bands. Raises UserError if it lacks a band or has another dtype."""
        if bands is None:
            info = source.info
            bands = Bands(tuple(info.bands), info.dtype, tuple(map(tuple, source.split_info.ranges)),
                          tuple(source.split_info.mean), tuple(source.split_info.std))  # fmt: skip
        return cls((source,), (1.0,), bands, (tuple(bands.indices_in(source.info, source.path)),))

    def __len__(self) -> int:
        """Number of records of all datasets, and of examples per epoch."""
        return sum(len(source) for source in self.sources)

    def names(self) -> list[str]:
        """The names of the datasets, numbered if several have the same name."""
        names = [source.info.name for source in self.sources]
        return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]

    def card(self) -> dict[str, Any]:
        """The data card in checkpoints, as JSON: "name", "split", "records", "fingerprint", "class_names"; for several
        datasets also "sets", with the share of each."""
        cards = [
            {
                "name": name, "split": source.split, "records": len(source),
                "fingerprint": source.split_info.fingerprint, "class_names": source.info.class_names,
            }
            for name, source in zip(self.names(), self.sources, strict=True)
        ]  # fmt: skip
        if len(cards) == 1:
            return cards[0]
        parts = [[card["fingerprint"], share] for card, share in zip(cards, self.shares, strict=True)]
        return {
            "name": "+".join(card["name"] for card in cards), "split": self.sources[0].split, "records": len(self),
            "fingerprint": hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest(), "class_names": None,
            "sets": [card | {"share": share} for card, share in zip(cards, self.shares, strict=True)],
        }  # fmt: skip


def open_mixture(settings) -> Mixture:
    """Opens the datasets of `config.data`, whose fields `config.check` has accepted.

    Raises:
      UserError: as `records.open_split` and `choose_bands`; a dataset is named twice.
    """
    paths = [path.strip() for path in settings.path.split(",")]
    if len(set(paths)) < len(paths):
        raise UserError(f"data.path={settings.path} names a dataset twice; use data.weights instead")
    sources = tuple(records.open_split(path, settings.split, settings.skip_damaged) for path in paths)
    weights = tuple(settings.weights) or tuple(len(source) for source in sources)
    shares = tuple(weight / sum(weights) for weight in weights)
    bands = choose_bands(settings, sources, shares)
    return Mixture(sources, shares, bands, tuple(tuple(bands.indices_in(s.info, s.path)) for s in sources))


def choose_bands(settings, sources: Sequence[records.RecordSource], shares: Sequence[float]) -> Bands:
    """The bands of a run.

    Args:
      settings: `config.data`: `bands`, `ranges` and `normalize`.
      sources: one per dataset; shares: the fraction of examples drawn from each, with sum 1.

    Raises:
      UserError: a band is missing or named twice, dtypes differ, or ranges are invalid.
    """
    first = sources[0]
    names = tuple(settings.bands) or tuple(first.info.bands)
    if len(set(names)) < len(names):
        raise UserError(f"data.bands={','.join(names)} names a band twice")
    bands = Bands(names, first.info.dtype, ((0.0, 1.0),) * len(names), (0.0,) * len(names), (1.0,) * len(names))
    places = [bands.indices_in(source.info, source.path) for source in sources]
    ranges = _ranges(settings.ranges, names, sources, places)
    if settings.normalize == "imagenet":
        if names != RGB:
            raise UserError(
                f"data.normalize=imagenet requires the bands red, green, blue, got {', '.join(names)}; use "
                "data.normalize=dataset"
            )
        mean, std = IMAGENET
    else:
        means, stds = zip(*(_moments(*of, ranges) for of in zip(sources, places, strict=True)), strict=True)
        mean = np.average(means, axis=0, weights=shares)  # [C]
        square = np.average(np.square(means) + np.square(stds), axis=0, weights=shares)
        std = np.sqrt(square - mean**2)
        if not std.all():
            name = names[int(np.argmin(std))]
            raise UserError(f"band {name!r} is constant within its range; remove it from data.bands")
        mean, std = (tuple(round(float(value), 6) for value in values) for values in (mean, std))
    return dataclasses.replace(bands, ranges=ranges, mean=tuple(mean), std=tuple(std))


def _ranges(wanted, names, sources, places) -> tuple[tuple[float, float], ...]:
    """The ranges from the config, one for all bands or one per band; by default those stored with the data."""
    if not wanted:
        stored = [[source.split_info.ranges[at] for at in where] for source, where in zip(sources, places, strict=True)]
        if any(ranges != stored[0] for ranges in stored[1:]):
            raise UserError(
                f"{sources[0].path} and the other datasets have different stored ranges (percentiles 1 and 99); set "
                "data.ranges to the range that maps to [0, 1] in all of them, for example ((0, 10000),)"
            )
        return tuple((float(low), float(high)) for low, high in stored[0])
    pairs = [tuple(pair) if isinstance(pair, (tuple, list)) else () for pair in wanted]
    if len(pairs) not in (1, len(names)) or any(len(pair) != 2 or not pair[0] < pair[1] for pair in pairs):
        raise UserError(
            f"data.ranges={wanted} must be one (low, high) for all bands or one for each of {', '.join(names)}, with "
            "low < high, for example ((0, 10000),)"
        )
    return tuple((float(low), float(high)) for low, high in pairs) * (len(names) if len(pairs) == 1 else 1)


def _moments(source, places, ranges) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of each band of one dataset, for the given ranges."""
    stored = source.split_info
    if all(list(pair) == stored.ranges[at] for pair, at in zip(ranges, places, strict=True)):
        return np.array(stored.mean)[places], np.array(stored.std)[places]
    counts = statistics.current(statistics.load(source.path, source.split), source.info.dtype)
    return statistics.moments(counts[places], source.info.dtype, ranges)
