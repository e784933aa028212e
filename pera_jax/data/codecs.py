"""How one image is stored in a record: as JPEG or PNG where it is 8-bit RGB, as TIFF for any other bands or dtype.

The TIFF is what GDAL and tifffile write: bands one after the other (planar), each predicted from its left neighbour
(horizontal differencing, for floats Adobe's floating-point predictor) and packed with Zstandard. Nothing is lost.
"""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from pera_jax.common import environment

DTYPES = ("uint8", "uint16", "float32")
# What Pillow's decoders raise on damaged input: `UnidentifiedImageError` is an OSError, PNG raises SyntaxError.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError,
                 struct.error, zlib.error, Image.DecompressionBombError)
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HORIZONTAL, _FLOATING_POINT = 2, 3  # predictors of the TIFF standard and its supplement


class ImageDecodeError(ValueError):
    """The bytes are no image, or an image that is damaged."""


def decode_image(encoded: bytes) -> np.ndarray:
    """Decodes a stored image: [H, W, C] of uint8, uint16 or float32, writable.

    JPEG and PNG come out as red, green, blue of uint8; TIFF as it was stored. Raises ImageDecodeError on anything
    undecodable, EnvironmentFault where the machine fails.
    """
    if encoded[:4] in _TIFF_MAGIC:
        return _decode_tiff(encoded)
    with decoding(), Image.open(io.BytesIO(encoded)) as image:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # a writable copy


@contextlib.contextmanager
def decoding(errors: type[Exception] | tuple[type[Exception], ...] = DECODE_ERRORS) -> Iterator[None]:
    """Turns what a decoder raises on damaged bytes, by default Pillow's, into ImageDecodeError.

    What it raises because the machine fails becomes EnvironmentFault: a decoder loads libraries and takes memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except ImageDecodeError:
        raise
    except (*(errors if isinstance(errors, tuple) else (errors,)), MemoryError) as error:
        environment.raise_if_fault(error, "an image cannot be decoded")
        raise ImageDecodeError(f"undecodable image: {error or type(error).__name__}") from error


def decode_bands(encoded: bytes, info, places: Sequence[int]) -> np.ndarray:
    """The bands at `places` of a stored image: [H, W, len(places)].

    Raises ImageDecodeError where it is undecodable, or has other bands or another dtype than `info`, the metadata of its
    data set, says.
    """
    pixels = decode_image(encoded)
    if pixels.shape[2] != len(info.bands) or pixels.dtype != info.dtype:
        raise ImageDecodeError(f"{pixels.shape[2]} bands of {pixels.dtype} instead of {len(info.bands)} of {info.dtype}")
    return pixels if list(places) == list(range(len(info.bands))) else np.ascontiguousarray(pixels[..., list(places)])


def encode(pixels: np.ndarray) -> bytes:
    """The bytes of a stored image of `pixels` [H, W, C]: PNG of three bands of uint8, TIFF of all others."""
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        return encode_tiff(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encode_tiff(pixels: np.ndarray) -> bytes:
    """The bytes of a TIFF of `pixels` [H, W, C], uint8, uint16 or float32; they depend on the pixels only."""
    import tifffile  # here and below: data sets of JPEG and PNG do without it

    if pixels.dtype.name not in DTYPES or pixels.ndim != 3:
        raise ValueError(f"{pixels.dtype} {pixels.shape} is not [H, W, C] of {', '.join(DTYPES)}")
    planes = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))  # [C, H, W]
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, planes, byteorder="<", photometric="minisblack",
        planarconfig="separate" if len(planes) > 1 else None, rowsperstrip=len(pixels), compression="zstd",
        predictor=_FLOATING_POINT if pixels.dtype.kind == "f" else _HORIZONTAL, metadata=None, software=False,
    )  # fmt: skip
    return buffer.getvalue()


def _decode_tiff(encoded: bytes) -> np.ndarray:
    with decoding(Exception):  # on damaged bytes tifffile and its codecs raise nearly anything
        import tifffile

        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            page = file.pages.first
            planes = page.asarray(maxworkers=1)  # [C, H, W]; [H, W] where there is one band
            if page.dtype is None or page.dtype.name not in DTYPES or planes.ndim not in (2, 3):
                raise ImageDecodeError(f"no image of a data set folder: a TIFF of {page.dtype} {page.shape}")
    if planes.ndim == 2:
        return planes[:, :, None].copy()
    return np.ascontiguousarray(np.moveaxis(planes, 0, 2))  # [H, W, C]
