"""Untrusted text made safe to print: file names, class names, keys, metadata, values from JSON.

Such text reaches terminals, logs and error messages. Unescaped, a line feed can forge a log line (`error: ...`), an
escape sequence moves the cursor or renames the window, a bidirectional control reverses a name, and a lone surrogate
(an undecodable byte of a file name) makes `print` fail.
"""

import codecs
import unicodedata
from collections.abc import Iterable

LIMIT = 200
"""Maximum number of characters of untrusted text in a message."""

_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Invisible letters and marks: Hangul fillers, the grapheme joiner, invisible vowels and selectors.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_CUT = "..."


def printable(text: object, limit: int | None = LIMIT) -> str:
    """`str(text)` as one line that is safe on every terminal.

    Control characters (C0 with line feed and escape, DEL, C1), format characters (bidirectional controls, zero-width
    characters), lone surrogates, line and paragraph separators, private and unassigned characters and invisible letters
    are shown as Python escapes (`\\n`, `\\x1b`, `\\u202e`). Everything else is kept, including backslashes and letters
    of all scripts, so text that is already printable is returned unchanged.

    Args:
        text: any object; converted with `str`, including paths with undecodable bytes.
        limit: maximum length of the result; longer text is cut in the middle, to keep the end of a path. None: no
          limit.
    """
    text = str(text)
    if limit is not None and len(text) > 2 * limit:  # cut before escaping: a name may have a gigabyte
        text = text[:limit] + _CUT + text[-limit:]
    if not (text.isascii() and text.isprintable()):
        text = "".join(map(_shown, text))
    if limit is None or len(text) <= limit:
        return text
    head = max((limit - len(_CUT)) * 2 // 3, 0)
    tail = max(limit - len(_CUT) - head, 0)
    return text[:head] + _CUT + text[len(text) - tail :]


def several(items: Iterable[object], limit: int = 3) -> str:
    """The first `limit` items, each `printable`, and the number of the others: "a, b, c and 4 more"."""
    items = list(items)
    shown = ", ".join(printable(item) for item in items[:limit])
    return f"{shown} and {len(items) - limit:,} more" if len(items) > limit else shown


def every(items: Iterable[object]) -> str:
    """All items, each `printable`, separated by commas."""
    return ", ".join(map(printable, items))


def first_line(error: object, limit: int = LIMIT) -> str:
    """The first line of an exception's text, `printable` and without a final period; its type's name if it has no
    text."""
    lines = str(error).strip().splitlines()
    return printable(lines[0].rstrip(".") if lines else type(error).__name__, limit)


def decoded(content: bytes) -> str:
    """Decodes a text file from any editor or spreadsheet; lines end with line feeds.

    UTF-8 with or without a byte order mark, and UTF-16 with one. Raises ValueError for other encodings.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not encoded in UTF-8; save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _shown(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED_CATEGORIES and character not in _INVISIBLE:
        return character
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
