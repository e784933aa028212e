"""The tiles of all scenes: counted arithmetically, created lazily, and assigned to shards."""

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

MOST_TILES = 20_000_000  # per split: planning takes 24 bytes per tile
_MOST_BYTES = 1 << 30  # maximum size of a tile in bytes


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A scene with its tile grid."""

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
        # Clipped to the file, against rounding.
        window = left, top, min(width * across, right - left), min(height * down, bottom - top)
        part = Tile(window, width, height, self.choice.numbers, self.choice.alpha)
        return Item(self.path, f"{self.name}/{row:06d}_{column:06d}", None, self.size, part)


class Tiles(Sequence[Item]):
    """Items: one per file that cannot be opened, whose part is the reason, then one per tile, whose part is a `Tile`,
    in the order of scenes and rows."""

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
        """Everything that determines the items, for a hash."""
        return [[item.key, item.size, item.part] for item in self._unreadable] + [
            [
                scene.name,
                scene.size,
                scene.sides,
                *dataclasses.astuple(scene.grid),
                scene.choice.numbers,
                scene.choice.alpha,
            ]
            for scene in self._scenes
        ]


class _Dealt(Sequence[Item]):
    """Items in another order, given as an array of indices."""

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
    """The tiles of the scenes in `choices`, and the reasons of scenes left out.

    Raises UserError: lengths in meters for scenes without a georeference, no scene is large enough for a tile, or there
    are too many or too large tiles.
    """
    in_meters = gsd is not None or tile.meters or stride.meters
    planned, unfit = [], {}
    for name, choice in choices.items():
        scene = scenes[name]
        if in_meters and scene.meters is None:
            unfit[name] = (
                "has no georeference, so lengths in meters cannot be used; give --tile and --stride in pixels "
                "and omit --gsd"
            )
            continue
        grid = Grid.from_sides(scene.sides, scene.meters, tile, stride, gsd)
        if fault := _fault(grid, scene, choice, gsd):
            unfit[name] = fault
        else:
            planned.append(_Planned(name, *files[name], scene.sides, grid, choice))
    check_few(unfit, len(choices), files)
    if not any(scene.grid.whole for scene in planned):
        largest = max(planned, key=lambda scene: min(scene.grid.sides))
        width, height = largest.grid.sides
        raise UserError(
            f"--tile {tile} is larger than every scene: the largest, {printable(largest.path)}, has {width} x {height} "
            f"pixels, a tile {largest.grid.tile_sides[0]} x {largest.grid.tile_sides[1]}; use a smaller --tile"
        )
    bad = [Item(files[name][0], name, None, files[name][1], (reason,)) for name, reason in unreadable.items()]
    tiles = Tiles(bad, planned)
    if len(tiles) > MOST_TILES:
        raise UserError(
            f"{len(planned)} scenes have {len(tiles):,} tiles, more than {MOST_TILES:,} per split; use a larger "
            "--stride or --tile, or convert them to several splits"
        )
    return tiles, unfit


def _fault(grid: Grid, scene: Scene, choice: Choice, gsd: float | None) -> str | None:
    """Why a scene cannot be tiled, or None."""
    width, height = scene.sides
    if min(grid.sides) < 1:
        return f"is smaller than a pixel of --gsd {gsd:g}; use a smaller --gsd"
    if grid.number > MOST_TILES:
        return (
            f"has {width:,} x {height:,} pixels and {grid.number:,} tiles, more than {MOST_TILES:,} per split; "
            "use a larger --stride or --tile, or cut the scene first"
        )
    across, down = (min(pair) for pair in zip(grid.sides, grid.tile_sides, strict=True))
    size = across * down * len(choice.numbers) * np.dtype(scene.dtype).itemsize
    if size > _MOST_BYTES:
        return (
            f"has {width:,} x {height:,} pixels, but a tile of {across:,} x {down:,} takes {size / 2**30:,.1f} GiB, "
            f"more than {_MOST_BYTES >> 30} GiB; use a smaller --tile"
        )
    if grid.step[0] * grid.step[1] > MOST_UNDER_ONE:
        return f"has more than {MOST_UNDER_ONE:,} pixels per pixel of --gsd {gsd:g}; use a smaller --gsd"
    return None


def make_split(
    output: pathlib.Path,
    dataset: str,
    name: str,
    bands: list[str],
    dtype: str,
    tiles: Tiles,
    shards: int,
    options: list,
) -> split_plan.Split:
    """The plan of the conversion: tiles are assigned to shards by a hash of their keys, in scene order within a shard.

    `options` is everything else that the records depend on, in JSON types.
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
