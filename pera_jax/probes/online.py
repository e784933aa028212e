"""The monitor: kNN accuracy of the features during training, on a small set of labeled images.

Each image is classified by its nearest neighbors among the other images of the set. The number is for monitoring a run,
not for publication. It uses the teacher, or the student of a method without a teacher, and does not affect training.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.data import decode, records
from pera_jax.objectives.base import Objective
from pera_jax.parallel import sharding
from pera_jax.probes.classification import knn

METRIC = "monitor/knn20"
NEIGHBORS = 20
MICRO_BATCH = 32  # images per device
_SEARCHED = 10  # at most this many records are read per image of the set


def labeled_subset(settings, bands: Bands, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads a class-balanced subset of `settings.images` images, or fewer if the dataset is too small.

    Records are read in a fixed random order, and the first ones of each class are used. At most ten times
    `settings.images` records are read.

    Args:
      settings: `config.monitor`: `data`, `split`, `images`.
      side: px; images are resized to side x side.

    Returns:
      (stored values [N, side, side, C], labels int64 [N]).

    Raises:
      UserError: a dataset that cannot be read, has other bands, no classes or too few images.
    """
    source = records.open_split(settings.data, settings.split)
    classes = len(source.info.class_names or ())
    if classes < 2:
        raise UserError(
            f'monitor.data={settings.data} needs at least two classes; give a labeled dataset, or "" to disable the '
            'monitor'
        )
    places = bands.indices_in(source.info, source.path)
    order = np.random.default_rng(0).permutation(len(source))[: _SEARCHED * settings.images]
    quota, taken, images, labels = -(-settings.images // classes), np.zeros(classes, int), [], []
    for index in order:
        if len(images) == settings.images:
            break
        record = source.record(index)
        if record.label < 0 or taken[record.label] == quota:
            continue
        taken[record.label] += 1
        images.append(decode.resized_record(source, index, record, places, side))
        labels.append(record.label)
    source.close()
    if len(images) <= NEIGHBORS:
        raise UserError(
            f"the monitor needs at least {NEIGHBORS + 1} labeled images in split {settings.split!r} of "
            f"{settings.data}, got {len(images)}; raise monitor.images or use a larger dataset"
        )
    return np.stack(images), np.array(labels)


class Monitor:
    """Evaluates the labeled subset on the mesh of the training.

    Parameters keep their sharding. A collective: every process calls it at the same steps and gets the same result.
    """

    def __init__(self, settings, objective: Objective, params: Any, mesh: Mesh):
        """
        Args:
          settings: `config.monitor`, with a non-empty `data`.
          params: parameters of the evaluated network (`base.judged`), or their shapes, with shardings.

        Raises:
          UserError: as `labeled_subset`.
        """
        self.images, self.labels = labeled_subset(settings, objective.bands, objective.encoder.image_size)
        shards, wide = sharding.batch_shards(mesh), objective.precision.wide
        self._rows = shards * min(MICRO_BATCH, -(-len(self.images) // shards))
        self._where = NamedSharding(mesh, sharding.BATCH)
        def encode(backbone, images):  # [B, S, S, C] -> [B, D]
            return objective.encoder.apply({"params": backbone}, objective.bands.normalized(images, wide))[
                "class_token"
            ]

        everywhere = NamedSharding(mesh, sharding.P())
        self._encode = jax.jit(
            encode,
            in_shardings=(jax.tree.map(lambda leaf: leaf.sharding, params["backbone"]), self._where),
            out_shardings=everywhere,
        )
        # Replicated: every device computes the full result.
        self._vote = jax.jit(
            functools.partial(knn.leave_one_out, classes=int(self.labels.max()) + 1, k=NEIGHBORS),
            in_shardings=everywhere,
            out_shardings=everywhere,
        )

    def features(self, params: Any) -> np.ndarray:
        """The class tokens float32 [N, D] of the subset, computed batch by batch to save device memory."""
        parts = []
        for first in range(0, len(self.images), self._rows):
            part = self.images[first : first + self._rows]
            padded = np.zeros((self._rows, *part.shape[1:]), part.dtype)
            padded[: len(part)] = part
            rows = jax.make_array_from_callback(padded.shape, self._where, lambda index, rows=padded: rows[index])
            parts.append(np.asarray(self._encode(params["backbone"], rows)))
        return np.concatenate(parts)[: len(self.images)]  # removes the padding

    def __call__(self, params: Any) -> dict[str, float]:
        """The metric: leave-one-out kNN accuracy of the class tokens, with k = 20 and T = 0.07."""
        return {METRIC: float(self._vote(self.features(params), self.labels))}
