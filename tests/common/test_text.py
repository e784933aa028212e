"""Untrusted text in messages."""

import pathlib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pera_jax.common.text import LIMIT, first_line, printable, several


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("forest", "forest"),
        ("Flüße/日本 ñ.tif", "Flüße/日本 ñ.tif"),
        ("C:\\data\\new", "C:\\data\\new"),
        ("a\nerror: forged\r\n", "a\\nerror: forged\\r\\n"),
        ("\x1b[31mred\x1b[0m\x07\x7f", "\\x1b[31mred\\x1b[0m\\x07\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202egnp.exe\u2066\u200b\ufeff", "\\u202egnp.exe\\u2066\\u200b\\ufeff"),
        ("\udce9.png", "\\udce9.png"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("\U000e0041\u3164", "\\U000e0041\\u3164"),
        (pathlib.Path("a/b\n"), "a/b\\n"),
        (None, "None"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=[]), max_size=300), st.integers(3, 400))
def test_printable_is_one_safe_line_within_its_limit_and_idempotent(text, limit):
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert printable(shown, limit) == shown


def test_long_text_keeps_its_beginning_and_its_end():
    shown = printable("x" * 10**7 + "\n/image.png")
    assert len(shown) == LIMIT
    assert shown.startswith("xxx")
    assert "..." in shown
    assert shown.endswith("\\n/image.png")
    assert len(printable("y" * 1000, limit=None)) == 1000


def test_several():
    assert several([]) == ""
    assert several(["a"]) == "a"
    assert several(["a", "b", "c"]) == "a, b, c"
    assert several(["a", "b\n", 3, "d", "e"]) == "a, b\\n, 3 and 2 more"
    assert several((str(i) for i in range(2000)), limit=2) == "0, 1 and 1,998 more"


def test_first_line():
    assert first_line(ValueError("\n no such band.\nand 40 lines of C++")) == "no such band"
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line("a\x1b[2J") == "a\\x1b[2J"
