"""Image files other than TIFF, by Pillow: upright, with what Pillow leaves out of PNG's depths and transparent values."""

import io
import warnings

import numpy as np
from PIL import Image

from pera_jax.data.images.image_errors import ImageDecodeError, check_size

# Pillow remarks on odd metadata, thousands of times in a large folder. No `catch_warnings`: threads read images.
warnings.filterwarnings("ignore", module=r"PIL\.")
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
_PNG, _PNG_BIT_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # signature; position of the byte: signature 8, chunk head 8, sides 8


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, ...] as EXIF's orientation, 1 to 8, means them to be seen; a view."""
    return _TURNS.get(orientation, lambda a: a)(pixels)


def opened(encoded: bytes) -> Image.Image:
    """A file that is no TIFF, opened by Pillow's reader of its format; its pixels are not decoded yet.

    The size is checked by the memory that it takes: the limit of `Image.open` is one of pixels, and sound masks have more.
    Raises ImageDecodeError, or one of `DECODE_ERRORS`.
    """
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    file = io.BytesIO(encoded)
    if encoded.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.jpeg_factory(file, "")
    elif encoded.startswith(_PNG):
        image = PngImagePlugin.PngImageFile(file, "")
    elif encoded.startswith(b"GIF8"):
        image = GifImagePlugin.GifImageFile(file, "")
    elif encoded.startswith(b"BM"):
        image = BmpImagePlugin.BmpImageFile(file, "")
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        image = WebPImagePlugin.WebPImageFile(file, "")
    else:
        raise ImageDecodeError("no image of a known format, or cut off in its header")
    check_size(image.height, image.width, len(image.getbands()))
    return image


def read(encoded: bytes) -> tuple[np.ndarray, int, list[str]]:
    """Reads a file: (upright values [H, W, C], bits of a value, what became other than in the file).

    The values are uint8, or uint16 of 16 bits: grey or red, green, blue, then the opacity where there is one. Raises
    ImageDecodeError where there is no rule, and on damaged bytes nearly anything.
    """
    if encoded.startswith(_PNG) and encoded[_PNG_BIT_DEPTH : _PNG_BIT_DEPTH + 1] == b"\x10":
        return _deep_png(encoded)
    with opened(encoded) as image:
        image.load()
        changes, orientation = _changes(image), _orientation(image)
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
            raise ImageDecodeError(f"no rule turns mode {image.mode} into 8-bit RGB")
        if image.mode != "RGB":
            changes.append("mode " + image.mode)
        elif image.has_transparency_data:
            changes.append("transparent colour")
        clear = image.info.get("transparency")
        if image.mode in ("1", "L"):
            values = np.asarray(image.convert("L"))[:, :, None]
            if isinstance(clear, int):
                if image.format == "PNG" and image.mode == "L":
                    clear *= _stretch(encoded)  # Pillow stretches grey of 2 and 4 bits, but not the transparent value
                values = np.concatenate([values, np.where(values == clear, 0, 255).astype(np.uint8)], axis=2)
        else:
            values = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return upright(values, orientation), 8, changes


def read_indices(encoded: bytes) -> np.ndarray:
    """Reads a file of class indices: upright, [H, W, C] of the very values, of a palette the numbers. Errors as of `read`."""
    if not encoded.startswith((_PNG, b"GIF8", b"BM")):
        raise ImageDecodeError("no PNG, TIFF, GIF or BMP; other formats do not keep class indices")
    with opened(encoded) as image:
        values = np.asarray(image)
        if image.format == "PNG" and image.mode == "L" and encoded[_PNG_BIT_DEPTH] < 8:
            values = values // _stretch(encoded)
        values = upright(values, _orientation(image))
    values = values.astype(np.uint8) if values.dtype == bool else values
    return values if values.ndim == 3 else values[:, :, None]


def _deep_png(encoded: bytes) -> tuple[np.ndarray, int, list[str]]:
    """A PNG of 16 bits, of which Pillow keeps the upper 8 of colours and all of grey."""
    import imagecodecs  # here: data sets of 8 bits do without it

    with opened(encoded) as image:
        changes, orientation = _changes(image), _orientation(image)
        check_size(image.height, image.width, 8)
    values = imagecodecs.png_decode(encoded)  # a transparent colour becomes a band of opacity
    values = values if values.ndim == 3 else values[:, :, None]
    if values.dtype != np.uint16:
        raise ImageDecodeError(f"a PNG of 16 bits that is decoded as {values.dtype}")
    return upright(values, orientation), 16, changes


def _stretch(encoded: bytes) -> int:
    """By what Pillow multiplies the grey values of a PNG."""
    return 255 // ((1 << encoded[_PNG_BIT_DEPTH]) - 1)


def _changes(image: Image.Image) -> list[str]:
    changes = []
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        changes.append("several frames")  # the further pictures of a camera's MPO file are no reason to recode a JPEG
    if image.format not in ("JPEG", "MPO", "PNG"):
        changes.append("format " + image.format)
    if _orientation(image) != 1:
        changes.append("orientation")
    return changes


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(_EXIF_ORIENTATION, 1)
    return found if found in _TURNS else 1
