"""Errors of image decoding: damaged bytes, unsupported kinds, images too large for memory."""

import contextlib
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from pera_jax.common import environment

# What Pillow's decoders raise on damaged input: `UnidentifiedImageError` is an OSError, PNG raises SyntaxError.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError,
                 struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip
MOST_BYTES = 2 << 30  # size of a decoded image: 715 million pixels of 8-bit RGB, 2.1 billion of a mask


class ImageDecodeError(ValueError):
    """The bytes are not an image, or the image is damaged or of an unsupported kind."""


@contextlib.contextmanager
def decoding(
    errors: type[Exception] | tuple[type[Exception], ...] = DECODE_ERRORS, said: str = "undecodable image: "
) -> Iterator[None]:
    """Converts exceptions of a decoder (by default Pillow) to ImageDecodeError.

    Failures of the machine become EnvironmentFault: decoders load libraries and allocate memory.

    Args:
      said: prefix of the message.
    """
    try:
        yield
    except ImageDecodeError:
        raise
    except (*(errors if isinstance(errors, tuple) else (errors,)), MemoryError) as error:
        environment.raise_if_fault(error, "an image cannot be decoded")
        raise ImageDecodeError(f"{said}{str(error) or type(error).__name__}") from error


def check_size(height: int, width: int, bytes_per_pixel: int) -> None:
    """Raises ImageDecodeError if a decoded image would take more than `MOST_BYTES` of memory."""
    if height * width * bytes_per_pixel > MOST_BYTES:
        raise ImageDecodeError(
            f"is {width} x {height} px and would take {height * width * bytes_per_pixel / 2**30:.1f} GiB when decoded, "
            f"more than {MOST_BYTES / 2**30:.3g} GiB; cut it into tiles first"
        )
