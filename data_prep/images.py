"""Converts a folder or archives of images to one split of a dataset folder of ArrayRecord shards.

    pera-jax prep-images --input aid/train --output shards/aid --split train
    pera-jax prep-images --input million_aid.zip --output shards/million --split train --drop duplicates,blank

* Input: a folder, or tar, tar.gz, tar.bz2, tar.xz and zip archives, which are streamed and never unpacked to disk.
* Images: file names that end in jpg, jpeg, png, tif, tiff or webp (any case), in folders of any depth. Other files are
  rejected, and so are hidden files, links that lead out of the folder (unless --follow-links), and archive members that
  are links or whose names lead out of the archive. Links that stay inside the folder are followed.
* Names: backslashes in the names of zip members, as written on Windows, are read as folders; a message says so.
* Classes: if all but a few images lie in folders, the top-level folders become the classes, and the few others are left
  out with a warning; in an archive, folders that contain all its images are skipped first. All splits of a dataset must
  have the same classes.
* Pixels: see `pera_jax.data.images.foreign`; changes of pixel values are named and counted. Each image is decoded once,
  to check it. JPEG and PNG files that need no change are stored byte for byte.
* OUTPUT/SPLIT.report.json accounts for every input as written, duplicate, rejected or failed, and lists images that are
  exact duplicates, smaller than --min-side, or blank; --drop leaves these out. OUTPUT/SPLIT.inputs.csv has the complete
  list. More than --max-corrupt-fraction of failed images is an error.
* After a kill or a full disk, re-run the same command to resume after the finished shards. It must have the same
  relative paths, file sizes and options; --workers and --max-corrupt-fraction may differ. A complete split is not
  changed.
"""

import argparse
import functools
import pathlib
import re
from collections.abc import Callable

from data_prep.convert import command, folder, pixels, split_plan
from data_prep.convert.shards import Item, run_jobs
from data_prep.inputs import sources
from pera_jax.common import paths
from pera_jax.common.errors import UserError, run
from pera_jax.common.text import several
from pera_jax.data import file_tree, records


def main(argv: list[str] | None = None, driver: Callable = run_jobs) -> None:
    """The command; `driver` runs the jobs, see `run` of `folder.write_split`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="pera-jax prep-images", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input", type=paths.local_path, required=True, nargs="+", help="folder of images, or archives"
    )
    parser.add_argument("--no-labels", action="store_true", help="do not use folders as classes")
    parser.add_argument("--follow-links", action="store_true", help="follow links that lead out of the folder")
    command.add_options(parser)
    command.add_range(parser)
    args = parser.parse_args(argv)
    check_places(args.input, args.output, args.split)

    inventory = sources.take_stock(args.input, args.follow_links)
    for taken, number in inventory.backslashes.items():
        what = "read as folders" if taken else "part of the name, not folders: classes in them are not found"
        print(f"{number:,} names in {several(args.input)} have backslashes, which are {what}", flush=True)
    messages = [file_tree.links_out(args.input[0], inventory.rejected)] + ([] if args.no_labels else inventory.label())
    for line in filter(None, messages):
        print(line, flush=True)
    options = command.conversion(args)
    info = folder.existing_info(args.output)
    dataset = info.name if info else dataset_name(args.output)
    shards = command.number_of_shards(args, len(inventory))
    split = make_split(inventory, args.output, dataset, args.split, shards, options)
    convert = functools.partial(convert_file, **options)
    command.write(split, sources.read, convert, args, driver=driver, rejected=inventory.rejected)


def check_places(inputs: list[pathlib.Path], output: pathlib.Path, split: str) -> None:
    """Raises UserError if output and input overlap, or for an invalid split name."""
    for source in inputs:
        inner, outer = source.resolve(), output.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UserError(f"--output {output} and {source} overlap; choose separate folders")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", split) or split == "all":
        raise UserError(f"--split {split!r} is not a valid split name; use letters, digits and _, and not 'all'")


def dataset_name(output: pathlib.Path) -> str:
    """The name of a new dataset: that of its folder, made valid for TensorFlow Datasets."""
    name = re.sub(r"\W", "_", output.resolve().name, flags=re.ASCII)
    return name if name[:1].isalpha() else "data_" + name


def make_split(
    inventory: sources.Inventory, output: pathlib.Path, dataset: str, name: str, shards: int, options: dict
) -> split_plan.Split:
    """The plan of the conversion."""
    digest = inventory.digest([records.FORMAT_VERSION, dataset, name, inventory.class_names, shards, options])
    bands = list(records.RGB)
    return split_plan.Split(
        output, dataset, name, bands, "uint8", inventory.class_names, False, inventory, shards, digest
    )


def convert_file(item: Item, **options) -> pixels.Stored:
    """Reads and converts one file; options as in `pixels.convert`. Raises ImageDecodeError (also if the file cannot be
    read) and Rejected."""
    return pixels.convert(sources.read(item), **options)


if __name__ == "__main__":
    run(main)
