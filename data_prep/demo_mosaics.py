"""Renders procedural scenes for dense probes: land cover with masks, and pairs of dates with new buildings.

    pera-jax demo-mosaics --output mosaics

makes mosaics/cover/{train,test}/{image,label} with classes.txt, and mosaics/change/{train,test}/{A,B,label}, as
`pera_jax.data.labelled.scenes` reads them. A scene is a patchwork of fields, each filled with the layout of one class
of `data_prep.demo_scenes`; one exposure for the whole. The second date of a pair has an exposure of its own, and roofs
where some fields were; every fourth pair shows no change.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from data_prep.demo import raster
from data_prep.demo.scene_layouts import LAYOUTS
from data_prep.demo.scene_parts import Tones
from data_prep.demo_scenes import expose, write_once
from pera_jax.common import paths
from pera_jax.common.errors import UserError, run
from pera_jax.common.progress import Progress
from pera_jax.common.text import printable

VERSION = 1  # of the pictures; increases when the same seed gives other pictures
CLASSES = ("forest", "crop_rows", "orchard", "dense_roofs", "solar_farm")
BUILT = CLASSES.index("dense_roofs")
SIZE = 192  # px
ZOOM = np.float32(0.6)  # of the layouts, similar to global crops of the demo
NUMBERS = {"train": 16, "test": 8}
_FIELDS = 7


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    parser = argparse.ArgumentParser(prog="pera-jax demo-mosaics", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=paths.local_path, required=True, help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be >= 0")
    settings = {"version": VERSION, "seed": args.seed}
    if not write_once(args.output, settings, lambda staging: _write(staging, args.seed)):
        print(f"mosaics: already in {printable(args.output)}")
        return
    print(f"{sum(NUMBERS.values())} scenes in {printable(args.output)}/cover and as many pairs in {args.output}/change")


def _write(staging: pathlib.Path, seed: int) -> None:
    with Progress(2 * sum(NUMBERS.values()), "scenes", "render") as progress:
        for place, (split, number) in enumerate(NUMBERS.items()):
            for index in range(number):
                rng = np.random.default_rng([seed, place, index])
                fields = layout(rng)
                classes = rng.integers(0, len(CLASSES), _FIELDS)
                _save(staging / "cover" / split, f"cover_{index:02d}", image=render(rng, fields, classes),
                      label=classes[fields].astype(np.uint8))  # fmt: skip
                progress.update()
                before, after = pair(rng, fields, changes=index % 4 != 3)
                _save(staging / "change" / split, f"pair_{index:02d}", A=render(rng, fields, before),
                      B=render(rng, fields, after), label=np.uint8(255) * (before != after)[fields])  # fmt: skip
                progress.update()
    (staging / "cover" / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="ascii")


def _save(folder: pathlib.Path, name: str, **pictures: np.ndarray) -> None:
    for kind, pixels in pictures.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{name}.png")


def layout(rng: np.random.Generator) -> np.ndarray:
    """The field index of each pixel, int [SIZE, SIZE]: a Voronoi diagram of random points."""
    at = raster.frame(SIZE)
    points = rng.uniform(-SIZE / 2, SIZE / 2, (_FIELDS, 2))
    return np.argmin([(at.u - u) ** 2 + (at.v - v) ** 2 for u, v in points], axis=0)


def pair(rng: np.random.Generator, fields: np.ndarray, changes: bool) -> tuple[np.ndarray, np.ndarray]:
    """The classes of the fields, int [fields], at two dates: up to two become buildings; with `changes`, at least
    one."""
    before = rng.integers(0, len(CLASSES), _FIELDS)
    shown = np.unique(fields)
    before[shown[0]] = (BUILT + 1) % len(CLASSES)  # at least one field to build on
    after, free = before.copy(), [field for field in shown if before[field] != BUILT]
    if changes:
        after[rng.permutation(free)[: rng.integers(1, 3)]] = BUILT
    return before, after


def render(rng: np.random.Generator, fields: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3]: each field cut from a scene of its class."""
    picture = np.zeros((SIZE, SIZE, 3), np.float32)
    at, sun = raster.frame(SIZE), rng.uniform(0, 2 * np.pi)
    at = raster.Frame(at.u / ZOOM, at.v / ZOOM)
    for field in np.unique(fields):
        scene = LAYOUTS[CLASSES[classes[field]]](rng, at, Tones(rng, sun=sun))  # [SIZE, SIZE, 3]
        picture[fields == field] = scene[fields == field]
    return expose(picture, rng)


if __name__ == "__main__":
    run(main)
