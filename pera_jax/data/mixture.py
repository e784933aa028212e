"""The data sets of a run: one, or several of which examples are drawn by weight."""

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
      sources: the records of each data set.
      shares: of the examples that are drawn from each; they add up to 1.
      bands: those of the run.
      places: of each data set, where these bands stand in its images.
    """

    sources: tuple[records.RecordSource, ...]
    shares: tuple[float, ...]
    bands: Bands
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, source: records.RecordSource, bands: Bands | None = None) -> "Mixture":
        """One data set; its own bands by default. Raises UserError where it lacks a band, or has another dtype."""
        if bands is None:
            info = source.info
            bands = Bands(tuple(info.bands), info.dtype, tuple(map(tuple, source.split_info.ranges)),
                          tuple(source.split_info.mean), tuple(source.split_info.std))  # fmt: skip
        return cls((source,), (1.0,), bands, (tuple(bands.indices_in(source.info, source.path)),))

    def __len__(self) -> int:
        """Records of all data sets; an epoch draws as many examples."""
        return sum(len(source) for source in self.sources)

    def names(self) -> list[str]:
        """A name for each data set: its own, numbered where several have the same."""
        names = [source.info.name for source in self.sources]
        return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]

    def card(self) -> dict[str, Any]:
        """What a checkpoint says of the data, JSON: "name", "split", "records", "fingerprint", "class_names"; of several
        data sets also "sets", with the share of each."""
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
    """The data sets that `config.data` names.

    Raises:
      UserError: as `records.open_split` and `choose_bands`; a data set named twice; weights that do not fit.
    """
    paths = [path.strip() for path in settings.path.split(",")]
    if len(set(paths)) < len(paths):
        raise UserError(f"data.path={settings.path} names a data set twice; give it a larger weight instead")
    sources = tuple(records.open_split(path, settings.split, settings.skip_damaged) for path in paths)
    weights = tuple(settings.weights) or tuple(len(source) for source in sources)
    if len(weights) != len(sources) or not all(weight > 0 for weight in weights):
        raise UserError(
            f"data.weights={settings.weights} must hold a positive number for each of the {len(sources)} data set(s) of "
            "data.path, or nothing: as many examples as there are records"
        )
    shares = tuple(weight / sum(weights) for weight in weights)
    bands = choose_bands(settings, sources, shares)
    return Mixture(sources, shares, bands, tuple(tuple(bands.indices_in(s.info, s.path)) for s in sources))


def choose_bands(settings, sources: Sequence[records.RecordSource], shares: Sequence[float]) -> Bands:
    """The bands of a run.

    Args:
      settings: `config.data`: `bands`, `ranges` and `normalize`.
      sources: of each data set; shares: of the examples that are drawn from each, adding up to 1.

    Raises:
      UserError: a band that is missing or named twice, values of several dtypes, ranges that do not fit.
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
                f"data.normalize=imagenet is for the bands red, green, blue, and these are {', '.join(names)}; use "
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
    counts = statistics.of_dtype(statistics.load(source.path, source.split), source.info.dtype)
    return statistics.moments(counts[places], source.info.dtype, ranges)
