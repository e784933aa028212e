"""Evaluates one network on several tasks: opens the data, extracts features once, runs each task, writes each
result."""

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data.labelled import folders, scenes
from pera_jax.data.labelled.samples import Samples, check_labels, open_samples
from pera_jax.encoder import extract as features
from pera_jax.encoder.cache import Cache, digest
from pera_jax.encoder.load import STUDENT, TEACHER, Weights, load_weights, networks_of
from pera_jax.parallel import distributed
from pera_jax.probes.classification.labeled import Labeled
from pera_jax.probes.dense import dense
from pera_jax.probes.runner import keys, results
from pera_jax.probes.runner.specs import DENSE, TASKS, Spec
from pera_jax.probes.scores import Score
from pera_jax.training.checkpoints import checkpoint

TRAINED = (TEACHER, STUDENT)
ENCODERS = (*TRAINED, "untrained", "pixels")
_DATES = {"segmentation": 1, "change": 2}


@dataclasses.dataclass(frozen=True)
class Network:
    """The evaluated network.

    Attributes:
      encoder: "teacher", "student" (of a method without a teacher), "untrained" (the initial weights) or "pixels" (the
        baseline without a network).
      meta: metadata of the checkpoint.
      weights: SHA-256 of the backbone; "" for pixels.
      saved: identity of the save, SHA-256 of Orbax's metadata; it changes if the step is saved again.
    """

    encoder: str
    run: str
    step: int
    meta: dict[str, Any]
    weights: str
    saved: str
    extractor: features.Extractor | features.Pixels

    @classmethod
    def from_weights(cls, weights: Weights, run: str, saved: str, before: "Network | None" = None) -> "Network":
        """The network of loaded weights.

        Args:
          weights: `weights.network` is one of `ENCODERS`.
          before: an earlier checkpoint of the same run; its compiled extractor is reused, so it must not be used
            afterwards.
        """
        encoder = weights.network
        if encoder == "pixels":
            return cls(encoder, run, 0, weights.meta, "", saved, features.Pixels(weights.meta))
        if (
            before
            and before.meta["model"] == weights.meta["model"]
            and before.extractor.bands == Bands.from_metadata(weights.meta)
        ):
            extractor = before.extractor
            extractor.take(weights.backbone)
        else:
            extractor = features.Extractor(weights.backbone, weights.meta)
        return cls(encoder, run, weights.step, weights.meta, digest(weights.backbone), saved, extractor)

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint fields of a result."""
        return {
            "run": self.run, "step": self.step, "encoder": self.encoder, "weights": self.weights, "saved": self.saved,
            "git": self.meta["git"], "trained_on": self.meta["data"]["fingerprint"],
        }  # fmt: skip


def load_network(run: str, step: int | None, encoder: str | None, verify: bool = True) -> Network:
    """Loads a network of a run.

    Args:
      encoder: one of `ENCODERS`; None for the trained network that is evaluated, see `networks_of`.

    Raises:
      UserError: a run, step or encoder that does not exist; damaged weights.
    """
    if encoder not in (None, *ENCODERS):
        raise UserError(f"unknown encoder {encoder!r}; expected one of {', '.join(ENCODERS)}")

    def read(chosen: int) -> tuple[Weights, str]:
        weights = _weights(run, chosen, encoder, verify)
        return weights, checkpoint.identity(checkpoint.folder_of(run, chosen)[0])

    weights, saved = checkpoint.read_while_present(run, step, read)
    return Network.from_weights(weights, run, saved)


def _weights(run: str, step: int, encoder: str | None, verify: bool) -> Weights:
    meta = checkpoint.load_meta(checkpoint.folder_of(run, step)[0])
    judged = networks_of(meta)[0]
    if encoder in (None, judged):
        return load_weights(run, step, judged, verify, parts=("backbone",))
    if encoder in TRAINED:
        raise UserError(f"the encoder of {run} is its {judged}, not a {encoder}; remove the option encoder")
    params = objectives.untrained(meta) if encoder == "untrained" else {"backbone": {}}  # pixels need no network
    return Weights(params, meta, 0, encoder)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a task: the entry, see `results`, and its pictures."""

    entry: dict[str, Any]
    pictures: dict[str, np.ndarray]


class Job:
    """The opened and checked data of all specs, to evaluate networks on.

    With several processes, all create a job and call the same methods. Each extracts features for a part of the whole
    images, and for all scenes of dense tasks; all compute the scores, and the main process writes.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        base: pathlib.Path,
        batch_size: int = 256,
        reading: folders.Reading = folders.Reading(),
    ):
        """Opens all data that can be opened without a checkpoint.

        Args:
          specs: the tasks.
          base: folder for the results.
          batch_size: images decoded at a time; does not change scores.
          reading: options for reading folders of images and of scenes.

        Raises:
          UserError: data that cannot be opened; inconsistent labels; a results folder with other files.
        """
        self.specs, self.base, self._batch_size = specs, base, batch_size
        self._reading = reading
        self._cache = Cache(base / "cache")
        self._samples: dict[tuple[str, str, str], Samples] = {}
        self._scenes: dict[str, scenes.Folder] = {}
        results.read(base)
        distributed.on_main_host(lambda: results.check_writable(base))
        for spec in specs:
            if spec.task not in DENSE:
                self._open(spec)
            elif not pathlib.Path(spec.data).is_dir():
                raise UserError(f"{spec.name}: the folder of scenes {spec.data} does not exist; give one with --data")

    def prepare(self, meta: dict[str, Any]) -> None:
        """Checks the data against the metadata of a checkpoint; all checkpoints of a run have the same bands and patch
        size.

        Raises:
          UserError: other bands; sizes that are not multiples of the patch size; scenes that do not fit.
        """
        bands = Bands.from_metadata(meta)
        for spec in self.specs:
            if spec.task not in DENSE:
                features.check_image_size(_image_size(spec, meta), meta)
                for samples in filter(None, self._open(spec)):
                    bands.indices_in(samples.suited_to(bands), samples.path)  # raises if a band is missing
            elif spec.name not in self._scenes:
                self._scenes[spec.name] = scenes.load(
                    spec.data, _DATES[spec.task], bands, spec.settings["folds"], spec.settings.get("class_names", ()),
                    (spec.train_split, spec.test_split), self._reading.max_corrupt_fraction,
                )  # fmt: skip

    def evaluate(self, network: Network, spec: Spec) -> Result:
        """Runs one task. Raises UserError: data that the task cannot use; NaN or infinite features."""
        began = time.perf_counter()
        data = self._data(network, spec)
        scores, details, pictures = {}, {}, {}
        for name, value in TASKS[spec.task].run(data, dict(spec.settings)):
            if isinstance(value, Score):
                scores[name] = dataclasses.asdict(value) | {"seeds": list(value.seeds)}
            elif isinstance(value, np.ndarray):
                pictures[name] = value
            else:
                details[name] = value
        found = {"scores": scores, "details": details, "seconds": round(time.perf_counter() - began, 1)}
        return Result(self._metadata(network, spec) | found, pictures)

    def failed(self, network: Network, spec: Spec, error: Exception) -> Result:
        """The result of a failed task: its error message."""
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Result(self._metadata(network, spec) | {"failure": printable(" ".join(text.split()), limit=2000)}, {})

    def write(self, result: Result) -> None:
        """Writes a result. If that fails, prints the result and raises UserError on all processes."""
        try:
            distributed.on_main_host(lambda: results.write(self.base, result.entry, result.pictures))
        except UserError:
            distributed.say(results.markdown([result.entry]))  # computing it may have taken hours
            raise

    def fingerprints(self, spec: Spec) -> tuple[str, str] | None:
        """Fingerprints of the training and the test split; None before `prepare` has loaded the scenes."""
        if spec.task in DENSE:
            folder = self._scenes.get(spec.name)
            return folder and folder.fingerprints
        train, test = self._open(spec)
        return train.fingerprint, (test or train).fingerprint

    def clear_cache(self) -> None:
        """Removes the features cached by this job."""
        self._cache.clear()

    # ---------------------------------------------------------------- data

    def _open(self, spec: Spec) -> tuple[Samples, Samples | None]:
        for split in (spec.train_split, spec.test_split):
            place = (spec.data, split, spec.labels)
            if split and place not in self._samples:
                self._samples[place] = open_samples(*place, self._reading)
        if spec.train_split == spec.test_split:
            raise UserError(f"the training and the test split are both {spec.train_split!r}; use a separate test split")
        train = self._samples[spec.data, spec.train_split, spec.labels]
        test = self._samples[spec.data, spec.test_split, spec.labels] if spec.test_split else None
        check_labels(train, test)
        return train, test

    def _data(self, network: Network, spec: Spec) -> Labeled | scenes.Dense:
        if spec.task in DENSE:
            return self._scenes[spec.name].dense(network.extractor.patch, self._tokens(network, spec))
        train, test = self._open(spec)
        size = _image_size(spec, network.meta)
        return Labeled(
            self._features(network, train, size), self._features(network, test, size) if test else None,
            train.labels, test.labels if test else None, train.class_names,
        )  # fmt: skip

    def _features(self, network: Network, samples: Samples, image_size: int) -> features.Features:
        key = _cache_key(network) | {"data": samples.fingerprint, "split": samples.split, "image_size": image_size}
        make = lambda: vars(features.extract(network.extractor, samples, image_size, self._batch_size))  # noqa: E731
        return features.Features(**self._cache.arrays(key, make))

    def _tokens(self, network: Network, spec: Spec) -> Callable[[np.ndarray, int, int], np.ndarray]:
        extractor, blocks = network.extractor, max(spec.settings["blocks"])

        def maps(images):
            return extractor.maps(images)[:, -blocks:]

        def tokens(image, window, stride):
            image = np.ascontiguousarray(image)
            content = hashlib.sha256(image).hexdigest()
            key = _cache_key(network) | {
                "image": content, "shape": image.shape, "window": window, "stride": stride, "blocks": blocks,
            }  # fmt: skip
            make = lambda: {"tokens": dense.encode(maps, image, extractor.patch, window, stride)}  # noqa: E731
            return self._cache.arrays(key, make)["tokens"]

        return tokens

    def _metadata(self, network: Network, spec: Spec) -> dict[str, Any]:
        """The fields of an entry that describe the checkpoint and the data."""
        prints = self.fingerprints(spec)
        if spec.task in DENSE:
            folder = self._scenes[spec.name]
            trained, tested = ({index for fold in folder.folds for index in fold[part]} for part in (0, 1))
            numbers, names = (len(trained), len(tested)), folder.class_names
            size, data_name = 0, pathlib.Path(spec.data).resolve().name
        else:
            train, test = self._open(spec)
            numbers, names = (len(train), len(test) if test else len(train)), train.class_names
            size, data_name = _image_size(spec, network.meta), train.name
        fields = spec.to_dict()
        return {
            "name": spec.name,
            "task": spec.task,
            "checkpoint": network.to_dict() | {"image_size": size, "origin": keys.origin(self.base, network.run)},
            "data": {
                "path": spec.data, "name": data_name, "train_split": spec.train_split, "test_split": spec.test_split,
                "labels": spec.labels, "train_images": numbers[0], "test_images": numbers[1],
                "train_fingerprint": prints[0], "test_fingerprint": prints[1], "class_names": list(names),
            },
            "settings": fields["settings"],
            "spec": fields,
        }  # fmt: skip


def _cache_key(network: Network) -> dict[str, Any]:
    """What features depend on, apart from the images."""
    return {"weights": network.weights, "encoder": network.encoder, "model": network.meta["model"],
            **network.extractor.bands.to_dict()}  # fmt: skip


def _image_size(spec: Spec, meta: dict[str, Any]) -> int:
    return spec.image_size or meta["model"]["image_size"]
