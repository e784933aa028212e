"""Where images come from: a folder, or archives that are read as streams and never unpacked.

A listing accounts for every file that it meets: as a candidate, or as rejected with a reason. Nothing is read that lies
outside the folder or archive: links that lead out of a folder are rejected, links to folders are not followed, and of an
archive no member is taken that is a link or whose name leads elsewhere.
"""

import array
import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from data_prep.shards import Item
from pera_jax.data.codecs import ImageDecodeError
from pera_jax.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_TAR_BLOCK = 512
_LARGEST = 1 << 30  # bytes of one file; a larger one is no image of a training set, and must fit into memory
_READ_ERRORS = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError,
                NotImplementedError)  # fmt: skip


class Inventory(Sequence[Item]):
    """The candidates of a conversion, of a folder in the order of their keys, of archives in the order of the members;
    without an object for each: there may be millions.

    `inventory[i]` makes an Item. After `label`, items have labels.
    """

    def __init__(self, places: list[pathlib.Path]):
        self.places = places
        self.keys: list[str] = []
        self.sizes = array.array("q")
        self.parts: list[tuple | None] = []  # of archives
        self.of = array.array("i")  # which of the places
        self.rejected: list[tuple[str, str]] = []  # (name, reason)
        self.class_names: list[str] | None = None
        self._labels: array.array | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place, part, key = self.places[self.of[index]], self.parts[index], self.keys[index]
        path = os.path.join(place, *key.split("/")) if part is None else str(place)
        label = None if self._labels is None else self._labels[index]
        return Item(path, key, label, self.sizes[index], part)

    def label(self) -> None:
        """Makes the topmost folders the classes, if every candidate lies in one. In archives a folder that holds all of
        them is passed over first, as long as there are folders in it."""
        split = [key.split("/")[:-1] for key in self.keys]
        skip = 0
        while self.parts[0] is not None and all(len(f) > skip + 1 and f[skip] == split[0][skip] for f in split):
            skip += 1
        if any(len(folders) <= skip for folders in split):
            return
        self.class_names = sorted({folders[skip] for folders in split})
        numbers = {name: i for i, name in enumerate(self.class_names)}
        self._labels = array.array("i", (numbers[folders[skip]] for folders in split))

    def digest(self, described: list) -> str:
        """SHA-256 over `described`, JSON, and the keys, sizes and parts of all candidates, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode("ascii"))
        for key, size, part in zip(self.keys, self.sizes, self.parts, strict=True):
            digest.update(f"{key}\0{size}\0{part}\n".encode())
        return digest.hexdigest()

    def _sort(self) -> None:
        order = sorted(range(len(self)), key=self.keys.__getitem__)
        self.keys, self.parts = [self.keys[i] for i in order], [self.parts[i] for i in order]
        self.sizes, self.of = (array.array(a.typecode, (a[i] for i in order)) for a in (self.sizes, self.of))


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """A file as a listing meets it."""

    name: str
    size: int
    part: tuple | None
    fault: str | None  # why it is no candidate whatever its name


def is_archive(path: pathlib.Path) -> bool:
    """Whether the name ends as an archive's does."""
    return path.name.lower().endswith(ARCHIVES)


def take_stock(inputs: list[pathlib.Path]) -> Inventory:
    """Lists a folder, or one or several archives; the keys of several begin with the archive's name.

    Raises UserError: nothing there, a folder that cannot be read, a damaged archive, no image, several folders.
    """
    for path in inputs:
        if not path.exists():
            raise UserError(f"--input {path} does not exist; name a folder of images or an archive")
        if not path.is_dir() and not is_archive(path):
            raise UserError(f"--input {path} is neither a folder nor an archive ({' '.join(ARCHIVES)})")
        if path.is_dir() and len(inputs) > 1:
            raise UserError(f"--input {path} is a folder beside others; name one folder, or only archives")
    if len({path.name for path in inputs}) < len(inputs):
        raise UserError("two archives of --input have the same name; rename one, keys begin with it")
    inventory = Inventory(inputs)
    for place, path in enumerate(inputs):
        prefix = f"{path.name}/" if len(inputs) > 1 else ""
        for found in files_below(path) if path.is_dir() else _archive(path):
            _take(inventory, found, place, prefix)
    if not inventory.keys:
        raise UserError(
            f"--input {inputs[0]} holds no image (names ending in {' '.join(e[1:] for e in ENDINGS)}); "
            f"{len(inventory.rejected)} other files are there"
        )
    if inputs[0].is_dir():
        inventory._sort()  # of compressed archives any other order than their own would be read again and again
    return inventory


def _take(inventory: Inventory, found: _Found, place: int, prefix: str) -> None:
    name, ending = prefix + found.name, os.path.splitext(found.name)[1].lower()
    try:
        name.encode("utf-8")
        fault = found.fault
    except UnicodeEncodeError:
        name, fault = name.encode("utf-8", "backslashreplace").decode(), "its name is not valid UTF-8"
    if not fault and ending not in ENDINGS:
        fault = f"ending {ending}" if ending else "no ending"
    if not fault and found.size > _LARGEST:
        fault = f"larger than {_LARGEST >> 30} GiB"
    if fault:
        inventory.rejected.append((name, fault))
        return
    inventory.keys.append(name)
    inventory.sizes.append(found.size)
    inventory.parts.append(found.part)
    inventory.of.append(place)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def files_below(root: pathlib.Path) -> Iterator[_Found]:
    """The files below a folder; hidden ones are passed over. Raises UserError where it cannot be read."""
    inside = os.path.realpath(root)

    def walk(path: str, prefix: str) -> Iterator[_Found]:
        with os.scandir(path) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    yield _link(entry, name)
                elif entry.is_dir():
                    yield from walk(entry.path, f"{name}/")
                elif entry.is_file():
                    yield _Found(name, entry.stat().st_size, None, None)
                else:
                    yield _Found(name, 0, None, "no regular file")

    def _link(entry: os.DirEntry, name: str) -> _Found:
        target = os.path.realpath(entry.path)
        if target != inside and not target.startswith(os.path.join(inside, "")):
            return _Found(name, 0, None, "a link that leads out of the folder")
        if not os.path.exists(target):
            return _Found(name, 0, None, "a link that leads nowhere")
        if not stat.S_ISREG(os.stat(target).st_mode):
            return _Found(name, 0, None, "a link to a folder, which is listed by itself")
        return _Found(name, os.path.getsize(target), None, None)

    try:
        yield from walk(str(root), "")
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _archive(path: pathlib.Path) -> Iterator[_Found]:
    """The members of an archive that are no folders; hidden ones are passed over."""
    seen = set()
    try:
        for found in _zip(path) if path.name.lower().endswith(".zip") else _tar(path):
            name = found.name.removeprefix("./")
            steps = name.replace("\\", "/").split("/")
            if name.startswith(("/", "\\")) or ".." in steps or ":" in steps[0]:
                yield _Found(name, 0, None, "its name leads out of the archive")
            elif name in seen:
                yield _Found(name, 0, None, "another member has this name")
            elif not _hidden(name):
                seen.add(name)
                yield _Found(name, found.size, found.part, found.fault)
    except _READ_ERRORS as error:
        raise UserError(f"archive {path} cannot be read ({error or type(error).__name__}); fetch it again") from error


def _tar(path: pathlib.Path) -> Iterator[_Found]:
    plain = path.name.lower().endswith(".tar")
    end = path.stat().st_size
    with _decompressed(path) as file, tarfile.open(fileobj=file, mode="r:" if plain else "r|") as tar:
        number = -1
        while (member := tar.next()) is not None:
            tar.members = []  # it would keep them all
            number += 1
            if member.isdir():
                continue
            fault = None
            if not member.isreg() or member.issparse():
                fault = "a link" if member.issym() or member.islnk() else "no regular file"
            elif plain and member.offset_data + member.size > end:
                fault = "cut off with the archive"
            yield _Found(member.name, member.size, ("at", member.offset_data) if plain else ("nth", number), fault)
        # tarfile takes a cut between two members, or in a header, for the end.
        if plain:
            file.seek(tar.offset)
            if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
                raise EOFError("it has no end mark: it is cut off")
        while file.read(1 << 20):  # to the end of the compressed file, where its checksum is
            pass


def _decompressed(path: str | pathlib.Path) -> BinaryIO:
    """A tar file's content; the packed ones raise EOFError where they are cut off."""
    kind = os.path.splitext(str(path).lower())[1]
    return {".tar": open, ".bz2": bz2.open, ".xz": lzma.open}.get(kind, gzip.open)(path, "rb")


def _zip(path: pathlib.Path) -> Iterator[_Found]:
    with zipfile.ZipFile(path) as archive:
        for number, member in enumerate(archive.infolist()):
            if member.is_dir():
                continue
            fault = None
            if stat.S_ISLNK(member.external_attr >> 16):
                fault = "a link"
            elif member.flag_bits & 1:
                fault = "encrypted"
            yield _Found(member.filename, member.file_size, ("zip", number), fault)


# ---------------------------------------------------------------- reading

_open: dict[str, object] = {}  # of this process: archives stay open from one item to the next


def read(item: Item) -> bytes:
    """The bytes of one candidate. Raises ImageDecodeError where they cannot be read."""
    try:
        if item.part is None:
            return pathlib.Path(item.path).read_bytes()
        kind, where = item.part
        if kind == "at":
            with open(item.path, "rb") as file:
                file.seek(where)
                return file.read(item.size)
        if kind == "zip":
            if item.path not in _open:
                _open[item.path] = zipfile.ZipFile(item.path)
            archive = _open[item.path]
            with archive.open(archive.infolist()[where]) as file:
                return file.read(item.size + 1)
        return _Stream.of(item.path, where).read(where)
    except _READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error or type(error).__name__
        raise ImageDecodeError(f"cannot be read: {reason}") from error


class _Stream:
    """A compressed tar, which can only be read forward. Each process reads it once: its jobs come in order."""

    def __init__(self, path: str):
        self._tar = tarfile.open(fileobj=_decompressed(path), mode="r|")
        self.next = 0

    @classmethod
    def of(cls, path: str, number: int) -> "_Stream":
        """The open stream if member `number` is still ahead, else a new one."""
        stream = _open.get(path)
        if stream is None or stream.next > number:
            stream = _open[path] = cls(path)
        return stream

    def read(self, number: int) -> bytes:
        while True:
            member = self._tar.next()
            self._tar.members = []
            self.next += 1
            if member is None:
                raise EOFError("the archive ends before it")
            if self.next > number:
                return self._tar.extractfile(member).read()
