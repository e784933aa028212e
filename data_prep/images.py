"""Converts a folder of images, or archives of them, into one split of a data set folder of ArrayRecord shards.

    python -m data_prep.images --input aid/train --output shards/aid --split train
    python -m data_prep.images --input million_aid.zip --output shards/million --split train --drop duplicates,blank

* Input: a folder, or tar, tar.gz, tar.bz2, tar.xz and zip archives, which are read as streams and never unpacked.
* Images: names that end in jpg, jpeg, png, tif, tiff or webp, in any case, in folders of any depth. All others are
  rejected, and so are hidden ones, links that lead out of the folder (--follow-links takes them), members of archives that are links or whose names
  lead elsewhere. Links that stay in the folder are followed.
* Names: backslashes in a zip, as Windows writes them, are folders, which is told.
* Classes: where all images but a few lie in folders, the names of the topmost folders become the labels, and the few are
  left out with a warning; in an archive, those below the folders that hold all of its images. All splits of a data set have the same classes.
* Pixels: see `pera_jax.data.images.foreign`; what changes their values is named and counted. Each image is
  decoded once, to check it. JPEG and PNG files that need no change are stored byte for byte.
* OUTPUT/SPLIT.report.json accounts for every input as written, duplicate, rejected or failed, and names images that are
  exact duplicates, smaller than --min-side, or blank; --drop leaves these out. OUTPUT/SPLIT.inputs.csv has the whole
  list. More than --max-corrupt-share of failed images is an error.
* Killed or out of space: the same command goes on after the shards that are finished. "The same" means the same
  relative paths, sizes in bytes and options; --workers and --max-corrupt-share may differ. A split that is complete is
  left alone.
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
    """The command; `driver` runs its jobs, as `folder.write_split` says of `run`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.images", description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=paths.local_path, required=True, nargs="+", help="folder of images, or archives")
    parser.add_argument("--no-labels", action="store_true", help="folders are no classes")
    parser.add_argument("--follow-links", action="store_true", help="also those that lead out of the folder")
    command.add_options(parser)
    command.add_range(parser)
    args = parser.parse_args(argv)
    check_places(args.input, args.output, args.split)

    inventory = sources.take_stock(args.input, args.follow_links)
    for taken, number in inventory.backslashes.items():
        what = "taken for folders" if taken else "part of the name and no folders: classes may lie hidden in it"
        print(f"{number:,} names in {several(args.input)} have backslashes, which are {what}", flush=True)
    told = [file_tree.links_out(args.input[0], inventory.rejected)] + ([] if args.no_labels else inventory.label())
    for line in filter(None, told):
        print(line, flush=True)
    options = command.conversion(args)
    info = folder.existing_info(args.output)
    dataset = info.name if info else dataset_name(args.output)
    shards = command.number_of_shards(args, len(inventory))
    split = make_split(inventory, args.output, dataset, args.split, shards, options)
    convert = functools.partial(convert_file, **options)
    command.write(split, sources.read, convert, args, driver=driver, rejected=inventory.rejected)


def check_places(inputs: list[pathlib.Path], output: pathlib.Path, split: str) -> None:
    """Raises UserError for an output inside the input or around it, or a bad name of a split."""
    for source in inputs:
        inner, outer = source.resolve(), output.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise UserError(f"--output {output} and {source} lie one in the other; name folders apart")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", split) or split == "all":
        raise UserError(f"--split {split!r} is no name of a split; use letters, digits and _, and not 'all'")


def dataset_name(output: pathlib.Path) -> str:
    """A new data set has the name of its folder, as far as TensorFlow Datasets allows."""
    name = re.sub(r"\W", "_", output.resolve().name, flags=re.ASCII)
    return name if name[:1].isalpha() else "data_" + name


def make_split(
    inventory: sources.Inventory, output: pathlib.Path, dataset: str, name: str, shards: int, options: dict
) -> split_plan.Split:
    """The plan of a conversion."""
    digest = inventory.digest([records.FORMAT_VERSION, dataset, name, inventory.class_names, shards, options])
    bands = list(records.RGB)
    return split_plan.Split(output, dataset, name, bands, "uint8", inventory.class_names, False, inventory, shards, digest)


def convert_file(item: Item, **options) -> pixels.Stored:
    """Reads and converts one file; options as of `pixels.convert`. Raises ImageDecodeError, also where the file cannot
    be read, and Rejected."""
    return pixels.convert(sources.read(item), **options)


if __name__ == "__main__":
    run(main)
