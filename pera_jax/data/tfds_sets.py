"""Datasets prepared by TensorFlow Datasets as ArrayRecord: opened by name or folder, and read without TensorFlow."""

import functools
import pathlib
from collections.abc import Callable, Collection

import numpy as np
from google.protobuf import json_format
from tensorflow_datasets import decode
from tensorflow_datasets.core import constants, features, read_only_builder

from pera_jax.common import environment
from pera_jax.common.errors import UserError
from pera_jax.common.text import first_line, several
from pera_jax.data import codecs, records, shard_files

FORMAT = "array_record"  # the only file format of TFDS with random access and without TensorFlow


def open_dataset(name: str, data_dir: str | None = None) -> read_only_builder.ReadOnlyBuilder:
    """Opens a prepared dataset by its folder or its name, NAME[/CONFIG][:VERSION]. Raises UserError."""
    place = pathlib.Path(name).expanduser()
    if not (place / "dataset_info.json").is_file():
        below = _prepared(place)
        if below:
            raise UserError(f"{name} is not a prepared dataset; pass one of the datasets in it: {several(below)}")
        if place.is_dir() or name.startswith(("/", ".", "~")):
            raise UserError(f"{name} is not a folder with a dataset_info.json; pass one prepared by TFDS")
        place = pathlib.Path(_find(name, data_dir))
    try:
        formats = {form.value for form in read_only_builder.builder_from_directory(place).info.available_file_formats()}
        if FORMAT in formats:
            return read_only_builder.builder_from_directory(place, file_format=FORMAT)
    except (ValueError, OSError, KeyError, json_format.ParseError) as error:
        raise UserError(f"{place} cannot be read as a TFDS dataset ({first_line(error)}); prepare it again") from error
    raise UserError(
        f"{place} is stored as {', '.join(sorted(formats))}, which only TensorFlow reads; where that is installed, run "
        f"tfds convert_format --dataset_version_dir={place} --out_file_format={FORMAT} --out_dir=FOLDER, "
        "and pass FOLDER"
    )


def _find(name: str, data_dir: str | None) -> str:
    """Finds the folder of a prepared dataset by name."""
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir).data_dir
    except ValueError as error:  # including DatasetNotFoundError, whose message has many lines
        where = pathlib.Path(data_dir or constants.DATA_DIR).expanduser()
        held = ", ".join(_prepared(where)) or "no dataset"
        raise UserError(
            f"no prepared dataset {name!r} in {where}, which has {held}; prepare it "
            f"in an environment with TensorFlow: tfds build {name} --file_format={FORMAT} --data_dir={where}"
        ) from error


def _prepared(place: pathlib.Path) -> list[str]:
    """The datasets below a folder, at most as deep as NAME/CONFIG/VERSION."""
    found = [file.parent for level in ("*", "*/*", "*/*/*") for file in place.glob(f"{level}/dataset_info.json")]
    return sorted(str(folder.relative_to(place)) for folder in found)


def pieces(builder: read_only_builder.ReadOnlyBuilder, tfds_split: str) -> list[tuple[str, int, int, int, int]]:
    """The shards of a split or a slice of it: (name, bytes, number of examples, first selected example, number of
    selected examples). Raises UserError: no such split, an empty slice, a damaged shard."""
    try:
        found = builder.info.splits[tfds_split].file_instructions
    except (ValueError, KeyError):
        found = []
    if not found or any(piece.take <= 0 for piece in found):  # train[50%:10%] gives a negative number
        held = ", ".join(f"{name} ({split.num_examples})" for name, split in sorted(builder.info.splits.items()))
        raise UserError(f"{tfds_split!r} selects no examples of {builder.info.full_name}; it has {held}")
    result = []
    for piece in found:
        shard = pathlib.Path(piece.filename)
        shard_files.check_shard(shard, piece.examples_in_shard)
        result.append((shard.name, shard_files.size_of(shard), piece.examples_in_shard, piece.skip, piece.take))
    return result


# ---------------------------------------------------------------- its features


def flat(feature: features.FeatureConnector, prefix: str = "") -> dict[str, features.FeatureConnector]:
    """The features by path, OUTER/INNER, flattened."""
    if not isinstance(feature, features.FeaturesDict):
        return {prefix[:-1]: feature}
    return {path: inner for name in feature for path, inner in flat(feature[name], f"{prefix}{name}/").items()}


def feature_of(builder: read_only_builder.ReadOnlyBuilder, path: str) -> features.FeatureConnector:
    """The feature at a path of `flat`."""
    return flat(builder.info.features)[path]


def _is_image(feature: features.FeatureConnector) -> bool:
    if isinstance(feature, features.Image):
        return not isinstance(feature, features.LabeledImage)  # which is a segmentation mask
    rank_3 = isinstance(feature, features.Tensor) and len(feature.shape) == 3 and feature.shape[2]
    return bool(rank_3) and np.dtype(feature.np_dtype).name in codecs.DTYPES


def pick_image(builder: read_only_builder.ReadOnlyBuilder, wanted: str | None = None) -> str:
    """The path of the image feature: `wanted`, or the only one, or the only `Image`. Raises UserError."""
    found = {path: feature for path, feature in flat(builder.info.features).items() if _is_image(feature)}
    encoded = [path for path, feature in found.items() if isinstance(feature, features.Image)]
    if wanted is None and len(encoded) != 1 and len(found) != 1:
        raise UserError(
            f"{builder.info.full_name} has {_listed('image feature', found)}; choose one with --image-feature"
        )
    if wanted is not None and wanted not in found:
        raise UserError(
            f"--image-feature {wanted} does not exist in {builder.info.full_name}, which has "
            f"{_listed('image feature', found)}"
        )
    return wanted or (encoded if len(encoded) == 1 else list(found))[0]


def pick_label(builder: read_only_builder.ReadOnlyBuilder, wanted: str | None = None) -> str | None:
    """The path of the class label: `wanted`, or the only one; None if there is none. Raises UserError."""
    every = flat(builder.info.features)
    found = [path for path, feature in every.items() if isinstance(feature, features.ClassLabel)]
    if wanted is None and len(found) > 1:
        has = _listed("ClassLabel", found)
        raise UserError(f"{builder.info.full_name} has {has}; choose one with --label-feature, or pass --no-labels")
    if wanted is not None and wanted not in found:
        raise UserError(
            f"--label-feature {wanted} does not exist in {builder.info.full_name}, which has "
            f"{_listed('ClassLabel', found)}"
        )
    return wanted or (found[0] if found else None)


def _listed(kind: str, paths: Collection[str]) -> str:
    return f"{len(paths)} {kind}s: {several(sorted(paths), 5)}" if paths else f"no {kind}"


def bands_of(path: str, feature: features.FeatureConnector, names: str | None = None) -> tuple[list[str], str]:
    """Bands and dtype of an image feature as it is stored. Raises UserError."""
    dtype = np.dtype(feature.np_dtype).name
    if isinstance(feature, features.Image):
        if dtype == "float32":  # TFDS stores the four bytes of a value in the four channels of a PNG
            raise UserError(
                f"feature {path!r} is an Image of float32, whose values have no known range; choose another feature"
            )
        if names is not None:
            raise UserError(
                f"--bands only applies to a Tensor; feature {path!r} is an Image, which becomes red, green, blue"
            )
        return list(records.RGB), "uint8"
    count = feature.shape[2]
    bands = names.split(",") if names is not None else [f"band_{i + 1}" for i in range(count)]
    if len(bands) != count or len(set(bands)) != count or not all(bands):
        raise UserError(f"--bands {names} must be {count} unique names: feature {path!r} has {count} bands")
    return bands, dtype


# ---------------------------------------------------------------- its examples


@functools.cache
def _reader(data_dir: str, tfds_split: str, image: str, label: str | None) -> Callable[[int], dict]:
    shard_files.prepare()
    builder = read_only_builder.builder_from_directory(data_dir, file_format=FORMAT)
    raw = decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(tfds_split, deserialize_method=raw)
    wanted = {path: feature_of(builder, path) for path in (image, label) if path is not None}
    parser = features.FeaturesDict(wanted)  # only these features: others may need TensorFlow
    encoded = isinstance(wanted[image], features.Image)
    decoders = {image: decode.SkipDecoding()} if encoded else None
    return lambda i: parser.deserialize_example_np(source[i], decoders=decoders)


def read(data_dir: str, tfds_split: str, image: str, label: str | None, index: int) -> dict:
    """Example `index` of a split: its encoded bytes or array by the path `image`, its class by `label`.

    The dataset is opened at first use and stays open. Raises ImageDecodeError, EnvironmentFault.
    """
    try:
        return environment.patiently(
            lambda: _reader(data_dir, tfds_split, image, label)(index), f"example {index} of {data_dir} cannot be read"
        )
    except environment.EnvironmentFault:
        raise
    except Exception as error:  # ArrayRecord, protobuf and TFDS each raise their own types
        raise codecs.ImageDecodeError(f"cannot be read: {first_line(error)}") from error
