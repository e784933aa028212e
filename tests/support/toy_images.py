"""Image files of every kind, each with the 8-bit RGB values that reading it must give."""

import io
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

TURNED = {  # by EXIF orientation: how an upright picture lies in the file
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1), 6: np.rot90,
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip
_COLOR_TYPES = {1: 0, 3: 2, 2: 4, 4: 6}  # of PNG, by the number of its bands


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    values: np.ndarray, depth: int, palette: np.ndarray | None = None, transparent: list[int] = (), orientation: int = 1
) -> bytes:
    """A PNG of values [H, W, C] of 1 to 16 bits, written here because Pillow does not write them all.

    Args:
      palette: uint8 [n, 3]; `values` are then its numbers.
      transparent: the content of tRNS: the opacity of the colors of the palette, else the value that is transparent.
    """
    height, width, bands = values.shape
    rows = []
    for row in values.reshape(height, -1):
        bits = np.unpackbits(row.astype(">u2")[:, None].view(np.uint8), axis=1)[:, 16 - depth :]
        rows.append(b"\0" + np.packbits(bits).tobytes())
    kind = 3 if palette is not None else _COLOR_TYPES[bands]
    content = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    content += _chunk(b"gAMA", struct.pack(">I", 100_000))  # linear light, as no one shows it: not applied
    if palette is not None:
        content += _chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    if len(transparent):
        content += _chunk(b"tRNS", struct.pack(f">{len(transparent)}{'B' if kind == 3 else 'H'}", *transparent))
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        content += _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    return content + _chunk(b"IDAT", zlib.compress(b"".join(rows))) + _chunk(b"IEND", b"")


def tiff(values: np.ndarray, planar: bool = False, orientation: int = 1, extra=(), **options) -> bytes:
    """A TIFF of values [H, W, C] in one of its layouts; `options` of tifffile, `extra` of ExtraSamples by their
    numbers."""
    bands = values.shape[2]
    photometric = options.pop("photometric", "rgb" if bands > 2 else "minisblack")
    stored = np.moveaxis(values, 2, 0) if planar and bands > 1 else values if bands > 1 else values[..., 0]
    tags = [(274, 3, 1, orientation, True)] if orientation != 1 else []
    layout = {"planarconfig": "separate" if planar else "contig"} if bands > 1 else {}
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, np.ascontiguousarray(stored), photometric=photometric, extratags=tags, metadata=None,
        extrasamples=extra or None, **layout, **options,
    )  # fmt: skip
    return buffer.getvalue()


def pillow(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def over_black(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] whose last band is opacity."""
    opacity = pixels[..., -1:].astype(float) / 255
    return np.round(pixels[..., :-1] * opacity).astype(np.uint8)


def every_kind(seed: int = 0) -> dict[str, tuple[bytes, np.ndarray]]:
    """Forty files by name: (bytes, the pixels uint8 [H, W, 3])."""
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (36, 44, 3), np.uint8)
    deep = rng.integers(0, 1 << 16, (36, 44, 3), np.uint16)
    gray, three = rgb[..., :1], np.repeat(rgb[..., :1], 3, axis=2)
    cut = np.where(rng.random((36, 44, 1)) < 0.5, 0, 255).astype(np.uint8)  # what a raster calls alpha
    infrared = rng.integers(20, 120, (36, 44, 1), np.uint8)
    soft = np.concatenate([rgb, rgb[..., :1]], axis=2)
    palette, numbers = rng.integers(0, 256, (16, 3), np.uint8), rng.integers(0, 16, (36, 44, 1))
    photo, cmyk = Image.fromarray(rgb), Image.fromarray(rgb).convert("CMYK")
    exif, seen = Image.Exif(), np.array(photo.resize((44, 36)))
    decoded = lambda content: np.array(Image.open(io.BytesIO(content)).convert("RGB"))  # noqa: E731
    jpegs = {
        "jpeg": pillow(photo, "JPEG"),
        "gray jpeg": pillow(gray[..., 0], "JPEG"),
        "cmyk jpeg": pillow(cmyk, "JPEG"),
    }
    files = {f"{name}.jpg": (content, decoded(content)) for name, content in jpegs.items()}
    for orientation, turn in TURNED.items():
        exif[0x0112] = orientation
        content = pillow(np.ascontiguousarray(turn(rgb)), "PNG", exif=exif)
        files[f"turned {orientation}.png"] = content, rgb
    exif[0x0112] = 6
    content = pillow(photo, "JPEG", exif=exif)
    files["turned.jpg"] = content, np.rot90(decoded(content), -1)
    files["turned.tif"] = tiff(np.ascontiguousarray(TURNED[8](rgb)), orientation=8), rgb
    files |= {
        "plain.png": (png(rgb, 8), rgb),
        "deep.png": (png(deep, 16), (deep >> 8).astype(np.uint8)),
        "deep gray.png": (png(deep[..., :1], 16), np.repeat(deep[..., :1] >> 8, 3, axis=2).astype(np.uint8)),
        "gray.png": (png(gray, 8), three),
        "4 bits.png": (png(gray >> 4, 4), three >> 4 << 4 | three >> 4),
        "1 bit.png": (png(gray >> 7, 1), (three >> 7) * 255),
        "alpha.png": (png(soft, 8), over_black(soft)),
        "gray alpha.png": (png(soft[..., :2], 8), np.repeat(over_black(soft[..., :2]), 3, axis=2)),
        "palette.png": (png(numbers, 4, palette), palette[numbers[..., 0]]),
        "clear.png": (png(numbers, 4, palette, [0]), palette[numbers[..., 0]] * (numbers > 0).astype(np.uint8)),
        "lossless.webp": (pillow(photo, "WEBP", lossless=True), rgb),
        "strips.tif": (tiff(rgb, rowsperstrip=5, compression="lzw", predictor=True), rgb),
        "planes.tif": (tiff(rgb, planar=True, rowsperstrip=7, compression="deflate"), rgb),
        "tiles.tif": (tiff(rgb, tile=(16, 32), compression="zstd", predictor=True), rgb),
        "planar tiles.tif": (tiff(rgb, planar=True, tile=(32, 16), byteorder=">"), rgb),
        "big.tif": (tiff(rgb, bigtiff=True, byteorder=">"), rgb),
        "packed.tiff": (tiff(rgb, compression="packbits"), rgb),
        "deep.tif": (tiff(deep, compression="lzw", predictor=True, byteorder=">"), (deep >> 8).astype(np.uint8)),
        "deep gray.tif": (tiff(deep[..., :1]), np.repeat(deep[..., :1] >> 8, 3, axis=2).astype(np.uint8)),
        "gray.tif": (tiff(gray), three),
        "white is 0.tif": (tiff(255 - gray, photometric="miniswhite"), three),
        "cut out.tif": (tiff(np.concatenate([rgb, cut], axis=2), extra=(2,)), rgb * (cut > 0).astype(np.uint8)),
        "infrared.tif": (tiff(np.concatenate([rgb, infrared], axis=2), extra=(2,)), rgb),
        "fourth.tif": (tiff(np.concatenate([rgb, infrared], axis=2), extra=(0,)), rgb),
        "palette.tif": (pillow(photo.quantize(16), "TIFF"), np.array(photo.quantize(16).convert("RGB"))),
        "cmyk.tif": (pillow(cmyk, "TIFF"), np.array(cmyk.convert("RGB"))),
        "subsampled.tif": (tiff(seen, compression="jpeg", photometric="ycbcr", tile=(16, 16)), None),
    }  # fmt: skip
    content = files["subsampled.tif"][0]
    files["subsampled.tif"] = content, decoded(content)
    return files
