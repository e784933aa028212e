"""The files below a folder, links included: the one listing of what conversions, probes and exports read."""

import os
import pathlib
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several

HIDDEN = "its name, or that of a folder around it, begins with a dot"
LEADS_OUT = "a link that leads out of the folder"


class Found(NamedTuple):
    """A file as a listing meets it: its name, size in bytes, where it is (None in folders), why it is no candidate
    whatever its name (None: it may be one), and whether backslashes in its name were taken for the slashes of folders."""

    name: str
    size: int
    part: tuple | None
    fault: str | None
    backslashes: bool = False


def links_out(root: object, rejected: Iterable[tuple[str, str | None]]) -> str:
    """What to tell of links that were left out, of (name, fault); "" where there are none."""
    names = [name for name, fault in rejected if fault == LEADS_OUT]
    if not names:
        return ""
    lead, stay = ("link leads", "stays") if len(names) == 1 else ("links lead", "stay")
    return f"{len(names):,} {lead} out of {printable(root)} and {stay} out: {several(names)}; --follow-links takes them"


def files_below(root: pathlib.Path, follow: bool = False) -> Iterator[Found]:
    """Every file below a folder, links inside it included. Raises UserError where the folder cannot be read.

    Args:
      follow: whether links that lead out of the folder are followed like those that stay in it.

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
                if around.startswith(os.path.join(real, "")):
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
                        found, folder = _link(entry, name, None if follow else inside)
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
        raise UserError(f"cannot read {printable(error.filename)}: {error.strerror}") from error


def _link(entry: os.DirEntry, name: str, inside: str | None) -> tuple[Found | None, str | None]:
    """A symbolic link: (the file that it is, or why it is none; None), or (None, the real path of a folder)."""
    target = os.path.realpath(entry.path)
    if inside is not None and target != inside and not target.startswith(os.path.join(inside, "")):
        return Found(name, 0, None, LEADS_OUT), None
    try:
        status = os.stat(target)
    except OSError:  # nothing there, or links that lead to each other
        return Found(name, 0, None, "a link that leads nowhere"), None
    if stat.S_ISDIR(status.st_mode):
        return None, target
    fault = None if stat.S_ISREG(status.st_mode) else "no regular file"
    return Found(name, status.st_size, None, fault), None
