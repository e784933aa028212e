"""The classes of the demo scenes: each function draws one kind of layout.

    layout(rng, at, tones) -> float32 [S, S, 3]

`at` is the coordinate frame (position, direction and scale are already drawn), `tones` the colors of the scene. What
tells the classes apart is the arrangement; the colors come from one distribution for all of them.
"""

from collections.abc import Callable

import numpy as np

from data_prep.demo.raster import Frame, Lottery, box, cells, cover, crowns, disc, noise, paint, shade, stripes
from data_prep.demo.scene_parts import Tones, copse, ground, road, trees


def crop_rows(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """Parcels of parallel crop rows, each parcel along one of two directions, with tracks between them."""
    picture = ground(rng, at, tones)
    at = at.turn(rng.uniform(0, np.pi))
    pitch_u, pitch_v = rng.uniform(60, 130), rng.uniform(60, 130)
    inside, column, row = cells(at.move(*rng.uniform(-60, 60, 2)), pitch_u, pitch_v)
    dryness, spacing, way, ripeness = Lottery(rng, 4).all(column, row)
    period = 7.0 + np.floor(4 * spacing) * 1.3
    across = np.where(way < 0.5, at.u, at.v)
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * across / period)
    growth = np.clip(0.75 + 0.2 * noise(rng, len(at.u), 30, 2), 0, 1)
    field = tones.draw("ground") * (0.8 + 0.4 * dryness)[..., None]
    paint(field, np.clip(1.6 * wave - 0.3, 0, 1) * growth, tones.draw("plant") * (0.75 + 0.5 * ripeness)[..., None])
    paint(picture, cover(box(inside, pitch_u / 2 - 2, pitch_v / 2 - 2)), field)
    return picture


def pivot_circles(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """Circular fields of center-pivot irrigation on a square grid, with spokes, rings and sectors."""
    picture = ground(rng, at, tones)
    at = at.turn(rng.uniform(0, np.pi))
    pitch = rng.uniform(44, 74)
    inside, column, row = cells(at.move(*rng.uniform(-40, 40, 2)), pitch, pitch)
    first, share, light, present = Lottery(rng, 4).all(column, row)
    radius = pitch * (0.5 - 0.03)
    crop, other = tones.draw("plant"), tones.draw("ground")
    angle = np.arctan2(inside.v, inside.u) / (2 * np.pi) + first
    sector = (angle % 1.0 < 0.25 + 0.5 * share).astype(np.float32)[..., None]
    tone = (0.7 + 0.6 * light)[..., None]
    field = (crop * sector + (0.5 * crop + 0.5 * other) * (1 - sector)) * tone
    rings = 1 + 0.08 * np.cos(2 * np.pi * np.hypot(inside.u, inside.v) / 5)
    there = present < 0.9
    paint(picture, cover(disc(inside, radius)) * there, field * rings[..., None])
    spoke = inside.turn(rng.uniform(0, np.pi))
    line = np.maximum(np.maximum(np.abs(spoke.v) - 0.7, -spoke.u), disc(inside, radius))
    paint(picture, cover(line) * there * 0.8, tones.draw("built"))
    return picture


def dense_roofs(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """A town: streets at right angles, blocks filled with gabled roofs, shadows on one side."""
    picture = ground(rng, at, tones, "built")
    angle = rng.uniform(0, np.pi)
    block_u, block_v = rng.uniform(46, 70), rng.uniform(30, 40)
    lots = int(rng.integers(3, 6))
    offset = rng.uniform(-40, 40, 2)
    lot_u, lot_v = (block_u - 8) / lots, (block_v - 8) / 2
    in_block, column, row = cells(at.turn(angle).move(*offset), block_u, block_v)
    in_lot, i, j = cells(in_block.move(-(block_u - 8) / 2, -lot_v), lot_u, lot_v)
    valid = (i >= 0) & (i < lots) & (j >= 0) & (j < 2)
    wide, deep, tone, kind = Lottery(rng, 4).all(column * 7 + i, row * 3 + j)
    distance = np.where(valid, box(in_lot, lot_u * (0.36 + 0.1 * wide), lot_v * (0.34 + 0.1 * deep)), 1e3)
    paint(picture, cover(box(in_block, block_u / 2 - 4, block_v / 2 - 4)), tones.draw("ground"))
    shade(picture, 1 - 0.55 * cover(tones.cast(distance, 2.6)))
    light = np.where(in_lot.v > 0, 1.12, 0.84) * (0.7 + 0.6 * tone)
    colors = np.stack([tones.draw("built") for _ in range(4)])
    roof = colors[(4 * kind).astype(int)] * light[..., None]
    paint(picture, cover(distance), roof)
    return picture


def scattered_houses(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """A few single houses with yards among trees, on a winding lane."""
    picture = ground(rng, at, tones)
    size = len(at.u)
    turned = at.turn(rng.uniform(0, np.pi))
    bend = 9 * np.sin(turned.u / rng.uniform(22, 34) + rng.uniform(0, 6))
    across = turned.v - bend
    pitch = rng.uniform(36, 48)
    yards, _ = crowns(at, rng, 30, (6, 10), 0.4, 0.25)
    inside, i, j = cells(at, pitch, pitch)
    shift_u, shift_v, way, present, tone = Lottery(rng, 5).all(i, j)
    inside = inside.move((shift_u - 0.5) * pitch * 0.5, (shift_v - 0.5) * pitch * 0.5)
    inside = inside.turn(rng.uniform(0, np.pi) + np.pi / 2 * np.round(2 * way))
    distance = np.where(present < 0.75, box(inside, 6.5, 4.2), 1e3)
    clear = np.maximum(cover(distance - 5, 4), np.maximum(cover(yards, 3), cover(np.abs(across) - 5)))
    paint(picture, cover(np.abs(across) - 2.2), tones.draw("built"))
    trees(rng, at, tones, picture, copse(rng, size, 0.7) * (1 - clear))
    shade(picture, 1 - 0.5 * cover(tones.cast(distance, 3.0)))
    roof = tones.draw("built") * (np.where(inside.v > 0, 1.15, 0.85) * (0.75 + 0.5 * tone))[..., None]
    paint(picture, cover(distance), roof)
    return picture


def forest(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """Closed woodland: irregular crowns everywhere, now and then a clearing."""
    picture = ground(rng, at, tones, "plant") * 0.7
    where = 1 - copse(rng, len(at.u), rng.uniform(0.0, 0.12))
    trees(rng, at, tones, picture, where, rng.uniform(7, 11))
    shade(picture, 1 + 0.1 * noise(rng, len(at.u), 36, 2))
    return picture


def orchard(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """Trees of one size on a regular grid over bare ground, each with its shadow."""
    picture = ground(rng, at, tones)
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-30, 30, 2)
    pitch = rng.uniform(10, 15)
    rows = at.turn(angle).move(*offset)
    distance, tone = crowns(rows, rng, pitch, (0.27 * pitch, 0.36 * pitch), 0.04, 0.97)
    paint(picture, cover(stripes(rows.v, pitch, 0.35 * pitch), 3) * 0.35, tones.draw("ground"))
    shade(picture, 1 - 0.5 * cover(tones.cast(distance, 0.24 * pitch), 1.5))
    color = tones.draw("plant")
    light = (0.8 + 0.35 * tone) * (1 + 0.12 * np.clip(-distance / 3, 0, 1))
    paint(picture, cover(distance, 1.5), color * light[..., None])
    return picture


def parking(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """A car park: double rows of bays, lanes between them, cars of many tones."""
    picture = ground(rng, at, tones, "built")
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-30, 30, 2)
    bay, depth = rng.uniform(6.5, 8.5), rng.uniform(12, 14)
    lane = rng.uniform(9, 13)
    turned = at.turn(angle).move(*offset)
    in_row, _, band = cells(turned, 1e6, 2 * depth + lane)
    in_bay, column, side = cells(Frame(turned.u, in_row.v), bay, depth)
    shift, present, tone, tint = Lottery(rng, 4).all(column, 2 * band + side)
    car = in_bay.move(0, (shift - 0.5) * 1.6)
    there = (side >= -1) & (side <= 0) & (present < rng.uniform(0.65, 0.95))
    distance = np.where(there, box(car, bay * 0.33, depth * 0.4), 1e3)
    marks = np.maximum(stripes(turned.u, bay, 0.9), np.abs(in_row.v) - depth)
    paint(picture, cover(marks) * 0.6, np.full(3, 0.82, np.float32))
    shade(picture, 1 - 0.45 * cover(tones.cast(distance, 1.6)))
    body = np.where(tone < 0.4, 0.82, np.where(tone < 0.75, 0.22, 0.5))[..., None] + 0.16 * (
        tones.draw("built") - 0.5
    ) * (tint[..., None] - 0.2)
    paint(picture, cover(distance), body.astype(np.float32))
    paint(picture, cover(box(car, bay * 0.24, depth * 0.16)) * (distance < 0) * 0.5, np.full(3, 0.15, np.float32))
    return picture


def solar_farm(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """Long rows of panels in blocks, dark with a bright edge, the ground showing between the rows."""
    picture = ground(rng, at, tones)
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-40, 40, 2)
    turned = at.turn(angle).move(*offset)
    length, rows = rng.uniform(36, 60), rng.integers(4, 7)
    pitch = rng.uniform(9, 12)
    block_v = rows * pitch + 7
    inside, column, row = cells(turned, length + 6, block_v)
    present, tone = Lottery(rng, 2).all(column, row)
    in_row, _, number = cells(inside.move(0, -rows * pitch / 2), 1e6, pitch)
    valid = (number >= 0) & (number < rows) & (present < 0.92)
    panel = np.where(valid, np.maximum(np.abs(inside.u) - length / 2, np.abs(in_row.v) - 0.31 * pitch), 1e3)
    shade(picture, 1 - 0.4 * cover(np.where(valid, panel - 1.5, 1e3), 2))
    color = tones.draw("water")
    seams = stripes(inside.u, 6.0, 0.8)
    light = 1 + 0.25 * noise(rng, len(at.u), 60) + 0.25 * tone
    paint(picture, cover(panel), color * np.clip(light, 0.5, 1.7)[..., None])
    paint(picture, cover(np.maximum(seams, panel)) * 0.5, tones.draw("built"))
    return picture


def river(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """A meandering river of even width with banks, woods in places along it."""
    picture = ground(rng, at, tones)
    size = len(at.u)
    turned = at.turn(rng.uniform(0, np.pi))
    wave, phase = rng.uniform(13, 19), rng.uniform(0, 2 * np.pi, 2)
    bend = rng.uniform(10, 20) * np.sin(turned.u / wave + phase[0]) + 7 * np.sin(turned.u / (2.7 * wave) + phase[1])
    slope = np.gradient(bend, axis=1) ** 2 + np.gradient(bend, axis=0) ** 2  # the distance to a steep curve is shorter
    across = np.abs(turned.v - bend) / np.sqrt(1 + slope) + 1.2 * noise(rng, size, 12, 2)
    half = rng.uniform(5.5, 10)
    trees(rng, at, tones, picture, copse(rng, size, rng.uniform(0.15, 0.45)) * (1 - cover(across - half - 3)))
    paint(picture, cover(across - half - 3, 4), tones.draw("ground"))
    water = tones.draw("water") * (1 + 0.05 * noise(rng, size, 14, 2))[..., None]
    paint(picture, cover(across - half, 1.5), water)
    return picture


def coast(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """Open water on one side, a ragged shore with a beach and surf, land on the other."""
    picture = ground(rng, at, tones)
    size = len(at.u)
    turned = at.turn(rng.uniform(0, 2 * np.pi))
    shore = turned.v + rng.uniform(-18, 18) + 11 * noise(rng, size, 46, 4)
    trees(rng, at, tones, picture, copse(rng, size, rng.uniform(0.1, 0.5)) * (1 - cover(shore - 8, 3)))
    paint(picture, cover(shore - rng.uniform(4, 9), 4), tones.draw("ground") * 1.2)
    deep = tones.draw("water")
    depth = np.clip(-shore / 40, 0, 1)[..., None]
    swell = 1 + 0.05 * np.cos(shore / 2.2) * np.exp(shore / 22)
    paint(picture, cover(shore, 1.5), (deep * 1.3 + depth * (deep * 0.8 - deep * 1.3)) * swell[..., None])
    for line in (0.0, rng.uniform(5, 8)):
        surf = np.abs(shore + line) - 1.1 - 0.6 * noise(rng, size, 9)
        paint(picture, cover(surf, 1.5) * 0.55, np.full(3, 0.85, np.float32))
    return picture


def crossroads(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """Two wide roads that cross near the middle, with lane marks; fields, trees and some houses around."""
    picture = ground(rng, at, tones)
    size = len(at.u)
    at = at.move(*rng.uniform(-14, 14, 2))
    turned = at.turn(rng.uniform(0, np.pi))
    other = turned.turn(rng.uniform(0.35, 0.65) * np.pi)
    first, second = rng.uniform(13, 20), rng.uniform(11, 16)
    free = np.minimum(np.abs(turned.v) - first / 2, np.abs(other.v) - second / 2)
    trees(rng, at, tones, picture, copse(rng, size, rng.uniform(0.2, 0.5)) * (1 - cover(free - 4)))
    road(rng, tones, picture, other.v, other.u, second)
    road(rng, tones, picture, turned.v, turned.u, first)
    return picture


def runway(rng: np.random.Generator, at: Frame, tones: Tones) -> np.ndarray:
    """One broad straight runway with edge lines and threshold bars, a taxiway beside it, mown land around."""
    picture = ground(rng, at, tones)
    turned = at.turn(rng.uniform(0, 2 * np.pi)).move(0, rng.uniform(-14, 14))
    half = rng.uniform(9, 13)
    white = np.full(3, 0.85, np.float32)
    paved = tones.draw("built")
    shade(picture, 1 + 0.06 * np.sign(np.sin(turned.v / 5)))  # mown strips
    gap = half + rng.uniform(14, 20)
    paint(picture, cover(np.abs(turned.v - gap) - 3.5), paved * 0.95)
    links = stripes(turned.move(rng.uniform(-30, 30), 0).u, rng.uniform(60, 90), 6)
    paint(picture, cover(np.maximum(links, np.abs(turned.v - gap / 2) - gap / 2)), paved * 0.95)
    end = rng.uniform(18, 40)
    strip = np.maximum(np.abs(turned.v) - half, turned.u - end)
    paint(picture, cover(strip), paved * (1 + 0.05 * noise(rng, len(at.u), 20, 2))[..., None])
    shade(picture, 1 - 0.12 * cover(np.maximum(np.abs(turned.v) - half * 0.5, strip), 6))
    bars = np.maximum(stripes(turned.v, 3.6, 1.8), np.abs(turned.v) - half + 1.5)
    bars = np.maximum(bars, np.abs(turned.u - end + 8) - 5)
    center = np.maximum(np.maximum(np.abs(turned.v) - 0.8, stripes(turned.u, 14, 8)), turned.u - end + 18)
    edge = np.maximum(np.abs(np.abs(turned.v) - half + 1) - 0.45, strip)
    for line in (bars, center, edge):
        paint(picture, cover(line) * 0.85, white)
    return picture


LAYOUTS: dict[str, Callable[[np.random.Generator, Frame, Tones], np.ndarray]] = {
    layout.__name__: layout
    for layout in (
        coast, crop_rows, crossroads, dense_roofs, forest, orchard, parking, pivot_circles, river, runway,
        scattered_houses, solar_farm,
    )  # fmt: skip
}
