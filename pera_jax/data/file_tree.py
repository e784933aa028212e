"""Lists the files below a folder, links included, for conversions, probes and exports."""

import os
import pathlib
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several

HIDDEN = "its name or the name of a parent folder begins with a dot"
LEADS_OUT = "a link that leads out of the folder"


class Found(NamedTuple):
    """A listed file.

    Attributes:
      name: path relative to the root, with "/".
      size: in bytes.
      part: where it lies in an archive; None in folders.
      fault: why it is rejected independent of its name; None if it may be a candidate.
      backslashes: whether backslashes in its name were read as folder separators.
    """

    name: str
    size: int
    part: tuple | None
    fault: str | None
    backslashes: bool = False


def links_out(root: object, rejected: Iterable[tuple[str, str | None]]) -> str:
    """A message about links that were left out, from (name, fault) pairs; "" if there are none."""
    names = [name for name, fault in rejected if fault == LEADS_OUT]
    if not names:
        return ""
    lead, stay = ("link leads", "is") if len(names) == 1 else ("links lead", "are")
    shown = f"{len(names):,} {lead} out of {printable(root)} and {stay} left out: {several(names)}"
    return f"{shown}; --follow-links includes them"


def files_below(root: pathlib.Path, follow: bool = False) -> Iterator[Found]:
    """Yields every file below a folder, including links that stay inside. Raises UserError if it cannot be read.

    A hidden folder is a single entry. Links to folders are followed, except links to a parent folder, and no folder is
    entered through links twice, so the walk ends and no file is found more than twice.

    Args:
      follow: whether to follow links that lead out of the folder.
    """
    inside, links, entered = os.path.realpath(root), [], set()
    waiting = [(str(root), "", None)]  # folders: path, name with "/", real path if reached by a link
    try:
        while waiting or links:
            if not waiting:
                links.sort(key=lambda link: link[1], reverse=True)  # an order independent of the file system
                path, name, real = links.pop()
                around = os.path.join(os.path.realpath(os.path.dirname(path)), "")
                if around.startswith(os.path.join(real, "")):
                    yield Found(name[:-1], 0, None, "a link to a parent folder")
                    continue
                waiting.append((path, name, real))
            path, prefix, real = waiting.pop()
            if real is not None:
                if real in entered:
                    yield Found(prefix[:-1], 0, None, "a folder that another link leads to")
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
                        yield Found(name, 0, None, "not a regular file")
    except OSError as error:
        raise UserError(f"cannot read {printable(error.filename)}: {error.strerror}; fix or remove it") from error


def _link(entry: os.DirEntry, name: str, inside: str | None) -> tuple[Found | None, str | None]:
    """Resolves a symbolic link: (the file or its fault, None), or (None, the real path of a folder)."""
    target = os.path.realpath(entry.path)
    if inside is not None and target != inside and not target.startswith(os.path.join(inside, "")):
        return Found(name, 0, None, LEADS_OUT), None
    try:
        status = os.stat(target)
    except OSError:  # a dangling link or a loop
        return Found(name, 0, None, "a broken link"), None
    if stat.S_ISDIR(status.st_mode):
        return None, target
    fault = None if stat.S_ISREG(status.st_mode) else "not a regular file"
    return Found(name, status.st_size, None, fault), None
