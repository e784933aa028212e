"""The tiles of all scenes: counted by arithmetic, made one by one when they are asked for, and dealt to the shards."""

import bisect
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from data_prep.convert import split_plan
from data_prep.convert.shards import Item
from data_prep.geo.scene_grid import Grid, Length
from data_prep.geo.scene_plan import Choice, Files, Reasons, check_few
from data_prep.geo.scene_reader import Scene, Tile
from data_prep.geo.scene_resample import MOST_UNDER_ONE
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data import records

MOST_TILES = 20_000_000  # of a split: what planning keeps of them are 24 bytes each
_MOST_BYTES = 1 << 30  # of the pixels of one tile


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A scene whose tiles are made."""

    name: str
    path: str
    size: int
    sides: tuple[int, int]
    grid: Grid
    choice: Choice

    def item(self, place: int) -> Item:
        grid = self.grid
        column, row, width, height = grid.tile(place)
        (across, down), (right, bottom) = grid.step, self.sides
        left, top = column * across, row * down
        # To the last bit inside of the file.
        window = left, top, min(width * across, right - left), min(height * down, bottom - top)
        part = Tile(window, width, height, self.choice.numbers, self.choice.alpha)
        return Item(self.path, f"{self.name}/{row:06d}_{column:06d}", None, self.size, part)


class Tiles(Sequence[Item]):
    """An item for each file that cannot be opened, whose part is the reason, then one for each tile, whose part is a
    `Tile`: scene by scene, row by row."""

    def __init__(self, unreadable: list[Item], scenes: list[_Planned]):
        self._unreadable, self._scenes = unreadable, scenes
        self._ends = list(itertools.accumulate((scene.grid.number for scene in scenes), initial=len(unreadable)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int) -> Item:
        if not 0 <= place < len(self):
            raise IndexError(place)
        scene = bisect.bisect_right(self._ends, place) - 1
        return self._unreadable[place] if scene < 0 else self._scenes[scene].item(place - self._ends[scene])

    def described(self) -> list:
        """What all items follow from, for a hash of them."""
        return [[item.key, item.size, item.part] for item in self._unreadable] + [
            [scene.name, scene.size, scene.sides, *dataclasses.astuple(scene.grid), scene.choice.numbers, scene.choice.alpha]
            for scene in self._scenes
        ]


class _Dealt(Sequence[Item]):
    """Items in another order, an array of their places."""

    def __init__(self, items: Sequence[Item], order: np.ndarray):
        self._items, self._order = items, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self._items[i] for i in self._order[place].tolist()]
        return self._items[int(self._order[place])]


def plan_tiles(
    files: Files,
    scenes: dict[str, Scene],
    unreadable: Reasons,
    choices: dict[str, Choice],
    tile: Length,
    stride: Length,
    gsd: float | None,
) -> tuple[Tiles, Reasons]:
    """The tiles of the scenes that `choices` names, and why some of these are left out.

    Raises UserError: metres are asked for of scenes that lie nowhere, no scene has room for a tile, or tiles are too many or
    too large.
    """
    in_metres = gsd is not None or tile.metres or stride.metres
    planned, unfit = [], {}
    for name, choice in choices.items():
        scene = scenes[name]
        if in_metres and scene.metres is None:
            unfit[name] = (
                "does not say where on the ground it lies, so metres mean nothing for it; give --tile and --stride in pixels "
                "and no --gsd"
            )
            continue
        grid = Grid.of(scene.sides, scene.metres, tile, stride, gsd)
        if fault := _fault(grid, scene, choice, gsd):
            unfit[name] = fault
        else:
            planned.append(_Planned(name, *files[name], scene.sides, grid, choice))
    check_few(unfit, len(choices), files)
    if not any(scene.grid.whole for scene in planned):
        largest = max(planned, key=lambda scene: min(scene.grid.sides))
        width, height = largest.grid.sides
        raise UserError(
            f"--tile {tile} is larger than every scene: the largest, {printable(largest.path)}, has {width} x {height} pixels, "
            f"a tile {largest.grid.tile_sides[0]} x {largest.grid.tile_sides[1]}; give a smaller --tile"
        )
    bad = [Item(files[name][0], name, None, files[name][1], (reason,)) for name, reason in unreadable.items()]
    tiles = Tiles(bad, planned)
    if len(tiles) > MOST_TILES:
        raise UserError(
            f"{len(planned)} scenes have {len(tiles):,} tiles, and a split at most {MOST_TILES:,}; give a larger --stride or "
            "--tile, or convert them to several splits"
        )
    return tiles, unfit


def _fault(grid: Grid, scene: Scene, choice: Choice, gsd: float | None) -> str | None:
    """Why no tiles can be made of a scene, or None."""
    width, height = scene.sides
    if min(grid.sides) < 1:
        return f"is smaller than a pixel of --gsd {gsd:g}; give a smaller one"
    if grid.number > MOST_TILES:
        return (
            f"claims {width:,} x {height:,} pixels, which are {grid.number:,} tiles, and a split has at most {MOST_TILES:,}; "
            "give a larger --stride or --tile, or cut the scene first"
        )
    across, down = (min(pair) for pair in zip(grid.sides, grid.tile_sides, strict=True))
    size = across * down * len(choice.numbers) * np.dtype(scene.dtype).itemsize
    if size > _MOST_BYTES:
        return (
            f"claims {width:,} x {height:,} pixels, and a tile of {across:,} x {down:,} takes {size / 2**30:,.1f} GiB, more than "
            f"{_MOST_BYTES >> 30}; give a smaller --tile"
        )
    if grid.step[0] * grid.step[1] > MOST_UNDER_ONE:
        return f"has more than {MOST_UNDER_ONE:,} pixels in one of --gsd {gsd:g}; give a smaller one"
    return None


def make_split(
    output: pathlib.Path, dataset: str, name: str, bands: list[str], dtype: str, tiles: Tiles, shards: int, options: list
) -> split_plan.Split:
    """The plan of a conversion: the tiles dealt to the shards by a hash of their keys, then as they lie in the scenes.

    `options` is what else the records depend on, of JSON's types.
    """
    described = [records.FORMAT_VERSION, dataset, name, bands, dtype, shards, options, tiles.described()]
    source = hashlib.sha256(json.dumps(described).encode("ascii")).hexdigest()
    hashes = np.fromiter(
        (int.from_bytes(hashlib.sha256(item.key.encode("utf-8")).digest()[:8], "big") for item in tiles),
        np.uint64, len(tiles),
    )  # fmt: skip
    order = np.argsort(hashes, kind="stable")
    for shard in range(shards):
        order[len(tiles) * shard // shards : len(tiles) * (shard + 1) // shards].sort()
    return split_plan.Split(output, dataset, name, bands, dtype, None, True, _Dealt(tiles, order), shards, source)
