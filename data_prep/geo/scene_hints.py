"""Hints on the values of scenes: scales, values that look like nodata, and alpha bands that look like ordinary
bands."""

from collections.abc import Sequence

import numpy as np

from data_prep.convert.pixels import Rejected
from data_prep.convert.shards import Item
from data_prep.geo import scene_reader
from data_prep.geo.scene_plan import Choice
from data_prep.geo.scene_reader import Scene, Tile
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data import codecs, statistics

_LOOKED_AT, _SIDE = 24, 512  # number of tiles checked in advance, and maximum size in px
_USUAL = (0, 9999, 99999, 65535, 65534, -1, -99, -999, -9999, -99999, -32768, -32767, 1e20, -1e20, 1e30, -1e30)
_HUGE = 1e37  # larger values are nodata in common formats (the largest floats, NetCDF's 9.97e36)
_SHARE = {True: 1e-4, False: 1e-3}  # minimum fraction of pixels, for a common nodata value or another value
# minimum fraction of pixels with a fill value in all bands, and of these, with the same value to their right
_PATCHES = 0.005, 0.9
_FAR = {True: 0.5, False: 3.0}  # minimum distance from other values, relative to the range of 98 % of them


def scales(scenes: dict[str, Scene], choices: dict[str, Choice], wanted: str | None) -> str | None:
    """A message about scale and offset of the bands; None if there are none.

    Args:
      wanted: --scale: "apply", "ignore" or None.

    Raises:
      UserError: they differ between scenes, and --scale is not set.
    """
    held = {name: tuple(scenes[name].scales[number] for number in choice.numbers) for name, choice in choices.items()}
    first, *others = dict.fromkeys(held.values())
    if not others and all(pair == (1, 0) for pair in first):
        return None
    if wanted == "apply":
        plain = sum(all(pair == (1, 0) for pair in pairs) for pairs in held.values())
        but = f", but {plain} of them have none and are stored unchanged" if plain else ""
        return f"scale and offset of {len(held)} scenes are applied: the values are float32{but}"
    if others and wanted is None:
        one, other = (next(name for name, pairs in held.items() if pairs == which) for which in (first, others[0]))
        band = next(band for band, pairs in enumerate(zip(first, others[0], strict=True)) if pairs[0] != pairs[1])
        said = " and ".join(
            f"{printable(name)} scale {held[name][band][0]:g} and offset {held[name][band][1]:g}"
            for name in (one, other)
        )
        raise UserError(
            f"scale and offset of band {choices[one].names[band]} differ between scenes: {said}; use --scale "
            "apply to store value * scale + offset as float32, or --scale ignore to store the values unchanged"
        )
    differ = "differ between the scenes and " if others else ""
    pairs = sorted(set(first))
    shown = ", ".join(f"{scale:g} and {offset:g}" for scale, offset in pairs[:3]) + (", ..." if len(pairs) > 3 else "")
    return f"scale and offset of the files ({shown}) {differ}are not applied: values are stored unchanged"


def fills(counts: statistics.Histogram, dtype: str, names: Sequence[str]) -> dict[float, str]:
    """Hints on values that look like nodata: a frequent minimum or maximum of a band, far from all other values.

    Args:
      counts: with at least one pixel in each band.

    Returns:
      Messages by value; none for uint8, whose range does not depend on the values.
    """
    found = {}  # by value, (band name, fraction, minimum and maximum of other values)
    for name, band in zip(names, statistics.current(counts, dtype) if dtype != "uint8" else (), strict=False):
        values, held = statistics.table(band)
        values, held = values[held > 0], held[held > 0]
        total, odd = held.sum(), []
        for _ in range(4):  # up to two such values per side
            for end, rest in ((0, np.s_[1:]), (-1, np.s_[:-1])):
                if len(values) > 1 and _stands_alone(values, held, end, total):
                    odd.append((float(values[end]), held[end] / total))
                    values, held = values[rest], held[rest]
        for value, share in odd:
            found.setdefault(value, []).append((name, share, values[0], values[-1]))
    return {value: _sentence(value, bands) for value, bands in found.items()}


def _sentence(value: float, bands: list[tuple[str, float, float, float]]) -> str:
    name, share, least, most = max(bands, key=lambda band: band[1])
    others = f" (and of {len(bands) - 1} other bands)" if len(bands) > 1 else ""
    stretches = " and extends the range that maps to [0, 1]" if share >= 0.01 else ""
    return (
        f"{share:.2%} of the pixels of band {printable(name)}{others} are {value:.9g}, far from all other values "
        f"({least:.5g} to {most:.5g}); if they are nodata, pass --nodata {value:.9g}: otherwise this value counts as "
        f"data{stretches}"
    )


def _stands_alone(values: np.ndarray, held: np.ndarray, end: int, total: int) -> bool:
    value, rest = values[end], np.s_[1:] if end == 0 else np.s_[:-1]
    usual = abs(value) > _HUGE or bool(np.isclose(value, _USUAL, rtol=1e-6, atol=0).any())
    others = values[rest]
    running = np.cumsum(held[rest])
    low, high = others[np.searchsorted(running, [0.01 * running[-1], 0.99 * running[-1]]).clip(0, len(others) - 1)]
    apart = abs(value - others[end])
    return held[end] >= max(2, _SHARE[usual] * total) and apart > _FAR[usual] * (high - low) and apart > 0


class _Patches:
    """Detects fill values, 0 or the maximum of the dtype, that occur in all bands together and in patches.

    Such values may be close to valid ones: 0 in reflectances, or in decibels, where it is bright.
    """

    def __init__(self):
        # by value, (pixels, pixels with a right neighbor, pixels whose right neighbor has it too)
        self._total, self._held = 0, {}

    def add(self, pixels: np.ndarray, valid: np.ndarray) -> None:
        """Adds pixels [H, W, C] in the dtype of the file, and their data mask."""
        self._total += pixels.shape[0] * pixels.shape[1]
        for value in (0, np.iinfo(pixels.dtype).max) if pixels.dtype.kind == "u" else (0,):
            same = (pixels == value) & valid
            # the value may be declared as nodata in some bands only
            here = (same | ~valid).all(axis=2) & same.any(axis=2)
            inner = here[:, :-1]
            held = np.array([here.sum(), inner.sum(), (inner & here[:, 1:]).sum()])
            self._held[value] = self._held.get(value, 0) + held

    def sentences(self, names: Sequence[str]) -> dict[float, str]:
        """Messages by value."""
        where = "all bands" if len(names) > 1 else f"band {printable(names[0])}"
        least, beside = _PATCHES
        return {
            float(value): f"{held / self._total:.2%} of the pixels checked are {value:g} in {where}, in patches; if "
            f"they are nodata, pass --nodata {value:g}: otherwise this value counts as data"
            for value, (held, inner, pairs) in self._held.items()
            if least * self._total <= held < self._total and pairs >= beside * max(1, inner)
        }  # fmt: skip


def beforehand(
    items: Sequence[Item], dtype: str, names: Sequence[str], nodata: Sequence[float]
) -> tuple[dict[float, str], list[str]]:
    """Checks some tiles at the original pixels and values: (hints on nodata by value, hints on alpha bands)."""
    counts, opacities, patches = 0, 0, _Patches()
    for i in sorted({len(items) * k // _LOOKED_AT for k in range(_LOOKED_AT)}):
        part = items[i].part
        if not isinstance(part, Tile):
            continue
        width, height = (max(1, min(_SIDE, int(side))) for side in part.window[2:])
        part = part._replace(window=(*map(int, part.window[:2]), width, height), columns=width, rows=height)
        try:
            pixels, valid = scene_reader.read(items[i].path, part, nodata)
            if part.alpha is not None:
                opacities = opacities + scene_reader.opacities(items[i].path, part)
        except (codecs.ImageDecodeError, Rejected):
            continue  # reported by the conversion
        patches.add(pixels, valid)
        if dtype == "float32":
            pixels = pixels.astype(np.float32)
        counts = counts + statistics.count(pixels, valid)
    known = not isinstance(counts, int) and all(held.any() for _, held in map(statistics.table, counts))
    between = 0.0 if isinstance(opacities, int) else opacities[1:-1].sum() / opacities.sum()
    odd = [f"{between:.0%} of the pixels checked are partly transparent in the alpha band, so it may be an "
           "ordinary band"] if between > 0.1 else []  # fmt: skip
    return patches.sentences(names) | (fills(counts, dtype, names) if known else {}), odd
