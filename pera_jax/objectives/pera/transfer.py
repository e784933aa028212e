"""Adapts a trained pixel head to other bands."""

from typing import Any

import numpy as np

from pera_jax.bands import band_order


def adapt(params: dict[str, Any], new: dict[str, Any], patch: int, source: tuple[str, ...], target: tuple[str, ...]):
    """Converts the pixel head's last layer, whose rows are ordered by row, column, band, to the bands `target`.

    Args:
      params: parameters trained on the bands `source`; returned unchanged without a pixel head, such as the teacher's.
      new: freshly initialized parameters, from which the layer is taken if the numbers of bands differ.
    """
    if "pixel_head" not in params or source == target:
        return params
    order, head = band_order(source, target), params["pixel_head"]
    if order is None:
        return params | {"pixel_head": head | {name: new["pixel_head"][name] for name in ("direction", "gain")}}
    rows = np.arange(patch * patch * len(source)).reshape(-1, len(source))[:, order].reshape(-1)
    return params | {"pixel_head": head | {name: np.asarray(head[name])[rows] for name in ("direction", "gain")}}
