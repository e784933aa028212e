"""The views of a few images in training, and what the networks make of them: the objective's own figure."""

import jax
import numpy as np

from pera_jax import objectives
from pera_jax.bands import visible
from pera_jax.data import pipeline, records
from pera_jax.data.mixture import Mixture
from pera_jax.encoder.load import Weights
from pera_jax.objectives import batches
from pera_jax.objectives.base import Streams
from pera_jax.objectives.watched import Preview
from pera_jax.reports.drawing.grid import Grid, Tile

_SIDE = 188  # px of a tile


def preview(networks: dict[str, Weights], source: records.RecordSource, number: int, seed: int) -> Preview | None:
    """The objective's figure of `number` images, cropped as in training; None if the objective has none.

    Args:
      networks: by name, "teacher" and "student" as far as the checkpoint has them.
    """
    meta = next(iter(networks.values())).meta
    objective, config = objectives.from_metadata(meta), meta["config"]
    # With batches of one image the length of Grain's endless stream would overflow.
    crops = pipeline.Crops(objective.crops, config["crops"]["aspect"], config["crops"]["flip"])
    stream = pipeline.make_pipeline(
        Mixture.from_source(source, objective.bands), crops, batch_size=max(number, 2), seed=seed
    )
    batch = next(stream)
    stream.close()
    # The pipeline would need whole groups of images for the draws, which is more than a small split may have.
    shown = {name: np.array(batch[name][:number]) for name in objective.crops}
    shown |= batches.draws(objective, number, np.random.default_rng(seed))
    params = {name: weights.params for name, weights in networks.items()}
    channels = visible(objective.bands, config["data"]["rgb"])
    return objective.preview(params, shown, Streams(jax.random.key(seed)), channels)


def grid(shown: Preview) -> Grid:
    rows = tuple(tuple(Tile(image) for image in images) for images in zip(*shown.columns.values(), strict=True))
    return Grid(tuple(shown.columns), rows, _SIDE, tuple(shown.tints.items()))
