"""Class names from folders, label tables and text files."""

import pathlib
import unicodedata
from collections.abc import Sequence

from pera_jax.common.errors import UserError
from pera_jax.common.text import decoded, printable, several

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
_UNWRITABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


def check(names: Sequence[str], source: object) -> None:
    """Rejects names that cannot be stored in results, tables and the label file of TFDS (one name per line).

    Args:
        source: where the names come from, for the message.

    Raises:
        UserError: a name that is empty, occurs twice, or contains control characters or undecodable bytes.
    """
    wrong = [name for name in names if not name.strip() or any(unicodedata.category(c) in _UNWRITABLE for c in name)]
    if wrong:
        shown = several(f"'{name}'" for name in wrong)
        raise UserError(
            f"{printable(source)} has class names that are empty or contain control characters or bytes that are not "
            f"UTF-8: {shown}; rename them"
        )
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"{printable(source)} has two classes with the same name: {several(twice)}; rename one")


def lookalike_warning(names: Sequence[str], source: object) -> str | None:
    """A warning if names differ only in case, whitespace, invisible characters or Unicode normalization; else None.

    Args:
        source: where the names come from.
    """
    groups = {}
    for name in names:
        shown = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        groups.setdefault(" ".join(shown.casefold().split()), []).append(name)
    twins = [name for group in groups.values() if len(group) > 1 for name in group]
    if not twins:
        return None
    shown = several((ascii(name) for name in twins), 6)
    return f"warning: {printable(source)} has classes whose names look the same but count as different: {shown}"


def look_like_splits(names: Sequence[str]) -> bool:
    """Whether class folders look like the splits of a dataset instead."""
    return {name.lower() for name in names} <= _SPLITS


def few(strays: int, images: int) -> bool:
    """Whether the images outside class folders (`strays`) are few enough to still treat the folders as classes."""
    return strays <= max(1, images // 10) and 2 * strays < images


def outside_warning(strays: Sequence[str], names: Sequence[str]) -> str:
    """A warning about images that lie outside the class folders and are left out."""
    lie = "image lies" if len(strays) == 1 else "images lie"
    return (
        f"warning: {len(strays):,} {lie} outside the folders of the {len(names):,} classes {several(names, 5)} and "
        f"{'is' if len(strays) == 1 else 'are'} left out: {several(strays)}"
    )


def read(file: pathlib.Path, most: int) -> tuple[str, ...]:
    """Reads class names from a file with one name per line, in the order of the class indices.

    Trailing blank lines are ignored.

    Args:
        most: maximum number of classes.

    Raises:
        UserError: the file cannot be read, is not text, has no names, too many names, a blank line between names, or
            names that `check` rejects.
    """
    try:
        lines = [line.strip() for line in decoded(file.read_bytes()).rstrip().split("\n")]
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{printable(file)} cannot be read as text ({error}); write one class name per line") from error
    names = tuple(lines if any(lines) else ())
    if not 0 < len(names) <= most:
        raise UserError(f"{printable(file)} has {len(names):,} class names, expected 1 to {most}; write one per line")
    if "" in names:
        raise UserError(
            f"line {names.index('') + 1} of {printable(file)} is blank, but line numbers are class indices; add a name "
            "or remove the line"
        )
    check(names, file)
    return names
