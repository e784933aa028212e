"""Pairs as the networks see them, and the student's guess at its learnable patches (arXiv:2505.19447, section III)."""

import jax
import numpy as np
from einops import rearrange
from ml_collections import ConfigDict

from pera_jax.data import pipeline, records
from pera_jax.data.mixture import Mixture
from pera_jax.reports.drawing.grid import Grid, Tile
from pera_jax.reports.drawing.images import as_bytes, visible
from pera_jax.training.checkpoints import checkpoint

COLUMNS = ("crop", "masks", "student sees", "teacher sees", "to be guessed", "the guess")
TINTS = {"student": (230, 120, 0), "learnable": (30, 180, 90), "teacher": (40, 110, 235)}
HIDDEN = (225, 225, 225)  # patches that a column does not show
_SIDE = 188  # px of a tile

READING = (
    "Each row is one pair: a crop, from which two looks are made that differ in colour but not in place. Student and "
    "teacher see disjoint patches. The student knows where its learnable patches lie and guesses their pixels from "
    "those that it sees: compare the green patches of the last two columns. A column shows nothing where it is grey."
)


def pairs(
    weights: checkpoint.Weights, source: records.RecordSource, number: int, seed: int
) -> tuple[dict[str, np.ndarray], float]:
    """Draws `number` pairs as training does, one per image, and lets the student guess.

    Args:
      weights: the student's.

    Returns:
      (columns, explained): uint8 [number, H, H, 3] for each name of `COLUMNS`; and the share of the variance of the
      learnable patches' pixels that the guess explains, over these pairs: 0 for always guessing their mean colour.
    """
    objective, config = checkpoint.objective_of(weights.meta), ConfigDict(weights.meta["config"])
    bands = objective.bands
    # Grain's endless stream has more batches of one image than it can count.
    stream = pipeline.make_pipeline(Mixture.of(source, bands), config.crops, batch_size=max(number, 2), seed=seed)
    batch = next(stream)
    stream.close()

    def look_and_guess(params, batch):
        view = objective.make_views(objective.examples(jax.random.key(seed), batch))["global"]
        guess = objective.outputs(params, params, {"global": view}, None)[2]  # [N V, n_l, p p C]
        return view, guess, objective.pixel_targets(view)

    crops = {kind: batch[kind][:number] for kind in ("global", "local") if kind in batch}
    view, guess, target = jax.device_get(jax.jit(look_and_guess)(weights.params, crops))
    explained = 1.0 - np.mean((guess - target) ** 2) / np.mean((target - _plain(target, objective.vit.bands)) ** 2)

    shown = visible(bands, config.views.rgb)
    first = slice(None, None, objective.crops["global"][0])  # the first pair of each image; crops are batch-major
    student, teacher = (as_bytes(look[first] * bands.std + bands.mean, shown) for look in (view.student, view.teacher))
    masks = {kind: getattr(view.masks, kind)[first] for kind in TINTS}
    patch = objective.vit.patch
    rows, columns = np.arange(number)[:, None], student.shape[2] // patch

    def cut(images):  # [N, H, W, 3] -> [N, L, p, p, 3]
        return rearrange(images, "n (h p) (w q) c -> n (h w) p q c", p=patch, q=patch)

    def join(patches):
        return rearrange(patches, "n (h w) p q c -> n (h p) (w q) c", w=columns)

    def only(images, *kinds):
        patches, shown = cut(images), np.broadcast_to(np.uint8(HIDDEN), cut(images).shape).copy()
        for kind in kinds:
            shown[rows, masks[kind]] = patches[rows, masks[kind]]
        return join(shown)

    crop = as_bytes(bands.mapped(crops["global"][:, 0]), shown)
    tinted = cut(crop).astype(np.float32)
    for kind, tint in TINTS.items():
        tinted[rows, masks[kind]] = 0.5 * tinted[rows, masks[kind]] + 0.5 * np.float32(tint)
    wanted = only(student, "student", "learnable")
    guessed = cut(wanted)
    pixels = rearrange(guess[first], "n l (p q c) -> n l p q c", p=patch, q=patch)
    guessed[rows, masks["learnable"]] = as_bytes(pixels * bands.std + bands.mean, shown)
    seen = only(student, "student"), only(teacher, "teacher")
    tiles = (crop, join(tinted.astype(np.uint8)), *seen, wanted, join(guessed))
    return dict(zip(COLUMNS, tiles, strict=True)), float(explained)


def _plain(target: np.ndarray, bands: int) -> np.ndarray:
    """The mean of each band over all patches, as one patch: [p p C]."""
    colour = target.reshape(-1, bands).mean(axis=0)
    return np.tile(colour, target.shape[-1] // bands)


def grid(columns: dict[str, np.ndarray]) -> Grid:
    rows = tuple(tuple(Tile(image) for image in images) for images in zip(*columns.values(), strict=True))
    return Grid(tuple(columns), rows, _SIDE, tuple(TINTS.items()))
