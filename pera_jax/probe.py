"""The probe job: how good are the frozen features of a run's checkpoint?

    python -m pera_jax.probe --run runs/aid --data shards/aid --tasks knn,linear

Settings are chosen on a part of the training split; the test split is used once for each score. Results go beside the
run, to RUN/probe/step_000123/ (`_untrained` is added for the network at step 0), and to TensorBoard in RUN/tb_probe.
"""

import argparse
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from pera_jax import checkpoint, errors
from pera_jax.bands import Bands
from pera_jax.data import records
from pera_jax.errors import UserError
from pera_jax.probes import colour, features, knn, linear, results


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network and the labelled data to judge it on. Features are extracted once, when a task first asks."""

    weights: checkpoint.Weights
    train: records.RecordSource
    test: records.RecordSource
    classes: int
    image_size: int
    batch_size: int
    seed: int

    @property
    def bands(self) -> Bands:
        return Bands.of(self.weights.meta)

    @functools.cached_property
    def features(self) -> tuple[features.Features, features.Features]:
        """Of the training and of the test split."""
        extractor = features.Extractor(self.weights.backbone, self.weights.meta)
        train, test = (
            features.extract(extractor, source, self.bands, self.image_size, self.batch_size)
            for source in (self.train, self.test)
        )
        return train, test


def _knn(subject: Subject) -> dict[str, Any]:
    def variants(tokens):
        plain = tokens.concatenated(1, patch_means=False)
        # Each part with length 1, so that the cosine of the pair is the mean of the two cosines.
        both = np.concatenate([knn.unit(plain), knn.unit(tokens.patch_means[:, -1])], axis=1)
        return {"class": plain, "class_mean": both}

    train, test = subject.features
    return knn.probe(variants(train), train.labels, variants(test), test.labels, subject.classes, subject.seed)


def _linear(subject: Subject) -> dict[str, Any]:
    train, test = subject.features

    def variants(tokens):
        return {
            f"{'class_mean' if means else 'class'}_{blocks}": tokens.concatenated(blocks, means)
            for blocks in sorted({1, tokens.class_tokens.shape[1]})
            for means in (False, True)
        }

    return linear.probe(variants(train), train.labels, variants(test), test.labels, subject.classes, subject.seed)


def _colour(subject: Subject) -> dict[str, Any]:
    def summary(image):
        return colour.statistics(subject.bands.mapped(image))

    def measured(source):
        parts = list(features.read(source, subject.bands, summary, subject.batch_size, "colours"))
        values, labels = zip(*parts, strict=True)
        return np.concatenate(values), np.concatenate(labels)

    return colour.probe(*measured(subject.train), *measured(subject.test), seed=subject.seed)


TASKS = {"knn": _knn, "linear": _linear, "colour": _colour}


def probe(
    run: str,
    data: str,
    tasks: list[str],
    *,
    step: int | None = None,
    untrained: bool = False,
    train_split: str = "train",
    test_split: str = "test",
    output: str | None = None,
    image_size: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], pathlib.Path]:
    """Judges a checkpoint and writes what it found; arguments as the command's options.

    Args:
      image_size: px, the side to which whole images are resized; None: the size of the global crops in training.

    Returns:
      (the entry of each task, see `probes.results`; the folder with the files).

    Raises:
      UserError: everything that is wrong with the arguments, the run or the data.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"there is no task {', '.join(unknown)!r}; choose from {', '.join(TASKS)}")
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be at least 0")
    if not pathlib.Path(run).is_dir():
        raise UserError(f"the run's folder {run} does not exist; name the --workdir of a training")
    if train_split == test_split:
        raise UserError(f"--train-split and --test-split are both {train_split!r}; a test needs images of its own")
    train, test = (records.open_split(data, split) for split in (train_split, test_split))
    weights = checkpoint.load_weights(run, step, untrained=untrained)
    meta = weights.meta
    for source in (train, test):
        Bands.of(meta).places(source.info, source.path)  # raises where a band is missing
    image_size = meta["model"]["image_size"] if image_size is None else image_size
    features.check_image_size(image_size, meta)
    _check_labels(train, test, train_split, test_split)

    subject = Subject(weights, train, test, len(train.info.class_names), image_size, batch_size, seed)
    described = _describe(subject, run, data, untrained, train_split, test_split)
    entries = [{"task": task} | described | TASKS[task](subject) for task in tasks]
    base = pathlib.Path(output) if output else pathlib.Path(run)
    folder = base if output else base / "probe" / f"step_{weights.step:06d}{'_untrained' if untrained else ''}"
    results.write(folder, entries)
    results.write_events(base / "tb_probe", weights.step, entries)
    return entries, folder


def _check_labels(train: records.RecordSource, test: records.RecordSource, train_split: str, test_split: str) -> None:
    """Raises UserError without classes, with images without a label, or with test classes that training lacks."""
    names = train.info.class_names
    if not names:
        raise UserError(f"{train.path} has no labels; convert class folders with python -m data_prep.images")
    present = {}
    for split, source in ((train_split, train), (test_split, test)):
        labels = set(features.labels_of(source).tolist())
        if not labels <= set(range(len(names))):
            raise UserError(f"split {split!r} of {train.path} holds images without one of its {len(names)} classes")
        present[split] = labels
    if len(present[train_split]) < 2:
        raise UserError(f"split {train_split!r} of {train.path} holds one class only; there is nothing to tell apart")
    lacking = present[test_split] - present[train_split]
    if lacking:
        raise UserError(
            f"split {test_split!r} of {train.path} has {len(present[test_split])} classes and {train_split!r} has "
            f"{len(present[train_split])}, which lacks {', '.join(names[label] for label in sorted(lacking))}; "
            "convert both splits from folders of the same classes"
        )


def _describe(subject, run, data, untrained, train_split, test_split) -> dict[str, Any]:
    """What each entry says of the checkpoint and the data."""
    train, test, meta = subject.train, subject.test, subject.weights.meta
    return {
        "checkpoint": {
            "run": str(run), "step": subject.weights.step, "untrained": untrained, "network": "teacher",
            "image_size": subject.image_size, "git": meta["git"], "trained_on": meta["data"]["fingerprint"],
        },
        "data": {
            "name": train.info.name, "path": str(data), "train_split": train_split, "test_split": test_split,
            "train_images": len(train), "test_images": len(test), "class_names": train.info.class_names,
            "train_fingerprint": train.split_info.fingerprint, "test_fingerprint": test.split_info.fingerprint,
        },
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pera_jax.probe", description="Scores a checkpoint's features.")
    parser.add_argument("--run", required=True, help="folder of the run (the --workdir of the training)")
    parser.add_argument("--data", required=True, help="data set folder with labels")
    parser.add_argument("--tasks", default="knn,linear", help=f"some of {','.join(TASKS)} (default knn,linear)")
    parser.add_argument("--step", type=int, help="the checkpoint (default: the latest)")
    parser.add_argument("--untrained", action="store_true", help="the network as it was before the first step")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--output", help="folder for the results (default: RUN/probe/step_NNNNNN)")
    parser.add_argument("--image-size", type=int, help="px, a multiple of the patch (default: the global crops' size)")
    parser.add_argument("--batch-size", type=int, default=256, help="images decoded at a time; changes no score")
    parser.add_argument("--seed", type=int, default=0, help="of held-out parts, batches and intervals (default 0)")
    options = vars(parser.parse_args(argv))
    tasks = [task.strip() for task in options.pop("tasks").split(",") if task.strip()]
    entries, folder = probe(tasks=tasks, **options)
    described, held = entries[0]["checkpoint"], entries[0]["data"]
    print(
        f"{described['run']}, step {described['step']}{' (untrained)' if described['untrained'] else ''}, on "
        f"{held['path']}: {held['train_images']:,} training and {held['test_images']:,} test images of "
        f"{len(held['class_names'])} classes at {described['image_size']} px\n\n{results.table(entries)}\n\n"
        f"written to {folder}"
    )


if __name__ == "__main__":
    errors.run(main)
