"""From the bytes of a stored image to its crops; a large JPEG is decoded at a fraction of its size where they allow it.

The size of an image is in the header of its file, so boxes are drawn first. A JPEG comes in blocks of 8 x 8 pixels that
can be decoded to means of 2 x 2, 4 x 4 or 8 x 8 of them, for less than the whole. The largest such reduction is taken
after which every box is still longer than its crop. Crops of aerial photographs then differ from those of the whole
image by 0.3 to 0.9 grey levels on average; textures as fine as pixels and of full contrast, by up to 3.
"""

from collections.abc import Sequence

import numpy as np

from pera_jax.data import codecs
from pera_jax.data import crops as geometry
from pera_jax.data.images import picture_files

_JPEG_MAGIC = b"\xff\xd8\xff"
_REDUCTIONS = (8, 4, 2)
_MARGIN = 1.25  # by which a reduced box is at least longer than its crop


def fill_crops(
    encoded: bytes, info, places: Sequence[int], rng: np.random.Generator, crops, out: dict[str, np.ndarray]
) -> None:
    """Decodes one stored image, draws the geometry of its crops and fills them.

    Args:
      encoded: the image, of a data set with the metadata `info`.
      places: of the C bands that are wanted, where they stand in it.
      rng: what the geometry is drawn from.
      crops: `pipeline.Crops`.
      out: by kind of crop, [number, size, size, C] of the stored dtype.

    Raises ImageDecodeError where the image is undecodable, or not what `info` says; `out` is then filled in part.
    """
    image, drawn = read_image(encoded, info, places, rng, crops)
    for name, each in drawn.items():
        for place, crop in zip(out[name], each, strict=True):
            geometry.crop_resize(image, *crop, place)


def read_image(
    encoded: bytes, info, places: Sequence[int], rng: np.random.Generator, crops
) -> tuple[geometry.Image, dict[str, list[tuple]]]:
    """Draws the geometry of an image's crops and decodes it as they need it; arguments and errors of `fill_crops`.

    Returns the image and what `draw_crops` does.
    """
    if encoded[:3] != _JPEG_MAGIC or len(info.bands) != 3 or info.dtype != "uint8":
        image = geometry.Image(codecs.decode_bands(encoded, info, places))
        return image, draw_crops(rng, image.height, image.width, crops)

    with codecs.decoding():
        file = picture_files.opened(encoded)
    with file:
        drawn = draw_crops(rng, file.height, file.width, crops)
        reduction = largest_reduction(drawn)
        with codecs.decoding():
            if reduction > 1:
                file.draft(None, (file.width // reduction, file.height // reduction))
            colours = file if file.mode == "RGB" else file.convert("RGB")
            # Pillow keeps four bytes per pixel, and so does the layout for cropping: faster than packing three.
            raw = colours.tobytes("raw", "RGBX")
    pixels = np.frombuffer(raw, np.uint8).reshape(colours.height, colours.width, 4)
    if list(places) == [0, 1, 2]:
        return geometry.Image(pixels, 3, reduction), drawn
    return geometry.Image(pixels[..., list(places)], reduction=reduction), drawn


def draw_crops(rng: np.random.Generator, height: int, width: int, crops) -> dict[str, list[tuple]]:
    """Draws the geometry of all crops of one image: by crop type, (box, size, flip horizontally, flip vertically)."""
    return {
        name: [
            (
                geometry.sample_box(rng, height, width, area, crops.aspect),
                size,
                rng.random() < crops.flip,
                rng.random() < crops.flip,
            )
            for _ in range(number)
        ]
        for name, (number, size, area) in crops.specs.items()
    }


def largest_reduction(drawn: dict[str, list[tuple]]) -> int:
    """1, 2, 4 or 8: the largest after which every box is longer than its crop, by the margin."""
    room = min(min(box.height, box.width) / size for each in drawn.values() for box, size, *_ in each)
    return next((reduction for reduction in _REDUCTIONS if room >= _MARGIN * reduction), 1)
