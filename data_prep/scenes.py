"""Cuts GeoTIFF scenes into tiles: one split of a data set folder of ArrayRecord shards.

    python -m data_prep.scenes --input scenes/ --output shards/sentinel2 --split train --tile 256
    python -m data_prep.scenes --input naip_2020.tif --output shards/naip --split train --tile 640m --stride 320m \
        --gsd 2.5 --bands red,green,blue --band-names red,green,blue,nir

* Scenes: the files below each folder of --input whose names end in tif or tiff, in any case; files that --input names
  themselves may be of any kind that rasterio opens (JPEG 2000, PNG, VRT). They are read by windows, so their size does
  not matter. `data_prep.scene_reader` says what counts as a band, as no data, and how pixels are made of another size.
* Tiles: `data_prep.scene_grid` says where they lie. A tile of which more than --max-nodata holds no data, in the band that
  has least, or that has a band without any, is left out.
* Bands: --bands chooses and orders them by number (from 1) or name; --band-names names all bands of the files, in their
  order, an alpha band too where it is none. All scenes must have the chosen bands and the same dtype: uint8, uint16 or float32, which is kept.
* Records: three bands of uint8 as PNG, everything else as TIFF. What is no data is stored as 0 and does not count in the
  histogram. The key is SCENE/ROW_COLUMN, in pixels of the grid; `place` is what `scene_reader.place` says.
* Order: a hash of the key deals the tiles to the shards, so that none is a single place; within a shard they lie as in
  the scenes, so that a part of a file is read once.
* OUTPUT/SPLIT.report.json accounts for every tile, and for every file that gave none, as `data_prep.images` says.
* Damaged files: what can be read of them is kept. More than --max-corrupt-share of scenes that cannot be opened, or of
  tiles that cannot be read, is an error.
* Killed or out of space: the same command goes on after the shards that are finished, as with `data_prep.images`.
"""

import argparse
import functools
import os
from collections.abc import Callable

from data_prep import command, folder, images, scene_plan, scene_reader
from data_prep.pixels import Rejected, Stored, content_hash
from data_prep.scene_grid import length
from data_prep.scene_reader import Tile
from data_prep.shards import Item, run_jobs
from pera_jax.common import paths
from pera_jax.common.text import printable, several
from pera_jax.data import codecs, records, statistics
from pera_jax.errors import run


def main(argv: list[str] | None = None, driver: Callable = run_jobs) -> None:
    """The command; `driver` runs its jobs, as `folder.write_split` says of `run`. Raises UserError."""
    args = _arguments(argv)
    scene_reader.require_rasterio()
    images.check_places(args.input, args.output, args.split)
    files, rejected = scene_plan.list_scenes(args.input)
    scenes, unreadable = scene_plan.look_at(files, args.max_corrupt_share)
    choices = scene_plan.choose_bands(scenes, args.bands, args.band_names)
    items = scene_plan.plan_tiles(files, scenes, unreadable, choices, args.tile, args.stride or args.tile, args.gsd)
    names, dtype = next(iter(choices.values())).names, next(iter(scenes.values())).dtype
    shards = command.number_of_shards(args, len(items))
    info = folder.existing_info(args.output)
    dataset = info.name if info else images.dataset_name(args.output)
    split = scene_plan.make_split(args.output, dataset, args.split, names, dtype, items, shards, args.max_nodata)
    if folder.already_complete(split, info):
        print(f"{args.split}: already complete in {printable(args.output)}, {info.splits[args.split].records} records")
        return
    workers = f", {args.workers} workers" if driver is run_jobs else ""
    print(f"{args.split}: {len(items)} tiles of {len(files)} scenes, {several(names, 20)} of {dtype}, {split.shards} shards"
          f"{workers}", flush=True)  # fmt: skip
    if number := sum(choice.alpha for choice in choices.values()):
        print(
            f"the alpha band of {number} scenes says where there is data; if it is a band like others, name it in --band-names"
        )
    info, report = folder.write_split(
        split, functools.partial(convert_tile, max_nodata=args.max_nodata), workers=args.workers, run=driver,
        max_corrupt_share=args.max_corrupt_share, rejected=rejected,
    )  # fmt: skip
    written = info.splits[args.split]
    print(f"{args.split}: {written.records} records, {sum(written.shard_bytes) / 1e6:.1f} MB, in {printable(args.output)}")
    print_bands(names, written)
    named = [f"{report[name]['number']} {name}" for name in ("rejected", "failed") if report[name]["number"]]
    if named:
        print(f"left out: {', '.join(named)}")
    if twins := report["found"]["number"]:
        print(f"written, but the same pixels as a tile before them: {twins}")
    if named or twins:
        print(f"{printable(args.output / args.split)}.report.json and {args.split}.inputs.csv name them")


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


def convert_tile(item: Item, max_nodata: float) -> Stored:
    """Reads and encodes one item of `scene_plan.plan_tiles`.

    Raises ImageDecodeError where the file is damaged, Rejected where more than `max_nodata` (a share) of a band, or all of
    it, is no data.
    """
    if not isinstance(item.part, Tile):
        raise codecs.ImageDecodeError(item.part[0])
    pixels, valid = scene_reader.read(item.path, item.part)  # [H, W, C] both
    missing = 1 - valid.mean(axis=(0, 1))  # [C]
    worst = int(missing.argmax())
    if missing[worst] > max_nodata or not valid[..., worst].any():
        raise Rejected("too little data")
    histogram = statistics.count(pixels, valid)
    changes = []
    if missing[worst] > 0:
        changes.append("no data to 0")
    if (item.part.columns, item.part.rows) != item.part.window[2:]:
        changes.append("other pixel size")
    encoded = codecs.encode(pixels)
    place = scene_reader.place(item.path, item.part, item.key.rsplit("/", 1)[0])
    return Stored(encoded, histogram, tuple(changes), content_hash(encoded), place=place)


if __name__ == "__main__":
    run(main)
