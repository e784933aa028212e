"""From files and options to the list of tiles: which scenes there are, which bands they give, where their tiles lie."""

import dataclasses
import hashlib
import json
import os
import pathlib

from data_prep import folder, scene_reader, sources
from data_prep.scene_grid import Grid, Length
from data_prep.scene_reader import Scene, Tile
from data_prep.shards import Item
from pera_jax.data import codecs, records
from pera_jax.errors import UserError
from pera_jax.metrics import Progress

ENDINGS = (".tif", ".tiff")


def list_scenes(places: list[pathlib.Path]) -> tuple[dict[str, tuple[str, int]], list[tuple[str, str]]]:
    """Returns ({name: (path, size in bytes)} of every scene, sorted; (name, reason) of other files in the folders).

    The name is the path relative to the folder of --input, or that of a file that --input names. Raises UserError: nothing
    there, or two scenes of one name.
    """
    scenes, rejected = {}, []
    for source in places:
        if not source.exists():
            raise UserError(f"--input {source} does not exist; name GeoTIFFs or folders of them")
        found = [(source.name, str(source), source.stat().st_size)]
        if source.is_dir():
            found, others = _below(source)
            rejected += others
        for name, path, size in found:
            if name in scenes:
                raise UserError(
                    f"{scenes[name][0]} and {path} would have the same name; rename one, or name their folder"
                )
            scenes[name] = (path, size)
    if not scenes:
        endings = " ".join(ending[1:] for ending in ENDINGS)
        raise UserError(
            f"--input {places[0]} holds no GeoTIFF (names ending in {endings}); {len(rejected)} other files are there"
        )
    return dict(sorted(scenes.items())), rejected


def _below(root: pathlib.Path) -> tuple[list[tuple[str, str, int]], list[tuple[str, str]]]:
    """((name, path, size) of the GeoTIFFs below a folder, (name, reason) of the other files)."""
    scenes, rejected = [], []
    for found in sources.files_below(root):
        ending = os.path.splitext(found.name)[1]
        name = found.name.encode("utf-8", "backslashreplace").decode()
        if found.fault or ending.lower() not in ENDINGS:
            rejected.append((name, found.fault or (f"ending {ending}" if ending else "no ending")))
        elif name != found.name:
            rejected.append((name, "its name is not valid UTF-8"))
        else:
            scenes.append((name, os.path.join(root, *name.split("/")), found.size))
    return scenes, rejected


def look_at(files: dict[str, tuple[str, int]], max_corrupt_share: float) -> tuple[dict[str, Scene], dict[str, str]]:
    """Opens every file: ({name: scene}, {name: reason} of those that cannot be opened). Raises UserError where these are
    too many, or scenes differ in dtype."""
    scenes, unreadable = {}, {}
    with Progress(len(files), "scenes", "look at") as progress:
        for name, (path, _) in files.items():
            try:
                scenes[name] = scene_reader.describe(path)
            except codecs.ImageDecodeError as error:
                unreadable[name] = str(error)
            progress.update()
    if len(unreadable) > max_corrupt_share * len(files) or not scenes:
        name, reason = next(iter(unreadable.items()))
        mend = (
            f"mend them, or allow a larger --max-corrupt-share than {max_corrupt_share:g}"
            if scenes
            else "name GeoTIFFs"
        )
        raise UserError(
            f"{len(unreadable)} of {len(files)} scenes cannot be read (the first is {files[name][0]}: {reason}); {mend}"
        )
    first = next(iter(scenes))
    for name, scene in scenes.items():
        if scene.dtype != scenes[first].dtype:
            raise UserError(
                f"{files[name][0]} holds {scene.dtype} and {files[first][0]} {scenes[first].dtype}; convert them one by one "
                "to data sets of their own"
            )
    return scenes, unreadable


@dataclasses.dataclass(frozen=True)
class Choice:
    """The bands that are taken of a scene: GDAL's numbers, their names, and whether an alpha band says where there is data."""

    numbers: tuple[int, ...]
    names: list[str]
    alpha: bool


def choose_bands(scenes: dict[str, Scene], wanted: list[str] | None, band_names: list[str] | None) -> dict[str, Choice]:
    """The bands of each scene, by its name.

    Args:
      wanted: --bands; None takes all in the order of the file.
      band_names: --band-names: with or without one for an alpha band, which then is a band like others.

    Raises UserError where a scene lacks one, or scenes differ.
    """
    choices = {}
    for scene_name, scene in scenes.items():
        names, alpha = scene.names, scene.alpha
        if band_names is not None:
            if alpha is not None and len(band_names) == len(names) + 1:
                names, alpha = dict.fromkeys(sorted([*names, alpha])), None
            if len(band_names) != len(names):
                raise UserError(
                    f"{scene_name} has {len(names)} bands, --band-names has {len(band_names)}; name all of them"
                )
            names = dict(zip(names, band_names, strict=True))
        numbers = {name: number for number, name in names.items()}
        chosen = []
        for band in wanted or names.values():
            number = int(band) if band.isdecimal() and band not in numbers else numbers.get(band)
            if number not in names:
                held = ", ".join(f"{number} {name}" for number, name in names.items())
                raise UserError(f"{scene_name} has no band {band!r}; it has {held}; choose --bands of these")
            chosen.append(number)
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--bands {','.join(wanted)} chooses a band of {scene_name} twice; name each once")
        choices[scene_name] = Choice(tuple(chosen), [names[number] for number in chosen], alpha is not None)
    first = next(iter(choices))
    for scene_name, choice in choices.items():
        if choice.names != choices[first].names:
            raise UserError(
                f"{scene_name} has the bands {', '.join(choice.names)}, and {first} {', '.join(choices[first].names)}; choose --bands "
                "that both have, give --band-names, or convert them to data sets of their own"
            )
    return choices


def plan_tiles(
    files: dict[str, tuple[str, int]],
    scenes: dict[str, Scene],
    unreadable: dict[str, str],
    choices: dict[str, Choice],
    tile: Length,
    stride: Length,
    gsd: float | None,
) -> list[Item]:
    """One item for each tile, whose part is a `Tile`, and for each file that cannot be opened, whose part is the reason.

    `files`, `scenes`, `unreadable` and `choices` come from the functions above, the others from the command line.

    Raises UserError: metres are asked for of a scene that lies nowhere, or no scene has room for a tile.
    """
    items = [Item(files[name][0], name, None, files[name][1], (reason,)) for name, reason in unreadable.items()]
    in_metres = gsd is not None or tile.metres or stride.metres
    grids = {}
    for name, scene in scenes.items():
        if in_metres and scene.metres is None:
            raise UserError(
                f"{files[name][0]} does not say where on the ground it lies, so metres mean nothing for it; give --tile and "
                "--stride in pixels and no --gsd"
            )
        grids[name] = grid = Grid.of(scene.sides, scene.metres, tile, stride, gsd)
        if min(grid.sides) < 1:
            raise UserError(f"{files[name][0]} is smaller than a pixel of --gsd {gsd:g}; give a smaller one")
        for column, row, width, height in grid.tiles():
            window = _window(grid, scene, column, row, width, height)
            part = Tile(window, width, height, choices[name].numbers, choices[name].alpha)
            items.append(Item(files[name][0], f"{name}/{row:06d}_{column:06d}", None, files[name][1], part))
    if not any(grid.whole for grid in grids.values()):
        name = max(grids, key=lambda name: min(grids[name].sides))
        width, height = grids[name].sides
        raise UserError(
            f"--tile {tile} is larger than every scene: the largest, {files[name][0]}, has {width} x {height} pixels, a "
            f"tile {grids[name].tile[0]} x {grids[name].tile[1]}; give a smaller --tile"
        )
    return items


def _window(
    grid: Grid, scene: Scene, column: int, row: int, width: int, height: int
) -> tuple[float, float, float, float]:
    """A tile [column, row, width, height] in pixels of the file, inside of which it lies to the last bit."""
    (across, down), (right, bottom) = grid.step, scene.sides
    left, top = column * across, row * down
    return left, top, min(width * across, right - left), min(height * down, bottom - top)


def make_split(
    output: pathlib.Path,
    dataset: str,
    name: str,
    bands: list[str],
    dtype: str,
    items: list[Item],
    shards: int,
    max_nodata: float,
) -> folder.Split:
    """The plan of a conversion: the tiles dealt to the shards by a hash of their keys, then as they lie in the scenes."""
    dealt = sorted(items, key=lambda item: hashlib.sha256(item.key.encode("utf-8")).digest())
    described = [records.FORMAT_VERSION, dataset, name, bands, dtype, shards, max_nodata]
    digest = hashlib.sha256(json.dumps(described).encode("ascii"))
    for item in dealt:
        digest.update(json.dumps([item.key, item.size, item.part]).encode("ascii"))
    split = folder.Split(output, dataset, name, bands, dtype, None, True, dealt, shards, digest.hexdigest())
    ordered = [item for k in range(shards) for item in sorted(split.job(k).items, key=lambda item: item.key)]
    return dataclasses.replace(split, items=ordered)
