"""The report's picture of a DINOv2 run: the views of the teacher, and those of the student with its masks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pera_jax.objectives import independent_views
from pera_jax.objectives.base import Streams
from pera_jax.objectives.watched import Preview

HIDDEN = (225, 225, 225)  # patches that are replaced by the mask token

READING = (
    "Each row is one image: two global crops and, for the student only, smaller local crops, each with colors of its "
    "own. The teacher sees the whole global crops, the student half of them with masked patches (gray). From each crop "
    "the student guesses the teacher's prototypes of the other global crop, and at masked patches those of the same "
    "patch."
)


def preview(
    objective: Any, networks: dict[str, Any], batch: dict[str, Any], rngs: Streams, channels: tuple[int, int, int]
) -> Preview:
    """Makes the views of each image as in training.

    The caption states at how many masked patches the student's most probable prototype is the teacher's.

    Args:
      objective: a `DINOv2`. networks: the parameters of its "student" and "teacher".
      batch: crops of stored values, [N, V, H, W, C] by crop type, and masks [N, 2, L].
    """
    # Any number of images, with any masks: each image is a group, with room for the largest mask of both crops.
    highest = objective.masks.ratio[1]
    alone = dataclasses.replace(objective.masks, group=1, probability=1.0, ratio=(highest, highest))
    objective = dataclasses.replace(objective, masks=alone)

    def view_and_guess(student, teacher, batch):
        views = objective.make_views(objective.prepare(rngs, batch))
        out = objective.outputs(student, teacher, views, batch["masks"], None)
        best = [
            jnp.argmax(objective.precision.logits(each.units, each.weights), axis=-1)
            for each in (out.patch_student, out.patch_teacher)
        ]
        return views, best[0] == best[1], out.row_weights > 0

    views, same, held = jax.device_get(jax.jit(view_and_guess)(networks["student"], networks["teacher"], batch))
    seen = independent_views.pictures(views, objective.crops, objective.bands, channels)
    columns = {}
    for v in range(2):
        picture = seen.pop(f"global {v + 1}")
        columns[f"teacher: global {v + 1}"] = picture
        columns[f"student: global {v + 1}"] = _hidden(picture, batch["masks"][:, v], objective.encoder.patch)
    columns |= {f"student: {name}": picture for name, picture in seen.items()}
    share = np.mean(same[held]) if held.any() else 0.0
    caption = f"At {share:.0%} of the masked patches, the student's most probable prototype is the teacher's."
    return Preview(columns, READING, caption, {})


def _hidden(pictures: np.ndarray, masks: np.ndarray, patch: int) -> np.ndarray:
    """The pictures [N, H, W, 3] with gray patches where `masks` [N, L] are not 0."""
    side = pictures.shape[1] // patch
    tiles = rearrange(pictures, "n (h p) (w q) c -> n (h w) p q c", p=patch, q=patch).copy()
    tiles[masks != 0] = HIDDEN
    return rearrange(tiles, "n (h w) p q c -> n (h p) (w q) c", h=side)
