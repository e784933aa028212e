"""Linear semantic segmentation on frozen patch tokens.

Settings (window and stride in px of the enlarged image, tile in px of the scene):
  window, stride: size and stride of the encoder's windows, multiples of the patch size.
  scale: integer factor by which images are enlarged before the encoder; a divisor of the patch size.
  blocks: numbers of last blocks whose tokens are concatenated; one is chosen.
  learning_rates: candidates; one is chosen.
  priors: strengths of the logit adjustment; one is chosen.
  steps, batch: training steps, and pixels per step.
  held_out: fraction of the training scenes (or of the tiles of a single scene) held out to choose hyperparameters.
  tile: side of the tiles of a scene, which are held out from a single scene and resampled for the interval.
  folds: number of cross-validation folds for scenes without splits, see `scenes.load`.
  class_names: class names for a folder without classes.txt; () for "class 0" and so on.
  seeds: seeds of the held-out split and the batches; the first one is also the seed of the interval.

Scores, over the pooled pixels of all test scenes, means over the seeds: `segmentation_miou` (mean IoU over classes in
truth or prediction), `segmentation_accuracy`, `segmentation_macro_f1`, and `segmentation_miou_seen`, the mean IoU over
test pixels whose class occurs in the training scenes of the fold (with cross-validation a scene may have classes of its
own).
"""

from collections.abc import Iterator
from typing import Any

from pera_jax.data.labelled.scenes import Dense
from pera_jax.probes.dense import dense, overlap, pixel_probe

SETTINGS = pixel_probe.SETTINGS | {"priors": (0.0, 0.5, 1.0), "tile": 128, "class_names": ()}

SCORES = {"miou": overlap.mean_iou, "accuracy": overlap.accuracy, "macro_f1": overlap.macro_f1}


def run(data: Dense, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the scores, then the details: per_class (IoU by class name, mean over seeds), confusion (pixels
    [true][predicted] of the first seed), chosen, held_out (mean IoU by blocks, learning rate and prior), and the
    predictions of the first seed.

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
