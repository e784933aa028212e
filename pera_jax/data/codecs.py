"""How one image is stored in a record: as JPEG or PNG where it is 8-bit RGB, as TIFF for any other bands or dtype.

The TIFF is what GDAL and tifffile write: bands one after the other (planar), each predicted from its left neighbour
(horizontal differencing, for floats Adobe's floating-point predictor) and packed with Zstandard. Nothing is lost.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pera_jax.data.images import foreign, picture_files, tiff_files
from pera_jax.data.images.image_errors import ImageDecodeError, decoding

DTYPES = foreign.DTYPES
_HORIZONTAL, _FLOATING_POINT = 2, 3  # predictors of the TIFF standard and its supplement


def decode_image(encoded: bytes) -> np.ndarray:
    """Decodes the image of a record: [H, W, C] of uint8, uint16 or float32, writable.

    JPEG and PNG come out as red, green, blue of uint8; TIFF as it was stored. The files of others, which may be turned,
    inverted or of any kind, are for `foreign.read`. Raises ImageDecodeError on anything undecodable,
    EnvironmentFault where the machine fails.
    """
    if encoded[:4] in tiff_files.MAGIC:
        return _decode_tiff(encoded)
    with decoding(), picture_files.opened(encoded) as image:
        if image.mode == "RGB":  # as this program stores it
            return np.array(image)  # a writable copy
    return foreign.read(encoded, colours=True).pixels


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
            pixels = tiff_files.values_of(file.pages.first)
    if pixels.dtype.name not in DTYPES:
        raise ImageDecodeError(f"no image of a data set folder: a TIFF of {pixels.dtype} {pixels.shape}")
    return pixels
