"""What the conversion commands share: the options of their output, and the run with what it prints."""

import argparse
import os
import pathlib
from collections.abc import Callable

from data_prep import folder
from data_prep.pixels import Stored
from data_prep.shards import Item, run_jobs

_IMAGES_PER_SHARD = 512  # enough shards for several workers, little lost with an unfinished one
_MOST_SHARDS = 512  # readers keep every shard open: stay below the usual limit of 1,024 open files


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command that converts images: what is written, how, and how fast."""
    parser.add_argument("--output", type=pathlib.Path, required=True, help="data set folder; made if need be")
    parser.add_argument("--split", required=True, help="name of the split: train, test, ...")
    parser.add_argument("--workers", type=_positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--max-side", type=_positive, metavar="PX", help="reduce images whose longer side is longer")
    parser.add_argument("--jpeg-quality", type=_quality, metavar="Q", help="store changed images as JPEG, not as PNG")
    parser.add_argument("--max-corrupt-share", type=_share, default=0.05, metavar="S", help="default: %(default)s")
    parser.add_argument("--shard-size", type=_positive, metavar="N", help="images per shard; default: 512, or "
                        "more where that would make over 512 shards")  # fmt: skip


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


def number_of_shards(args: argparse.Namespace, images: int) -> int:
    """How many shards hold that many images, by --shard-size or its default."""
    size = args.shard_size or max(_IMAGES_PER_SHARD, -(-images // _MOST_SHARDS))
    return -(-images // size)


def write(
    split: folder.Split,
    convert: Callable[[Item], Stored],
    args: argparse.Namespace,
    *,
    driver: Callable = run_jobs,
    ignored: dict[str, int],
) -> None:
    """Writes a split, or what is missing of it, and prints what came of it.

    `args` holds the options of `add_options`; the others are as in `folder.write_split`, where `driver` is `run`.
    Raises UserError.
    """
    info = folder.existing_info(args.output)
    if folder.already_complete(split, info):
        print(f"{split.name}: already complete in {args.output}, {info.splits[split.name].records} records")
        return
    classes = f"{len(split.class_names)} classes" if split.class_names else "no classes"
    workers = f", {args.workers} workers" if driver is run_jobs else ""
    print(f"{split.name}: {len(split.items)} images, {classes}, {split.shards} shards{workers}", flush=True)
    info, report = folder.write_split(
        split, convert, workers=args.workers, run=driver, max_corrupt_share=args.max_corrupt_share, ignored=ignored
    )
    written = info.splits[split.name]
    print(f"{split.name}: {written.records} records, {sum(written.shard_bytes) / 1e6:.1f} MB, in {args.output}")
    print(f"mean {written.mean}, std {written.std}, fingerprint {written.fingerprint[:12]}")
    names = args.output / f"{split.name}.report.json"
    if report["corrupt"]:
        print(f"{len(report['corrupt'])} corrupt images were left out; {names} names them")
    if report["rejected"]:
        print(f"{len(report['rejected'])} sound images were left out; {names} gives the reasons")
