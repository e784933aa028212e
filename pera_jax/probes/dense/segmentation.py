"""Linear semantic segmentation on frozen patch tokens.

Settings (px are those of the enlarged image for window and stride, else those of the scene):
  window, stride: px, multiples of the patch: the windows that the encoder sees, and how far apart they lie.
  scale: whole number by which images are enlarged before the encoder; it divides the patch.
  blocks: from how many last blocks tokens are concatenated, each number a variant to choose from.
  learning_rates: to choose from.
  steps, batch: steps of training, and pixels of each.
  held_out: the share of the training scenes (of a single one: of its tiles) that settings are chosen on.
  tile: px, side of the tiles of a scene that are held out, and that are resampled for the interval.
  folds: in how many parts scenes without splits are tested, see `scenes.load`.
  class_names: of a folder without classes.txt; (): "class 0" and so on.
  seeds: of the held-out part, the batches and, the first one, the interval.

Scores: `segmentation_miou` (mean over the classes in truth or prediction of intersection over union),
`segmentation_accuracy` (share of pixels) and `segmentation_macro_f1`; and `segmentation_miou_seen`, of only those test
pixels whose class the fold's training scenes hold: without splits, no scene needs to hold all classes. All are of the
pooled pixels of all test scenes, means over seeds.
"""

from collections.abc import Iterator
from typing import Any

from pera_jax.data.labelled.scenes import Dense
from pera_jax.probes.dense import dense, overlap, pixel_probe

SETTINGS = pixel_probe.SETTINGS | {"priors": (0.0, 0.5, 1.0), "tile": 128, "class_names": ()}

SCORES = {"miou": overlap.mean_iou, "accuracy": overlap.accuracy, "macro_f1": overlap.macro_f1}


def run(data: Dense, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the scores, then details: per_class (IoU by name, mean over seeds), confusion (pixels [true][predicted],
    first seed), chosen, held_out (mean IoU by blocks and learning rate), pictures of the first seed.

    Raises:
      UserError: see `dense.encode` and `pixel_probe.probe`.
    """

    def tokens(scene):
        return data.tokens(dense.enlarge(scene.images[0], settings["scale"]), settings["window"], settings["stride"])

    def units(scene):
        return dense.tiles(scene.mask.shape, settings["tile"])

    tested = pixel_probe.probe(data, settings, tokens, units, overlap.mean_iou)
    seed = settings["seeds"][0]
    for name, statistic in SCORES.items():
        yield f"segmentation_{name}", overlap.score(tested.matrices, statistic, seed)
    yield "segmentation_miou_seen", overlap.score(tested.seen, overlap.mean_iou, seed)
    yield from pixel_probe.details(tested, data.class_names)
