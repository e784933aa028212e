"""Where images come from: a folder, or archives (`data_prep.archives`).

A listing accounts for every file that it meets: as a candidate, or as rejected with a reason. Nothing is read that
lies outside the folder or archive: links that lead out of a folder are rejected, and of an archive no member is taken
that is a link or whose name leads elsewhere.
"""

import array
import collections
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Sequence

from data_prep import archives
from data_prep.archives import HIDDEN, Found
from data_prep.shards import Item
from pera_jax.common import classes, environment
from pera_jax.common.text import printable
from pera_jax.data.codecs import ImageDecodeError
from pera_jax.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
_NUMBERS = 4  # that a member of an archive is found by, at the most


class Names(Sequence[str]):
    """A list of names that takes no more memory than their letters and 8 bytes for each."""

    def __init__(self, names: Iterable[str] = ()):
        self._letters, self._ends = bytearray(), array.array("Q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Raises UnicodeEncodeError where the name is not valid UTF-8."""
        self._letters += name.encode("utf-8")
        self._ends.append(len(self._letters))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._letters[self._ends[index] : self._ends[index + 1]].decode("utf-8")


class Inventory(Sequence[Item]):
    """The candidates of a conversion, of a folder in the order of their keys, of archives in the order of the members;
    without an object for each: there may be millions.

    `inventory[i]` makes an Item, a slice a list of them. After `label`, items have labels.
    """

    def __init__(self, inputs: list[pathlib.Path]):
        self.inputs = inputs
        self.keys = Names()
        self.rejected: list[tuple[str, str]] = []  # (name, reason)
        self.backslashes = collections.Counter()  # names that have some, by whether they were taken for folders
        self.class_names: list[str] | None = None
        self._sizes, self._input = array.array("q"), array.array("i")
        self._kinds, self._parts = bytearray(), array.array("Q")  # of archives: _NUMBERS for each candidate
        self._labels: array.array | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, part, key = self.inputs[self._input[index]], self._part(index), self.keys[index]
        path = os.path.join(path, *key.split("/")) if part is None else str(path)
        label = None if self._labels is None else self._labels[index]
        return Item(path, key, label, self._sizes[index], part)

    def _part(self, index: int) -> tuple | None:
        if not self._kinds:
            return None
        numbers = self._parts[_NUMBERS * index : _NUMBERS * (index + 1)]
        return ("zip", *numbers) if self._kinds[index] else ("tar", numbers[0])

    def take(self, found: Found, place: int, prefix: str) -> None:
        """Adds a file of the input number `place` to the candidates, or to what is rejected."""
        name, fault, ending = prefix + found.name, found.fault, os.path.splitext(found.name)[1].lower()
        if found.backslashes or "\\" in name:
            self.backslashes[found.backslashes] += 1
        safe = name.encode("utf-8", "backslashreplace").decode()
        if safe != name:
            fault = "its name is not valid UTF-8"
        if not fault and ending not in ENDINGS:
            fault = f"ending {ending}" if ending else "no ending"
        if not fault and found.size > archives.LARGEST:
            fault = f"larger than {archives.LARGEST >> 30} GiB"
        if fault:
            self.rejected.append((safe, fault))
            return
        self.keys.append(name)
        self._sizes.append(found.size)
        self._input.append(place)
        if found.part:
            kind, *numbers = found.part
            self._kinds.append(kind == "zip")
            self._parts.extend(numbers + [0] * (_NUMBERS - len(numbers)))

    def label(self) -> None:
        """Makes the topmost folders the classes, as `classes.check` allows, if every candidate lies in one. In each archive the folders that hold
        all of its candidates are passed over first, as long as there are folders in them."""
        labels, numbers = array.array("i"), {}  # numbered as they come, as yet
        for key, skip in zip(self.keys, self._around(), strict=True):
            steps = key.split("/")
            if len(steps) <= skip + 1:
                return
            labels.append(numbers.setdefault(steps[skip], len(numbers)))
        self.class_names = sorted(numbers)
        classes.check(self.class_names, self.inputs[0])
        places = {numbers[name]: i for i, name in enumerate(self.class_names)}
        self._labels = array.array("i", map(places.__getitem__, labels))

    def _around(self) -> Iterator[int]:
        """For each candidate, how many folders of its key are no class; the name of one of several archives is none."""
        if not self._kinds:
            return iter(bytes(len(self)))
        common, depth = {}, {}  # of each archive: the folders around all of its candidates, and the fewest around one
        for key, place in zip(self.keys, self._input, strict=True):
            steps = key.split("/")[:-1]
            shared = common.setdefault(place, steps)
            depth[place] = min(depth.get(place, len(steps)), len(steps))
            while shared != steps[: len(shared)]:
                shared = common[place] = shared[:-1]
        least = int(len(self.inputs) > 1)
        skip = {place: max(least, min(len(common[place]), depth[place] - 1)) for place in common}
        return map(skip.__getitem__, self._input)

    def digest(self, described: list) -> str:
        """SHA-256 over `described`, JSON, and what the candidates are known by, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode("ascii"))
        for i, (key, size) in enumerate(zip(self.keys, self._sizes, strict=True)):
            digest.update(f"{key}\0{size}\0{self._part(i)}\n".encode())
        return digest.hexdigest()

    def sort(self) -> None:
        """Puts the candidates of a folder into the order of their keys."""
        keys = list(self.keys)
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.keys = Names(keys[i] for i in order)
        self._sizes = array.array("q", (self._sizes[i] for i in order))
        self.rejected.sort()


def take_stock(inputs: list[pathlib.Path]) -> Inventory:
    """Lists a folder, or one or several archives; the keys of several begin with the archive's name.

    Raises UserError: nothing there, a folder that cannot be read, a damaged archive, no image, several folders.
    """
    for path in inputs:
        if not path.exists():
            raise UserError(f"--input {path} does not exist; name a folder of images or an archive")
        if not path.is_dir() and not (path.is_file() and archives.is_archive(path)):
            raise UserError(f"--input {path} is neither a folder nor an archive ({' '.join(archives.ENDINGS)})")
        if path.is_dir() and len(inputs) > 1:
            raise UserError(f"--input {path} is a folder beside others; name one folder, or only archives")
    if len({path.name for path in inputs}) < len(inputs):
        raise UserError("two archives of --input have the same name; rename one, keys begin with it")
    inventory = Inventory(inputs)
    for place, path in enumerate(inputs):
        prefix = f"{path.name}/" if len(inputs) > 1 else ""
        for found in files_below(path) if path.is_dir() else archives.members(path):
            inventory.take(found, place, prefix)
    if not inventory.keys:
        raise UserError(
            f"--input {inputs[0]} holds no image (names ending in {' '.join(e[1:] for e in ENDINGS)}); "
            f"{len(inventory.rejected)} other files are there"
        )
    if inputs[0].is_dir():
        inventory.sort()  # of packed archives any other order than their own would be unpacked again and again
    return inventory


def files_below(root: pathlib.Path) -> Iterator[Found]:
    """Every file below a folder, links inside it included. Raises UserError where the folder cannot be read.

    A hidden folder is one entry. A link to a folder is followed, but none to a folder that it lies in, and no folder is
    entered by links twice: so there is an end, and no file is found more than twice because of links to folders.
    """
    inside, links, entered = os.path.realpath(root), [], set()
    waiting = [(str(root), "", None)]  # folders: path, name with /, real path where a link led there
    try:
        while waiting or links:
            if not waiting:
                links.sort(key=lambda link: link[1], reverse=True)  # an order that does not depend on the disk's
                path, name, real = links.pop()
                around = os.path.join(os.path.realpath(os.path.dirname(path)), "")
                if around.startswith(real + os.sep):
                    yield Found(name[:-1], 0, None, "a link to a folder that it lies in")
                    continue
                waiting.append((path, name, real))
            path, prefix, real = waiting.pop()
            if real is not None:
                if real in entered:
                    yield Found(prefix[:-1], 0, None, "a folder that was entered by a link before")
                    continue
                entered.add(real)
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name) if real else entries:
                    name = prefix + entry.name
                    if entry.name.startswith("."):
                        yield Found(name, 0, None, HIDDEN)
                    elif entry.is_symlink():
                        found, folder = _link(entry, name, inside)
                        if folder:
                            links.append((entry.path, f"{name}/", folder))
                        else:
                            yield found
                    elif entry.is_dir():
                        waiting.append((entry.path, f"{name}/", real and os.path.join(real, entry.name)))
                    elif entry.is_file():
                        yield Found(name, entry.stat().st_size, None, None)
                    else:
                        yield Found(name, 0, None, "no regular file")
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _link(entry: os.DirEntry, name: str, inside: str) -> tuple[Found | None, str | None]:
    """A symbolic link: (the file that it is, or why it is none; None), or (None, the real path of a folder)."""
    target = os.path.realpath(entry.path)
    if target != inside and not target.startswith(os.path.join(inside, "")):
        return Found(name, 0, None, "a link that leads out of the folder"), None
    try:
        status = os.stat(target)
    except OSError:  # nothing there, or links that lead to each other
        return Found(name, 0, None, "a link that leads nowhere"), None
    if stat.S_ISDIR(status.st_mode):
        return None, target
    fault = None if stat.S_ISREG(status.st_mode) else "no regular file"
    return Found(name, status.st_size, None, fault), None


def read(item: Item) -> bytes:
    """The bytes of one candidate. Raises ImageDecodeError where they cannot be read, EnvironmentFault."""
    try:
        return environment.patiently(lambda: _bytes(item), f"{printable(item.path)} cannot be read")
    except archives.READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error or type(error).__name__
        raise ImageDecodeError(f"cannot be read: {reason}") from error


def _bytes(item: Item) -> bytes:
    try:
        if item.part is None:
            return pathlib.Path(item.path).read_bytes()
        return archives.read(item.path, item.part, item.size)
    except PermissionError as error:  # a fault of this file alone
        raise ImageDecodeError(f"cannot be read: {error.strerror}") from error
