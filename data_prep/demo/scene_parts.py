"""Common elements of demo scenes: colors, open land, woods, roads."""

import dataclasses

import numpy as np

from data_prep.demo.raster import Frame, cover, crowns, displace, noise, paint, shade, stripes

_ANCHORS = {
    "plant": [(48, 62, 42), (74, 92, 56), (104, 112, 70), (126, 120, 80), (112, 92, 62)],
    "ground": [(134, 112, 86), (160, 146, 110), (108, 118, 74), (146, 136, 122), (122, 96, 74), (92, 106, 66)],
    "built": [(146, 142, 138), (112, 110, 112), (178, 172, 164), (150, 112, 94), (96, 92, 90)],
    "water": [(58, 76, 84), (66, 84, 72), (96, 98, 78), (44, 54, 60), (104, 118, 116)],
}


@dataclasses.dataclass
class Tones:
    """Random colors of one scene, and the direction of its shadows."""

    rng: np.random.Generator
    sun: float

    def draw(self, kind: str) -> np.ndarray:
        """A color of a kind of surface: between two of its examples, a little lighter or darker. float32 [3]."""
        first, second = self.rng.choice(len(_ANCHORS[kind]), 2, replace=False)
        mixed = np.array(_ANCHORS[kind], np.float32)
        mixed = mixed[first] + self.rng.uniform(0, 0.6) * (mixed[second] - mixed[first])
        return (mixed / 255 * self.rng.uniform(0.85, 1.15)).astype(np.float32)

    def cast(self, shape: np.ndarray, length: float) -> np.ndarray:
        """The shadow of a shape (given by distances), `length` pixels long; a negative length points to the sun."""
        return displace(shape, length * np.cos(self.sun), length * np.sin(self.sun))


def ground(rng: np.random.Generator, at: Frame, tones: Tones, kind: str = "ground") -> np.ndarray:
    """Open land of two mixing colors."""
    size = len(at.u)
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = tones.draw(kind)
    paint(picture, np.clip(0.5 + 0.5 * noise(rng, size, 40, 4), 0, 1) * 0.6, tones.draw(kind))
    shade(picture, 1 + 0.05 * noise(rng, size, 5, 2))
    return picture


def trees(
    rng: np.random.Generator, at: Frame, tones: Tones, picture: np.ndarray, where: np.ndarray, pitch: float = 8.0
) -> None:
    """Woodland with round crowns, lit from one side, in the area `where` [S, S] in [0, 1]."""
    size = len(at.u)
    color = tones.draw("plant")
    distance, tone = crowns(at, rng, pitch, (0.4 * pitch, 0.62 * pitch), 0.4)
    paint(picture, where * cover(tones.cast(distance, 0.3 * pitch), 2) * 0.65, color * 0.4)
    lit = np.clip(tones.cast(distance, -0.2 * pitch) / (-0.3 * pitch), -1, 1)
    light = (0.62 + 0.5 * tone) * (1 + 0.16 * lit)
    crown = color * (light * (1 + 0.08 * noise(rng, size, 3)))[..., None]
    paint(picture, where * cover(distance, 1.5), crown)


def copse(rng: np.random.Generator, size: int, amount: float) -> np.ndarray:
    """A mask of tree patches that cover about the fraction `amount` of the picture."""
    field = noise(rng, size, size / 3, 3)
    return cover((np.quantile(field, 1 - amount) - field) * 6, 1.5)


def road(
    rng: np.random.Generator, tones: Tones, picture: np.ndarray, across: np.ndarray, along: np.ndarray, width: float
) -> None:
    """A paved band around across = 0 with verges and a broken center line."""
    paint(picture, cover(np.abs(across) - width / 2 - 2.5, 2) * 0.5, tones.draw("ground"))
    paint(picture, cover(np.abs(across) - width / 2), tones.draw("built"))
    line = np.maximum(np.abs(across) - 0.6, stripes(along, 8, 4.5))
    paint(picture, cover(line) * 0.7, np.full(3, 0.85, np.float32))
