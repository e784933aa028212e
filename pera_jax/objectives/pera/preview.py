"""The report's picture of a PerA run: both views of a pair, and the student's prediction of its learnable patches."""

from typing import Any

import jax
import numpy as np
from einops import rearrange

from pera_jax.bands import as_bytes
from pera_jax.objectives.base import Streams
from pera_jax.objectives.watched import Preview

COLUMNS = ("crop", "masks", "student sees", "teacher sees", "to be guessed", "the guess")
TINTS = {"student": (230, 120, 0), "learnable": (30, 180, 90), "teacher": (40, 110, 235)}
HIDDEN = (225, 225, 225)  # patches that a column does not show

READING = (
    "Each row is one pair: a crop, from which two views are made that differ in color but not in place. Student and "
    "teacher see disjoint patches. The student knows the positions of its learnable patches and predicts their pixels "
    "from the patches that it sees: compare the green patches of the last two columns. Hidden patches are gray."
)


def preview(
    objective: Any, networks: dict[str, Any], batch: dict[str, Any], rngs: Streams, channels: tuple[int, int, int]
) -> Preview:
    """Makes the views of each image as in training, and the student's prediction.

    The caption states the fraction of the variance of the learnable patches' pixels that the prediction explains;
    always predicting their mean color would explain 0.

    Args:
      objective: a `PerA`. networks: has the parameters of its "student".
      batch: crops of stored values, [N, V, H, W, C] by crop type.
    """
    bands, patch, number = objective.bands, objective.encoder.patch, len(batch["global"])

    def view_and_guess(params, batch):
        view = objective.make_views(objective.prepare(rngs, batch))["global"]
        guess = objective.outputs(params, params, {"global": view}, None)[2]  # [N V, n_l, p p C]
        return view, guess, objective.pixel_targets(view)

    view, guess, target = jax.device_get(jax.jit(view_and_guess)(networks["student"], batch))
    explained = 1.0 - np.mean((guess - target) ** 2) / np.mean((target - _plain(target, len(bands))) ** 2)

    first = slice(None, None, objective.crops["global"].number)  # the first pair of each image; crops are batch-major
    student, teacher = (as_bytes(bands.denormalized(seen[first]), channels) for seen in (view.student, view.teacher))
    masks = {name: getattr(view.masks, name)[first] for name in TINTS}
    rows, columns = np.arange(number)[:, None], student.shape[2] // patch

    def cut(images):  # [N, H, W, 3] -> [N, L, p, p, 3]
        return rearrange(images, "n (h p) (w q) c -> n (h w) p q c", p=patch, q=patch)

    def join(patches):
        return rearrange(patches, "n (h w) p q c -> n (h p) (w q) c", w=columns)

    def only(images, *names):
        patches, shown = cut(images), np.broadcast_to(np.uint8(HIDDEN), cut(images).shape).copy()
        for name in names:
            shown[rows, masks[name]] = patches[rows, masks[name]]
        return join(shown)

    crop = as_bytes(bands.mapped(batch["global"][:, 0]), channels)
    tinted = cut(crop).astype(np.float32)
    for name, tint in TINTS.items():
        tinted[rows, masks[name]] = 0.5 * tinted[rows, masks[name]] + 0.5 * np.float32(tint)
    wanted = only(student, "student", "learnable")
    guessed = cut(wanted)
    pixels = rearrange(guess[first], "n l (p q c) -> n l p q c", p=patch, q=patch)
    guessed[rows, masks["learnable"]] = as_bytes(bands.denormalized(pixels), channels)
    seen = only(student, "student"), only(teacher, "teacher")
    tiles = (crop, join(tinted.astype(np.uint8)), *seen, wanted, join(guessed))
    caption = f"The guess explains {explained:.0%} of the variance of the learnable patches' pixels."
    return Preview(dict(zip(COLUMNS, tiles, strict=True)), READING, caption, TINTS)


def _plain(target: np.ndarray, bands: int) -> np.ndarray:
    """The mean of each band over all patches, as one patch: [p p C]."""
    color = target.reshape(-1, bands).mean(axis=0)
    return np.tile(color, target.shape[-1] // bands)
