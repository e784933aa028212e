"""Labeled images in class folders: listing and checking."""

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
    """How image folders are read.

    Attributes:
      follow_links: whether links that lead out of a folder are followed.
      max_corrupt_fraction: maximum fraction of unreadable images, which are skipped.
    """

    follow_links: bool = False
    max_corrupt_fraction: float = 0.05

    def __post_init__(self):
        if not 0 <= self.max_corrupt_fraction <= 1:
            raise UserError(f"--max-corrupt-fraction is {self.max_corrupt_fraction:g}; it must be in [0, 1]")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a `Reading`."""
    parser.add_argument("--follow-links", action="store_true", help="follow links that lead out of an image folder")
    parser.add_argument("--max-corrupt-fraction", type=float, default=Reading.max_corrupt_fraction, metavar="F",
                        help="maximum fraction of unreadable images in a folder; default: %(default)s")  # fmt: skip


def reading_of(options: argparse.Namespace) -> Reading:
    """The `Reading` from the options of `add_options`."""
    return Reading(options.follow_links, options.max_corrupt_fraction)


Kind = tuple[tuple[str, ...], str]  # bands, dtype


@dataclasses.dataclass(frozen=True)
class Found:
    """The images of a folder in the order of their keys (paths below the split folder)."""

    files: list[pathlib.Path]
    keys: list[str]
    labels: np.ndarray  # int64 [N], -1 without classes
    class_names: tuple[str, ...] | None
    messages: tuple[str, ...] = ()  # messages for the user
    # Bands and dtype of most images by the argument `colors` of `foreign.read`, if any can be read so; see `examine`.
    kinds: dict[bool | None, Kind] = dataclasses.field(default_factory=dict)

    def take(self, places: Sequence[int], messages: str) -> "Found":
        """The images at these indices, with an additional message."""
        files, keys = ([values[i] for i in places] for values in (self.files, self.keys))
        return dataclasses.replace(
            self, files=files, keys=keys, labels=self.labels[list(places)], messages=(*self.messages, messages)
        )


def list_images(folder: pathlib.Path, split: str, with_classes: bool | None, follow_links: bool = False) -> Found:
    """Lists the images of FOLDER/SPLIT/CLASS/..., or of FOLDER/SPLIT/... without classes.

    A few images outside the class folders are skipped.

    Args:
      with_classes: None: all images, with classes if each lies at CLASS/NAME; the split may be "" for the folder
        itself.
      follow_links: whether links that lead out of the folder are followed.

    Raises:
      UserError: no such folder, no images, too many images outside class folders.
    """
    place = folder / split
    if not place.is_dir() or (not split and with_classes is not None):
        held = several(sorted(path.name for path in folder.iterdir() if path.is_dir()), 5) or "no folder"
        raise UserError(f"{folder} has no folder '{printable(split)}' for the split; it has {held}")
    keys, messages = _keys(place, follow_links)
    files = [place.joinpath(*key.split("/")) for key in keys]
    strays = [number for number, key in enumerate(keys) if "/" not in key]
    names = tuple(sorted({key.split("/")[0] for key in keys if "/" in key}))
    needed = with_classes
    if with_classes is None:
        with_classes = all(key.count("/") == 1 for key in keys)
        if not with_classes and names:
            why = (
                f"images outside of them ({several(keys[i] for i in strays)})"
                if strays
                else "images in deeper folders; if the folders are splits, choose one with --split"
            )
            messages += (f"folders are not used as classes ({several(names)}): there are {why}",)
    if not with_classes:
        return Found(files, keys, np.full(len(files), -1, np.int64), None, messages)
    if strays and not classes.few(len(strays), len(keys)):
        raise UserError(
            f"{printable(files[strays[0]])} is not in a class folder, like {len(strays) - 1:,} other images of "
            f"{len(keys):,}; move them into class folders, or pass a label table with --labels"
        )
    classes.check(names, place)
    empty = sorted(path.name for path in place.iterdir() if path.is_dir() and path.name not in names)
    if empty and needed:
        links = "".join(f"; {line}" for line in messages if "--follow-links" in line)
        raise UserError(f"the class folder {printable(place / empty[0])} has no images; add some or remove it{links}")
    messages += tuple(filter(None, [classes.lookalike_warning(names, place)]))
    if classes.look_like_splits(names):
        messages += (f"warning: the class folders of {printable(place)} look like splits: {several(names)}",)
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(key.split("/")[0], -1) for key in keys], np.int64)
    found = Found(files, keys, labels, names, messages)
    if not strays:
        return found
    sound = [number for number, key in enumerate(keys) if "/" in key]
    return found.take(sound, classes.outside_warning([str(place / keys[i]) for i in strays], names))


def _keys(place: pathlib.Path, follow_links: bool) -> tuple[list[str], tuple[str, ...]]:
    """The sorted names of the images below a folder, and messages about other files."""
    keys, out, endings = [], [], collections.Counter()
    for found in file_tree.files_below(place, follow_links):
        ending = pathlib.PurePosixPath(found.name).suffix.lower()
        if found.fault == file_tree.HIDDEN:
            continue
        if (
            found.fault is None
            and ending in foreign.ENDINGS
            and found.name.encode("utf-8", "replace").decode() != found.name
        ):
            out.append((found.name, "its name is not valid UTF-8"))  # as in conversions; CSV files could not store it
        elif found.fault is None and ending in foreign.ENDINGS:
            keys.append(found.name)
        elif found.fault is None:
            endings[ending or "no ending"] += 1
        else:
            out.append((found.name, found.fault))
    messages = [file_tree.links_out(place, out)]
    others = collections.Counter(fault for _, fault in out if fault != file_tree.LEADS_OUT) + endings
    if others:
        reasons = several(f"{reason} ({number:,})" for reason, number in others.most_common())
        messages.append(f"{others.total():,} files of {printable(place)} are skipped: {reasons}")
    messages = tuple(filter(None, messages))
    if not keys:
        raise UserError(
            f"{place} has no images (names ending in {' '.join(foreign.ENDINGS)}); pass the folder above its splits"
            + "".join(f"; {line}" for line in messages)
        )
    return sorted(keys), messages


def examine(found: Found, max_corrupt_fraction: float) -> tuple[Found, str]:
    """Reads and decodes every image once; returns the valid images and their fingerprint.

    Images whose number of bands or dtype differs from most others are invalid. The fingerprint is the hexadecimal
    SHA-256 over keys, classes and file contents.

    Raises:
      UserError: more than `max_corrupt_fraction` of the images are invalid. EnvironmentFault: the machine failed.
    """
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        looks = _without_odd(list(pool.map(_look, found.files)))
    faults = [(file, look.fault) for file, look in zip(found.files, looks, strict=True) if look.fault]
    if faults:
        shown = several(f"{file}: {fault}" for file, fault in faults)
        if len(faults) > max_corrupt_fraction * len(looks):
            raise UserError(
                f"{printable(faults[0][0])} cannot be read as an image ({printable(faults[0][1])}), like "
                f"{len(faults):,} of {len(looks):,} images; fix or remove them, or increase --max-corrupt-fraction "
                f"({max_corrupt_fraction:g})"
            )
        messages = f"warning: {len(faults):,} of {len(looks):,} images cannot be read and are skipped: {shown}"
        found = found.take([number for number, look in enumerate(looks) if not look.fault], messages)
        looks = [look for look in looks if not look.fault]
    changes = collections.Counter(change for look in looks for change in look.changes if change in foreign.CHANGES)
    lines = (
        f"changed on reading, {name}: {number:,} images {foreign.CHANGES[name]}"
        for name, number in changes.most_common()
    )
    found = dataclasses.replace(found, messages=(*found.messages, *lines), kinds=_most(looks))
    digest = hashlib.sha256(foreign.VERSION)  # cached features depend on how files are read
    for look, key, label in zip(looks, found.keys, found.labels, strict=True):
        digest.update(f"{key}\0{label}\0{look.digest}\n".encode("utf-8", "surrogateescape"))
    return found, digest.hexdigest()


class _Look(NamedTuple):
    """The check of a file: SHA-256, why it is not valid (or ""), the changes when read as colors, and (bands, dtype) by
    the argument `colors` of `foreign.read`."""

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
    # Values that cannot be read as colors may be valid for weights with other bands.
    sound = {colors: picture for colors, picture in found.items() if isinstance(picture, foreign.Picture)}
    if not sound:
        return _Look("", str(found[None]))
    kinds = {colors: (picture.bands, picture.pixels.dtype.name) for colors, picture in sound.items()}
    return _Look(hashlib.sha256(encoded).hexdigest(), "", next(iter(sound.values())).changes, kinds)


def _most(looks: Sequence[_Look]) -> dict[bool | None, Kind]:
    """The most frequent (bands, dtype), by the argument `colors` of `foreign.read`."""
    counts = {
        colors: collections.Counter(look.kinds[colors] for look in looks if colors in look.kinds)
        for colors in (None, False)
    }
    return {colors: count.most_common(1)[0][0] for colors, count in counts.items() if count}


def _without_odd(looks: list[_Look]) -> list[_Look]:
    """Marks images whose shape differs from most others in either reading as invalid."""
    shape = lambda kind: (len(kind[0]), kind[1])  # noqa: E731  band names may differ
    most = {colors: shape(kind) for colors, kind in _most(looks).items()}
    for place, look in enumerate(looks):
        own = {colors: shape(kind) for colors, kind in look.kinds.items()}
        if own and not any(own[colors] == most[colors] for colors in own):
            count, dtype = own.get(None, own.get(False))
            others = most.get(None, most.get(False))
            fault = f"{count} bands of {dtype}, but most images have {others[0]} of {others[1]}"
            looks[place] = look._replace(fault=fault)
    return looks
