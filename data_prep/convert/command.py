"""Shared parts of the conversion commands: options, search for duplicates, running the conversion and its output."""

import argparse
import os
import pathlib
from collections.abc import Callable, Sequence

from data_prep.convert import duplicates, folder, pixels, split_plan
from data_prep.convert.shards import Item, run_jobs
from pera_jax.common import paths
from pera_jax.common.text import printable, several
from pera_jax.data import records
from pera_jax.data.images import foreign

DROPS = ("duplicates", "small", "blank")
_IMAGES_PER_SHARD = 512  # enough shards for several workers, little work lost with an unfinished one
_MOST_SHARDS = 512  # TensorFlow Datasets keeps every shard open: stay below the usual limit of 1,024 files


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for output, image conversion and workers."""
    parser.add_argument("--output", type=paths.local_path, required=True, help="dataset folder; created if missing")
    parser.add_argument("--split", required=True, help="name of the split: train, test, ...")
    parser.add_argument(
        "--workers", type=count, default=len(os.sched_getaffinity(0)), help="number of processes (default: all cores)"
    )
    parser.add_argument("--max-side", type=count, metavar="PX", help="downsize images whose longer side is larger")
    parser.add_argument(
        "--jpeg-quality", type=_quality, metavar="Q", help="store changed images as JPEG instead of PNG"
    )
    parser.add_argument("--min-side", type=count, default=32, metavar="PX", help="images with a smaller "
                        "shorter side count as small (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--drop", type=_drops, default=(), metavar="KINDS", help=f"kinds to leave out, from {','.join(DROPS)}"
    )
    parser.add_argument("--max-corrupt-fraction", type=fraction, default=0.05, metavar="F", help="maximum fraction "
                        "of unreadable images (default: %(default)s)")  # fmt: skip
    parser.add_argument("--shard-size", type=count, metavar="N", help="images per shard; default: 512, or "
                        "more to stay within 512 shards")  # fmt: skip


def add_range(parser: argparse.ArgumentParser) -> None:
    """Adds the option for images with more than 8 bits."""
    parser.add_argument("--range", type=_range, metavar="LOW,HIGH", dest="span", help="for images of 9 to 16 bits, "
                        "the values mapped to 0 and 255; default: keep the upper 8 bits")  # fmt: skip


def _range(text: str) -> tuple[int, int]:
    low, high = map(int, text.split(","))
    if not 0 <= low < high < 1 << 16:
        raise argparse.ArgumentTypeError(f"expected two numbers LOW,HIGH in [0, 65535] with LOW < HIGH, got {text}")
    return low, high


def _drops(text: str) -> tuple[str, ...]:
    kinds = tuple(sorted(set(text.split(","))))
    for kind in kinds:
        if kind not in DROPS:
            raise argparse.ArgumentTypeError(f"expected kinds from {', '.join(DROPS)}, got {kind!r}")
    return kinds


def count(text: str) -> int:
    """Parses an integer >= 1. Raises ArgumentTypeError."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return int(text)


def _quality(text: str) -> int:
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"expected an integer in [1, 100], got {text}")
    return int(text)


def fraction(text: str) -> float:
    """Parses a number in [0, 1]. Raises ArgumentTypeError."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text}")
    return float(text)


def conversion(args: argparse.Namespace) -> dict:
    """The keyword arguments of `pixels.convert`."""
    options = {name: getattr(args, name) for name in ("max_side", "jpeg_quality", "min_side", "drop")}
    return options | ({"span": args.span} if args.span else {})  # an absent span keeps the hash of older conversions


def number_of_shards(args: argparse.Namespace, images: int) -> int:
    """Number of shards for `images` images, by --shard-size or its default."""
    size = args.shard_size or max(_IMAGES_PER_SHARD, -(-images // _MOST_SHARDS))
    return -(-images // size)


def write(
    split: split_plan.Split,
    read: Callable[[Item], bytes],
    convert: Callable[[Item], pixels.Stored],
    args: argparse.Namespace,
    *,
    driver: Callable = run_jobs,
    rejected: Sequence[tuple[str, str]] = (),
) -> None:
    """Writes a split, or its missing shards, and prints a summary.

    Args:
      split: what to write, including duplicates.
      read: returns the bytes that identify duplicates of an item; raises ImageDecodeError; picklable.
      convert, rejected: as in `folder.write_split`.
      args: with the options of `add_options`.
      driver: runs the jobs; argument `run` of `folder.write_split`.

    Raises UserError.
    """
    info = folder.existing_info(args.output)
    if folder.already_complete(split, info):
        print(f"{split.name}: already complete in {printable(args.output)}, {info.splits[split.name].records} records")
        return
    classes = (
        f"{len(split.class_names)} classes ({several(split.class_names, 5)})" if split.class_names else "no classes"
    )
    workers = f", {args.workers} workers" if driver is run_jobs else ""
    print(f"{split.name}: {len(split)} images, {classes}, {split.shards} shards{workers}", flush=True)
    split_plan.check_unfinished(split)  # before the slow search for duplicates
    again = duplicates.find(split.items, read, args.workers) if "duplicates" in args.drop else []
    info, report = folder.write_split(
        split_plan.without(split, again), convert, workers=args.workers, run=driver,
        max_corrupt_fraction=args.max_corrupt_fraction, rejected=rejected,
        duplicates=[item.key for item in map(split.items.__getitem__, again)],
    )  # fmt: skip
    show(args.output, info.splits[split.name], report)


def show(output: pathlib.Path, written: records.SplitInfo, report: dict) -> None:
    """Prints a summary of a conversion."""
    split = report["split"]
    print(f"{split}: {written.records} records, {sum(written.shard_bytes) / 1e6:.1f} MB, in {printable(output)}")
    print(f"mean {written.mean}, std {written.std}, fingerprint {written.fingerprint[:12]}")
    _show_changes(report["changed"])
    left_out = {name: report[name]["number"] for name in ("duplicates", "rejected", "failed")}
    named = [f"{number} {name}" for name, number in left_out.items() if number]
    found = [f"{of['number']} {kind}" for kind, of in report["found"]["reasons"].items()]
    if named:
        print(f"left out: {', '.join(named)}")
    if found:
        print(f"written, but may be unwanted (--drop leaves them out): {', '.join(found)}")
    if named or found:
        print(f"{printable(output / split)}.report.json and {split}.inputs.csv list them")


def _show_changes(changed: dict[str, int]) -> None:
    """Prints changes of pixel values; changes of format or bit depth are not listed."""
    for name, number in sorted(changed.items(), key=lambda change: (-change[1], change[0])):
        if name in foreign.CHANGES:
            print(f"changed, {name}: {number:,} {'image' if number == 1 else 'images'} {foreign.CHANGES[name]}")
