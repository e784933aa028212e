"""Building blocks of self-contained HTML pages without scripts.

All text from data goes through `escaped`. A content security policy forbids scripts and external resources.
"""

import base64
import html
from collections.abc import Iterable, Sequence

from pera_jax.common.text import printable

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 28px 32px 64px; max-width: 1240px; background: #fff; color: #2d3238;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 27px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 6px; padding-top: 14px; border-top: 2px solid #2d3238; }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 4px 0 10px; } .quiet { color: #69727c; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 14px 3px 0; text-align: right; white-space: nowrap; vertical-align: top; }
td:first-child, th:first-child { text-align: left; }
th { font-weight: 600; color: #69727c; border-bottom: 1px solid #d6dbe0; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: minmax(0, max-content) minmax(80px, 460px) max-content; gap: 2px 12px;
  align-items: center; }
.bars .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars .bar { height: 13px; background: #3a6ea5; min-width: 1px; } .bars .count { font-variant-numeric: tabular-nums; }
.picture { max-width: 100%; } code { font-size: 13px; overflow-wrap: anywhere; } details { margin: 4px 0 8px; }
nav a { margin-right: 16px; color: #24598f; } .warn { color: #a33030; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escaped(value) -> str:
    """Escapes text for elements and attributes; line feeds stay, other control characters become Python escapes."""
    lines = str(value).split("\n")
    return html.escape("\n".join(printable(line, None) for line in lines), quote=True)


def document(title: str, body: Iterable[str], style: str = "") -> bytes:
    """The whole page; `style` adds CSS rules."""
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{style}</style></head>\n<body>\n'
    )
    return (head + "\n".join(body) + "\n</body></html>\n").encode("utf-8", errors="replace")  # lone surrogates of JSON


def table(rows: Sequence[Sequence]) -> str:
    """A table of numbers; `rows[0]` are the column names, the first column is text."""
    head, *body = ("".join(f"<{kind}>{escaped(cell)}</{kind}>" for cell in row)
                   for kind, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True))  # fmt: skip
    lines = "".join(f"<tr>{line}</tr>" for line in (head, *body))
    return f'<div class="scroll"><table>{lines}</table></div>'


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """A two-column table of names and values."""
    rows = "".join(f'<tr><td>{escaped(name)}</td><td class="text">{escaped(value)}</td></tr>' for name, value in pairs)
    return f"<table>{rows}</table>"


def bars(counts: Sequence[tuple[str, int]]) -> str:
    """A horizontal bar chart: a name, a bar and a number per count."""
    most = max((count for _, count in counts), default=0) or 1
    return '<div class="bars">' + "".join(
        f'<div class="name" title="{escaped(name)}">{escaped(name)}</div>'
        f'<div class="bar" style="width:{100 * count / most:.2f}%"></div><div class="count">{count:,}</div>'
        for name, count in counts
    ) + "</div>"  # fmt: skip


def image(content: bytes, kind: str, alt: str, width: int | None = None) -> str:
    """An embedded image; `kind` is png or jpeg, `width` in px on the page."""
    size = "" if width is None else f' class="picture" width="{width}"'
    return (
        f'<img alt="{escaped(alt)}"{size} src="data:image/{kind};base64,{base64.b64encode(content).decode("ascii")}">'
    )
