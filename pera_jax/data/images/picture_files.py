"""Image files other than TIFF, read by Pillow; also PNG bit depths and transparency that Pillow does not handle."""

import io
import warnings

import numpy as np
from PIL import Image

from pera_jax.data.images.image_errors import ImageDecodeError, check_size

# Pillow warns about unusual metadata. Not with `catch_warnings`, which is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
_PNG, _PNG_BIT_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # signature; position of the byte: signature 8, chunk head 8, sides 8


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates and flips pixels [H, W, ...] by the EXIF orientation, 1 to 8; returns a view."""
    return _TURNS.get(orientation, lambda a: a)(pixels)


def opened(encoded: bytes) -> Image.Image:
    """Opens a file other than TIFF with the Pillow reader of its format, without decoding the pixels.

    The size is limited by memory; the pixel limit of `Image.open` would reject valid masks. Raises ImageDecodeError or
    one of `DECODE_ERRORS`.
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
        raise ImageDecodeError("not an image of a known format, or truncated in its header")
    check_size(image.height, image.width, len(image.getbands()))
    return image


def read(encoded: bytes) -> tuple[np.ndarray, int, list[str]]:
    """Reads a file: (upright values [H, W, C], bits per value, changes).

    The values are uint8, or uint16 for 16 bits: gray or RGB, followed by opacity if there is any. Raises
    ImageDecodeError for unsupported modes, and almost any exception for damaged bytes.
    """
    if encoded.startswith(_PNG) and encoded[_PNG_BIT_DEPTH : _PNG_BIT_DEPTH + 1] == b"\x10":
        return _deep_png(encoded)
    with opened(encoded) as image:
        image.load()
        changes, orientation = _changes(image), _orientation(image)
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
            raise ImageDecodeError(f"unsupported image mode {image.mode}")
        if image.mode != "RGB":
            changes.append("mode " + image.mode)
        elif image.has_transparency_data:
            changes.append("transparent color")
        clear = image.info.get("transparency")
        if image.mode in ("1", "L"):
            values = np.asarray(image.convert("L"))[:, :, None]
            if isinstance(clear, int):
                if image.format == "PNG" and image.mode == "L":
                    clear *= _stretch(encoded)  # Pillow scales 2-bit and 4-bit gray, but not the transparent value
                values = np.concatenate([values, np.where(values == clear, 0, 255).astype(np.uint8)], axis=2)
        else:
            values = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return upright(values, orientation), 8, changes


def read_indices(encoded: bytes) -> np.ndarray:
    """Reads class indices: upright, [H, W, C] with the exact values, for palettes the indices. Raises as `read`."""
    if not encoded.startswith((_PNG, b"GIF8", b"BM")):
        raise ImageDecodeError("not a PNG, TIFF, GIF or BMP; other formats do not preserve class indices")
    with opened(encoded) as image:
        values = np.asarray(image)
        if image.format == "PNG" and image.mode == "L" and encoded[_PNG_BIT_DEPTH] < 8:
            values = values // _stretch(encoded)
        values = upright(values, _orientation(image))
    values = values.astype(np.uint8) if values.dtype == bool else values
    return values if values.ndim == 3 else values[:, :, None]


def _deep_png(encoded: bytes) -> tuple[np.ndarray, int, list[str]]:
    """A 16-bit PNG; Pillow would only keep the upper 8 bits of colors."""
    import imagecodecs  # imported late: not needed for 8 bits

    with opened(encoded) as image:
        changes, orientation = _changes(image), _orientation(image)
        check_size(image.height, image.width, 8)
    values = imagecodecs.png_decode(encoded)  # a transparent color becomes an opacity band
    values = values if values.ndim == 3 else values[:, :, None]
    if values.dtype != np.uint16:
        raise ImageDecodeError(f"a 16-bit PNG that decodes to {values.dtype}")
    return upright(values, orientation), 16, changes


def _stretch(encoded: bytes) -> int:
    """The factor by which Pillow multiplies the gray values of a PNG."""
    return 255 // ((1 << encoded[_PNG_BIT_DEPTH]) - 1)


def _changes(image: Image.Image) -> list[str]:
    changes = []
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        changes.append("several frames")  # extra pictures in a camera's MPO file do not require re-encoding
    if image.format not in ("JPEG", "MPO", "PNG"):
        changes.append("format " + image.format)
    if _orientation(image) != 1:
        changes.append("orientation")
    return changes


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(_EXIF_ORIENTATION, 1)
    return found if found in _TURNS else 1
