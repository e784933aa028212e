"""Foreign text made safe to print: file names, class names, keys, metadata, values out of JSON.

Such text reaches terminals, logs and error sentences. Raw, a line feed in it forges a line of its own (`error: ...`), an
escape sequence moves the cursor or renames the window, a bidirectional control shows a name backwards, and a lone
surrogate (an undecodable byte of a file name) ends `print` in a traceback.
"""

import codecs
import unicodedata
from collections.abc import Iterable

LIMIT = 200
"""Characters of one piece of foreign text that a sentence shows at most."""

_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Letters and marks that draw nothing: fillers of Hangul, the grapheme joiner, vowels and selectors without a shape.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_CUT = "..."


def printable(text: object, limit: int | None = LIMIT) -> str:
    """`str(text)` as one line that is safe on every terminal.

    Control characters (C0 with line feed and escape, DEL, C1), format characters (bidirectional controls, zero-width
    ones), lone surrogates, line and paragraph separators, private and unassigned characters and letters that draw
    nothing are shown as Python escapes (`\\n`, `\\x1b`, `\\u202e`). All else stays, backslashes and letters of every
    script too, so a text that is printable already comes back as it is.

    Args:
        text: anything; what is no string is shown as `str` does, a path of undecodable bytes included.
        limit: characters of the result at most; more are cut in the middle (the end of a path tells the file).
            None: no limit.
    """
    text = str(text)
    if limit is not None and len(text) > 2 * limit:  # what is cut anyway is not escaped first: a name may have a gigabyte
        text = text[:limit] + _CUT + text[-limit:]
    if not (text.isascii() and text.isprintable()):
        text = "".join(map(_shown, text))
    if limit is None or len(text) <= limit:
        return text
    head = max((limit - len(_CUT)) * 2 // 3, 0)
    tail = max(limit - len(_CUT) - head, 0)
    return text[:head] + _CUT + text[len(text) - tail :]


def several(items: Iterable[object], limit: int = 3) -> str:
    """`items` in a sentence: the first `limit` of them, each `printable`, then how many more: "a, b, c and 4 more"."""
    items = list(items)
    shown = ", ".join(printable(item) for item in items[:limit])
    return f"{shown} and {len(items) - limit:,} more" if len(items) > limit else shown


def every(items: Iterable[object]) -> str:
    """All of `items`, each `printable`, for a sentence that must leave none out."""
    return ", ".join(map(printable, items))


def decoded(content: bytes) -> str:
    """The text in a file that people made with any editor or spreadsheet, its lines ended by line feeds.

    UTF-8 with or without a byte order mark, and UTF-16 with one. Raises ValueError: another encoding.
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
