"""Metadata files that let TensorFlow Datasets open a dataset folder; written without TensorFlow."""

import pathlib

import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, naming

from pera_jax.data import records


def write(staging: pathlib.Path, folder: pathlib.Path, info: records.DatasetInfo) -> None:
    """Writes dataset_info.json, features.json and, with classes, label.labels.txt to the new folder `staging`.

    They describe the shards of `info` in `folder`. Raises OSError.
    """
    coded = info.dtype == "uint8" and len(info.bands) == 3  # TFDS decodes JPEG and PNG; TIFF stays bytes
    image = tfds.features.Image(shape=(None, None, 3)) if coded else tfds.features.Text()
    features = {"image": image, "key": tfds.features.Text()}
    if info.has_places:
        features["place"] = tfds.features.Text()
    if info.class_names is not None:
        features["label"] = tfds.features.ClassLabel(names=info.class_names)
    identity = dataset_info.DatasetIdentity(
        name=info.name, version=tfds.core.Version(f"{info.format_version}.0.0"), data_dir=str(folder), module_name=""
    )
    metadata = dataset_info.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    metadata.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = naming.ShardedFileTemplate(data_dir=folder, dataset_name=info.name, filetype_suffix="array_record")
    metadata.set_splits(
        tfds.core.splits.SplitDict(
            tfds.core.SplitInfo(
                name=name, shard_lengths=part.shard_records, num_bytes=sum(part.shard_bytes), filename_template=template
            )
            for name, part in info.splits.items()
        )
    )
    staging.mkdir(exist_ok=True)
    metadata.write_to_directory(staging)
