"""Listing and reading archives of images as streams, without unpacking to disk.

A member of a tar file is located by its offset in the uncompressed content. Compressed tar files can only be read
forward: each process keeps one open stream, and decompresses the archive once if members are read in order. A member of
a zip file is located by its offset in the file and its compression, so workers do not have to read the whole directory.
"""

import bz2
import gzip
import lzma
import os
import pathlib
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from pera_jax.common.errors import UserError
from pera_jax.data.file_tree import HIDDEN, Found

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
LARGEST = 1 << 30  # maximum file size in bytes; files are read into memory
READ_ERRORS = (OSError, EOFError, ValueError, OverflowError, RuntimeError, MemoryError, struct.error, zlib.error,
               lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)  # fmt: skip
OUTSIDE = "its name leads out of the archive"
_TAR_BLOCK = 512
_LARGEST_HEADER = 1 << 24  # tarfile reads extended headers into memory
_LONGEST_NAME = 4096  # bytes, as for paths
_BOMB_BYTES, _BOMB_RATIO = 1 << 26, 200  # larger members with higher compression are decompression bombs
_BOMB = f"larger than {_BOMB_BYTES >> 20} MiB, and compressed to less than 1/{_BOMB_RATIO}"
_UTF_8 = 1 << 11  # flag of a zip member: its name is UTF-8
_ZIP_HEADER = struct.Struct("<4s22x2H")  # signature, length of name, length of extra field


class _Joined(Exception):
    """Data after the end marker of a tar file."""


def is_archive(path: pathlib.Path) -> bool:
    """Whether the name ends like an archive."""
    return path.name.lower().endswith(ENDINGS)


def members(path: pathlib.Path) -> Iterator[Found]:
    """Yields every member of an archive that is not a folder, in order. Raises UserError if it is damaged or
    truncated."""
    seen = set()
    try:
        for found in _zip(path) if path.name.lower().endswith(".zip") else _tar(path):
            # Zip names must have slashes, but Windows PowerShell 5 and .NET before 4.6.1 write backslashes.
            backslashes = found.part[0] == "zip" and "\\" in found.name
            path_in_archive = found.name.replace("\\", "/") if backslashes else found.name
            if path_in_archive.endswith("/") and not found.size:
                continue  # a folder
            steps = [step for step in path_in_archive.split("/") if step not in ("", ".")]
            name, fault = "/".join(steps), found.fault
            if re.match(r"[/\\]|[A-Za-z]:", found.name) or ".." in re.split(r"[/\\]", name):
                name, fault = found.name, OUTSIDE
            elif len(name) > _LONGEST_NAME // 4 and len(os.fsencode(name)) > _LONGEST_NAME:
                name, fault = name[:100] + "...", f"its name is longer than {_LONGEST_NAME} bytes"
            elif name in seen:
                fault = "another member has this name"
            elif any(step.startswith(".") for step in steps):
                fault = HIDDEN
            if fault is None:
                seen.add(name)
            yield Found(name, found.size, found.part, fault, backslashes)
    except _Joined as error:
        raise UserError(f"archive {path} {error}") from error
    except READ_ERRORS as error:
        raise UserError(
            f"archive {path} cannot be read ({error or type(error).__name__}); download it again"
        ) from error


def _unpacked(file: BinaryIO, path: str | pathlib.Path) -> BinaryIO:
    """The uncompressed content of a tar file. If compressed, it raises EOFError if truncated, and seeks back by
    restarting."""
    kind = os.path.splitext(str(path).lower())[1]
    if kind == ".tar":
        return file
    if kind == ".bz2":
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if kind == ".xz" else gzip.GzipFile(fileobj=file)


class _Headers:
    """File wrapper for listing with tarfile: remembers the last block, and rejects huge headers."""

    def __init__(self, file: BinaryIO):
        self._file, self.last = file, b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._file.read(size)
        return self.last


def _tar(path: pathlib.Path) -> Iterator[Found]:
    with open(path, "rb") as file, _unpacked(file, path) as content:
        headers = _Headers(content)
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            waiting, before = None, 0  # a member, and the position before it
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile would keep all members
                at, before = before, file.tell()
                if waiting is not None:
                    yield _judged(waiting, before - at)
                waiting = None if member.isdir() else member
            if waiting is not None:
                yield _judged(waiting, file.tell() - before)
            if headers.last != bytes(_TAR_BLOCK):  # tarfile treats a damaged or missing header as the end
                raise EOFError("it is damaged or truncated: its end marker is missing")
        while data := content.read(1 << 20):  # to the end of the compressed file, which has the checksum
            if any(_is_header(data[at : at + _TAR_BLOCK]) for at in range(0, len(data), _TAR_BLOCK)):
                raise _Joined("continues after its end marker, like concatenated archives; pass them separately "
                              "to --input, or unpack it with tar --ignore-zeros")  # fmt: skip


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _judged(member: tarfile.TarInfo, packed: int) -> Found:
    """A member of a tar file that takes about `packed` bytes of it."""
    fault = None
    if member.issym() or member.islnk():
        fault = "a link"
    elif not member.isreg() or member.issparse():
        fault = "not a regular file"
    elif member.size > _BOMB_BYTES and member.size > packed * _BOMB_RATIO:
        fault = _BOMB
    return Found(member.name, member.size, ("tar", member.offset_data), fault)


def _zip(path: pathlib.Path) -> Iterator[Found]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            fault, kind = None, stat.S_IFMT(member.external_attr >> 16)
            if kind == stat.S_IFLNK:
                fault = "a link"
            elif kind not in (0, stat.S_IFREG):
                fault = "not a regular file"
            elif member.flag_bits & 1:
                fault = "encrypted"
            elif member.header_offset < 0:
                fault = "its offset is before the start of the archive"
            elif member.file_size > max(_BOMB_BYTES, member.compress_size * _BOMB_RATIO):
                fault = _BOMB
            part = ("zip", member.header_offset, member.compress_size, member.compress_type, member.CRC)
            yield Found(_zip_name(member), member.file_size, part, fault)


def _zip_name(member: zipfile.ZipInfo) -> str:
    """The name of a member. Without the UTF-8 flag it should be in code page 437, but macOS and others omit the flag,
    and meaningful text in that code page is hardly ever valid UTF-8."""
    if member.flag_bits & _UTF_8 or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


# ---------------------------------------------------------------- reading

_open: dict[str, BinaryIO] = {}  # per process: archives stay open between members


def read(path: str, part: tuple, size: int) -> bytes:
    """Reads a member of `size` bytes at the location `part` from `members`. Raises one of READ_ERRORS."""
    kind, offset, *packing = part
    if path not in _open:
        file = open(path, "rb")
        _open[path] = file if kind == "zip" else _unpacked(file, path)
    try:
        file = _open[path]
        file.seek(offset)
        return _read_zipped(file, size, *packing) if kind == "zip" else file.read(size)
    except READ_ERRORS:
        _open.pop(path).close()  # a failed stream cannot be used again
        raise


def close_all() -> None:
    """Closes all open archives of this process, before a file is replaced by another."""
    while _open:
        _open.popitem()[1].close()


def _read_zipped(file: BinaryIO, size: int, packed: int, method: int, checksum: int) -> bytes:
    """Reads the member whose local header starts at the position of `file`; at most `size` + 1 bytes."""
    head = file.read(_ZIP_HEADER.size)
    if len(head) < _ZIP_HEADER.size or head[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no member at the offset in the directory")
    _, name, extra = _ZIP_HEADER.unpack(head)
    file.seek(name + extra, os.SEEK_CUR)
    info = zipfile.ZipInfo()
    info.file_size, info.compress_size, info.compress_type, info.CRC = size, packed, method, checksum
    with zipfile.ZipExtFile(file, "r", info) as member:
        return member.read(size + 1)  # one more byte: the checksum is verified at the end
