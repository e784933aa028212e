"""Converts a folder of images, or archives of them, into one split of a data set folder of ArrayRecord shards.

    python -m data_prep.images --input aid/train --output shards/aid --split train
    python -m data_prep.images --input million_aid.zip --output shards/million --split train --drop duplicates,blank

* Input: a folder, or tar, tar.gz, tar.bz2, tar.xz and zip archives, which are read as streams and never unpacked.
* Images: names that end in jpg, jpeg, png, tif, tiff or webp, in any case, in folders of any depth. All others are
  rejected, and so are hidden ones, links that lead out of the folder, members of archives that are links or whose names
  lead elsewhere. Links that stay in the folder are followed.
* Classes: where every image lies in a folder, the names of the topmost folders become the labels; in an archive, those
  below the folders that hold all of its images. All splits of a data set have the same classes.
* Pixels: see `data_prep.pixels`. Each image is decoded once, to check it. JPEG and PNG files that need no change are
  stored byte for byte.
* OUTPUT/SPLIT.report.json accounts for every input as written, duplicate, rejected or failed, and names images that are
  exact duplicates, smaller than --min-side, or blank; --drop leaves these out. OUTPUT/SPLIT.inputs.csv has the whole
  list. More than --max-corrupt-share of failed images is an error.
* Killed or out of space: the same command goes on after the shards that are finished. "The same" means the same
  relative paths, sizes in bytes and options; --workers and --max-corrupt-share may differ. A split that is complete is
  left alone.
"""

import argparse
import functools
import os
import pathlib
import re

from data_prep import duplicates, folder, pixels, sources
from data_prep.shards import Item
from pera_jax.data import records
from pera_jax.errors import UserError, run

DROPS = ("duplicates", "small", "blank")
_IMAGES_PER_SHARD = 512  # enough shards for several workers, little lost with an unfinished one
_MOST_SHARDS = 512  # readers keep every shard open: stay below the usual limit of 1,024 open files


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.images", description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=pathlib.Path, required=True, nargs="+", help="folder of images, or archives")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="data set folder; made if need be")
    parser.add_argument("--split", required=True, help="name of the split: train, test, ...")
    parser.add_argument("--workers", type=_positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--max-side", type=_positive, metavar="PX", help="reduce images whose longer side is longer")
    parser.add_argument("--jpeg-quality", type=_quality, metavar="Q", help="store changed images as JPEG, not as PNG")
    parser.add_argument("--min-side", type=_positive, default=32, metavar="PX", help="images whose shorter side is "
                        "shorter are small (%(default)s)")  # fmt: skip
    parser.add_argument("--drop", type=_drops, default=(), metavar="KINDS", help=f"leave out, of {','.join(DROPS)}")
    parser.add_argument("--max-corrupt-share", type=_share, default=0.05, metavar="S", help="default: %(default)s")
    parser.add_argument("--shard-size", type=_positive, metavar="N", help="images per shard; default: 512, or "
                        "more where that would make over 512 shards")  # fmt: skip
    parser.add_argument("--no-labels", action="store_true", help="folders are no classes")
    args = parser.parse_args(argv)
    check_places(args.input, args.output, args.split)

    inventory = sources.take_stock(args.input)
    if not args.no_labels:
        inventory.label()
    options = {name: getattr(args, name) for name in ("max_side", "jpeg_quality", "min_side", "drop")}
    info = folder.existing_info(args.output)
    dataset = info.name if info else dataset_name(args.output)
    size = args.shard_size or max(_IMAGES_PER_SHARD, -(-len(inventory) // _MOST_SHARDS))
    split = make_split(inventory, args.output, dataset, args.split, size, options)
    if folder.already_complete(split, info):
        print(f"{args.split}: already complete in {args.output}, {info.splits[args.split].records} records")
        return
    classes = f"{len(inventory.class_names)} classes" if inventory.class_names else "no classes"
    print(f"{args.split}: {len(inventory)} images, {classes}, {split.shards} shards, {args.workers} workers", flush=True)
    folder.check_unfinished(split)  # before the search for duplicates, which takes its time
    again = duplicates.find(inventory, sources.read, args.workers) if "duplicates" in args.drop else []
    split = folder.without(split, again)
    info, report = folder.write_split(
        split, functools.partial(convert_file, **options), workers=args.workers,
        max_corrupt_share=args.max_corrupt_share, rejected=inventory.rejected,
        duplicates=[inventory.keys[i] for i in again],
    )  # fmt: skip
    show(args.output, info.splits[args.split], report)


def show(output: pathlib.Path, written: records.SplitInfo, report: dict) -> None:
    """Prints what a conversion wrote and left out."""
    split = report["split"]
    print(f"{split}: {written.records} records, {sum(written.shard_bytes) / 1e6:.1f} MB, in {output}")
    print(f"mean {written.mean}, std {written.std}, fingerprint {written.fingerprint[:12]}")
    left_out = {name: report[name]["number"] for name in ("duplicates", "rejected", "failed")}
    named = [f"{number} {name}" for name, number in left_out.items() if number]
    found = [f"{of['number']} {kind}" for kind, of in report["found"]["reasons"].items()]
    if named:
        print(f"left out: {', '.join(named)}")
    if found:
        print(f"written, but look at them (--drop leaves them out): {', '.join(found)}")
    if named or found:
        print(f"{output / split}.report.json and {split}.inputs.csv name them")


def _drops(text: str) -> tuple[str, ...]:
    kinds = tuple(sorted(set(text.split(","))))
    for kind in kinds:
        if kind not in DROPS:
            raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(DROPS)}")
    return kinds


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def _quality(text: str) -> int:
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 100")
    return int(text)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


def check_places(inputs: list[pathlib.Path], output: pathlib.Path, split: str) -> None:
    """Raises UserError for an output inside the input or around it, or a bad name of a split."""
    for source in inputs:
        inner, outer = source.resolve(), output.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UserError(f"--output {output} and --input {source} lie one in the other; name folders apart")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", split) or split == "all":
        raise UserError(f"--split {split!r} is no name of a split; use letters, digits and _, and not 'all'")


def dataset_name(output: pathlib.Path) -> str:
    """A new data set has the name of its folder, as far as TensorFlow Datasets allows."""
    name = re.sub(r"\W", "_", output.resolve().name, flags=re.ASCII)
    return name if name[:1].isalpha() else "data_" + name


def make_split(
    inventory: sources.Inventory, output: pathlib.Path, dataset: str, name: str, shard_size: int, options: dict
) -> folder.Split:
    """The plan of a conversion into shards of about `shard_size` images."""
    shards = -(-len(inventory) // shard_size)
    digest = inventory.digest([records.FORMAT_VERSION, dataset, name, inventory.class_names, shards, options])
    bands = list(records.RGB)
    return folder.Split(output, dataset, name, bands, "uint8", inventory.class_names, False, inventory, shards, digest)


def convert_file(item: Item, **options) -> pixels.Stored:
    """Reads and converts one file; options as of `pixels.convert`. Raises ImageDecodeError, also where the file cannot
    be read, and Rejected."""
    return pixels.convert(sources.read(item), **options)


if __name__ == "__main__":
    run(main)
