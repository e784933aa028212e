"""What the dense tasks share: patch tokens of whole scenes, and the protocol of choosing, refitting and testing.

For each fold and each seed the settings are chosen on a part of the training scenes that is held out (scenes where
there are several, else tiles of them), the head is fitted again to all training scenes, and the test scenes are
predicted once. The pixels of all folds are pooled.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pera_jax.errors import UserError
from pera_jax.probes import overlap, pixel_head
from pera_jax.probes.overlap import IGNORE
from pera_jax.probes.scenes import Dense, Scene

WINDOWS = 16  # that a network gets at once

# ---------------------------------------------------------------- tokens of a whole scene


def encode(
    maps: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    patch: int,
    window: int,
    stride: int,
    windows: int = WINDOWS,
) -> np.ndarray:
    """The patch tokens of a scene, from overlapping windows; where these overlap, their mean.

    The scene is padded below and to the right by reflection, to whole patches and at least one window; the last window
    of a row or column ends with it.

    Args:
      maps: stored values [B, window, window, C] -> float32 [B, n, window / patch, window / patch, D].
      image: stored values [H, W, C].
      window, stride: px, multiples of `patch`.
      windows: the largest B; all batches of a scene are as large, the last one is filled up with zeros.

    Returns:
      float32 [n, ceil(H / patch), ceil(W / patch), D].

    Raises:
      UserError: window or stride that is no multiple of the patch; a stride that leaves gaps; tokens that are not finite.
    """
    for name, value in (("window", window), ("stride", stride)):
        if value < patch or value % patch:
            raise UserError(f"{name}={value} px is not a multiple of the patch of {patch} px")
    if stride > window:
        raise UserError(f"stride={stride} px is more than window={window} px, which leaves gaps; take at most the window")
    height, width = (max(-(-side // patch) * patch, window) for side in image.shape[:2])
    padding = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    padded = np.pad(image, padding, "symmetric")
    places = [(top, left) for top in _starts(height, window, stride) for left in _starts(width, window, stride)]
    windows = -(-len(places) // -(-len(places) // windows))  # no more than an even share
    side, total = window // patch, None
    counts = np.zeros((height // patch, width // patch, 1), np.float32)
    for first in range(0, len(places), windows):
        part = places[first : first + windows]
        batch = np.zeros((windows, window, window, image.shape[2]), image.dtype)
        for number, (top, left) in enumerate(part):
            batch[number] = padded[top : top + window, left : left + window]
        tokens = np.asarray(maps(batch))  # [B, n, side, side, D]
        if total is None:
            total = np.zeros((tokens.shape[1], *counts.shape[:2], tokens.shape[4]), np.float32)
        for found, (top, left) in zip(tokens, part, strict=False):  # in order: the sums do not depend on the batches
            rows, columns = slice(top // patch, top // patch + side), slice(left // patch, left // patch + side)
            total[:, rows, columns] += found
            counts[rows, columns] += 1.0
    total /= counts
    if not np.isfinite(total).all():
        raise UserError("the encoder gives tokens that are not finite; probe an earlier checkpoint")
    return total[:, : -(-image.shape[0] // patch), : -(-image.shape[1] // patch)]


def _starts(length: int, window: int, stride: int) -> list[int]:
    return sorted({*range(0, length - window + 1, stride), length - window})


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """An image [H, W, C] bilinearly enlarged to [scale H, scale W, C] of its dtype (half-pixel centres)."""
    if scale == 1:
        return image
    values = image.astype(np.float32)
    for axis in (0, 1):
        length = image.shape[axis]
        at = np.clip((np.arange(length * scale) + 0.5) / scale - 0.5, 0, length - 1)
        low = np.floor(at).astype(np.int64)
        share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, length - 1)
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values if image.dtype.kind == "f" else np.rint(values).astype(image.dtype)


# ---------------------------------------------------------------- choosing, refitting, testing


@dataclasses.dataclass(frozen=True)
class Tested:
    """What the folds gave together.

    Attributes:
      matrices: int64 [seeds, units, C, C], confusion matrices of the test units.
      seen: the same of only those pixels whose class the training scenes of the fold hold.
      pictures: the predicted classes uint8 [H, W] of each test scene by its key, of the first seed.
      chosen: for each seed and fold a dict of seed, fold, blocks, learning_rate, prior.
      held_out: the mean held-out score by number of blocks, learning rate and prior.
    """

    matrices: np.ndarray
    seen: np.ndarray
    pictures: dict[str, np.ndarray]
    chosen: list[dict[str, Any]]
    held_out: dict[str, dict[str, dict[str, float]]]


def tiles(shape: tuple[int, int], side: int) -> np.ndarray:
    """The number of the square tile of `side` px that each pixel [H, W] belongs to, in raster order; int64."""
    rows, columns = (np.arange(length) // side for length in shape)
    return rows[:, None] * (-(-shape[1] // side)) + columns


def hold_out(masks: list[np.ndarray], share: float, side: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Divides the labels of the training scenes: (masks to fit, masks held out), IGNORE in the other's place.

    Whole scenes are held out, `round(share n)` of n and at least one. No class is left without a label to fit; where
    that lets no scene go, as with a single one, tiles of `side` px take the place of scenes.

    Raises:
      UserError: nothing can be held out.
    """
    for places in ([np.zeros(mask.shape, np.int64) for mask in masks], [tiles(mask.shape, side) for mask in masks]):
        firsts = np.cumsum([0] + [int(place.max()) + 1 for place in places])
        units = [place + first for place, first in zip(places, firsts[:-1], strict=True)]
        pairs = np.concatenate([(unit * 256 + mask).ravel() for unit, mask in zip(units, masks, strict=True)])
        counts = np.bincount(pairs, minlength=firsts[-1] * 256).reshape(-1, 256)[:, :IGNORE]  # [units, classes]
        labelled = np.flatnonzero(counts.sum(axis=1))
        left, held = counts.sum(axis=0), []
        for unit in np.random.default_rng(seed).permutation(labelled):
            empties = np.any((left > 0) & (left == counts[unit]))
            if not empties and len(held) < max(round(share * len(labelled)), 1):
                left = left - counts[unit]
                held.append(unit)
        if held:
            out = [np.isin(unit, held) for unit in units]
            parts = list(zip(masks, out, strict=True))
            ignore = np.uint8(IGNORE)
            return [np.where(o, ignore, mask) for mask, o in parts], [np.where(o, mask, ignore) for mask, o in parts]
    raise UserError(
        f"no tile of {side} px of the training scenes can be held out without losing a class; label more of them"
    )


def probe(
    data: Dense,
    settings: dict[str, Any],
    tokens_of: Callable[[Scene], np.ndarray],
    units_of: Callable[[Scene], np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray],
) -> Tested:
    """Trains, chooses and tests on all folds, with all seeds.

    Args:
      settings: scale, blocks, learning_rates, priors, steps, batch, held_out, tile, seeds; see the tasks.
      tokens_of: the tokens float32 [n, h, w, D] of a scene, h = ceil(H scale / patch).
      units_of: the unit of the interval, from 0, that each pixel [H, W] of a scene belongs to.
      statistic: of confusion matrices [..., C, C]; the largest on the held-out part is chosen.

    Raises:
      UserError: a scale that does not divide the patch; nothing can be held out; no labelled test pixel.
    """
    scenes, classes = data.scenes, len(data.class_names)
    if data.patch % settings["scale"]:
        raise UserError(f"scale={settings['scale']} does not divide the patch of {data.patch} px")
    if all(np.all(scenes[place].mask == IGNORE) for _, test in data.folds for place in test):
        raise UserError("the test scenes hold no labelled pixel; there is nothing to score")
    priors = settings["priors"]
    heads = Heads(scenes, tokens_of, classes, data.patch // settings["scale"], settings)

    matrices, seen, pictures, chosen, held_out = [], [], {}, [], []
    for seed in settings["seeds"]:
        of_seed, seen_of_seed = [], []
        for number, (train, test) in enumerate(data.folds):
            masks = [scenes[place].mask for place in train]
            fitted, held = hold_out(masks, settings["held_out"], settings["tile"], seed)
            models = heads.fit(train, fitted, range(len(heads.grid)), seed)
            held_out.append(statistic(heads.confusions(train, held, models, offsets(fitted, classes, priors))))  # [G, O]
            best, prior = np.unravel_index(np.argmax(held_out[-1]), held_out[-1].shape)  # of equal ones the first
            blocks, rate = heads.grid[best]
            chosen.append({"seed": seed, "fold": number, "blocks": blocks, "learning_rate": rate, "prior": priors[prior]})
            model = heads.fit(train, masks, [best], seed)
            offset = offsets(masks, classes, priors[prior : prior + 1])
            for place in test:
                scene, units = scenes[place], units_of(scenes[place])
                predicted = heads.predict(place, model, offset)
                pictures.setdefault(scene.key, predicted)
                lacking = np.flatnonzero(np.isinf(offset[0]))
                known = np.where(np.isin(scene.mask, lacking), np.uint8(IGNORE), scene.mask)
                for truth, results in ((scene.mask, of_seed), (known, seen_of_seed)):
                    results.append(overlap.confusions(predicted, truth, units, int(units.max()) + 1, classes))
        matrices.append(np.concatenate(of_seed))
        seen.append(np.concatenate(seen_of_seed))
    means, table = np.mean(held_out, axis=0), {}
    for (blocks, rate), values in zip(heads.grid, means.tolist(), strict=True):
        table.setdefault(str(blocks), {})[str(rate)] = dict(zip(map(str, priors), values, strict=True))
    return Tested(np.stack(matrices), np.stack(seen), pictures, chosen, table)


def offsets(masks: list[np.ndarray], classes: int, priors: Sequence[float]) -> np.ndarray:
    """What is added to the logits: minus `prior` times the logarithm of each class's share of the labels.

    Logit adjustment, Menon et al., arXiv:2007.07314: 0 favours classes as often as they occur, 1 all classes alike; of
    two classes it moves the threshold. A class that does not occur is never predicted.

    Returns:
      float32 [O, C].
    """
    counts = sum(np.bincount(mask.ravel(), minlength=IGNORE + 1)[:classes] for mask in masks)
    logs = np.log(np.maximum(counts, 1) / counts.sum())
    return np.where(counts > 0, -np.float64(priors)[:, None] * logs, -np.inf).astype(np.float32)


class Heads:
    """The tokens of all scenes in one array, and the heads that are fitted to parts of them."""

    def __init__(self, scenes, tokens_of, classes, px, settings):
        maps, used = [], max(settings["blocks"])
        for scene in scenes:
            tokens = tokens_of(scene)[-used:]  # [n, h, w, D]
            maps.append(np.moveaxis(tokens, 0, 2).reshape(*tokens.shape[1:3], -1))  # [h, w, n D]
        self._sizes = [found.shape[:2] for found in maps]
        firsts = np.cumsum([0] + [height * width for height, width in self._sizes], dtype=np.int32)
        self._corners = [pixel_head.corners(*size) + first for size, first in zip(self._sizes, firsts, strict=False)]
        self._tokens = jnp.concatenate([found.reshape(-1, found.shape[2]) for found in maps])  # [T, n D]
        self._scenes, self._classes, self._px, self._settings = scenes, classes, px, settings
        last, width = len(tokens), tokens.shape[3]
        blocks = sorted({min(number, last) for number in settings["blocks"]})
        self.grid = [(number, rate) for number in blocks for rate in settings["learning_rates"]]
        from_end = last - np.arange(last * width) // width  # [F]; the last block is 1
        self._kept = np.stack([from_end <= number for number, _ in self.grid], axis=1)  # [F, G]

    def _cells(self, places, masks):
        """Corners and labels of the cells of the scenes at `places` that hold a label."""
        corners, labels = [], []
        for place, mask in zip(places, masks, strict=True):
            cut = pixel_head.cells(mask, *self._sizes[place], self._px)
            labelled = np.any(cut != IGNORE, axis=1)
            corners.append(self._corners[place][labelled])
            labels.append(cut[labelled])
        return np.concatenate(corners), np.concatenate(labels)

    def fit(self, places, masks, heads, seed):
        """Fits those of the grid to the masks of the scenes at `places`: weights [F, G, C], bias [G, C]."""
        heads = list(heads)
        rates = np.array([self.grid[head][1] for head in heads])
        return pixel_head.fit(
            self._tokens, *self._cells(places, masks), self._classes, rates, self._kept[:, heads],
            self._settings["steps"], self._settings["batch"], seed,
        )  # fmt: skip

    def confusions(self, places, masks, models, offsets):
        """Confusion matrices int64 [G, O, C, C] over the masks of the scenes at `places`."""
        corners, labels = self._cells(places, masks)
        found = pixel_head.predict(self._tokens, corners, *models, offsets, self._px)  # [K, P, G, O]
        return np.array(
            [[overlap.confusion(found[:, :, g, o], labels, self._classes) for o in range(found.shape[3])]
             for g in range(found.shape[2])]
        )  # fmt: skip

    def predict(self, place, model, offset):
        """The classes uint8 [H, W] of the scene at `place`."""
        found = pixel_head.predict(self._tokens, self._corners[place], *model, offset, self._px)[:, :, 0, 0]
        return pixel_head.picture(found, self._scenes[place].mask.shape, self._sizes[place][1], self._px)


def details(tested: Tested, class_names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What a task tells beside its scores: per_class, confusion, chosen, held_out, pictures."""
    pooled = tested.matrices.sum(axis=1)  # [seeds, C, C]
    by_class = overlap.mean(overlap.iou(pooled).T)  # over seeds; NaN where no seed has the class
    yield "per_class", {
        name: None if np.isnan(value) else float(value) for name, value in zip(class_names, by_class, strict=True)
    }
    yield "confusion", pooled[0].tolist()
    yield "chosen", tested.chosen
    yield "held_out", tested.held_out
    for key, picture in tested.pictures.items():
        yield f"prediction/{key}", picture
