"""Sources of images: a folder, or archives (`data_prep.inputs.archives`).

A listing accounts for every file: as a candidate, or as rejected with a reason. Nothing outside the folder or archive
is read: links that lead out of a folder are rejected unless requested, and so are archive members that are links or
whose names lead out of the archive.
"""

import array
import collections
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from data_prep.convert.shards import Item
from data_prep.inputs import archives
from pera_jax.common import classes, environment
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several
from pera_jax.data import file_tree
from pera_jax.data.codecs import ImageDecodeError
from pera_jax.data.file_tree import Found
from pera_jax.data.images import foreign

_NUMBERS = 4  # maximum number of integers that locate an archive member


class Names(Sequence[str]):
    """A compact list of names: 8 bytes per name in addition to its text."""

    def __init__(self, names: Iterable[str] = ()):
        self._letters, self._ends = bytearray(), array.array("Q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Raises UnicodeEncodeError if the name is not valid UTF-8."""
        self._letters += name.encode("utf-8")
        self._ends.append(len(self._letters))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._letters[self._ends[index] : self._ends[index + 1]].decode("utf-8")


class Inventory(Sequence[Item]):
    """The candidates of a conversion, sorted by key for a folder, in member order for archives.

    Compact, as there may be millions: `inventory[i]` creates an Item, a slice a list of Items. After `label`, items
    have labels.
    """

    def __init__(self, inputs: list[pathlib.Path]):
        self.inputs = inputs
        self.keys = Names()
        self.rejected: list[tuple[str, str]] = []  # (name, reason)
        self.backslashes = collections.Counter()  # names with backslashes, by whether they were read as folders
        self.class_names: list[str] | None = None
        self._sizes, self._input = array.array("q"), array.array("i")
        self._kinds, self._parts = bytearray(), array.array("Q")  # for archives: _NUMBERS per candidate
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
        """Adds a file of input `place` to the candidates or to the rejected files."""
        name, fault, ending = prefix + found.name, found.fault, os.path.splitext(found.name)[1].lower()
        if found.backslashes or "\\" in name:
            self.backslashes[found.backslashes] += 1
        safe = name.encode("utf-8", "backslashreplace").decode()
        if safe != name:
            fault = "its name is not valid UTF-8"
        if not fault and ending not in foreign.ENDINGS:
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

    def label(self) -> list[str]:
        """Uses the top-level folders as classes if nearly all candidates lie in one; rejects the few others.

        In archives, folders that contain all candidates are skipped first. Returns messages for the user. Raises
        UserError for invalid class names, see `classes.check`.
        """
        labels, numbers, strays = array.array("i"), {}, []  # numbered in order of appearance for now
        for index, (key, skip) in enumerate(zip(self.keys, self._around(), strict=True)):
            steps = key.split("/")
            if len(steps) <= skip + 1:
                strays.append(index)
            else:
                labels.append(numbers.setdefault(steps[skip], len(numbers)))
        if strays and not classes.few(len(strays), len(self)):
            warning = (
                f"warning: no classes, although there are the folders {several(sorted(numbers))}: outside of them "
            )
            return [f"{warning}lie {several([self.keys[i] for i in strays])}"] if numbers else []
        self.class_names = sorted(numbers)
        classes.check(self.class_names, self.inputs[0])
        places = {numbers[name]: i for i, name in enumerate(self.class_names)}
        messages = list(filter(None, [classes.lookalike_warning(self.class_names, self.inputs[0])]))
        if strays:
            names = [self.keys[i] for i in strays]
            messages.append(
                classes.outside_warning(names, self.class_names) + "; --no-labels includes all images, without classes"
            )
            self.rejected += [(name, "outside the class folders") for name in names]
            out = set(strays)
            self._reorder([i for i in range(len(self)) if i not in out])
        if classes.look_like_splits(self.class_names):
            inner = {key.split("/")[skip + 1] for key, skip in zip(self.keys, self._around(), strict=True)
                     if key.count("/") > skip + 1}  # fmt: skip
            holds = f", which contains {several(sorted(inner))}" if inner else ""
            messages.append(
                f"warning: the classes are {several(self.class_names)}, which look like splits; if they are, pass "
                f"--input {printable(self.inputs[0] / self.class_names[-1])}{holds}"
            )
        self._labels = array.array("i", map(places.__getitem__, labels))
        return messages

    def _around(self) -> Iterator[int]:
        """For each candidate, the number of leading folders of its key to skip before the class, including archive
        names."""
        if not self._kinds:
            return iter(bytes(len(self)))
        common, depths = {}, {}  # per archive: folders that contain all candidates, and counts by depth
        for key, place in zip(self.keys, self._input, strict=True):
            steps = key.split("/")[:-1]
            shared = common.setdefault(place, steps)
            depths.setdefault(place, collections.Counter())[len(steps)] += 1
            while shared != steps[: len(shared)]:
                shared = common[place] = shared[:-1]
        least, skip = int(len(self.inputs) > 1), {}
        for place, shared in common.items():
            beside = depths[place][len(shared)]  # candidates directly in the innermost common folder
            inner = len(shared) if classes.few(beside, depths[place].total()) else min(depths[place]) - 1
            skip[place] = max(least, min(len(shared), inner))
        return map(skip.__getitem__, self._input)

    def digest(self, described: list) -> str:
        """Hexadecimal SHA-256 over `described` (JSON) and key, size and location of all candidates."""
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode("ascii"))
        for i, (key, size) in enumerate(zip(self.keys, self._sizes, strict=True)):
            digest.update(f"{key}\0{size}\0{self._part(i)}\n".encode())
        return digest.hexdigest()

    def sort(self) -> None:
        """Sorts the candidates of a folder by key."""
        keys = list(self.keys)
        self._reorder(sorted(range(len(keys)), key=keys.__getitem__))
        self.rejected.sort()

    def _reorder(self, order: list[int]) -> None:
        """Keeps the candidates at these indices, in this order."""
        if self._kinds:
            self._parts = array.array(
                "Q", (self._parts[_NUMBERS * i + k] for i in order for k in range(_NUMBERS))
            )
            self._kinds = bytearray(self._kinds[i] for i in order)
        self._sizes = array.array("q", (self._sizes[i] for i in order))
        self._input = array.array("i", (self._input[i] for i in order))
        self.keys = Names(map(self.keys.__getitem__, order))


def take_stock(inputs: list[pathlib.Path], follow: bool = False) -> Inventory:
    """Lists a folder, or one or several archives; keys of several archives start with the archive name.

    Args:
      follow: whether to follow links that lead out of a folder.

    Raises UserError: missing input, an unreadable folder, a damaged archive, no images, several folders.
    """
    for path in inputs:
        if not path.exists():
            raise UserError(f"--input {path} does not exist; pass a folder of images or an archive")
        if not path.is_dir() and not (path.is_file() and archives.is_archive(path)):
            raise UserError(
                f"--input {path} is neither a folder nor an archive ({' '.join(archives.ENDINGS)}); pass one of these"
            )
        if path.is_dir() and len(inputs) > 1:
            raise UserError(
                f"--input {path} is one of several inputs, but a folder; pass a single folder, or only archives"
            )
    if len({path.name for path in inputs}) < len(inputs):
        raise UserError("two archives of --input have the same name; rename one, as keys start with it")
    inventory = Inventory(inputs)
    for place, path in enumerate(inputs):
        prefix = f"{path.name}/" if len(inputs) > 1 else ""
        for found in file_tree.files_below(path, follow) if path.is_dir() else archives.members(path):
            inventory.take(found, place, prefix)
    if not inventory.keys:
        raise UserError(
            f"--input {inputs[0]} has no images (names ending in {' '.join(e[1:] for e in foreign.ENDINGS)}), "
            f"but {len(inventory.rejected)} other files; pass a folder of images"
            + "".join(f"; {line}" for line in [file_tree.links_out(inputs[0], inventory.rejected)] if line)
        )
    if inputs[0].is_dir():
        inventory.sort()  # compressed archives must be read in their own order
    return inventory


def read(item: Item) -> bytes:
    """The content of one candidate. Raises ImageDecodeError if it cannot be read, EnvironmentFault."""
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
    except PermissionError as error:  # concerns only this file
        raise ImageDecodeError(f"cannot be read: {error.strerror}") from error
