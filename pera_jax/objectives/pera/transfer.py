"""The pixel head of a run for images of other bands."""

from typing import Any

import numpy as np

from pera_jax.bands import band_order


def adapt(params: dict[str, Any], new: dict[str, Any], patch: int, there: tuple[str, ...], here: tuple[str, ...]):
    """Parameters with the pixel head's last layer, whose rows are ordered row, column, band, for the bands `here`.

    Args:
      params: trained on the bands `there`; without a pixel head, as the teacher's, they are returned as they are.
      new: those that the layer is taken from where the numbers of bands differ.
    """
    if "pixel_head" not in params or there == here:
        return params
    order, head = band_order(there, here), params["pixel_head"]
    if order is None:
        return params | {"pixel_head": head | {name: new["pixel_head"][name] for name in ("direction", "gain")}}
    rows = np.arange(patch * patch * len(there)).reshape(-1, len(there))[:, order].reshape(-1)
    return params | {"pixel_head": head | {name: np.asarray(head[name])[rows] for name in ("direction", "gain")}}
