"""What the features of a network tell while it is trained: nearest neighbors among a few labelled images.

The number is for watching a run, not for reporting one: of each image of a small set the class is guessed from the other
images of the set. It reads the teacher, or the student of a method without one, and changes nothing of the training.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records
from pera_jax.encoder import extract as features
from pera_jax.objectives.base import Objective
from pera_jax.parallel import sharding
from pera_jax.probes.classification import knn

METRIC = "monitor/knn20"
NEIGHBOURS = 20
MICRO_BATCH = 32  # images per device
_SEARCHED = 10  # records that are looked at for each image that is wanted, at most


def small_set(settings, bands: Bands, side: int) -> tuple[np.ndarray, np.ndarray]:
    """As many images of each class as there are, or `settings.images` in all.

    The records are looked at in an order that is random and always the same; of each class the first ones are taken. A
    large set is not searched whole: it ends after ten times as many records as images are wanted.

    Args:
      settings: `config.monitor`: `data`, `split`, `images`.
      side: px, to which whole images are resized.

    Returns:
      (stored values [N, side, side, C], labels int64 [N]).

    Raises:
      UserError: a data set that cannot be read, that has other bands or no classes, or too few images.
    """
    source = records.open_split(settings.data, settings.split)
    classes = len(source.info.class_names or ())
    if classes < 2:
        raise UserError(f"monitor.data={settings.data} has no classes to tell apart; name a labelled data set, or \"\"")
    places = bands.indices_in(source.info, source.path)
    order = np.random.default_rng(0).permutation(len(source))[: _SEARCHED * settings.images]
    quota, taken, images, labels = -(-settings.images // classes), np.zeros(classes, int), [], []
    for index in order:
        if len(images) == settings.images:
            break
        try:
            record = records.decode_record(source.read(index))
            if record.label < 0 or taken[record.label] == quota:
                continue
            pixels = codecs.decode_bands(record.image, source.info, places)
        except (RuntimeError, codecs.ImageDecodeError) as error:
            raise UserError(f"record {index} of {source.path} cannot be read; convert it anew") from error
        taken[record.label] += 1
        images.append(features.resized(pixels, side))
        labels.append(record.label)
    source.close()
    if len(images) <= NEIGHBOURS:
        raise UserError(
            f"the monitor found {len(images)} labelled images in split {settings.split!r} of {settings.data}, and "
            f"{NEIGHBOURS} neighbours of each need at least {NEIGHBOURS + 1}; raise monitor.images or give it more"
        )
    return np.stack(images), np.array(labels)


class Monitor:
    """The small set and the teacher's features of it, computed over the mesh of the training.

    The parameters stay where they lie; every host calls it at the same steps and finds the same.
    """

    def __init__(self, settings, objective: Objective, params: Any, mesh: Mesh):
        """
        Args:
          settings: `config.monitor`, whose `data` is not empty.
          params: of the network that is judged (`base.judged`), or their shapes, with their shardings.

        Raises:
          UserError: as `small_set`.
        """
        self.images, self.labels = small_set(settings, objective.bands, objective.encoder.image_size)
        shards, wide = sharding.batch_shards(mesh), objective.precision.wide
        self._rows = shards * min(MICRO_BATCH, -(-len(self.images) // shards))
        self._where = NamedSharding(mesh, sharding.BATCH)
        def encode(backbone, images):  # [B, S, S, C] -> [B, D]
            return objective.encoder.apply({"params": backbone}, objective.bands.normalized(images, wide))["class_token"]

        everywhere = NamedSharding(mesh, sharding.P())
        self._encode = jax.jit(
            encode,
            in_shardings=(jax.tree.map(lambda leaf: leaf.sharding, params["backbone"]), self._where),
            out_shardings=everywhere,
        )
        # Each device works on all of it, so that all of them find the same.
        self._vote = jax.jit(
            functools.partial(knn.leave_one_out, classes=int(self.labels.max()) + 1, k=NEIGHBOURS),
            in_shardings=everywhere,
            out_shardings=everywhere,
        )

    def features(self, params: Any) -> np.ndarray:
        """The class tokens [N, D] of the small set. One part after the other: only one lies on the devices."""
        parts = []
        for first in range(0, len(self.images), self._rows):
            part = self.images[first : first + self._rows]
            padded = np.zeros((self._rows, *part.shape[1:]), part.dtype)
            padded[: len(part)] = part
            rows = jax.make_array_from_callback(padded.shape, self._where, lambda index, rows=padded: rows[index])
            parts.append(np.asarray(self._encode(params["backbone"], rows)))
        return np.concatenate(parts)[: len(self.images)]  # only the end is padded

    def __call__(self, params: Any) -> dict[str, float]:
        """The metric: leave-one-out accuracy with k = 20, T = 0.07 on the class tokens."""
        return {METRIC: float(self._vote(self.features(params), self.labels))}
