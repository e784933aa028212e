"""Images in class folders."""

import argparse
import collections
import concurrent.futures
import dataclasses
import errno
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pera_jax.common import classes, environment
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several
from pera_jax.data import file_tree
from pera_jax.data.images import foreign


@dataclasses.dataclass(frozen=True)
class Reading:
    """How folders of images are read.

    Attributes:
      follow_links: whether links that lead out of a folder are followed.
      max_corrupt_share: the largest part of the images that may be unreadable; these are left out.
    """

    follow_links: bool = False
    max_corrupt_share: float = 0.05

    def __post_init__(self):
        if not 0 <= self.max_corrupt_share <= 1:
            raise UserError(f"--max-corrupt-share is {self.max_corrupt_share:g}; it must be from 0 to 1")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a `Reading`."""
    parser.add_argument("--follow-links", action="store_true", help="of a folder of images also links that lead out of it")
    parser.add_argument("--max-corrupt-share", type=float, default=Reading.max_corrupt_share, metavar="S",
                        help="largest part of a folder's images that may be unreadable; default: %(default)s")  # fmt: skip


def reading_of(options: argparse.Namespace) -> Reading:
    """The `Reading` that the options of `add_options` ask for."""
    return Reading(options.follow_links, options.max_corrupt_share)


Kind = tuple[tuple[str, ...], str]  # bands, dtype


@dataclasses.dataclass(frozen=True)
class Found:
    """The images of a folder in the order of their keys, paths below the folder of the split."""

    files: list[pathlib.Path]
    keys: list[str]
    labels: np.ndarray  # int64 [N], -1 without classes
    class_names: tuple[str, ...] | None
    told: tuple[str, ...] = ()  # what a user must know of it, a line each
    # Of most of them, by the argument `colours` of `foreign.read`; without the readings that none has. See `examine`.
    kinds: dict[bool | None, Kind] = dataclasses.field(default_factory=dict)

    def take(self, places: Sequence[int], told: str) -> "Found":
        """The images at these places."""
        files, keys = ([values[i] for i in places] for values in (self.files, self.keys))
        return dataclasses.replace(self, files=files, keys=keys, labels=self.labels[list(places)], told=(*self.told, told))


def list_images(folder: pathlib.Path, split: str, with_classes: bool | None, follow_links: bool = False) -> Found:
    """The images of FOLDER/SPLIT/CLASS/..., or of FOLDER/SPLIT/... without classes. A few beside the folders of the classes
    are left out.

    Args:
      with_classes: None: all images, with classes where each lies at CLASS/NAME; the split may be "", the folder itself.
      follow_links: whether links that lead out of the folder are followed.

    Raises:
      UserError: no such folder, no image, images beside class folders.
    """
    place = folder / split
    if not place.is_dir() or (not split and with_classes is not None):
        held = several(sorted(path.name for path in folder.iterdir() if path.is_dir()), 5) or "no folder"
        raise UserError(f"{folder} has no folder '{printable(split)}' for the split; it has {held}")
    keys, told = _keys(place, follow_links)
    files = [place.joinpath(*key.split("/")) for key in keys]
    strays = [number for number, key in enumerate(keys) if "/" not in key]
    names = tuple(sorted({key.split("/")[0] for key in keys if "/" in key}))
    needed = with_classes
    if with_classes is None:
        with_classes = all(key.count("/") == 1 for key in keys)
        if not with_classes and names:
            why = f"{several(keys[i] for i in strays)} beside them" if strays else "images deeper than in those; name a split with --split where they are splits"
            told += (f"no classes are taken from the folders {several(names)}: there are {why}",)
    if not with_classes:
        return Found(files, keys, np.full(len(files), -1, np.int64), None, told)
    if strays and not classes.few(len(strays), len(keys)):
        raise UserError(
            f"{printable(files[strays[0]])} lies in no class folder, and so do {len(strays) - 1:,} other images of "
            f"{len(keys):,}; move them into one, or give a table with --labels"
        )
    classes.check(names, place)
    empty = sorted(path.name for path in place.iterdir() if path.is_dir() and path.name not in names)
    if empty and needed:
        links = "".join(f"; {line}" for line in told if "--follow-links" in line)
        raise UserError(f"the class folder {printable(place / empty[0])} holds no image; fill or remove it{links}")
    told += tuple(filter(None, [classes.alike(names, place)]))
    if classes.look_like_splits(names):
        told += (f"warning: the classes of {printable(place)} are {several(names)}, which look like splits",)
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(key.split("/")[0], -1) for key in keys], np.int64)
    found = Found(files, keys, labels, names, told)
    if not strays:
        return found
    sound = [number for number, key in enumerate(keys) if "/" in key]
    return found.take(sound, classes.beside([str(place / keys[i]) for i in strays], names))


def _keys(place: pathlib.Path, follow_links: bool) -> tuple[list[str], tuple[str, ...]]:
    """The names of the images below a folder, ascending, and what to tell of what is no image."""
    keys, out, endings = [], [], collections.Counter()
    for found in file_tree.files_below(place, follow_links):
        ending = pathlib.PurePosixPath(found.name).suffix.lower()
        if found.fault == file_tree.HIDDEN:
            continue
        if found.fault is None and ending in foreign.ENDINGS and found.name.encode("utf-8", "replace").decode() != found.name:
            out.append((found.name, "its name is not valid UTF-8"))  # as in conversions; no table could hold it
        elif found.fault is None and ending in foreign.ENDINGS:
            keys.append(found.name)
        elif found.fault is None:
            endings[ending or "no ending"] += 1
        else:
            out.append((found.name, found.fault))
    told = [file_tree.links_out(place, out)]
    others = collections.Counter(fault for _, fault in out if fault != file_tree.LEADS_OUT) + endings
    if others:
        reasons = several(f"{reason} ({number:,})" for reason, number in others.most_common())
        told.append(f"{others.total():,} files of {printable(place)} stay out: {reasons}")
    told = tuple(filter(None, told))
    if not keys:
        raise UserError(
            f"{place} holds no image (names ending in {' '.join(foreign.ENDINGS)}); name the folder above its splits"
            + "".join(f"; {line}" for line in told)
        )
    return sorted(keys), told


def examine(found: Found, max_corrupt_share: float) -> tuple[Found, str]:
    """Reads and decodes every image once: (those that can be and are like most others, the fingerprint of these).

    The fingerprint is SHA-256 over keys, classes and the bytes of the files, in hexadecimal.

    Raises:
      UserError: a larger share than that cannot be read; EnvironmentFault where the machine fails.
    """
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        looks = _without_odd(list(pool.map(_look, found.files)))
    faults = [(file, look.fault) for file, look in zip(found.files, looks, strict=True) if look.fault]
    if faults:
        shown = several(f"{file}: {fault}" for file, fault in faults)
        if len(faults) > max_corrupt_share * len(looks):
            raise UserError(
                f"{printable(faults[0][0])} cannot be read as an image ({printable(faults[0][1])}), and so with "
                f"{len(faults):,} of {len(looks):,}; mend or remove them, or allow a larger --max-corrupt-share than "
                f"{max_corrupt_share:g}"
            )
        told = f"warning: {len(faults):,} of {len(looks):,} images cannot be read and are left out: {shown}"
        found = found.take([number for number, look in enumerate(looks) if not look.fault], told)
        looks = [look for look in looks if not look.fault]
    changes = collections.Counter(change for look in looks for change in look.changes if change in foreign.CHANGES)
    lines = (f"read as pictures, {name}: {number:,} images {foreign.CHANGES[name]}" for name, number in changes.most_common())
    found = dataclasses.replace(found, told=(*found.told, *lines), kinds=_most(looks))
    digest = hashlib.sha256(foreign.VERSION)  # features are kept by it, and depend on how files are read
    for look, key, label in zip(looks, found.keys, found.labels, strict=True):
        digest.update(f"{key}\0{label}\0{look.digest}\n".encode("utf-8", "surrogateescape"))
    return found, digest.hexdigest()


class _Look(NamedTuple):
    """What there is to say of a file: its SHA-256, why it is no image, or "", what its reading as a picture changes, and
    (bands, dtype) by the argument `colours` of `foreign.read`."""

    digest: str
    fault: str
    changes: tuple[str, ...] = ()
    kinds: dict[bool | None, Kind] = {}


def _look(file: pathlib.Path) -> _Look:
    try:
        encoded = file.read_bytes()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT):
            environment.raise_if_fault(error, f"{printable(file)} cannot be read")
        return _Look("", error.strerror or type(error).__name__)
    try:
        found = foreign.readings(encoded)
    except foreign.ImageDecodeError as error:
        return _Look("", str(error))
    # Sound values without a range may be what the weights take.
    sound = {colours: picture for colours, picture in found.items() if isinstance(picture, foreign.Picture)}
    if not sound:
        return _Look("", str(found[None]))
    kinds = {colours: (picture.bands, picture.pixels.dtype.name) for colours, picture in sound.items()}
    return _Look(hashlib.sha256(encoded).hexdigest(), "", next(iter(sound.values())).changes, kinds)


def _most(looks: Sequence[_Look]) -> dict[bool | None, Kind]:
    """(bands, dtype) that most of the images have, by the argument `colours` of `foreign.read`."""
    counts = {colours: collections.Counter(look.kinds[colours] for look in looks if colours in look.kinds) for colours in (None, False)}
    return {colours: count.most_common(1)[0][0] for colours, count in counts.items() if count}


def _without_odd(looks: list[_Look]) -> list[_Look]:
    """Images that are unlike most others in either reading have a fault."""
    shape = lambda kind: (len(kind[0]), kind[1])  # noqa: E731  names of bands may differ
    most = {colours: shape(kind) for colours, kind in _most(looks).items()}
    for place, look in enumerate(looks):
        own = {colours: shape(kind) for colours, kind in look.kinds.items()}
        if own and not any(own[colours] == most[colours] for colours in own):
            count, dtype = own.get(None, own.get(False))
            others = most.get(None, most.get(False))
            fault = f"{count} bands of {dtype}, and most images are {others[0]} of {others[1]}"
            looks[place] = look._replace(fault=fault)
    return looks
