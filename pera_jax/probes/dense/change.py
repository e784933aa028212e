"""Linear change detection on frozen patch tokens; the input of the head is `|f1 - f2|` of the two dates.

Settings: as in `segmentation`, except that image pairs are held out and resampled for the interval; `tile` (px) is used
only with a single training pair, of which tiles are held out.

Scores of the class "changed", over the pooled pixels of all test pairs, means over the seeds: `change_f1`,
`change_iou`, `change_precision`, `change_recall`. They are 1 if there is no change in truth and prediction.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pera_jax.data.labelled.scenes import Dense
from pera_jax.probes.dense import dense, overlap, pixel_probe

SETTINGS = pixel_probe.SETTINGS | {"priors": (0.0, 0.5, 1.0, 1.5), "tile": 64}

SCORES = {
    "f1": overlap.change_f1, "iou": overlap.change_iou, "precision": overlap.change_precision,
    "recall": overlap.change_recall,
}  # fmt: skip


def run(data: Dense, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the scores, then the details as in `segmentation.run`; held_out is the F1 of "changed".

    Raises:
      UserError: see `dense.encode` and `pixel_probe.probe`.
    """

    def tokens(scene):
        first, second = (
            data.tokens(dense.enlarge(image, settings["scale"]), settings["window"], settings["stride"])
            for image in scene.images
        )
        return np.abs(first - second)

    def units(scene):
        return np.zeros(scene.mask.shape, np.int64)

    tested = pixel_probe.probe(data, settings, tokens, units, overlap.change_f1)
    for name, statistic in SCORES.items():
        yield f"change_{name}", overlap.score(tested.matrices, statistic, settings["seeds"][0])
    yield from pixel_probe.details(tested, data.class_names)
