"""The report job: a picture of pairs as the networks see them, and of the student's guess at its learnable patches.

    python -m pera_jax.report --run runs/aid --data shards/aid --output report

writes pairs.png: each row is one pair, in columns

    crop              the crop that both looks are made from
    masks             whose each patch is: student, learnable, teacher, in three tints
    student sees      the student's look at its patches
    teacher sees      the teacher's look at its patches
    to be guessed     the student's look at its own and at the learnable patches
    the guess         the same with the learnable patches as the pixel head gives them
"""

import argparse
import io
import pathlib

import jax
import numpy as np
from einops import rearrange
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from pera_jax import checkpoint, errors, files
from pera_jax.bands import Bands, rgb_places
from pera_jax.data import pipeline, records
from pera_jax.data.mixture import Mixture
from pera_jax.errors import UserError

COLUMNS = ("crop", "masks", "student sees", "teacher sees", "to be guessed", "the guess")
TINTS = {"student": (230, 120, 0), "learnable": (30, 180, 90), "teacher": (40, 110, 235)}
HIDDEN = (225, 225, 225)  # patches that a column does not show
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_TILE, _GAP, _HEAD = 176, 8, 30  # px: least side of a tile, space between tiles, height of the line of names


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
    stream = pipeline.make_pipeline(Mixture.of(source, bands), config.crops, batch_size=number, seed=seed)
    batch = next(stream)
    stream.close()

    def look_and_guess(params, batch):
        view = objective.make_views(objective.examples(jax.random.key(seed), batch))["global"]
        guess = objective.outputs(params, params, {"global": view}, None)[2]  # [N V, n_l, p p C]
        return view, guess, objective.pixel_targets(view)

    crops = {kind: batch[kind] for kind in ("global", "local") if kind in batch}
    view, guess, target = jax.device_get(jax.jit(look_and_guess)(weights.params, crops))
    explained = 1.0 - np.mean((guess - target) ** 2) / np.mean((target - _plain(target, objective.vit.bands)) ** 2)

    shown = _shown(bands, config.views.rgb)
    first = slice(None, None, objective.crops["global"][0])  # the first pair of each image; crops are batch-major
    student, teacher = (_bytes(look[first] * bands.std + bands.mean, shown) for look in (view.student, view.teacher))
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

    crop = _bytes(bands.mapped(batch["global"][:, 0]), shown)
    tinted = cut(crop).astype(np.float32)
    for kind, tint in TINTS.items():
        tinted[rows, masks[kind]] = 0.5 * tinted[rows, masks[kind]] + 0.5 * np.float32(tint)
    wanted = only(student, "student", "learnable")
    guessed = cut(wanted)
    pixels = rearrange(guess[first], "n l (p q c) -> n l p q c", p=patch, q=patch)
    guessed[rows, masks["learnable"]] = _bytes(pixels * bands.std + bands.mean, shown)
    seen = only(student, "student"), only(teacher, "teacher")
    tiles = (crop, join(tinted.astype(np.uint8)), *seen, wanted, join(guessed))
    return dict(zip(COLUMNS, tiles, strict=True)), float(explained)


def _plain(target: np.ndarray, bands: int) -> np.ndarray:
    """The mean of each band over all patches, as one patch: [p p C]."""
    colour = target.reshape(-1, bands).mean(axis=0)
    return np.tile(colour, target.shape[-1] // bands)


def _shown(bands: Bands, rgb: tuple[str, ...]) -> tuple[int, int, int]:
    """The channels that a picture shows as red, green and blue: these where they are known, else the first three, or one
    band as grey."""
    return rgb_places(rgb, bands.names) or ((0, 1, 2) if len(bands) > 2 else (0, 0, 0))


def _bytes(values: np.ndarray, shown: tuple[int, int, int]) -> np.ndarray:
    """Values in [0, 1], [..., C], as uint8 [..., 3] for a picture."""
    return np.round(255.0 * np.clip(values[..., shown], 0.0, 1.0)).astype(np.uint8)


def draw(columns: dict[str, np.ndarray], caption: str) -> Image.Image:
    """One image: names of the columns, a row of tiles per pair, a legend of the tints and a caption.

    Args:
      columns: by name uint8 [N, H, H, 3], all of one shape; small tiles are enlarged by whole factors.
    """
    number, side = next(iter(columns.values())).shape[:2]
    factor = -(-_TILE // side)
    tile = factor * side
    font = ImageFont.load_default(size=14)
    width = len(columns) * (tile + _GAP) + _GAP
    bottom = _HEAD + number * (tile + _GAP)
    picture = Image.new("RGB", (width, bottom + _HEAD), _PAPER)
    pen = ImageDraw.Draw(picture)
    for column, (name, images) in enumerate(columns.items()):
        left = _GAP + column * (tile + _GAP)
        pen.text((left, _HEAD // 2), name, _INK, font, anchor="lm")
        for row, image in enumerate(images):
            enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
            picture.paste(Image.fromarray(enlarged), (left, _HEAD + row * (tile + _GAP)))
    left, middle = _GAP, bottom + _HEAD // 2 - _GAP // 2
    for kind, tint in TINTS.items():
        pen.rectangle((left, middle - 6, left + 12, middle + 6), fill=tint)
        pen.text((left + 18, middle), kind, _INK, font, anchor="lm")
        left += 36 + int(pen.textlength(kind, font))
    pen.text((left, middle), caption, _INK, font, anchor="lm")
    return picture


def report(
    run: str,
    data: str,
    output: str,
    *,
    step: int | None = None,
    split: str | None = None,
    number: int = 6,
    seed: int = 0,
) -> tuple[pathlib.Path, float, int]:
    """Writes `output`/pairs.png; arguments as the command's options.

    Returns:
      (the file, the share of variance explained as in `pairs`, the checkpoint's step).

    Raises:
      UserError: no such run, step, data or split; data of other bands; an output that cannot be written.
    """
    if number < 1:
        raise UserError(f"--pairs is {number}; it must be at least 1")
    if not pathlib.Path(run).is_dir():
        raise UserError(f"the run's folder {run} does not exist; name the --workdir of a training")
    weights = checkpoint.load_weights(run, step, which="student")
    meta = weights.meta
    source = records.open_split(data, meta["config"]["data"]["split"] if split is None else split)
    Bands.of(meta).places(source.info, source.path)  # raises where a band is missing
    if number > len(source):
        raise UserError(f"--pairs is {number}, but the split of {data} holds {len(source)} images; ask for fewer")
    columns, explained = pairs(weights, source, number, seed)
    share = f"the guess explains {explained:.0%} of the pixels' variance"
    encoded = io.BytesIO()
    draw(columns, f"{meta['config']['name']}, step {weights.step:,}: {share}").save(encoded, "PNG")
    file = pathlib.Path(output) / "pairs.png"
    try:
        files.write(file, encoded.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; make room or choose another --output") from error
    return file, explained, weights.step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pera_jax.report", description="A picture of pairs and guesses.")
    parser.add_argument("--run", required=True, help="folder of the run (the --workdir of the training)")
    parser.add_argument("--data", required=True, help="data set folder")
    parser.add_argument("--output", required=True, help="folder for pairs.png")
    parser.add_argument("--step", type=int, help="the checkpoint (default: the latest)")
    parser.add_argument("--split", help="split of the data (default: the one that was trained on)")
    parser.add_argument("--pairs", type=int, default=6, dest="number", help="rows of the picture (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="of crops, looks and masks (default 0)")
    file, explained, step = report(**vars(parser.parse_args(argv)))
    print(f"step {step}: the guess explains {explained:.1%} of the variance of the learnable patches' pixels")
    print(f"written to {file}")


if __name__ == "__main__":
    errors.run(main)
