"""What stands in the way of decoding an image: damaged bytes, kinds that are not read, sizes that fit into no memory."""

import contextlib
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from pera_jax.common import environment

# What Pillow's decoders raise on damaged input: `UnidentifiedImageError` is an OSError, PNG raises SyntaxError.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError,
                 struct.error, zlib.error, Image.DecompressionBombError)  # fmt: skip
MOST_BYTES = 2 << 30  # of one image once it is decoded: 715 million pixels of 8-bit RGB, 2.1 billion of a mask


class ImageDecodeError(ValueError):
    """The bytes are no image, an image that is damaged, or of a kind that is not read."""


@contextlib.contextmanager
def decoding(
    errors: type[Exception] | tuple[type[Exception], ...] = DECODE_ERRORS, said: str = "undecodable image: "
) -> Iterator[None]:
    """Turns what a decoder raises on damaged bytes, by default Pillow's, into ImageDecodeError.

    What it raises because the machine fails becomes EnvironmentFault: a decoder loads libraries and takes memory.

    Args:
      said: what the text of the ImageDecodeError begins with.
    """
    try:
        yield
    except ImageDecodeError:
        raise
    except (*(errors if isinstance(errors, tuple) else (errors,)), MemoryError) as error:
        environment.raise_if_fault(error, "an image cannot be decoded")
        raise ImageDecodeError(f"{said}{str(error) or type(error).__name__}") from error


def check_size(height: int, width: int, bytes_per_pixel: int) -> None:
    """Raises ImageDecodeError where an image would take more memory than `MOST_BYTES`."""
    if height * width * bytes_per_pixel > MOST_BYTES:
        raise ImageDecodeError(
            f"claims {width} x {height} px, {height * width * bytes_per_pixel / 2**30:.1f} GiB once decoded, more than "
            f"{MOST_BYTES / 2**30:.3g}; cut it into tiles first"
        )
