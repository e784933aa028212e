"""Files and archives of all kinds, for tests of conversions."""

import io
import os
import pathlib
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image


def encode(pixels, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def contents(rng) -> dict[str, bytes]:
    """One file of each kind, by a name that says what must become of it."""
    colors = rng.integers(0, 256, (40, 48, 3), np.uint8)
    photo, exif = Image.fromarray(colors), Image.Exif()
    exif[0x0112] = 6
    jpeg, palette = encode(photo, "JPEG"), photo.quantize(8)
    return {
        "written/jpeg.jpg": jpeg,
        "written/cmyk.jpg": encode(photo.convert("CMYK"), "JPEG"),
        "written/deep.png": encode(rng.integers(0, 65536, (33, 32), np.uint16)),
        "written/palette.png": encode(palette, transparency=0),
        "written/turned.jpeg": encode(photo, "JPEG", exif=exif),
        "written/wrongly named.tif": encode(photo, "WEBP", lossless=True),
        "written/ünïcödé 🛰.PNG": encode(rng.integers(0, 256, (40, 40, 3), np.uint8)),
        f"written/{'long' * 50}.jpg": encode(photo, "JPEG", quality=50),
        "small/1 pixel.png": encode(colors[:1, :1]),
        "blank/blank.png": encode(np.full((50, 60, 3), int(rng.integers(256)), np.uint8)),
        "failed/cut.jpg": jpeg[: int(rng.integers(10, len(jpeg) // 2))],
        "failed/zero.png": b"",
        "failed/text.jpg": b"<html>404</html>",
        "failed/bomb.png": bomb(),
        "failed/noise.webp": rng.bytes(300),
        "rejected/notes.txt": b"hello",
        "rejected/no ending": b"",
        "rejected/archive.zip": b"PK",
        "rejected/.hidden.jpg": jpeg,
    }


def twins(files: dict[str, bytes], rng) -> dict[str, bytes]:
    """Copies of some images that can be written, under names that come later."""
    names = [name for name in files if name.startswith("written/")]
    chosen = rng.choice(names, 3, replace=False)
    return {f"zz twin/{i}{os.path.splitext(name)[1]}": files[name] for i, name in enumerate(chosen)}


def pack(path: pathlib.Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
            link = zipfile.ZipInfo("all/rejected/link.png")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "../../outside/secret.png")
        return
    with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(f"all/rejected/{name}")
            member.type, member.linkname = kind, "../../outside/secret.png"
            archive.addfile(member)
