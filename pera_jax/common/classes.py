"""Names of classes as they come from folders, tables and files of names."""

import pathlib
import unicodedata
from collections.abc import Sequence

from pera_jax.common.errors import UserError
from pera_jax.common.text import decoded, printable, several

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
_UNWRITABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


def check(names: Sequence[str], source: object) -> None:
    """Refuses names that results, tables and TFDS's list of labels, one name a line, could not hold.

    Args:
        source: what the names are of, for the sentence.

    Raises:
        UserError: an empty name, one twice, or one with line feeds, other control characters or undecodable bytes.
    """
    wrong = [name for name in names if not name.strip() or any(unicodedata.category(c) in _UNWRITABLE for c in name)]
    if wrong:
        shown = several(f"'{name}'" for name in wrong)
        raise UserError(
            f"{printable(source)} has classes whose names are empty or hold control characters or bytes that are not UTF-8: "
            f"{shown}; rename them"
        )
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"{printable(source)} has two classes of one name: {several(twice)}; rename one")


def alike(names: Sequence[str], source: object) -> str | None:
    """A warning of names that differ in case, blanks, invisible characters or the spelling of accents only, or None.

    Args:
        source: what the names are of.
    """
    groups = {}
    for name in names:
        shown = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        groups.setdefault(" ".join(shown.casefold().split()), []).append(name)
    twins = [name for group in groups.values() if len(group) > 1 for name in group]
    if not twins:
        return None
    shown = several((ascii(name) for name in twins), 6)
    return f"warning: {printable(source)} has classes whose names look the same and count as different ones: {shown}"


def look_like_splits(names: Sequence[str]) -> bool:
    """Whether folders that are taken for classes are rather the splits of a data set."""
    return {name.lower() for name in names} <= _SPLITS


def few(strays: int, images: int) -> bool:
    """Whether so many of the images may lie beside the folders of classes that these are still meant as such."""
    return strays <= max(1, images // 10) and 2 * strays < images


def beside(strays: Sequence[str], names: Sequence[str]) -> str:
    """What to tell of images that lie beside the folders of the classes and are left out."""
    lie = "image lies" if len(strays) == 1 else "images lie"
    return (
        f"warning: {len(strays):,} {lie} beside the folders of the {len(names):,} classes {several(names, 5)} and "
        f"{'is' if len(strays) == 1 else 'are'} left out: {several(strays)}"
    )


def read(file: pathlib.Path, most: int) -> tuple[str, ...]:
    """The names in a file with one a line, in the order of the class indices; blank lines at the end are passed over.

    Args:
        most: the largest number of classes.

    Raises:
        UserError: the file cannot be read, is no text, holds no name or too many, a blank line between names, or names
            that `check` refuses.
    """
    try:
        lines = [line.strip() for line in decoded(file.read_bytes()).rstrip().split("\n")]
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{printable(file)} cannot be read as text ({error}); write one class name a line") from error
    names = tuple(lines if any(lines) else ())
    if not 0 < len(names) <= most:
        raise UserError(f"{printable(file)} holds {len(names):,} class names; write 1 to {most}, one a line")
    if "" in names:
        raise UserError(
            f"line {names.index('') + 1} of {printable(file)} is blank, and the line tells the class; name it or remove the line"
        )
    check(names, file)
    return names
