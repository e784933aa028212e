"""Archives of images, listed and read as streams: nothing is unpacked to the disk.

Of a tar file, packed or not, a member is a place in the unpacked content. A packed one can only be read forward: each
process keeps one open stream and unpacks the archive once, as long as it asks for members in their order. Of a zip
file, a member is a place in the file and how it is packed there, so that workers need not read the whole directory.
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
LARGEST = 1 << 30  # bytes of one file; a larger one is no image of a training set, and must fit into memory
READ_ERRORS = (OSError, EOFError, ValueError, OverflowError, RuntimeError, MemoryError, struct.error, zlib.error,
               lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)  # fmt: skip
OUTSIDE = "its name leads out of the archive"
_TAR_BLOCK = 512
_LARGEST_HEADER = 1 << 24  # tarfile reads long names and attributes whole
_LONGEST_NAME = 4096  # bytes, as of a path
_BOMB_BYTES, _BOMB_RATIO = 1 << 26, 200  # what is larger and packed tighter is no image, but made to fill the memory
_BOMB = f"over {_BOMB_BYTES >> 20} MiB, packed to less than 1/{_BOMB_RATIO}"
_UTF_8 = 1 << 11  # of a zip member's flags: its name is encoded so
_ZIP_HEADER = struct.Struct("<4s22x2H")  # signature, length of the name, length of the extra field


class _Joined(Exception):
    """Data behind the end of a tar file."""


def is_archive(path: pathlib.Path) -> bool:
    """Whether the name ends as an archive's does."""
    return path.name.lower().endswith(ENDINGS)


def members(path: pathlib.Path) -> Iterator[Found]:
    """Every member of an archive that is no folder, in order. Raises UserError where it is damaged or cut off."""
    seen = set()
    try:
        for found in _zip(path) if path.name.lower().endswith(".zip") else _tar(path):
            # A zip's names have slashes, says its specification; Windows PowerShell 5 and .NET before 4.6.1 write backslashes.
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
        raise UserError(f"archive {path} cannot be read ({error or type(error).__name__}); fetch it again") from error


def _unpacked(file: BinaryIO, path: str | pathlib.Path) -> BinaryIO:
    """The content of a tar file. A packed one raises EOFError where it is cut off, and goes back by starting anew."""
    kind = os.path.splitext(str(path).lower())[1]
    if kind == ".tar":
        return file
    if kind == ".bz2":
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if kind == ".xz" else gzip.GzipFile(fileobj=file)


class _Headers:
    """A file as tarfile reads it for a listing: keeps the last block, and gives no header that is huge."""

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
            waiting, before = None, 0  # a member, and where the file stood before it
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep them all
                at, before = before, file.tell()
                if waiting is not None:
                    yield _judged(waiting, before - at)
                waiting = None if member.isdir() else member
            if waiting is not None:
                yield _judged(waiting, file.tell() - before)
            if headers.last != bytes(_TAR_BLOCK):  # tarfile takes a damaged header, or none at all, for the end
                raise EOFError("it is damaged, or cut off: its end mark is missing")
        while data := content.read(1 << 20):  # to the end of the packed file, where its checksum is
            if any(_is_header(data[at : at + _TAR_BLOCK]) for at in range(0, len(data), _TAR_BLOCK)):
                raise _Joined("goes on behind its end mark, as where archives were put one behind the other; give them one by "
                              "one to --input, or unpack it with tar --ignore-zeros")  # fmt: skip


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _judged(member: tarfile.TarInfo, packed: int) -> Found:
    """A member of a tar file that took about `packed` bytes of it."""
    fault = None
    if member.issym() or member.islnk():
        fault = "a link"
    elif not member.isreg() or member.issparse():
        fault = "no regular file"
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
                fault = "no regular file"
            elif member.flag_bits & 1:
                fault = "encrypted"
            elif member.header_offset < 0:
                fault = "it lies before the beginning of the archive"
            elif member.file_size > max(_BOMB_BYTES, member.compress_size * _BOMB_RATIO):
                fault = _BOMB
            part = ("zip", member.header_offset, member.compress_size, member.compress_type, member.CRC)
            yield Found(_zip_name(member), member.file_size, part, fault)


def _zip_name(member: zipfile.ZipInfo) -> str:
    """A member's name. Without the flag that says UTF-8 it should be in code page 437; macOS and others leave out the flag,
    and no text of that code page that means anything is UTF-8 by chance."""
    if member.flag_bits & _UTF_8 or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


# ---------------------------------------------------------------- reading

_open: dict[str, BinaryIO] = {}  # of this process: archives stay open from one member to the next


def read(path: str, part: tuple, size: int) -> bytes:
    """The content of a member, of `size` bytes, where a listing said that it is. Raises one of READ_ERRORS."""
    kind, offset, *packing = part
    if path not in _open:
        file = open(path, "rb")
        _open[path] = file if kind == "zip" else _unpacked(file, path)
    try:
        file = _open[path]
        file.seek(offset)
        return _read_zipped(file, size, *packing) if kind == "zip" else file.read(size)
    except READ_ERRORS:
        _open.pop(path).close()  # a stream that failed is of no more use
        raise


def close_all() -> None:
    """Closes the archives that this process has open; for one that reads another archive under the same name."""
    while _open:
        _open.popitem()[1].close()


def _read_zipped(file: BinaryIO, size: int, packed: int, method: int, checksum: int) -> bytes:
    """The member whose own header begins where `file` stands. Gives `size` bytes at the most, whatever was packed."""
    head = file.read(_ZIP_HEADER.size)
    if len(head) < _ZIP_HEADER.size or head[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no member is where the directory says")
    _, name, extra = _ZIP_HEADER.unpack(head)
    file.seek(name + extra, os.SEEK_CUR)
    info = zipfile.ZipInfo()
    info.file_size, info.compress_size, info.compress_type, info.CRC = size, packed, method, checksum
    with zipfile.ZipExtFile(file, "r", info) as member:
        return member.read(size + 1)  # one more: the checksum is looked at behind the last byte
