"""Image encoding in records: JPEG or PNG for 8-bit RGB, lossless TIFF for other bands and dtypes.

The TIFF is readable by GDAL and tifffile: planar bands with horizontal differencing (for floats, Adobe's floating-point
predictor) and Zstandard compression.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pera_jax.data.images import foreign, picture_files, tiff_files
from pera_jax.data.images.image_errors import ImageDecodeError, decoding

DTYPES = foreign.DTYPES
_HORIZONTAL, _FLOATING_POINT = 2, 3  # TIFF predictors


def decode_image(encoded: bytes) -> np.ndarray:
    """Decodes the image of a record: [H, W, C] of uint8, uint16 or float32, writable.

    JPEG and PNG give RGB uint8, TIFF the stored values. For arbitrary image files use `foreign.read`.

    Raises ImageDecodeError for undecodable bytes, EnvironmentFault if the machine fails.
    """
    if encoded[:4] in tiff_files.MAGIC:
        return _decode_tiff(encoded)
    with decoding(), picture_files.opened(encoded) as image:
        if image.mode == "RGB":  # as written by `encode`
            return np.array(image)  # a writable copy
    return foreign.read(encoded, colors=True).pixels


def decode_bands(encoded: bytes, info, places: Sequence[int]) -> np.ndarray:
    """The channels `places` of a stored image: [H, W, len(places)].

    Raises ImageDecodeError if it cannot be decoded, or does not match the bands and dtype of `info`.
    """
    pixels = decode_image(encoded)
    if pixels.shape[2] != len(info.bands) or pixels.dtype != info.dtype:
        raise ImageDecodeError(
            f"expected {len(info.bands)} bands of {info.dtype}, got {pixels.shape[2]} of {pixels.dtype}"
        )
    return pixels if list(places) == list(range(len(info.bands))) else np.ascontiguousarray(pixels[..., list(places)])


def encode(pixels: np.ndarray) -> bytes:
    """Encodes `pixels` [H, W, C] for a record: PNG for three bands of uint8, else TIFF."""
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        return encode_tiff(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encode_tiff(pixels: np.ndarray) -> bytes:
    """Encodes `pixels` [H, W, C], uint8, uint16 or float32, as TIFF. Deterministic."""
    import tifffile  # imported late: not needed for JPEG and PNG

    if pixels.dtype.name not in DTYPES or pixels.ndim != 3:
        raise ValueError(f"expected [H, W, C] of {', '.join(DTYPES)}, got {pixels.dtype} {list(pixels.shape)}")
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
            pixels = tiff_files.values_of(file.pages.first)
    if pixels.dtype.name not in DTYPES:
        raise ImageDecodeError(f"unexpected TIFF of {pixels.dtype} {list(pixels.shape)} in a dataset folder")
    return pixels
