"""The data sets of a run: one, or several of which examples are drawn by weight."""

import dataclasses
import hashlib
import json
from typing import Any

from pera_jax import bands as bands_of
from pera_jax.bands import Bands
from pera_jax.data import records
from pera_jax.errors import UserError


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
        return cls((source,), (1.0,), bands, (tuple(bands.places(source.info, source.path)),))

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
      UserError: as `records.open_split` and `bands.choose`; a data set named twice; weights that do not fit.
    """
    paths = [path.strip() for path in settings.path.split(",")]
    if len(set(paths)) < len(paths):
        raise UserError(f"data.path={settings.path} names a data set twice; give it a larger weight instead")
    sources = tuple(records.open_split(path, settings.split) for path in paths)
    weights = tuple(settings.weights) or tuple(len(source) for source in sources)
    if len(weights) != len(sources) or not all(weight > 0 for weight in weights):
        raise UserError(
            f"data.weights={settings.weights} must hold a positive number for each of the {len(sources)} data set(s) of "
            "data.path, or nothing: as many examples as there are records"
        )
    shares = tuple(weight / sum(weights) for weight in weights)
    bands = bands_of.choose(settings, sources, shares)
    return Mixture(sources, shares, bands, tuple(tuple(bands.places(s.info, s.path)) for s in sources))
