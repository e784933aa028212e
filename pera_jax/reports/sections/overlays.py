"""Labels, predictions and errors of segmentation and change probes on test scenes."""

import colorsys
import pathlib
from typing import Any

import numpy as np

from pera_jax.bands import Bands, as_bytes, visible
from pera_jax.common.errors import UserError
from pera_jax.data.labelled import scene_files, scenes
from pera_jax.probes.dense.overlap import IGNORE
from pera_jax.reports.drawing.grid import Grid, Tile

READING = (
    "Test scenes of the probe: the image (for change detection both dates), the labels, the prediction from frozen "
    "features, and the errors in red over the darkened image. Light gray pixels have no label and are ignored."
)
_MOST = 6  # scenes per result
_UNLABELED, _WRONG = (205, 205, 205), (225, 40, 40)
_DISTINCT = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (86, 180, 233), (120, 80, 40),
    (150, 60, 190), (70, 70, 70), (160, 210, 60),
)  # fmt: skip


def colors_of(classes: int) -> tuple[tuple[int, int, int], ...]:
    """One color per class; for two classes a dark and a bright one."""
    if classes == 2:
        return (40, 44, 52), (255, 196, 0)
    more = [colorsys.hsv_to_rgb(i * 0.618 % 1.0, 0.55, 0.9) for i in range(classes - len(_DISTINCT))]
    return (*_DISTINCT, *(tuple(round(255 * part) for part in color) for color in more))[:classes]


def colored(mask: np.ndarray, colors: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Class indices uint8 [H, W] as colors uint8 [H, W, 3]; unlabeled pixels are gray."""
    table = np.full((256, 3), _UNLABELED, np.uint8)
    table[: len(colors)] = colors
    return table[mask]


def errors(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The darkened gray image [H, W, 3] with errors in red and unlabeled pixels in light gray."""
    result = np.repeat(40.0 + 0.45 * image.mean(axis=2, keepdims=True), 3, axis=2)
    wrong, unlabeled = (truth != predicted) & (truth != IGNORE), truth == IGNORE
    result[wrong] = 0.2 * result[wrong] + 0.8 * np.array(_WRONG)
    result[unlabeled] = _UNLABELED
    return np.round(result).astype(np.uint8)


def grid(entry: dict[str, Any], bands: Bands, rgb: tuple[str, ...]) -> tuple[Grid | None, list[str]]:
    """The scenes of a segmentation or change result, and a message for each scene that cannot be shown."""
    pictures = sorted(pathlib.Path(entry["file"]).with_suffix("").rglob("*.png"))
    names = tuple(entry["data"]["class_names"])
    colors, change = colors_of(len(names)), entry["task"] == "change"
    rows, faults = [], []
    try:
        found = _found(entry["data"], change)
        for picture in pictures[:_MOST]:
            try:
                rows.append(_row(found, picture, names, colors, bands, rgb))
            except UserError as error:
                faults.append(f"{picture.name} is not shown: {error}.")
    except UserError as error:
        faults.append(f"The scenes are not shown: {error}.")
    images = ("first date", "second date") if change else ("image",)
    columns = (*images, "truth", "prediction", "errors")
    side = 1130 // len(columns) - 8
    kinds = (*zip(names, colors, strict=True), ("no label", _UNLABELED), ("wrong", _WRONG))
    left = len(pictures) - _MOST
    faults += [f"{left} more scenes are in {pathlib.Path(entry['file']).with_suffix('')}."] if left > 0 else []
    return (Grid(columns, tuple(rows), side, kinds) if rows else None), faults


def _found(data: dict[str, Any], change: bool) -> dict[str, dict[str, pathlib.Path]]:
    """The files of the test scenes, see `scene_files.files`."""
    splits = tuple(str(data.get(name) or "") for name in ("train_split", "test_split"))
    tested = scenes.folders(pathlib.Path(str(data.get("path") or "")), splits)[-1]
    return scene_files.files(tested, 2 if change else 1)


def _row(found, picture: pathlib.Path, names, colors, bands: Bands, rgb) -> tuple[Tile, ...]:
    if picture.stem not in found["label"]:
        raise UserError("the scene no longer exists in the data folder")
    scene = scene_files.read(found, picture.stem, bands, names)
    predicted = scene_files.read_mask(picture, False, names)
    if predicted.shape != scene.mask.shape:
        raise UserError("labels and prediction have different sizes")
    views = [as_bytes(bands.mapped(image), visible(bands, rgb)) for image in scene.images]
    maps = (colored(scene.mask, colors), colored(predicted, colors))
    tiles = [Tile(view) for view in views] + [Tile(each, exact=True) for each in maps]
    tiles[0] = Tile(views[0], picture.stem)
    return (*tiles, Tile(errors(views[-1], scene.mask, predicted)))
