"""Selects and reads the images of a split that a report shows."""

import dataclasses

import numpy as np

from pera_jax.bands import Bands
from pera_jax.data import decode, records
from pera_jax.data.labelled import samples

_MOST = 20_000  # images among which a few are chosen


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image shown in the report.

    Attributes:
      pixels: stored values [S, S, C] of the network's bands, the image resized to a square.
      key: path of the source file; label: class index, or -1.
    """

    pixels: np.ndarray
    key: str
    label: int


class Subset:
    """The records of a split at `indices`, with the interface of `records.RecordSource`."""

    def __init__(self, source: records.RecordSource, indices: np.ndarray):
        self.info, self.path, self.split, self.split_info = source.info, source.path, source.split, source.split_info
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, i: int) -> records.Record:
        return self.source.record(self.indices[i])


def choose(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Indices of `number` images of as many classes as possible, sorted by class.

    Args:
      labels: int [N]; all -1 without classes.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    # Rank of each image within its class in the random order: one image of each class first, then a second.
    rank, seen = np.empty(len(labels), np.int64), {}
    for index in order:
        rank[index] = seen[labels[index]] = seen.get(labels[index], -1) + 1
    shuffled = {label: position for position, label in enumerate(rng.permutation(np.unique(labels)))}
    turn = np.array([shuffled[label] for label in labels], np.int64)
    chosen = np.lexsort((turn, rank))[:number]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def read(source: records.RecordSource, bands: Bands, index: int, size: int) -> Shown:
    """Reads one image of a split. Raises UserError for a damaged record or a missing band."""
    places = bands.indices_in(source.info, source.path)
    record = source.record(index)
    return Shown(decode.resized_record(source, index, record, places, size), record.key, record.label)


def pick(source: records.RecordSource, number: int, seed: int) -> np.ndarray:
    """Indices of at most `number` images of a split, chosen by `choose`; considers only a random part of a large
    split."""
    places = np.arange(len(source))
    if len(source) > _MOST:
        places = np.sort(np.random.default_rng(seed).choice(len(source), _MOST, replace=False))
    known = source.info.class_names  # without classes there are no labels to read
    labels = samples.from_source(Subset(source, places)).labels if known else np.full(len(places), -1)
    return places[choose(labels, number, seed)]


def name_of(label: int, class_names) -> str:
    """The name of the class `label`; "" if there is none."""
    return class_names[label] if class_names and 0 <= label < len(class_names) else ""
