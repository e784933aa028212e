"""What a data worker does for one batch: it draws, reads, decodes and crops its records."""

from typing import Any

import numpy as np

from pera_jax import calls
from pera_jax.common.errors import UserError
from pera_jax.data import decode, records
from pera_jax.data.mixture import Mixture

with calls.logging_unchanged():  # also imports Orbax, which configures logging
    import grain

_REPLACEMENTS, _NEIGHBORS, _LEAP = 100, 4, 0x9E3779B1
_DRAWS = 0x6D61736B  # separates the draws of a group of images from those of their crops


class ReadBatch(grain.transforms.Map):
    """Reads, decodes and crops the records of one batch, directly into the arrays of the batch."""

    def __init__(self, data: Mixture, crops: Any):
        """`crops`: `pipeline.Crops`."""
        self._data = data
        self._crops = crops

    def map(self, draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Maps "set", "index" and "seed", int64 [b], to a batch as documented in `make_pipeline`."""
        size, bands = len(draws["index"]), self._data.bands
        batch = {
            name: np.empty((size, number, pixels, pixels, len(bands)), bands.dtype)
            for name, (number, pixels, _) in self._crops.specs.items()
        }
        label, replaced = np.empty(size, np.int32), np.empty(size, bool)
        for i, (place, index, seed) in enumerate(zip(draws["set"], draws["index"], draws["seed"], strict=True)):
            out = {name: values[i] for name, values in batch.items()}
            label[i], replaced[i] = self._fill(int(place), int(index), int(seed), out)
        batch |= self._drawn(draws["seed"])
        return batch | {"label": label, "set": draws["set"], "index": draws["index"], "replaced": replaced}

    def _drawn(self, seeds: np.ndarray) -> dict[str, np.ndarray]:
        """The entries of `Crops.draws`, [b, ...]; each group has a generator keyed by the seeds of its images [b]."""
        source = self._crops.draws
        if source is None:
            return {}
        groups = [source.draw(np.random.default_rng([_DRAWS, *each])) for each in seeds.reshape(-1, source.group)]
        return {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}

    def _fill(self, place: int, index: int, seed: int, out: dict[str, np.ndarray]) -> tuple[int, bool]:
        """Fills `out`, by crop type [number, size, size, C], from record `index` of dataset `place`, or from another
        record if that cannot be decoded; returns (label, whether the record was replaced)."""
        source = self._data.sources[place]
        for skipped in range(_REPLACEMENTS):
            # First the next records, then distant ones, since a whole shard may be damaged.
            other = (index + (skipped if skipped < _NEIGHBORS else skipped * _LEAP)) % len(source)
            try:
                record = records.decode_record(source.read(other))
                rng = np.random.default_rng(seed)
                decode.fill_crops(record.image, source.info, self._data.places[place], rng, self._crops, out)
                return record.label, skipped > 0
            except (RuntimeError, ValueError):  # damaged shard, record or image
                continue
        raise UserError(
            f"{_REPLACEMENTS} records of {source.path} cannot be decoded, starting with record {index}; the dataset is "
            "damaged, convert it again"
        )


class Draw(grain.transforms.RandomMap):
    """The draw of a record: its dataset and index, and the seed of its crops, from a generator keyed by (seed,
    position)."""

    def __init__(self, place: int):
        self._place = np.int64(place)

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.int64]:
        return {"set": self._place, "index": np.int64(index), "seed": rng.integers(2**63)}


def check_groups(draws: Any, rows: np.ndarray) -> None:
    """Raises UserError if the rows of the batch are not whole groups of `Crops.draws` in their order."""
    group = draws.group if draws else 1
    if len(rows) % group == 0:
        groups = rows.reshape(-1, group)  # [G, g]
        if np.all(groups[:, 0] % group == 0) and np.all(groups == groups[:, :1] + np.arange(group)):
            return
    raise UserError(
        f"the method draws for groups of {group} images, and the rows of the batch on this host are not whole groups; "
        "choose a group that divides the images per device"
    )
