"""What the user of scenes should know of their values before they become tiles: scales, values that look like no data, and
alpha bands that look like bands."""

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

_LOOKED_AT, _SIDE = 24, 512  # tiles that are looked at beforehand, and px of each that are, at most
_USUAL = (0, 9999, 99999, 65535, 65534, -1, -99, -999, -9999, -99999, -32768, -32767, 1e20, -1e20, 1e30, -1e30)
_HUGE = 1e37  # what lies beyond is no data in all usual formats (the largest floats, NetCDF's 9.97e36)
_SHARE = {True: 1e-4, False: 1e-3}  # of the pixels, that a usual or another value must have
_PATCHES = 0.005, 0.9  # of the pixels that such a value fills in all bands, and of these, how many have one to their right
_FAR = {True: 0.5, False: 3.0}  # from the others, in the extent of 98 % of these


def scales(scenes: dict[str, Scene], choices: dict[str, Choice], wanted: str | None) -> str | None:
    """A sentence for the terminal on scale and offset of the files' bands; None where none has any.

    Args:
      wanted: --scale: "apply", "ignore" or None.

    Raises:
      UserError: they differ between the scenes, so that one number means several things, and nobody said what to do.
    """
    held = {name: tuple(scenes[name].scales[number] for number in choice.numbers) for name, choice in choices.items()}
    first, *others = dict.fromkeys(held.values())
    if not others and all(pair == (1, 0) for pair in first):
        return None
    if wanted == "apply":
        plain = sum(all(pair == (1, 0) for pair in pairs) for pairs in held.values())
        but = f", but {plain} of them have none and are stored as they are" if plain else ""
        return f"scale and offset of {len(held)} scenes are applied: the values are float32{but}"
    if others and wanted is None:
        one, other = (next(name for name, pairs in held.items() if pairs == which) for which in (first, others[0]))
        band = next(band for band, pairs in enumerate(zip(first, others[0], strict=True)) if pairs[0] != pairs[1])
        said = " and ".join(
            f"{printable(name)} scale {held[name][band][0]:g} and offset {held[name][band][1]:g}" for name in (one, other)
        )
        raise UserError(
            f"the same number means other things in band {choices[one].names[band]} of these scenes: {said}; give --scale "
            "apply, which stores value x scale + offset as float32, or --scale ignore, which stores the numbers as they are"
        )
    differ = "differ between the scenes and " if others else ""
    pairs = sorted(set(first))
    shown = ", ".join(f"{scale:g} and {offset:g}" for scale, offset in pairs[:3]) + (", ..." if len(pairs) > 3 else "")
    return f"scale and offset of the files ({shown}) {differ}are not applied: the numbers are stored as they are"


def fills(counts: statistics.Histogram, dtype: str, names: Sequence[str]) -> dict[float, str]:
    """Sentences on values that look like no data: the least or the greatest of a band, many of it, far from all others.

    Args:
      counts: a pixel or more in each band.

    Returns:
      By the value. Of uint8, none: its range does not depend on the values.
    """
    found = {}  # by value, (name of a band, its share, least and greatest of the others)
    for name, band in zip(names, statistics.of_dtype(counts, dtype) if dtype != "uint8" else (), strict=False):
        values, held = statistics.table(band)
        values, held = values[held > 0], held[held > 0]
        total, odd = held.sum(), []
        for _ in range(4):  # also two such values on one side
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
    stretches = " and stretches the range that maps to [0, 1]" if share >= 0.01 else ""
    return (
        f"{share:.2%} of the pixels of band {printable(name)}{others} hold {value:.9g}, far from all others ({least:.5g} to "
        f"{most:.5g}); if they have no data, give --nodata {value:.9g}: else this value counts as data{stretches}"
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
    """Counts what scenes are filled with where nothing was seen: 0, or the greatest whole number, in all bands at once and
    side by side. Such values need not lie far from others: 0 among reflectances, or among decibels, where it is bright."""

    def __init__(self):
        self._total, self._held = 0, {}  # by value, (pixels, those whose neighbour to the right holds it too)

    def add(self, pixels: np.ndarray, valid: np.ndarray) -> None:
        """Pixels [H, W, C] of the file's dtype, and where there is data."""
        self._total += pixels.shape[0] * pixels.shape[1]
        for value in (0, np.iinfo(pixels.dtype).max) if pixels.dtype.kind == "u" else (0,):
            same = (pixels == value) & valid
            here = (same | ~valid).all(axis=2) & same.any(axis=2)  # a band may declare it, and another one not
            inner = here[:, :-1]
            held = np.array([here.sum(), inner.sum(), (inner & here[:, 1:]).sum()])
            self._held[value] = self._held.get(value, 0) + held

    def sentences(self, names: Sequence[str]) -> dict[float, str]:
        """What to tell, by the value."""
        where = "all bands" if len(names) > 1 else f"band {printable(names[0])}"
        least, beside = _PATCHES
        return {
            float(value): f"{held / self._total:.2%} of the pixels that were looked at hold {value:g} in {where}, in patches; if "
            f"they have no data, give --nodata {value:g}: else this value counts as data"
            for value, (held, inner, pairs) in self._held.items()
            if least * self._total <= held < self._total and pairs >= beside * max(1, inner)
        }  # fmt: skip


def beforehand(
    items: Sequence[Item], dtype: str, names: Sequence[str], nodata: Sequence[float]
) -> tuple[dict[float, str], list[str]]:
    """Looks at some tiles, in pixels and values of the files: sentences on values that look like no data by the value, as
    of `fills` and `_Patches`, and sentences on alpha bands."""
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
            continue  # the conversion will name it
        patches.add(pixels, valid)
        if dtype == "float32":
            pixels = pixels.astype(np.float32)
        counts = counts + statistics.count(pixels, valid)
    known = not isinstance(counts, int) and all(held.any() for _, held in map(statistics.table, counts))
    between = 0.0 if isinstance(opacities, int) else opacities[1:-1].sum() / opacities.sum()
    odd = [f"{between:.0%} of the pixels that were looked at lie between nothing and all in the alpha band, so it may be a "
           "band like others"] if between > 0.1 else []  # fmt: skip
    return patches.sentences(names) | (fills(counts, dtype, names) if known else {}), odd
