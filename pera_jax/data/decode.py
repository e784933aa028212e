"""From stored images to crops; a large JPEG is decoded at reduced size if its crops allow it.

The image size is in the file header, so boxes are drawn before decoding. The 8 x 8 blocks of a JPEG can be decoded
directly at 1/2, 1/4 or 1/8 of the size, which is cheaper. The largest reduction is used for which every box is still
larger than its crop. Crops of aerial photographs then differ from those of the full image by 0.3 to 0.9 gray levels on
average; for full-contrast textures at pixel scale, by up to 3.
"""

from collections.abc import Sequence

import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.data import codecs, records
from pera_jax.data import crops as geometry
from pera_jax.data.images import picture_files

_JPEG_MAGIC = b"\xff\xd8\xff"
_REDUCTIONS = (8, 4, 2)
_MARGIN = 1.25  # minimum ratio of a reduced box and its crop


def fill_crops(
    encoded: bytes, info, places: Sequence[int], rng: np.random.Generator, crops, out: dict[str, np.ndarray]
) -> None:
    """Decodes one stored image, draws the geometry of its crops and fills them.

    Args:
      encoded: the image.
      info: `records.DatasetInfo` of its dataset.
      places: channel indices of the C bands to keep.
      rng: random generator for the geometry.
      crops: `pipeline.Crops`.
      out: by crop type, [number, size, size, C] in the stored dtype.

    Raises:
      ImageDecodeError: the image cannot be decoded or does not match `info`; `out` may be partly filled.
    """
    image, drawn = read_image(encoded, info, places, rng, crops)
    for name, each in drawn.items():
        for place, crop in zip(out[name], each, strict=True):
            geometry.crop_resize(image, *crop, place)


def read_image(
    encoded: bytes, info, places: Sequence[int], rng: np.random.Generator, crops
) -> tuple[geometry.Image, dict[str, list[tuple]]]:
    """Draws the crop geometry of an image and decodes it at the size that the crops need; see `fill_crops`.

    Returns the image and the result of `draw_crops`.
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
            colors = file if file.mode == "RGB" else file.convert("RGB")
            # four bytes per pixel, as in Pillow and in the crop layout: faster than packing three
            raw = colors.tobytes("raw", "RGBX")
    pixels = np.frombuffer(raw, np.uint8).reshape(colors.height, colors.width, 4)
    if list(places) == [0, 1, 2]:
        return geometry.Image(pixels, 3, reduction), drawn
    return geometry.Image(pixels[..., list(places)], reduction=reduction), drawn


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """A whole image [H, W, C] resized to [size, size, C], bilinear and antialiased like the crops in training."""
    image = geometry.Image(pixels)
    out = np.empty((size, size, pixels.shape[2]), pixels.dtype)
    geometry.crop_resize(image, geometry.Box(0, 0, image.height, image.width), size, False, False, out)
    return out


def resized_record(
    source: records.RecordSource, index: int, record: records.Record, places: Sequence[int], size: int
) -> np.ndarray:
    """The bands at `places` of the image in record `index` of a split, resized as a whole to [size, size, C].

    Raises:
      UserError: the image cannot be decoded.
    """
    try:
        pixels = codecs.decode_bands(record.image, source.info, places)
    except codecs.ImageDecodeError as error:
        raise UserError(f"record {index} of {source.path} is damaged; copy or convert the dataset again") from error
    return resized(pixels, size)


def draw_crops(rng: np.random.Generator, height: int, width: int, crops) -> dict[str, list[tuple]]:
    """Draws the geometry of all crops of one image: by crop type, a list of (box, size, horizontal flip, vertical
    flip)."""
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
    """1, 2, 4 or 8: the largest reduction for which every box is larger than its crop by the margin."""
    room = min(min(box.height, box.width) / size for each in drawn.values() for box, size, *_ in each)
    return next((reduction for reduction in _REDUCTIONS if room >= _MARGIN * reduction), 1)
