"""Nearest neighbors of query images among the training images, in feature space."""

from collections.abc import Sequence

import numpy as np

from pera_jax.bands import Bands, as_bytes
from pera_jax.probes.classification import knn
from pera_jax.reports.drawing import images
from pera_jax.reports.drawing.grid import Grid, Tile

RIGHT, WRONG = (30, 140, 70), (200, 50, 40)
NUMBER = 7  # neighbors of each query
MOST = 10_000  # images that are searched
SHOWN = 192  # px, the side at which images are drawn
READING = (
    "Left: the query. Right: the images with the highest cosine similarity of the class token, the nearest first, with "
    "their similarity."
)
FRAMES = " The color of the frame shows whether the class is that of the query."


def nearest(
    train: np.ndarray, queries: np.ndarray, number: int, own: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The most similar rows of `train` [N, D] for each of `queries` [M, D].

    Args:
      own: indices of the queries in `train`, to exclude each query from its own neighbors; None if they are not in
        `train`.

    Returns:
      (cosines float32 [M, number] descending, indices [M, number]); fewer if `train` is smaller.
    """
    return knn.nearest(train, queries, min(number, len(train) - (own is not None)), own)


def grid(
    queries: Sequence[images.Shown],
    found: Sequence[Sequence[images.Shown]],
    cosines: np.ndarray,
    bands: Bands,
    channels: tuple[int, int, int],
    class_names,
) -> Grid:
    """A row for each query; `cosines` [M, k] of the images `found`."""

    def tile(entry, text, frame=None):
        return Tile(as_bytes(bands.mapped(entry.pixels), channels), text, frame)

    rows = []
    for query, neighbors, values in zip(queries, found, cosines, strict=True):
        tiles = [tile(query, images.name_of(query.label, class_names) or query.key)]
        for neighbor, value in zip(neighbors, values, strict=True):
            frame = (RIGHT if neighbor.label == query.label else WRONG) if class_names else None
            name = images.name_of(neighbor.label, class_names) or neighbor.key
            tiles.append(tile(neighbor, f"{value:.2f} {name}", frame))
        rows.append(tuple(tiles))
    names = ("query", *(f"{place + 1}" for place in range(max((len(row) - 1 for row in rows), default=0))))
    legend = (("same class", RIGHT), ("another class", WRONG)) if class_names else ()
    return Grid(names, tuple(rows), 136, legend)
