"""Converts a split of a TensorFlow Datasets image dataset to a split of a dataset folder, without TensorFlow.

    pera-jax prep-tfds --dataset eurosat/rgb --tfds-split train[:80%] --output shards/eurosat --split train
    pera-jax prep-tfds --dataset ~/tensorflow_datasets/eurosat/all/2.0.0 --tfds-split train --split train \\
        --output shards/eurosat13 --bands B01,B02,B03,B04,B05,B06,B07,B08,B09,B10,B11,B12,B8A

* Dataset: a folder prepared by TFDS (with dataset_info.json and features.json), or the name NAME[/CONFIG][:VERSION] of
  a dataset in --data-dir. It must be prepared with `--file_format=array_record`; other formats require TensorFlow.
* Images: the only image feature, or --image-feature; nested features are written OUTER/INNER. The encoded bytes of an
  `Image` are treated like a file: see `data_prep.convert.pixels`. JPEG and PNG that need no change are stored byte for
  byte. A `Tensor` [height, width, bands] of uint8, uint16 or float32 is stored losslessly with all bands.
* Classes: the only `ClassLabel`, or --label-feature, with its names. Images with label -1 have no class and are
  rejected, unless --no-labels is given.
* Keys: the `tfds_id` of each example: its shard and its index there.
* Report, cleaning, resuming and workers: as in `data_prep.images`.
"""

import argparse
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable

from tensorflow_datasets.core import constants, features

from data_prep import images
from data_prep.convert import command, folder, split_plan
from data_prep.convert.shards import run_jobs
from data_prep.inputs import tfds_examples
from pera_jax.common import classes, paths
from pera_jax.common.errors import UserError, run
from pera_jax.data import records
from pera_jax.data.tfds_sets import bands_of, feature_of, open_dataset, pick_image, pick_label


def main(argv: list[str] | None = None, driver: Callable = run_jobs) -> None:
    """The command; `driver` runs the jobs, see `run` of `folder.write_split`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="pera-jax prep-tfds", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dataset", required=True, type=paths.local, help="folder of a prepared dataset, or NAME[/CONFIG][:VERSION]"
    )
    parser.add_argument(
        "--data-dir", type=paths.local, help=f"folder of the datasets named by --dataset; default: {constants.DATA_DIR}"
    )
    parser.add_argument("--tfds-split", help="TFDS split or slice, e.g. train[:80%%]; default: that of --split")
    parser.add_argument(
        "--image-feature", metavar="NAME", help="image feature to convert; required if there are several"
    )
    parser.add_argument(
        "--label-feature", metavar="NAME", help="ClassLabel feature to convert; required if there are several"
    )
    parser.add_argument(
        "--bands", metavar="NAME,NAME,...", help="band names of a Tensor feature; default: band_1,band_2,..."
    )
    parser.add_argument("--no-labels", action="store_true", help="convert without classes")
    command.add_options(parser)
    command.add_range(parser)
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
        if args.max_side or args.jpeg_quality or args.span or set(args.drop) - {"duplicates"}:
            raise UserError(
                f"--max-side, --jpeg-quality, --range and --drop small,blank do not apply to the Tensor {image!r}"
            )
        options = {}

    info = folder.existing_info(args.output)
    reading = {"tfds_split": tfds_split, "image": image, "label": label}
    class_names = None if label is None else list(feature_of(builder, label).names)
    if class_names is not None:
        classes.check(class_names, builder.info.full_name)
    shards = command.number_of_shards(args, len(examples))
    dataset = info.name if info else images.dataset_name(args.output)
    described = [
        records.FORMAT_VERSION, dataset, args.split, class_names, shards, options, reading, args.drop, bands, dtype,
        builder.info.full_name, examples.pieces,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode("ascii")).hexdigest()
    split = split_plan.Split(
        args.output, dataset, args.split, bands, dtype, class_names, False, examples, shards, digest
    )
    read = functools.partial(tfds_examples.read_bytes, **reading)
    convert = functools.partial(tfds_examples.convert_example, **reading, **options)
    command.write(split, read, convert, args, driver=driver)


if __name__ == "__main__":
    run(main)
