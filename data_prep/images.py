"""Converts a folder of images into one split of a data set folder of ArrayRecord shards.

    python -m data_prep.images --input aid/train --output shards/aid --split train
    python -m data_prep.images --input aid/test --output shards/aid --split test

* Images: files below --input, in folders of any depth, whose names end in jpg, jpeg, png, tif, tiff or webp, in any
  case. Names that begin with a dot are passed over; files with other endings are counted in the report.
* Classes: where every image lies in a folder below --input, the names of the topmost folders become the labels. All
  splits of a data set have the same classes.
* Pixels: see `data_prep.pixels`. Each image is decoded once, to check it. JPEG and PNG files that need no change are
  stored byte for byte.
* Corrupt images are left out, named with the reason in OUTPUT/SPLIT.report.json, and counted; more than
  --max-corrupt-share of them is an error.
* Killed or out of space: the same command goes on after the shards that are finished. "The same" means the same
  relative paths, sizes in bytes and options; --workers and --max-corrupt-share may differ. A split that is complete is
  left alone.
"""

import argparse
import collections
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable

from data_prep import command, folder, pixels
from data_prep.shards import Item, run_jobs
from pera_jax.data import codecs, records
from pera_jax.errors import UserError, run

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")


def main(argv: list[str] | None = None, driver: Callable = run_jobs) -> None:
    """The command; `driver` runs its jobs, as `folder.write_split` says of `run`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.images", description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=pathlib.Path, required=True, help="folder of images")
    parser.add_argument("--no-labels", action="store_true", help="folders are no classes")
    command.add_options(parser)
    args = parser.parse_args(argv)
    check_places(args.input, args.output, args.split)

    files, ignored = list_images(args.input)
    class_names = None if args.no_labels else class_folders(files)
    options = {"max_side": args.max_side, "jpeg_quality": args.jpeg_quality}
    info = folder.existing_info(args.output)
    dataset = info.name if info else dataset_name(args.output)
    shards = command.number_of_shards(args, len(files))
    split = make_split(args.input, args.output, dataset, args.split, files, class_names, shards, options)
    command.write(split, functools.partial(convert_file, **options), args, driver=driver, ignored=ignored)


def check_places(source: pathlib.Path, output: pathlib.Path, split: str) -> None:
    """Raises UserError for an input that is no folder, an output inside it or around it, or a bad name of a split."""
    if not source.exists():
        raise UserError(f"--input {source} does not exist; name a folder of images")
    if not source.is_dir():
        raise UserError(f"--input {source} is no folder; name a folder of images")
    inner, outer = source.resolve(), output.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"--output {output} and {source} lie one in the other; name folders apart")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", split) or split == "all":
        raise UserError(f"--split {split!r} is no name of a split; use letters, digits and _, and not 'all'")


def list_images(source: pathlib.Path) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Returns ((path relative to `source` with /, size in bytes) of every image, sorted; other files by ending).

    Follows symbolic links, but no folder into itself. A link that leads nowhere counts as an image: it will be listed
    as corrupt. Raises UserError if there is no image, a folder cannot be read, or a name is not valid UTF-8.
    """
    files, ignored = [], collections.Counter()

    def walk(path: pathlib.Path, prefix: str, ancestors: frozenset[pathlib.Path]) -> None:
        real = path.resolve()
        if real in ancestors:
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                ending = os.path.splitext(entry.name)[1].lower()
                if entry.is_dir():
                    walk(path / entry.name, f"{prefix}{entry.name}/", ancestors | {real})
                elif ending in ENDINGS:
                    files.append((prefix + entry.name, entry.stat().st_size if entry.is_file() else -1))
                else:
                    ignored[ending] += 1

    try:
        walk(source, "", frozenset())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    if not files:
        raise UserError(f"--input {source} holds no image (names ending in {' '.join(e[1:] for e in ENDINGS)})")
    for name, _ in files:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the name {name!r} in {source} is not valid UTF-8; rename it") from error
    return sorted(files), dict(sorted(ignored.items()))


def class_folders(files: list[tuple[str, int]]) -> list[str] | None:
    """The sorted names of the topmost folders if every image lies in one, else None."""
    if any("/" not in name for name, _ in files):
        return None
    return sorted({name.split("/", 1)[0] for name, _ in files})


def dataset_name(output: pathlib.Path) -> str:
    """A new data set has the name of its folder, as far as TensorFlow Datasets allows."""
    name = re.sub(r"\W", "_", output.resolve().name, flags=re.ASCII)
    return name if name[:1].isalpha() else "data_" + name


def make_split(
    source: pathlib.Path,
    output: pathlib.Path,
    dataset: str,
    name: str,
    files: list[tuple[str, int]],
    class_names: list[str] | None,
    shards: int,
    options: dict,
) -> folder.Split:
    """The plan of a conversion."""
    labels = {class_name: i for i, class_name in enumerate(class_names or ())}
    items = [
        Item(os.path.join(source, *key.split("/")), key, labels.get(key.split("/", 1)[0]), size) for key, size in files
    ]
    described = [records.FORMAT_VERSION, dataset, name, class_names, shards, options, files]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode("ascii")).hexdigest()
    return folder.Split(output, dataset, name, list(records.RGB), "uint8", class_names, False, items, shards, digest)


def convert_file(item: Item, **options: int | None) -> pixels.Stored:
    """Reads and converts one file. Raises ImageDecodeError, also where the file cannot be read."""
    try:
        encoded = pathlib.Path(item.path).read_bytes()
    except OSError as error:
        raise codecs.ImageDecodeError(f"cannot be read: {error.strerror}") from error
    return pixels.convert(encoded, **options)


if __name__ == "__main__":
    run(main)
