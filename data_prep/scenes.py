"""Cuts GeoTIFF scenes into tiles: one split of a data set folder of ArrayRecord shards.

    python -m data_prep.scenes --input scenes/ --output shards/sentinel2 --split train --tile 256
    python -m data_prep.scenes --input naip_2020.tif --output shards/naip --split train --tile 640m --stride 320m \
        --gsd 2.5 --bands red,green,blue --band-names red,green,blue,nir

* Scenes: the files below each folder of --input whose names end in tif or tiff, in any case; files that --input names
  themselves may be of any kind that rasterio opens (JPEG 2000, PNG, VRT). They are read by windows, so their size does
  not matter. `data_prep.geo.scene_reader` says what counts as a band, as no data, and how pixels are made of another size.
* Tiles: `data_prep.geo.scene_grid` says where they lie. A tile of which more than --max-nodata holds no data, in the band that
  has least, or that has a band without any, is left out.
* Bands: --bands chooses and orders them by number (from 1) or name; --band-names names all bands of the files, in their
  order, an alpha band too where it is none.
* Values: uint8, uint16 or float32, kept as they are. --scale apply stores value x scale + offset of the file, as float32;
  scenes whose scales differ need a word on that. --nodata names values that stand for no data, beside the one that a file
  declares.
* Scenes that are unlike more than half of the others (dtype, bands, no place on the ground) are left out and named.
* Records: three bands of uint8 as PNG, everything else as TIFF. What is no data is stored as the least value of the tile's
  band, at most 0, and does not count in the histogram. The key is SCENE/ROW_COLUMN, in pixels of the grid; `place` is what
  `scene_place.place` says.
* Order: a hash of the key deals the tiles to the shards, so that none is a single place; within a shard they lie as in
  the scenes, so that a part of a file is read once.
* OUTPUT/SPLIT.report.json accounts for every tile, and for every file that gave none, as `data_prep.images` says.
* Damaged files: what can be read of them is kept. More than --max-corrupt-share of scenes that cannot be opened, or of
  tiles that cannot be read, is an error.
* Killed or out of space: the same command goes on after the shards that are finished, as with `data_prep.images`.
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

_PLACED_BY = {"gcps": "ground control points", "rpcs": "RPCs, at the height that they are centred on"}


def main(argv: list[str] | None = None, driver: Callable = run_jobs) -> None:
    """The command; `driver` runs its jobs, as `folder.write_split` says of `run`. Raises UserError."""
    args = _arguments(argv)
    require_rasterio()
    images.check_places(args.input, args.output, args.split)
    files, rejected = scene_plan.list_scenes(args.input)
    scaled = args.scale == "apply"
    scenes, unreadable, unfit = scene_plan.look_at(files, args.max_corrupt_share, scaled)
    choices, others = scene_plan.choose_bands(files, scenes, args.bands, args.band_names)
    unfit |= others
    tiles, others = scene_tiles.plan_tiles(files, scenes, unreadable, choices, args.tile, args.stride or args.tile, args.gsd)
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
    print(f"{args.split}: {len(tiles)} tiles of {len(choices) + len(unreadable)} scenes, {several(names, 20)} of {dtype}, "
          f"{split.shards} shards{workers}", flush=True)  # fmt: skip
    hints, odd = scene_hints.beforehand(split.items, dtype, names, args.nodata)
    for line in (*notes, *odd, *hints.values()):
        print(line, flush=True)
    convert = functools.partial(convert_tile, max_nodata=args.max_nodata, nodata=tuple(args.nodata), scaled=scaled)
    info, report = folder.write_split(
        split, convert, workers=args.workers, run=driver, max_corrupt_share=args.max_corrupt_share,
        rejected=rejected + list(unfit.items()),
    )  # fmt: skip
    written = info.splits[args.split]
    print(f"{args.split}: {written.records} records, {sum(written.shard_bytes) / 1e6:.1f} MB, in {printable(args.output)}")
    print_bands(names, written)
    if not scaled:  # values of the files, as --nodata takes them
        found = scene_hints.fills(statistics.load(args.output, args.split), dtype, names)
        for line in (line for value, line in found.items() if value not in hints):
            print(line)
    _show(args.output, report)


def _check_nodata(values: list[float], dtype: str, scaled: bool) -> None:
    """Raises UserError where a value is none of the files'."""
    for value in values:
        if not scaled and scene_reader.stored(value, np.dtype(dtype)) is None:
            raise UserError(f"--nodata {value:g} is no value of {dtype}, which the scenes hold; leave it out")


def _notes(scenes: dict, choices: dict, unfit: dict[str, str], scale: str | None) -> list[str]:
    """What is done to the scenes, and what they lack, as lines for the terminal. Raises UserError as `scene_hints.scales`."""
    taken = {name: scenes[name] for name in choices}
    notes = [scene_hints.scales(scenes, choices, scale)]
    if unfit:
        shown = several(f"{printable(name)} {reason.split(';')[0]}" for name, reason in unfit.items())
        notes.append(f"left out: {len(unfit)} of {len(unfit) + len(taken)} scenes: {shown}")
    if number := sum(choice.alpha is not None for choice in choices.values()):
        notes.append(
            f"the alpha band of {number} scenes says where there is data; if it is a band like others, name it in --band-names"
        )
    if number := sum(scene.pages for scene in taken.values()):
        notes.append(f"{number} scenes hold several pages, of which the first is taken")
    for kind, what in _PLACED_BY.items():
        if number := sum(scene.placed == kind for scene in taken.values()):
            notes.append(f"{number} scenes lie where their {what} say")
    if number := sum(scene.placed is None for scene in taken.values()):
        notes.append(f"{number} scenes do not say where on the ground they lie: their tiles have no bounds")
    return [note for note in notes if note]


def _show(output: pathlib.Path, report: dict) -> None:
    """Prints what a conversion changed and left out."""
    split = report["split"]
    if report["changed"]:
        print("changed: " + ", ".join(f"{kind} in {number} tiles" for kind, number in report["changed"].items()))
    named = [f"{report[name]['number']} {name}" for name in ("rejected", "failed") if report[name]["number"]]
    if named:
        print(f"left out: {', '.join(named)}")
    if twins := report["found"]["number"]:
        print(f"written, but the same pixels as a tile before them: {twins}")
    if named or twins:
        print(f"{printable(output / split)}.report.json and {split}.inputs.csv name them")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_prep.scenes", description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=paths.local_path, required=True, nargs="+", help="folders of GeoTIFFs, or files")
    parser.add_argument("--output", type=paths.local_path, required=True, help="data set folder; made if need be")
    parser.add_argument("--split", required=True, help="name of the split: train, test, ...")
    parser.add_argument(
        "--tile", type=length, required=True, metavar="L", help="side of a tile: pixels (256) or metres (2560m)"
    )
    parser.add_argument("--stride", type=length, metavar="L", help="from tile to tile; default: the side of a tile")
    parser.add_argument("--gsd", type=_positive, metavar="M", help="metres a pixel; default: as in the scene")
    parser.add_argument("--bands", type=_names, metavar="B,B", help="numbers (from 1) or names; default: all but alpha")
    parser.add_argument("--band-names", type=_names, metavar="N,N", help="names of all bands of the files")
    parser.add_argument("--nodata", type=_number, nargs="+", default=[], metavar="V", help="values that stand for no data, "
                        "beside the one that a file declares")  # fmt: skip
    parser.add_argument("--scale", choices=("apply", "ignore"), help="what to do with scale and offset of the files; default: "
                        "ignore, but an error where they differ")  # fmt: skip
    parser.add_argument("--max-nodata", type=command.share, default=0.1, metavar="S", help="default: %(default)s")
    parser.add_argument("--workers", type=command.count, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--max-corrupt-share", type=command.share, default=0.05, metavar="S", help="default: %(default)s")
    parser.add_argument("--shard-size", type=command.count, metavar="N", help="tiles per shard; default: 512, or more where "
                        "that would make over 512 shards")  # fmt: skip
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return float(text)


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is no finite number; floats that are none never count as data")
    return float(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name, or one twice")
    return names


def print_bands(names: list[str], split: records.SplitInfo) -> None:
    """Prints a line for each band: the range in stored units that maps to [0, 1], mean and deviation after that."""
    names = list(map(printable, names))
    wide = max(map(len, [*names, "band"]))
    print(f"{'band':{wide}}  {'range':>19}  {'mean':>6}  {'std':>6}")
    for name, (low, high), mean, std in zip(names, split.ranges, split.mean, split.std, strict=True):
        print(f"{name:{wide}}  {low:9.5g} {high:9.5g}  {mean:6.4f}  {std:6.4f}")
    print(f"fingerprint {split.fingerprint[:12]}")


def convert_tile(item: Item, max_nodata: float, nodata: tuple[float, ...] = (), scaled: bool = False) -> Stored:
    """Reads and encodes one item of `scene_tiles.plan_tiles`; `nodata` and `scaled` are those of `scene_reader.read`.

    Raises ImageDecodeError where the file is damaged, Rejected where more than `max_nodata` (a share) of a band, or all of
    it, is no data.
    """
    if not isinstance(item.part, Tile):
        raise codecs.ImageDecodeError(item.part[0])
    pixels, valid = scene_reader.read(item.path, item.part, nodata, scaled)  # [H, W, C] both
    missing = 1 - valid.mean(axis=(0, 1))  # [C]
    worst = int(missing.argmax())
    if missing[worst] > max_nodata or not valid[..., worst].any():
        raise Rejected("too little data")
    changes, without = [], scene_reader.no_data(pixels, valid)
    if without:
        changes.append("no data to 0" if not any(without["values"]) else "no data to the least value")
    if scaled:
        changes.append("scale and offset")
    if (item.part.columns, item.part.rows) != item.part.window[2:]:
        changes.append("other pixel size")
    encoded = codecs.encode(pixels)
    place = scene_place.place(item.path, item.part, item.key.rsplit("/", 1)[0], without)
    return Stored(encoded, statistics.count(pixels, valid), tuple(changes), content_hash(encoded), place=place)


if __name__ == "__main__":
    run(main)
