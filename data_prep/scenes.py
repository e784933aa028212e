"""Cuts GeoTIFF scenes into tiles, as one split of a dataset folder of ArrayRecord shards.

    pera-jax prep-scenes --input scenes/ --output shards/sentinel2 --split train --tile 256
    pera-jax prep-scenes --input naip_2020.tif --output shards/naip --split train --tile 640m --stride 320m \
        --gsd 2.5 --bands red,green,blue --band-names red,green,blue,nir

* Scenes: files below the folders of --input whose names end in tif or tiff (any case); files passed directly may have
  any format that rasterio opens (JPEG 2000, PNG, VRT). They are read by windows, so their size does not matter. Bands,
  nodata and resampling: see `data_prep.geo.scene_reader`.
* Tiles: see `data_prep.geo.scene_grid`. A tile is left out if more than --max-nodata of any band is nodata, or if a
  band has no data at all.
* Bands: --bands selects and orders bands by number (from 1) or name; --band-names names all bands of the files in
  order, including an alpha band if it is an ordinary band.
* Values: uint8, uint16 or float32, unchanged. --scale apply stores value * scale + offset as float32; it must be set if
  the scales of the scenes differ. --nodata adds nodata values to those declared in the files.
* Scenes that differ from the majority (dtype, bands, no georeference) are left out and listed.
* Records: three bands of uint8 as PNG, everything else as TIFF. Nodata pixels are stored as the minimum of the tile's
  band, at most 0, and do not count in the histogram. The key is SCENE/ROW_COLUMN in grid pixels; `place` is documented
  in `scene_place.place`.
* Order: tiles are assigned to shards by a hash of the key, so that shards mix locations; within a shard they have the
  order of the scenes, so that each part of a file is read once.
* OUTPUT/SPLIT.report.json accounts for every tile, and for every file without tiles, as in `data_prep.images`.
* Damaged files: the readable tiles are kept. More than --max-corrupt-fraction of scenes that cannot be opened, or of
  tiles that cannot be read, is an error.
* After a kill or a full disk, re-run the same command to resume after the finished shards, as with `data_prep.images`.
"""

import argparse
import functools
import math
import os
import pathlib
from collections.abc import Callable

import numpy as np

from data_prep import images
from data_prep.convert import command, folder
from data_prep.convert.pixels import Rejected, Stored, content_hash
from data_prep.convert.shards import Item, run_jobs
from data_prep.geo import scene_hints, scene_place, scene_plan, scene_reader, scene_tiles
from data_prep.geo.scene_file import require_rasterio
from data_prep.geo.scene_grid import length
from data_prep.geo.scene_reader import Tile
from pera_jax.common import paths
from pera_jax.common.errors import UserError, run
from pera_jax.common.text import printable, several
from pera_jax.data import codecs, records, statistics

_PLACED_BY = {"gcps": "ground control points", "rpcs": "RPCs, at their reference height"}


def main(argv: list[str] | None = None, driver: Callable = run_jobs) -> None:
    """The command; `driver` runs the jobs, see `run` of `folder.write_split`. Raises UserError."""
    args = _arguments(argv)
    require_rasterio()
    images.check_places(args.input, args.output, args.split)
    files, rejected = scene_plan.list_scenes(args.input)
    scaled = args.scale == "apply"
    scenes, unreadable, unfit = scene_plan.look_at(files, args.max_corrupt_fraction, scaled)
    choices, others = scene_plan.choose_bands(files, scenes, args.bands, args.band_names)
    unfit |= others
    tiles, others = scene_tiles.plan_tiles(
        files, scenes, unreadable, choices, args.tile, args.stride or args.tile, args.gsd
    )
    unfit |= others
    choices = {name: choice for name, choice in choices.items() if name not in unfit}
    names, dtype = next(iter(choices.values())).names, scenes[next(iter(choices))].dtype
    _check_nodata(args.nodata, dtype, scaled)
    notes = _notes(scenes, choices, unfit, args.scale)
    shards = command.number_of_shards(args, len(tiles))
    info = folder.existing_info(args.output)
    dataset = info.name if info else images.dataset_name(args.output)
    split = scene_tiles.make_split(
        args.output, dataset, args.split, names, dtype, tiles, shards, [args.max_nodata, args.nodata, scaled]
    )
    if folder.already_complete(split, info):
        print(f"{args.split}: already complete in {printable(args.output)}, {info.splits[args.split].records} records")
        return
    workers = f", {args.workers} workers" if driver is run_jobs else ""
    print(f"{args.split}: {len(tiles)} tiles of {len(choices) + len(unreadable)} scenes, {several(names, 20)} of "
          f"{dtype}, {split.shards} shards{workers}", flush=True)  # fmt: skip
    hints, odd = scene_hints.beforehand(split.items, dtype, names, args.nodata)
    for line in (*notes, *odd, *hints.values()):
        print(line, flush=True)
    convert = functools.partial(convert_tile, max_nodata=args.max_nodata, nodata=tuple(args.nodata), scaled=scaled)
    info, report = folder.write_split(
        split, convert, workers=args.workers, run=driver, max_corrupt_fraction=args.max_corrupt_fraction,
        rejected=rejected + list(unfit.items()),
    )  # fmt: skip
    written = info.splits[args.split]
    print(
        f"{args.split}: {written.records} records, {sum(written.shard_bytes) / 1e6:.1f} MB, in {printable(args.output)}"
    )
    print_bands(names, written)
    if not scaled:  # values of the files, as --nodata takes them
        found = scene_hints.fills(statistics.load(args.output, args.split), dtype, names)
        for line in (line for value, line in found.items() if value not in hints):
            print(line)
    _show(args.output, report)


def _check_nodata(values: list[float], dtype: str, scaled: bool) -> None:
    """Raises UserError for a value outside the dtype of the files."""
    for value in values:
        if not scaled and scene_reader.stored(value, np.dtype(dtype)) is None:
            raise UserError(f"--nodata {value:g} is not a value of {dtype}, the dtype of the scenes; remove it")


def _notes(scenes: dict, choices: dict, unfit: dict[str, str], scale: str | None) -> list[str]:
    """Messages on changes and missing metadata of the scenes. Raises UserError as `scene_hints.scales`."""
    taken = {name: scenes[name] for name in choices}
    notes = [scene_hints.scales(scenes, choices, scale)]
    if unfit:
        shown = several(f"{printable(name)} {reason.split(';')[0]}" for name, reason in unfit.items())
        notes.append(f"left out: {len(unfit)} of {len(unfit) + len(taken)} scenes: {shown}")
    if number := sum(choice.alpha is not None for choice in choices.values()):
        notes.append(
            f"the alpha band of {number} scenes is used as data mask; if it is an ordinary band, name it in "
            "--band-names"
        )
    if number := sum(scene.pages for scene in taken.values()):
        notes.append(f"{number} scenes have several pages, of which the first is used")
    for kind, what in _PLACED_BY.items():
        if number := sum(scene.placed == kind for scene in taken.values()):
            notes.append(f"{number} scenes are georeferenced by their {what}")
    if number := sum(scene.placed is None for scene in taken.values()):
        notes.append(f"{number} scenes have no georeference: their tiles have no bounds")
    return [note for note in notes if note]


def _show(output: pathlib.Path, report: dict) -> None:
    """Prints a summary of changes and rejected tiles."""
    split = report["split"]
    if report["changed"]:
        print("changed: " + ", ".join(f"{kind} in {number} tiles" for kind, number in report["changed"].items()))
    named = [f"{report[name]['number']} {name}" for name in ("rejected", "failed") if report[name]["number"]]
    if named:
        print(f"left out: {', '.join(named)}")
    if twins := report["found"]["number"]:
        print(f"written, but with the same pixels as an earlier tile: {twins}")
    if named or twins:
        print(f"{printable(output / split)}.report.json and {split}.inputs.csv list them")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pera-jax prep-scenes", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input", type=paths.local_path, required=True, nargs="+", help="folders of GeoTIFFs, or files"
    )
    parser.add_argument("--output", type=paths.local_path, required=True, help="dataset folder; created if missing")
    parser.add_argument("--split", required=True, help="name of the split: train, test, ...")
    parser.add_argument(
        "--tile", type=length, required=True, metavar="L", help="tile size in pixels (256) or meters (2560m)"
    )
    parser.add_argument("--stride", type=length, metavar="L", help="step between tiles; default: the tile size")
    parser.add_argument("--gsd", type=_positive, metavar="M", help="meters per pixel; default: that of the scene")
    parser.add_argument(
        "--bands", type=_names, metavar="B,B", help="band numbers (from 1) or names; default: all except alpha"
    )
    parser.add_argument("--band-names", type=_names, metavar="N,N", help="names for all bands of the files")
    parser.add_argument("--nodata", type=_number, nargs="+", default=[], metavar="V", help="nodata values in "
                        "addition to those declared in the files")  # fmt: skip
    parser.add_argument("--scale", choices=("apply", "ignore"), help="what to do with scale and offset of the files; "
                        "default: ignore, but an error where they differ")  # fmt: skip
    parser.add_argument("--max-nodata", type=command.fraction, default=0.1, metavar="F", help="maximum fraction "
                        "of nodata pixels in a tile (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--workers",
        type=command.count,
        default=len(os.sched_getaffinity(0)),
        help="number of processes (default: all cores)",
    )
    parser.add_argument("--max-corrupt-fraction", type=command.fraction, default=0.05, metavar="F", help="maximum "
                        "fraction of unreadable scenes, and of unreadable tiles (default: %(default)s)")  # fmt: skip
    parser.add_argument("--shard-size", type=command.count, metavar="N", help="tiles per shard; default: 512, or more "
                        "where that would make over 512 shards")  # fmt: skip
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return float(text)


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(
            f"expected a finite number, got {text}; NaN and infinity always count as nodata"
        )
    return float(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected unique, nonempty names, got {text!r}")
    return names


def print_bands(names: list[str], split: records.SplitInfo) -> None:
    """Prints a line per band: the range in stored units that maps to [0, 1], and mean and std after that mapping."""
    names = list(map(printable, names))
    wide = max(map(len, [*names, "band"]))
    print(f"{'band':{wide}}  {'range':>19}  {'mean':>6}  {'std':>6}")
    for name, (low, high), mean, std in zip(names, split.ranges, split.mean, split.std, strict=True):
        print(f"{name:{wide}}  {low:9.5g} {high:9.5g}  {mean:6.4f}  {std:6.4f}")
    print(f"fingerprint {split.fingerprint[:12]}")


def convert_tile(item: Item, max_nodata: float, nodata: tuple[float, ...] = (), scaled: bool = False) -> Stored:
    """Reads and encodes one item of `scene_tiles.plan_tiles`; `nodata` and `scaled` as in `scene_reader.read`.

    Raises ImageDecodeError if the file is damaged, Rejected if more than the fraction `max_nodata` of a band, or all of
    it, is nodata.
    """
    if not isinstance(item.part, Tile):
        raise codecs.ImageDecodeError(item.part[0])
    pixels, valid = scene_reader.read(item.path, item.part, nodata, scaled)  # [H, W, C] both
    missing = 1 - valid.mean(axis=(0, 1))  # [C]
    worst = int(missing.argmax())
    if missing[worst] > max_nodata or not valid[..., worst].any():
        raise Rejected("too much nodata")
    changes, without = [], scene_reader.no_data(pixels, valid)
    if without:
        changes.append("nodata to 0" if not any(without["values"]) else "nodata to the minimum")
    if scaled:
        changes.append("scale and offset")
    if (item.part.columns, item.part.rows) != item.part.window[2:]:
        changes.append("resampled")
    encoded = codecs.encode(pixels)
    place = scene_place.place(item.path, item.part, item.key.rsplit("/", 1)[0], without)
    return Stored(encoded, statistics.count(pixels, valid), tuple(changes), content_hash(encoded), place=place)


if __name__ == "__main__":
    run(main)
