"""Renders a small dataset of procedural overhead scenes: an image folder with train/CLASS and test/CLASS.

    pera-jax demo-scenes --output scenes

The classes differ in layout (rows, circles, grids, bands, single objects), while colors, brightness and contrast come
from the same distributions, so that color statistics say little about the class. Each image only depends on --seed,
--size and its number. Rendering takes about 9 ms per image.
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_prep.demo import raster
from data_prep.demo.scene_layouts import LAYOUTS
from data_prep.demo.scene_parts import Tones
from pera_jax.common import files, json_files, paths
from pera_jax.common.errors import UserError, run
from pera_jax.common.progress import Progress
from pera_jax.common.text import printable

VERSION = 1  # of the pictures; increases when the same seed gives other pictures
_TEST_EVERY = 5  # one in five images of each class is for testing
_SETTINGS_FILE = "scenes.json"


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    parser = argparse.ArgumentParser(prog="pera-jax demo-scenes", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=paths.local_path, required=True, help="folder to create")
    parser.add_argument(
        "--images", type=int, default=1500, help="total number; a fifth is for testing (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=128, help="image size in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args(argv)
    fewest = _TEST_EVERY * len(LAYOUTS)
    if args.images < fewest:
        raise UserError(f"--images is {args.images}; it must be >= {fewest} for {len(LAYOUTS)} classes")
    if not 16 <= args.size <= 4096:
        raise UserError(f"--size is {args.size}; it must be in [16, 4096] pixels")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be >= 0")
    settings = {"version": VERSION, "images": args.images, "size": args.size, "seed": args.seed}
    if not write_once(args.output, settings, lambda staging: _write(staging, settings)):
        print(f"{args.images} scenes: already in {printable(args.output)}")
        return
    print(f"{args.images} scenes of {len(LAYOUTS)} classes in {printable(args.output)}, train and test")


def write_once(output: pathlib.Path, settings: dict, write: Callable[[pathlib.Path], None]) -> bool:
    """Creates a folder of pictures completely or not at all, with a file of its settings.

    Returns False if the folder already exists with these settings.

    Args:
      write: fills the given folder; raises OSError.

    Raises:
      UserError: the folder has other content, or cannot be written.
    """
    if output.exists():
        if _settings_of(output) != settings:
            raise UserError(f"--output {output} already exists with other content; remove it, or choose another folder")
        return False
    with files.whole_folder(output) as staging:
        write(staging)
        (staging / _SETTINGS_FILE).write_text(json.dumps(settings), encoding="ascii")
    return True


def _settings_of(output: pathlib.Path) -> dict | None:
    try:
        return json_files.parse((output / _SETTINGS_FILE).read_bytes(), dict)
    except (OSError, ValueError):
        return None


def _write(staging: pathlib.Path, settings: dict) -> None:
    """Renders all scenes into a folder. Raises OSError."""
    jobs = []
    for i in range(settings["images"]):
        number, name = divmod(i, len(LAYOUTS))
        jobs.append((list(LAYOUTS)[name], number))
    for split in ("train", "test"):
        for name in LAYOUTS:
            (staging / split / name).mkdir(parents=True)
    save = functools.partial(_save, staging, settings["size"], settings["seed"])
    workers = len(os.sched_getaffinity(0))
    with (
        multiprocessing.get_context("spawn").Pool(workers) as pool,
        Progress(len(jobs), "scenes", "render") as progress,
    ):
        for _ in pool.imap_unordered(save, jobs, chunksize=16):
            progress.update()


def _save(staging: pathlib.Path, size: int, seed: int, job: tuple[str, int]) -> None:
    """Renders scene number `job[1]` of class `job[0]` to a JPEG file."""
    name, number = job
    split = "test" if number % _TEST_EVERY == _TEST_EVERY - 1 else "train"
    rng = np.random.default_rng([seed, list(LAYOUTS).index(name), number])
    picture = Image.fromarray(render(name, size, rng))
    picture.save(staging / split / name / f"{name}_{number:05d}.jpg", quality=92, subsampling=0)


def render(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A scene of the class `name`: uint8 [size, size, 3]."""
    zoom = np.float32(rng.uniform(0.85, 1.2))
    at = raster.frame(size)
    at = raster.Frame(at.u / zoom, at.v / zoom)
    tones = Tones(rng, sun=rng.uniform(0, 2 * np.pi))
    picture = LAYOUTS[name](rng, at, tones)
    raster.shade(picture, 1 + 0.05 * raster.noise(rng, size, 50, 2))  # thin cloud, slopes
    return expose(picture, rng)


def expose(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Simulates the camera: light, haze, lens and sensor. float32 [S, S, 3] -> uint8.

    Brightness, contrast and color cast are moved most of the way to values drawn independently of the class, like
    exposure, white balance and season.
    """
    gray = picture.mean(axis=2, keepdims=True)
    chroma = picture - gray
    light, contrast = rng.uniform(0.30, 0.52), rng.uniform(0.09, 0.18)
    gray = (gray - gray.mean()) * (contrast / gray.std()) ** 0.85 + gray.mean() + 0.9 * (light - gray.mean())
    cast = rng.normal(0, 0.014, 2)
    wanted = np.array([0.016 + cast[0], 0.012 + cast[1], -0.028 - cast.sum()])
    chroma = (chroma + 0.6 * (wanted - chroma.mean(axis=(0, 1)))) * rng.uniform(0.8, 1.4)
    purple = np.clip((chroma[..., 0] + chroma[..., 2]) / 2 - chroma[..., 1] - 0.01, 0, None)
    # otherwise gray areas in green scenes would become purple
    chroma += purple[..., None] * np.array([-0.3, 0.6, -0.3])
    picture = gray + chroma
    picture += rng.normal(0, rng.uniform(0.004, 0.014), picture.shape[:2])[..., None]
    levels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    return raster.soften(levels, rng.uniform(0.2, 0.55))


if __name__ == "__main__":
    run(main)
