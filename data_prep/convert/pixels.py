"""One image file to the bytes that are stored: 8-bit RGB, upright, by the rules of `pera_jax.data.images.foreign`.

JPEG and PNG files that none of these rules and no limit of size changes are stored byte for byte. Everything else is
stored as PNG, which keeps every pixel, or as JPEG where the caller names a quality.
"""

import dataclasses
import hashlib
import io

import numpy as np
from PIL import Image

from pera_jax.data import statistics
from pera_jax.data.images import foreign

_BLANK = 2  # values that a band of a blank image spans at most


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
    span: tuple[int, int] | None = None,
) -> Stored:
    """Converts the content of one image file.

    Args:
      encoded: the file's bytes.
      max_side: where the longer side has more pixels than this, the image is reduced to it (Lanczos, antialiased).
      jpeg_quality: changed images are stored as JPEG of this quality (1 to 100, full colour resolution), not as PNG.
      min_side: an image whose shorter side has fewer pixels is "small".
      drop: names of what is to be refused, of "small" and "blank": no band of it spans more than 2 of 255 values.
      span: (low, high): the values of 9 to 16 bits that become 0 and 255; None: their upper 8 bits are kept.

    Raises:
      ImageDecodeError: see `foreign.read`.
      Rejected: an image of a kind that `drop` names.
    """
    picture = foreign.read(encoded, colours=True, span=span)
    rgb, changes = Image.fromarray(picture.pixels), list(picture.changes)
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


def _encode(image: Image.Image, jpeg_quality: int | None) -> bytes:
    buffer = io.BytesIO()
    if jpeg_quality is None:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return buffer.getvalue()
