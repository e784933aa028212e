"""What a split is to be made of, and the note of it that an unfinished conversion leaves."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from data_prep.convert.shards import Item, Job, write_file
from pera_jax.common import json_files
from pera_jax.common.errors import UserError

_PLAN_FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """A split to be written.

    Attributes:
      folder: the data set folder.
      dataset, name: names of the data set and of the split.
      bands, dtype: of the images.
      class_names: names of the classes, which the items' labels index; None without classes.
      has_places: whether records say where on the ground their image lies.
      items: the images in the order of the records; may make them one by one.
      shards: number of shards.
      source: a hash of what the records depend on: items, classes, shards and options of the conversion.
      kept: int64, the places in `items` of those that are converted; None: all.
    """

    folder: pathlib.Path
    dataset: str
    name: str
    bands: list[str]
    dtype: str
    class_names: list[str] | None
    has_places: bool
    items: Sequence[Item]
    shards: int
    source: str
    kept: np.ndarray | None = None

    @property
    def partial(self) -> pathlib.Path:
        return self.folder / f".{self.name}.partial"

    def shard_name(self, shard: int) -> str:
        return f"{self.dataset}-{self.name}.array_record-{shard:05d}-of-{self.shards:05d}"

    def __len__(self) -> int:
        """Images to convert."""
        return len(self.items) if self.kept is None else len(self.kept)

    def job_size(self, shard: int) -> int:
        """Images of one shard, of n in K: those from n k / K to n (k + 1) / K, whoever asks."""
        return len(self) * (shard + 1) // self.shards - len(self) * shard // self.shards

    def job(self, shard: int) -> Job:
        """What one shard is made of."""
        first = len(self) * shard // self.shards
        places = slice(first, first + self.job_size(shard))
        items = self.items[places] if self.kept is None else [self.items[i] for i in self.kept[places]]
        return Job(self.partial, self.shard_name(shard), items)


def without(split: Split, places: list[int]) -> Split:
    """The split without the items at these places."""
    if not places:
        return split
    kept = np.delete(np.arange(len(split.items)), places)
    return dataclasses.replace(split, kept=kept, shards=min(split.shards, len(kept)))


def check_unfinished(split: Split) -> None:
    """Raises UserError if the folder holds an unfinished conversion of something else, or shards of none."""
    plan = split.partial / _PLAN_FILE
    if plan.is_file():
        if _read(plan).source != split.source:
            raise UserError(
                f"{split.partial} is an unfinished conversion of other images or with other options; "
                f"give that command again, or remove {split.partial}"
            )
        return
    strays = sorted(split.folder.glob(f"{split.dataset}-{split.name}.array_record-*"))
    if strays:
        raise UserError(f"{strays[0]} belongs to no finished split; remove it, or name another --output")


def check_kept(split: Split) -> None:
    """Raises UserError if the unfinished conversion left out other items: shards would then lack images, or share them."""
    plan = split.partial / _PLAN_FILE
    if plan.is_file() and _read(plan).kept != _kept_hash(split):
        raise UserError(f"images were changed since {split.partial} was begun; remove it, and begin again")


@dataclasses.dataclass
class _Plan:
    """What is being converted, see `Split`."""

    source: str
    kept: str


def _read(file: pathlib.Path) -> _Plan:
    return json_files.read(file, _Plan, f"remove {file.parent}, and begin again")


def _kept_hash(split: Split) -> str:
    return hashlib.sha256(b"" if split.kept is None else split.kept.tobytes()).hexdigest()


def write(split: Split) -> None:
    """Begins a conversion, or goes on with one: notes what is converted, and removes what is half written."""
    split.partial.mkdir(exist_ok=True)
    remove_half_written(split)
    plan = _Plan(split.source, _kept_hash(split))
    write_file(split.partial / _PLAN_FILE, json.dumps(dataclasses.asdict(plan)).encode("ascii"))


def remove_half_written(split: Split) -> None:
    for file in split.partial.glob("*.tmp"):
        file.unlink(missing_ok=True)
