"""One image file to the bytes that are stored: every colour mode becomes 8-bit RGB, upright, by the rules below.

A file is judged by its content (JPEG, PNG, TIFF, WebP, BMP, GIF), not by the ending of its name, and
decoded whole, once.

| in the file                         | becomes                                                              |
|-------------------------------------|----------------------------------------------------------------------|
| RGB, 8 bit                          | as it is                                                             |
| RGB, grey or alpha, 16 bit          | the upper 8 bits of each value                                       |
| grey, 1 bit or 8 bit                | three equal bands                                                    |
| palette                             | the colours of the palette                                           |
| alpha, or a transparent colour      | the colour times its opacity: what is transparent is black           |
| CMYK, YCbCr                         | Pillow's conversion to RGB                                           |
| 32-bit integers, floats, CIELAB     | not read: their range or their white is not known; listed as corrupt |
| EXIF orientation                    | applied to the pixels                                                |
| several pages or frames             | the first                                                            |

JPEG and PNG files that none of these rules and no limit of size changes are stored byte for byte. Everything else is
stored as PNG, which keeps every pixel, or as JPEG where the caller names a quality.
"""

import dataclasses
import hashlib
import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pera_jax.data import statistics
from pera_jax.data.codecs import ImageDecodeError

_BLANK = 2  # values that a band of a blank image spans at most
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")
_ORIENTATION = 0x0112  # the EXIF tag
_PNG_BIT_DEPTH = 24  # position of the byte in the file: signature 8, chunk head 8, width 4, height 4


class Rejected(Exception):
    """An image that is sound but not wanted; its text is the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """An image ready to be written.

    Attributes:
      data: encoded bytes, as `codecs` says.
      histogram: pixels of each value in each band: `statistics.count`.
      content: a hash of what it was made from, 16 bytes: equal ones are exact duplicates.
      found: what cleaning looks for: "small", "blank".
      place: JSON text of where on the ground a tile lies, "" for other images.
      label: index of its class where only the content tells it; None leaves it to the item.
      changes: names of what was done to the pixels or the file; empty where the bytes are those of the source.
    """

    data: bytes
    histogram: statistics.Histogram
    changes: tuple[str, ...]
    content: bytes = b""
    found: tuple[str, ...] = ()
    place: str = ""
    label: int | None = None


def convert(
    encoded: bytes,
    max_side: int | None = None,
    jpeg_quality: int | None = None,
    min_side: int = 1,
    drop: tuple[str, ...] = (),
) -> Stored:
    """Converts the content of one image file.

    Args:
      encoded: the file's bytes.
      max_side: where the longer side has more pixels than this, the image is reduced to it (Lanczos, antialiased).
      jpeg_quality: changed images are stored as JPEG of this quality (1 to 100, full colour resolution), not as PNG.
      min_side: an image whose shorter side has fewer pixels is "small".
      drop: names of what is to be refused, of "small" and "blank": no band of it spans more than 2 of 255 values.

    Raises:
      ImageDecodeError: the bytes cannot be decoded, claim more pixels than Pillow takes for sane (179 million), or hold
        values without a known range.
      Rejected: an image of a kind that `drop` names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, thousands of them in a large folder
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                image.load()
                rgb, changes = _to_rgb(image, encoded)
    except ImageDecodeError:
        raise
    except UnidentifiedImageError as error:  # its own text names an address in memory
        raise ImageDecodeError("no image of a known format, or cut off in its header") from error
    except Image.DecompressionBombError as error:  # told by the header, before any memory is taken
        raise ImageDecodeError(f"claims more than {2 * Image.MAX_IMAGE_PIXELS} pixels; cut it into tiles first") from error
    except Exception as error:  # on damaged bytes Pillow's many readers raise nearly anything
        raise ImageDecodeError(str(error) or type(error).__name__) from error
    found = ["small"] if min(rgb.size) < min_side else []
    if max_side is not None and max(rgb.size) > max_side:
        scale = max_side / max(rgb.size)
        width, height = (max(1, round(side * scale)) for side in rgb.size)
        # One direction after the other: the order changes pixels, and Pillow's versions do not agree on it.
        rgb = rgb.resize((width, rgb.height), Image.Resampling.LANCZOS)
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
        changes.append("reduced")
    histogram = np.array(rgb.histogram(), np.int64).reshape(3, 256)  # what `statistics.count` gives, in C
    found += ["blank"] if _blank(histogram) else []
    for kind in found:
        if kind in drop:
            raise Rejected(kind)
    stored = _encode(rgb, jpeg_quality) if changes else encoded
    return Stored(stored, histogram, tuple(changes), content_hash(encoded), tuple(found))


def content_hash(encoded: bytes) -> bytes:
    """By which exact duplicates are found: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _blank(histogram: np.ndarray) -> bool:
    """Whether no band spans more than 2 values, which leaves room for the noise of a JPEG."""
    return all(np.ptp(np.flatnonzero(band)) <= _BLANK for band in histogram)


def _to_rgb(image: Image.Image, encoded: bytes) -> tuple[Image.Image, list[str]]:
    """Returns (8-bit RGB image, what was changed). Raises ImageDecodeError on modes without a rule."""
    changes = []
    deep = image.mode.startswith("I;16") or (image.format == "PNG" and encoded[_PNG_BIT_DEPTH] == 16)
    if deep:
        changes.append("16 bit")  # Pillow takes the upper byte of 16-bit colour by itself, of grey it does not
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        changes.append("several frames")  # the further pictures of a camera's MPO file are no reason to recode a JPEG
    if image.format not in ("JPEG", "MPO", "PNG"):
        changes.append("format " + image.format)
    if image.getexif().get(_ORIENTATION, 1) != 1:
        changes.append("orientation")
        image = ImageOps.exif_transpose(image)
    if image.mode != "RGB":
        changes.append("mode " + image.mode)
    if image.mode.startswith("I;16"):
        grey = np.asarray(image) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB"), changes
    if image.mode in ("I", "F", "LAB"):
        raise ImageDecodeError(f"no rule turns mode {image.mode} into 8-bit RGB")
    if image.has_transparency_data:
        if image.mode == "RGB":
            changes.append("transparent colour")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image.convert("RGB"), changes


def _encode(image: Image.Image, jpeg_quality: int | None) -> bytes:
    # A fresh image: the one that was read carries its file's metadata (ICC profile, transparency) into `save`.
    plain = Image.frombytes("RGB", image.size, image.tobytes())
    buffer = io.BytesIO()
    if jpeg_quality is None:
        plain.save(buffer, "PNG")
    else:
        plain.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return buffer.getvalue()
