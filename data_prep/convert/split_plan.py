"""The plan of a split, and its file in an unfinished conversion."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from data_prep.convert.shards import Item, Job
from pera_jax.common import files, json_files
from pera_jax.common.errors import UserError

_PLAN_FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """A split to write.

    Attributes:
      folder: the dataset folder.
      dataset, name: names of the dataset and the split.
      bands, dtype: of the images.
      class_names: indexed by the labels of the items; None without classes.
      has_places: whether the records have a `place`.
      items: the images in the order of the records; may be created lazily.
      shards: number of shards.
      source: hash over everything the records depend on: items, classes, shards and conversion options.
      kept: int64, the indices of the `items` to convert; None for all.
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
        """Number of images to convert."""
        return len(self.items) if self.kept is None else len(self.kept)

    def job_size(self, shard: int) -> int:
        """Number of images in shard k of K: those from n k / K to n (k + 1) / K."""
        return len(self) * (shard + 1) // self.shards - len(self) * shard // self.shards

    def job(self, shard: int) -> Job:
        """The job that writes one shard."""
        first = len(self) * shard // self.shards
        places = slice(first, first + self.job_size(shard))
        items = self.items[places] if self.kept is None else [self.items[i] for i in self.kept[places]]
        return Job(self.partial, self.shard_name(shard), items)


def without(split: Split, places: list[int]) -> Split:
    """The split without the items at these indices."""
    if not places:
        return split
    kept = np.delete(np.arange(len(split.items)), places)
    return dataclasses.replace(split, kept=kept, shards=min(split.shards, len(kept)))


def check_unfinished(split: Split) -> None:
    """Raises UserError if the folder has an unfinished conversion of something else, or stray shards."""
    plan = split.partial / _PLAN_FILE
    if plan.is_file():
        if _read(plan).source != split.source:
            raise UserError(
                f"{split.partial} is an unfinished conversion of other images or with other options; "
                f"re-run that command, or remove {split.partial}"
            )
        return
    strays = sorted(split.folder.glob(f"{split.dataset}-{split.name}.array_record-*"))
    if strays:
        raise UserError(f"{strays[0]} does not belong to a finished split; remove it, or choose another --output")


def check_kept(split: Split) -> None:
    """Raises UserError if the unfinished conversion left out different items, so that shards would not fit together."""
    plan = split.partial / _PLAN_FILE
    if plan.is_file() and _read(plan).kept != _kept_hash(split):
        raise UserError(f"images have changed since {split.partial} was created; remove it, and re-run the command")


@dataclasses.dataclass
class _Plan:
    """Identity of an unfinished conversion, see `Split`."""

    source: str
    kept: str


def _read(file: pathlib.Path) -> _Plan:
    return json_files.read(file, _Plan, f"remove {file.parent}, and re-run the command")


def _kept_hash(split: Split) -> str:
    return hashlib.sha256(b"" if split.kept is None else split.kept.tobytes()).hexdigest()


def write(split: Split) -> None:
    """Starts or resumes a conversion: writes the plan, and removes incomplete files."""
    split.partial.mkdir(exist_ok=True)
    remove_half_written(split)
    plan = _Plan(split.source, _kept_hash(split))
    files.write_json(split.partial / _PLAN_FILE, dataclasses.asdict(plan))


def remove_half_written(split: Split) -> None:
    for file in split.partial.glob("*.tmp"):
        file.unlink(missing_ok=True)
