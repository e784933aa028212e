"""Listing scenes and choosing their bands.

A minority of scenes that differ from the others (dtype, bands, no georeference) is left out and listed. Without a
majority there is an error.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Hashable

from data_prep.convert.pixels import Rejected
from data_prep.geo import scene_reader
from data_prep.geo.scene_file import ENDINGS
from data_prep.geo.scene_reader import Scene
from pera_jax.common.errors import UserError
from pera_jax.common.progress import Progress
from pera_jax.common.text import printable, several
from pera_jax.data import codecs, file_tree

Files = dict[str, tuple[str, int]]  # (path, size in bytes) by the name of a scene
Reasons = dict[str, str]  # by the name of a scene


def list_scenes(places: list[pathlib.Path]) -> tuple[Files, list[tuple[str, str]]]:
    """Returns ({name: (path, size in bytes)} of all scenes, sorted; (name, reason) of other files in the folders).

    Names are paths relative to a folder of --input, or names of files passed directly. Raises UserError: no scenes, or
    two scenes with the same name.
    """
    scenes, rejected = {}, []
    for source in places:
        if not source.exists():
            raise UserError(f"--input {source} does not exist; pass GeoTIFFs or folders of GeoTIFFs")
        found = [(source.name, str(source), source.stat().st_size)]
        if source.is_dir():
            found, others = _below(source)
            rejected += others
        for name, path, size in found:
            if name in scenes:
                raise UserError(
                    f"{printable(scenes[name][0])} and {printable(path)} have the same name; rename one, or pass their "
                    "parent folder"
                )
            scenes[name] = (path, size)
    if not scenes:
        endings = " ".join(ending[1:] for ending in ENDINGS)
        raise UserError(
            f"--input {places[0]} has no GeoTIFFs (names ending in {endings}), but {len(rejected)} other files; pass "
            "GeoTIFFs"
        )
    return dict(sorted(scenes.items())), rejected


def _below(root: pathlib.Path) -> tuple[list[tuple[str, str, int]], list[tuple[str, str]]]:
    """((name, path, size) of GeoTIFFs below a folder, (name, reason) of other files)."""
    scenes, rejected = [], []
    for found in file_tree.files_below(root):
        ending = os.path.splitext(found.name)[1]
        name = found.name.encode("utf-8", "backslashreplace").decode()
        if found.fault or ending.lower() not in ENDINGS:
            rejected.append((name, found.fault or (f"ending {ending}" if ending else "no ending")))
        elif name != found.name:
            rejected.append((name, "its name is not valid UTF-8"))
        else:
            scenes.append((name, os.path.join(root, *name.split("/")), found.size))
    return scenes, rejected


def look_at(
    files: Files, max_corrupt_fraction: float, scaled: bool = False
) -> tuple[dict[str, Scene], Reasons, Reasons]:
    """Opens every file.

    Args:
      scaled: whether scale and offset of the files will be applied.

    Returns:
      ({name: scene}, reasons of unreadable files by name, reasons of files left out by name).

    Raises:
      UserError: too many files cannot be opened or are left out, or no dtype has a majority.
    """
    scenes, unreadable, unfit = {}, {}, {}
    with Progress(len(files), "scenes", "open") as progress:
        for name, (path, _) in files.items():
            try:
                scenes[name] = scene_reader.describe(path, scaled)
            except codecs.ImageDecodeError as error:
                unreadable[name] = str(error)
            except Rejected as error:
                unfit[name] = str(error)
            progress.update()
    if len(unreadable) > max_corrupt_fraction * len(files) or not (scenes or unfit):
        name, reason = next(iter(unreadable.items()))
        fix = (
            f"fix them, or increase --max-corrupt-fraction ({max_corrupt_fraction:g})" if scenes else "pass GeoTIFFs"
        )
        raise UserError(
            f"{len(unreadable)} of {len(files)} scenes cannot be read (the first is {printable(files[name][0])}: "
            f"{reason}); {fix}"
        )
    check_few(unfit, len(files) - len(unreadable), files)
    common = majority({name: scene.dtype for name, scene in scenes.items()})
    first = next(iter(scenes))
    for name, scene in scenes.items():
        if common is None and scene.dtype != scenes[first].dtype:
            raise UserError(
                f"{printable(files[name][0])} has values of {scene.dtype}, but {printable(files[first][0])} of "
                f"{scenes[first].dtype}; convert them to separate datasets"
            )
        if common is not None and scene.dtype != common:
            unfit[name] = f"has values of {scene.dtype}, but most scenes of {common}"
    return {name: scene for name, scene in scenes.items() if name not in unfit}, unreadable, unfit


def majority(values: dict[str, Hashable]) -> Hashable | None:
    """The value shared by more than half, or None."""
    ((value, number),) = collections.Counter(values.values()).most_common(1)
    return value if 2 * number > len(values) else None


def check_few(unfit: Reasons, total: int, files: Files) -> None:
    """Raises UserError with the first reason if more than half or all of `total` scenes are unfit."""
    if unfit and (2 * len(unfit) > total or len(unfit) == total):
        name = next(iter(unfit))
        others = f" ({len(unfit)} of {total} scenes have this problem)" if total > 1 else ""
        raise UserError(f"{printable(files[name][0])} {unfit[name]}{others}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The selected bands of a scene: their GDAL numbers and names, and the number of the alpha band used as data mask,
    or None."""

    numbers: tuple[int, ...]
    names: list[str]
    alpha: int | None


def choose_bands(
    files: Files, scenes: dict[str, Scene], wanted: list[str] | None, band_names: list[str] | None
) -> tuple[dict[str, Choice], Reasons]:
    """The bands of each scene, and the reasons of scenes left out.

    Args:
      wanted: --bands; None selects all in file order.
      band_names: --band-names, with or without a name for an alpha band, which then is an ordinary band.

    Raises UserError if more than half of the scenes lack a band, or there is no majority.
    """
    choices, unfit = {}, {}
    for name, scene in scenes.items():
        try:
            choices[name] = _choose(name, scene, wanted, band_names)
        except Rejected as error:
            unfit[name] = str(error)
    check_few(unfit, len(scenes), files)
    common = majority({name: tuple(choice.names) for name, choice in choices.items()})
    first = next(iter(choices))
    for name, choice in choices.items():
        if common is None and choice.names != choices[first].names:
            raise UserError(
                f"{printable(name)} has the bands {several(choice.names, 20)}, but {printable(first)} has "
                f"{several(choices[first].names, 20)}; choose common --bands, pass --band-names, or convert them to "
                "separate datasets"
            )
        if common is not None and tuple(choice.names) != common:
            unfit[name] = f"has the bands {several(choice.names, 20)}, but most scenes have {several(common, 20)}"
    return {name: choice for name, choice in choices.items() if name not in unfit}, unfit


def _choose(scene_name: str, scene: Scene, wanted: list[str] | None, band_names: list[str] | None) -> Choice:
    """The bands of one scene. Raises Rejected if it lacks one."""
    names, alpha = scene.names, scene.alpha
    if band_names is not None:
        if alpha is not None and len(band_names) == len(names) + 1:
            names, alpha = dict.fromkeys(sorted([*names, alpha])), None
        if len(band_names) != len(names):
            raise Rejected(f"has {len(names)} bands, but --band-names has {len(band_names)} names; name all bands")
        names = dict(zip(names, band_names, strict=True))
    numbers = {name: number for number, name in names.items()}
    chosen = []
    for band in wanted or names.values():
        number = int(band) if band.isdecimal() and band not in numbers else numbers.get(band)
        if number not in names:
            held = several((f"{number} {name}" for number, name in names.items()), 20)
            raise Rejected(f"has no band {printable(band)!r}; choose --bands from {held}")
        chosen.append(number)
    if len(set(chosen)) < len(chosen):
        raise UserError(
            f"--bands {','.join(wanted)} selects a band of {printable(scene_name)} twice; list each band once"
        )
    return Choice(tuple(chosen), [names[number] for number in chosen], alpha)
