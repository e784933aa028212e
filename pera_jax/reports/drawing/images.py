"""Which images of a split a report shows, and how they look."""

import dataclasses

import numpy as np

from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records
from pera_jax.data.labelled import samples
from pera_jax.encoder import extract as features

_MOST = 20_000  # images of which a few are picked


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image that is shown.

    Attributes:
      pixels: stored values [S, S, C] of the network's bands, the whole image resized to a square.
      key: path of its source; label: its class, -1 without classes.
    """

    pixels: np.ndarray
    key: str
    label: int


class Subset:
    """Some records of a split, in the order given; reads as a `records.RecordSource`."""

    def __init__(self, source: records.RecordSource, indices: np.ndarray):
        self.info, self.path, self.split, self.split_info = source.info, source.path, source.split, source.split_info
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> bytes:
        return self.source.read(self.indices[i])


def choose(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Places of `number` images: of as many classes as there are, in the order of the classes.

    Args:
      labels: int [N]; all -1 without classes.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    # How many images of the same class come before each in the drawn order: first one of each class, then a second.
    rank, seen = np.empty(len(labels), np.int64), {}
    for place in order:
        rank[place] = seen[labels[place]] = seen.get(labels[place], -1) + 1
    shuffled = {label: place for place, label in enumerate(rng.permutation(np.unique(labels)))}
    turn = np.array([shuffled[label] for label in labels], np.int64)
    chosen = np.lexsort((turn, rank))[:number]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def read(source: records.RecordSource, bands: Bands, index: int, size: int) -> Shown:
    """One image of a split. Raises UserError for a damaged record and a band that is missing."""
    places = bands.indices_in(source.info, source.path)
    try:
        record = records.decode_record(source.read(int(index)))
        image = codecs.decode_bands(record.image, source.info, places)
    except (RuntimeError, codecs.ImageDecodeError) as error:
        raise UserError(f"record {index} of {source.path} is damaged; copy or convert it anew") from error
    return Shown(features.resized(image, size), record.key, record.label)


def pick(source: records.RecordSource, number: int, seed: int) -> np.ndarray:
    """The places of `number` images of a split, or of all where it has fewer, as `choose`; of a large split a part is
    looked at."""
    places = np.arange(len(source))
    if len(source) > _MOST:
        places = np.sort(np.random.default_rng(seed).choice(len(source), _MOST, replace=False))
    known = source.info.class_names  # without classes no record is read for nothing
    labels = samples.of_source(Subset(source, places)).labels if known else np.full(len(places), -1)
    return places[choose(labels, number, seed)]


def name_of(label: int, class_names) -> str:
    """The name of a class; "" without one."""
    return class_names[label] if class_names and 0 <= label < len(class_names) else ""
