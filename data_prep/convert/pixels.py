"""Conversion of an image file to its stored form: 8-bit RGB, upright, as read by `pera_jax.data.images.foreign`.

JPEG and PNG files that need no change are stored byte for byte. Other images are stored as PNG, which is lossless, or
as JPEG with a chosen quality.
"""

import dataclasses
import hashlib
import io

import numpy as np
from PIL import Image

from pera_jax.data import statistics
from pera_jax.data.images import foreign

_BLANK = 2  # maximum value range of a band in a blank image


class Rejected(Exception):
    """A valid image that is not wanted; the text is the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """An image ready to be written.

    Attributes:
      data: encoded bytes, see `codecs`.
      histogram: of each band: `statistics.count`.
      content: 16-byte hash of the source; equal for exact duplicates.
      found: findings of cleaning: "small", "blank".
      place: JSON text with the location of a tile, "" for other images.
      label: class index if known only from the content; None uses the label of the item.
      changes: names of changes of pixels or format; empty if the bytes are those of the source.
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
    span: tuple[int, int] | None = None,
) -> Stored:
    """Converts the content of one image file.

    Args:
      encoded: the file's bytes.
      max_side: maximum length of the longer side in px; larger images are downsized (Lanczos, antialiased).
      jpeg_quality: store changed images as JPEG of this quality (1 to 100, no chroma subsampling) instead of PNG.
      min_side: images whose shorter side is smaller (px) are "small".
      drop: kinds to reject, from "small" and "blank" (no band spans more than 2 of 255 values).
      span: (low, high): for 9 to 16 bits, the values mapped to 0 and 255; None keeps the upper 8 bits.

    Raises:
      ImageDecodeError: see `foreign.read`.
      Rejected: the image is of a kind in `drop`.
    """
    picture = foreign.read(encoded, colors=True, span=span)
    rgb, changes = Image.fromarray(picture.pixels), list(picture.changes)
    found = ["small"] if min(rgb.size) < min_side else []
    if max_side is not None and max(rgb.size) > max_side:
        scale = max_side / max(rgb.size)
        width, height = (max(1, round(side * scale)) for side in rgb.size)
        # One axis at a time: the order affects pixels and differs between versions of Pillow.
        rgb = rgb.resize((width, rgb.height), Image.Resampling.LANCZOS)
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
        changes.append("reduced")
    histogram = np.array(rgb.histogram(), np.int64).reshape(3, 256)  # the same as `statistics.count`, in C
    found += ["blank"] if _blank(histogram) else []
    for kind in found:
        if kind in drop:
            raise Rejected(kind)
    stored = _encode(rgb, jpeg_quality) if changes else encoded
    return Stored(stored, histogram, tuple(changes), content_hash(encoded), tuple(found))


def content_hash(encoded: bytes) -> bytes:
    """16 bytes of BLAKE2b, for finding exact duplicates."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _blank(histogram: np.ndarray) -> bool:
    """Whether no band spans more than 2 values, a tolerance for JPEG noise."""
    return all(np.ptp(np.flatnonzero(band)) <= _BLANK for band in histogram)


def _encode(image: Image.Image, jpeg_quality: int | None) -> bytes:
    buffer = io.BytesIO()
    if jpeg_quality is None:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return buffer.getvalue()
