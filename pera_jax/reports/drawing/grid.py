"""Grids of images: one description, drawn as a PNG and as HTML."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pera_jax.common import html

INK, PAPER = (40, 40, 40), (255, 255, 255)
_GAP, _HEAD, _LINE, _FRAME = 8, 30, 18, 4  # px: between tiles, the line of names, a line of text, a tile's frame

STYLE = """
.grid { display: grid; gap: 8px; justify-content: start; margin: 10px 0; }
.grid .name { font-size: 13px; font-weight: 600; color: #69727c; align-self: end; overflow-wrap: anywhere; }
.grid figure { margin: 0; break-inside: avoid; } .grid img { display: block; width: 100%; height: auto; }
.grid .enlarged { image-rendering: pixelated; }
.grid figcaption { font-size: 12px; line-height: 1.3; margin-top: 2px; overflow-wrap: anywhere; }
.legend { font-size: 13px; margin: 4px 0 10px; } .legend span { white-space: nowrap; margin-right: 16px; }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px; }
"""


@dataclasses.dataclass(frozen=True)
class Tile:
    """An image of a grid.

    Attributes:
      pixels: uint8 [H, W, 3].
      text: caption.
      frame: color of the frame, or None.
      exact: keep exact values, for maps and masks; otherwise the page stores a JPEG.
    """

    pixels: np.ndarray
    text: str = ""
    frame: tuple[int, int, int] | None = None
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows and columns of tiles.

    Attributes:
      names: names of the columns.
      rows: at most one tile per column each; None for an empty cell.
      side: width of a tile in px; the height keeps the aspect ratio.
      legend: names and colors.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[Tile | None, ...], ...]
    side: int
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()


def enlarged(tile: Tile, side: int) -> Image.Image:
    """The tile, resized to a width of `side` px or more: small ones by an integer factor, large ones downsampled."""
    height, width = tile.pixels.shape[:2]
    if width <= side:
        factor = -(-side // width)
        return Image.fromarray(tile.pixels.repeat(factor, axis=0).repeat(factor, axis=1))
    way = Image.Resampling.NEAREST if tile.exact else Image.Resampling.LANCZOS
    return Image.fromarray(tile.pixels).resize((side, max(round(height * side / width), 1)), way)


def picture(grid: Grid, caption: str = "") -> Image.Image:
    """Draws the grid as one image, with column names, captions, legend and a caption of the whole."""
    font = ImageFont.load_default(size=14)
    places = [[(column, tile) for column, tile in enumerate(row) if tile is not None] for row in grid.rows]
    drawn = [[enlarged(tile, grid.side) for _, tile in row] for row in places]
    tile_width = max((image.width for row in drawn for image in row), default=grid.side)
    heights = [
        max((image.height for image in images), default=0) + _LINE * any(tile.text for _, tile in row)
        for images, row in zip(drawn, places, strict=True)
    ]
    bottom = _HEAD + sum(height + _GAP for height in heights)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    footer = sum(36 + int(probe.textlength(name, font)) for name, _ in grid.legend)
    footer += int(probe.textlength(caption, font))
    width = max(len(grid.names) * (tile_width + _GAP) + _GAP, footer + 2 * _GAP)
    result = Image.new("RGB", (width, bottom + _HEAD), PAPER)
    pen = ImageDraw.Draw(result)
    lefts = [_GAP + column * (tile_width + _GAP) for column in range(len(grid.names))]
    for left, name in zip(lefts, grid.names, strict=True):
        pen.text((left, _HEAD // 2), _fitted(name, tile_width, font, pen), INK, font, anchor="lm")
    top = _HEAD
    for row, images, height in zip(places, drawn, heights, strict=True):
        for (column, tile), image in zip(row, images, strict=True):
            left = lefts[column]
            result.paste(image, (left, top))
            if tile.frame is not None:
                box = (left, top, left + image.width - 1, top + image.height - 1)
                pen.rectangle(box, outline=tile.frame, width=_FRAME)
            text = _fitted(tile.text, tile_width, font, pen)
            pen.text((left, top + image.height + _LINE // 2), text, INK, font, anchor="lm")
        top += height + _GAP
    left, middle = _GAP, bottom + _HEAD // 2 - _GAP // 2
    for name, color in grid.legend:
        pen.rectangle((left, middle - 6, left + 12, middle + 6), fill=color)
        pen.text((left + 18, middle), name, INK, font, anchor="lm")
        left += 36 + int(pen.textlength(name, font))
    pen.text((left, middle), caption, INK, font, anchor="lm")
    return result


def _fitted(text: str, width: int, font, pen: ImageDraw.ImageDraw) -> str:
    """`text`, truncated to a width of `width` px."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def figures(grid: Grid) -> str:
    """The grid as a part of the page; the page needs `STYLE`."""
    cells = [f'<div class="name">{html.escaped(name)}</div>' for name in grid.names]
    for row in grid.rows:
        cells += ["<div></div>" if tile is None else _figure(tile, grid.side) for tile in row]
        cells += ["<div></div>"] * (len(grid.names) - len(row))
    columns = f"grid-template-columns:repeat({len(grid.names)},minmax(0,{grid.side}px))"
    return f'<div class="grid" style="{columns}">{"".join(cells)}</div>{legend(grid.legend)}'


def legend(entries: Sequence[tuple[str, tuple[int, int, int]]]) -> str:
    """Names beside their colors."""
    if not entries:
        return ""
    spans = (f'<span><i style="background:rgb{color}"></i>{html.escaped(name)}</span> ' for name, color in entries)
    return f'<div class="legend">{"".join(spans)}</div>'


def _figure(tile: Tile, side: int) -> str:
    rule = f"outline:{_FRAME}px solid rgb{tile.frame};outline-offset:-{_FRAME}px"
    frame = "" if tile.frame is None else f' style="{rule}"'
    small = ' class="enlarged"' if tile.pixels.shape[1] < side else ""
    content, kind = _encoded(tile, side)
    caption = f"<figcaption>{html.escaped(tile.text)}</figcaption>" if tile.text else ""
    source = html.image(content, kind, tile.text or "a tile of the picture").removeprefix("<img")
    return f"<figure><img{small}{frame}{source}{caption}</figure>"


def _encoded(tile: Tile, side: int) -> tuple[bytes, str]:
    """At most twice as wide as it is shown, which print and fine screens use."""
    image = Image.fromarray(tile.pixels)
    if image.width > 2 * side:
        image = enlarged(tile, 2 * side)
    if tile.exact or image.width < side:
        return png(image), "png"
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90, subsampling=0)
    return content.getvalue(), "jpeg"
