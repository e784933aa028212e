"""Converts one split of a TensorFlow Datasets image data set into one split of a data set folder, without TensorFlow.

    python -m data_prep.tfds --dataset eurosat/rgb --tfds-split train[:80%] --output shards/eurosat --split train
    python -m data_prep.tfds --dataset ~/tensorflow_datasets/eurosat/all/2.0.0 --tfds-split train --split train \\
        --output shards/eurosat13 --bands B01,B02,B03,B04,B05,B06,B07,B08,B09,B10,B11,B12,B8A

* Data set: a folder that TFDS prepared (it holds dataset_info.json and features.json), or a name as TFDS writes it,
  NAME[/CONFIG][:VERSION], of one that lies in --data-dir. It must have been prepared with
  `--file_format=array_record`: reading TFDS's other formats needs TensorFlow.
* Images: the one image feature, or --image-feature; inside of others it is written OUTER/INNER. An `Image` gives its
  encoded bytes as they are stored, which go the way of a file: see `data_prep.pixels`. JPEG and PNG that need no change
  stay byte for byte. A `Tensor` [height, width, bands] of uint8, uint16 or float32 is stored with all its bands,
  without loss.
* Classes: the one `ClassLabel`, or --label-feature; its names are carried over. Images whose label is -1 have no class:
  they are rejected, unless --no-labels is given.
* Keys: the `tfds_id` of each example, its shard and its place there.
* The report, cleaning, interruptions, workers: as in `data_prep.images`.
"""

import argparse
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection

import numpy as np
from google.protobuf import json_format
from tensorflow_datasets.core import constants, features, read_only_builder

from data_prep import command, folder, images, tfds_examples
from data_prep.shards import run_jobs
from data_prep.tfds_examples import FORMAT, feature_of, first_line, flat
from pera_jax.data import codecs, records
from pera_jax.errors import UserError, run


def main(argv: list[str] | None = None, driver: Callable = run_jobs) -> None:
    """The command; `driver` runs its jobs, as `folder.write_split` says of `run`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.tfds", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="folder of a prepared data set, or NAME[/CONFIG][:VERSION]")
    parser.add_argument("--data-dir", help=f"where data sets lie that --dataset names; default: {constants.DATA_DIR}")
    parser.add_argument("--tfds-split", help="split or part of one, as TFDS writes it; default: that of --split")
    parser.add_argument("--image-feature", metavar="NAME", help="needed where there are several")
    parser.add_argument("--label-feature", metavar="NAME", help="needed where there are several")
    parser.add_argument("--bands", metavar="NAME,NAME,...", help="of a Tensor; default: band_1,band_2,...")
    parser.add_argument("--no-labels", action="store_true", help="leave the classes out")
    command.add_options(parser)
    args = parser.parse_args(argv)

    builder = open_dataset(args.dataset, args.data_dir)
    images.check_places([pathlib.Path(builder.data_dir)], args.output, args.split)
    tfds_split = args.tfds_split or args.split
    examples = tfds_examples.Examples(builder, tfds_split)
    image = pick_image(builder, args.image_feature)
    label = None if args.no_labels else pick_label(builder, args.label_feature)
    bands, dtype = bands_of(image, feature_of(builder, image), args.bands)
    options = command.conversion(args)
    if not isinstance(feature_of(builder, image), features.Image):
        if args.max_side or args.jpeg_quality or set(args.drop) - {"duplicates"}:
            raise UserError(f"--max-side, --jpeg-quality and --drop small,blank are not for the Tensor {image!r}")
        options = {}

    info = folder.existing_info(args.output)
    reading = {"tfds_split": tfds_split, "image": image, "label": label}
    class_names = None if label is None else list(feature_of(builder, label).names)
    shards = command.number_of_shards(args, len(examples))
    dataset = info.name if info else images.dataset_name(args.output)
    described = [
        records.FORMAT_VERSION, dataset, args.split, class_names, shards, options, reading, args.drop, bands, dtype,
        builder.info.full_name, examples.pieces,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode("ascii")).hexdigest()
    split = folder.Split(args.output, dataset, args.split, bands, dtype, class_names, False, examples, shards, digest)
    read = functools.partial(tfds_examples.read_bytes, **reading)
    convert = functools.partial(tfds_examples.convert_example, **reading, **options)
    command.write(split, read, convert, args, driver=driver)


# ---------------------------------------------------------------- the data set


def open_dataset(name: str, data_dir: str | None) -> read_only_builder.ReadOnlyBuilder:
    """Opens a prepared data set by its folder or its name. Raises UserError."""
    place = pathlib.Path(name).expanduser()
    if not (place / "dataset_info.json").is_file():
        below = _prepared(place)
        if below:
            raise UserError(f"--dataset {name} is no prepared data set; name one of those in it: {', '.join(below)}")
        if place.is_dir() or name.startswith(("/", ".", "~")):
            raise UserError(f"--dataset {name} is no folder with a dataset_info.json; name one that TFDS prepared")
        place = pathlib.Path(_find(name, data_dir))
    try:
        formats = {form.value for form in read_only_builder.builder_from_directory(place).info.available_file_formats()}
        if FORMAT in formats:
            return read_only_builder.builder_from_directory(place, file_format=FORMAT)
    except (ValueError, OSError, KeyError, json_format.ParseError) as error:
        raise UserError(f"{place} cannot be read as a TFDS data set ({first_line(error)}); prepare it anew") from error
    raise UserError(
        f"{place} is stored as {', '.join(sorted(formats))}, which only TensorFlow reads; where that is installed, run "
        f"tfds convert_format --dataset_version_dir={place} --out_file_format={FORMAT} --out_dir=FOLDER, "
        "and name FOLDER"
    )


def _find(name: str, data_dir: str | None) -> str:
    """The folder of a prepared data set that TFDS finds by name."""
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir).data_dir
    except ValueError as error:  # also DatasetNotFoundError, with many lines on where TFDS looked
        where = pathlib.Path(data_dir or constants.DATA_DIR).expanduser()
        held = ", ".join(_prepared(where)) or "none"
        raise UserError(
            f"no prepared data set {name!r} in {where}, which holds {held}; prepare it, "
            f"where TensorFlow is installed, with tfds build {name} --file_format={FORMAT} --data_dir={where}"
        ) from error


def _prepared(place: pathlib.Path) -> list[str]:
    """The data sets below a folder, NAME/CONFIG/VERSION at the deepest."""
    found = [file.parent for level in ("*", "*/*", "*/*/*") for file in place.glob(f"{level}/dataset_info.json")]
    return sorted(str(folder.relative_to(place)) for folder in found)


# ---------------------------------------------------------------- its features


def _is_image(feature: features.FeatureConnector) -> bool:
    if isinstance(feature, features.Image):
        return not isinstance(feature, features.LabeledImage)  # that is a mask of classes
    rank_3 = isinstance(feature, features.Tensor) and len(feature.shape) == 3 and feature.shape[2]
    return bool(rank_3) and np.dtype(feature.np_dtype).name in codecs.DTYPES


def pick_image(builder: read_only_builder.ReadOnlyBuilder, wanted: str | None) -> str:
    """The path of the image feature: `wanted`, or the only one, or the only `Image`. Raises UserError."""
    found = {path: feature for path, feature in flat(builder.info.features).items() if _is_image(feature)}
    encoded = [path for path, feature in found.items() if isinstance(feature, features.Image)]
    if wanted is None and len(encoded) != 1 and len(found) != 1:
        raise UserError(f"{builder.info.full_name} has {_listed('image feature', found)}; choose with --image-feature")
    if wanted is not None and wanted not in found:
        raise UserError(f"--image-feature {wanted}: {builder.info.full_name} has {_listed('image feature', found)}")
    return wanted or (encoded if len(encoded) == 1 else list(found))[0]


def pick_label(builder: read_only_builder.ReadOnlyBuilder, wanted: str | None) -> str | None:
    """The path of the class: `wanted`, or the only one, None where there is none. Raises UserError."""
    every = flat(builder.info.features)
    found = [path for path, feature in every.items() if isinstance(feature, features.ClassLabel)]
    if wanted is None and len(found) > 1:
        has = _listed("ClassLabel", found)
        raise UserError(f"{builder.info.full_name} has {has}; choose with --label-feature, or give --no-labels")
    if wanted is not None and wanted not in found:
        raise UserError(f"--label-feature {wanted}: {builder.info.full_name} has {_listed('ClassLabel', found)}")
    return wanted or (found[0] if found else None)


def _listed(kind: str, paths: Collection[str]) -> str:
    return f"{len(paths)} {kind}s: {', '.join(sorted(paths))}" if paths else f"no {kind}"


def bands_of(path: str, feature: features.FeatureConnector, names: str | None) -> tuple[list[str], str]:
    """The bands and the dtype of what is stored of an image feature. Raises UserError."""
    dtype = np.dtype(feature.np_dtype).name
    if isinstance(feature, features.Image):
        if dtype == "float32":  # TFDS spreads the four bytes of each value over the four channels of a PNG
            raise UserError(f"feature {path!r} is an Image of float32; its values have no known range, choose another")
        if names is not None:
            raise UserError(f"--bands is for a Tensor; feature {path!r} is an Image, which becomes red, green, blue")
        return list(records.RGB), "uint8"
    count = feature.shape[2]
    bands = names.split(",") if names is not None else [f"band_{i + 1}" for i in range(count)]
    if len(bands) != count or len(set(bands)) != count or not all(bands):
        raise UserError(f"--bands {names} must be {count} different names: feature {path!r} has {count} bands")
    return bands, dtype


if __name__ == "__main__":
    run(main)
