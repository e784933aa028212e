"""The parts of the page that `data_prep.browse` writes: HTML with everything in it, and nothing that runs.

Whatever comes from the data goes through `escaped`. A policy in the head forbids scripts and all that is not in the page.
"""

import base64
import collections
import html
import json
from collections.abc import Iterable, Sequence

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
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 16px 14px; }
figure { margin: 0; min-width: 0; }
.frame { display: flex; align-items: center; justify-content: center; height: 164px; background: #f1f3f5; }
.frame img { width: 160px; height: 160px; object-fit: contain; } .small img { image-rendering: pixelated; }
.frame span { padding: 8px; color: #a33030; font-size: 13px; overflow: hidden; overflow-wrap: anywhere; max-height: 140px; }
figcaption { font-size: 12.5px; line-height: 1.35; margin-top: 4px; }
figcaption div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars { display: grid; grid-template-columns: minmax(0, max-content) minmax(80px, 460px) max-content; gap: 2px 12px;
  align-items: center; }
.bars .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars .bar { height: 13px; background: #3a6ea5; min-width: 1px; } .bars .count { font-variant-numeric: tabular-nums; }
.picture { max-width: 100%; } code { font-size: 13px; overflow-wrap: anywhere; } details { margin: 4px 0 8px; }
nav a { margin-right: 16px; color: #24598f; } .warn { color: #a33030; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LISTED = 200  # entries of a report that the page repeats


def escaped(value) -> str:
    return html.escape(str(value), quote=True)


def document(title: str, body: Iterable[str]) -> bytes:
    """The whole page."""
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
    )
    return (head + "\n".join(body) + "\n</body></html>\n").encode("utf-8", errors="replace")  # lone surrogates of JSON


def table(rows: Sequence[Sequence], text: bool = False) -> str:
    """A table; `rows[0]` holds the names of the columns. `text`: the columns are words, else numbers but for the first."""
    first, *others = ("".join(f"<{kind}>{escaped(cell)}</{kind[:2]}>" for cell in row)
                      for kind, row in zip(["th", *["td class=text" if text else "td"] * (len(rows) - 1)], rows))  # fmt: skip
    body = "".join(f"<tr>{row}</tr>" for row in others)
    return f'<div class="scroll"><table><tr>{first}</tr>{body}</table></div>'


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """A table of names and what they are."""
    rows = "".join(f'<tr><td>{escaped(name)}</td><td class="text">{escaped(value)}</td></tr>' for name, value in pairs)
    return f"<table>{rows}</table>"


def bars(counts: Sequence[tuple[str, int]]) -> str:
    """A bar with its name and number for each count."""
    most = max((count for _, count in counts), default=0) or 1
    return '<div class="bars">' + "".join(
        f'<div class="name" title="{escaped(name)}">{escaped(name)}</div>'
        f'<div class="bar" style="width:{100 * count / most:.2f}%"></div><div class="count">{count:,}</div>'
        for name, count in counts
    ) + "</div>"  # fmt: skip


def image(content: bytes, kind: str, alt: str, width: int | None = None) -> str:
    """An image that lies in the page; `kind` is png or jpeg, `width` in px on the page."""
    size = "" if width is None else f' class="picture" width="{width}"'
    return f'<img alt="{escaped(alt)}"{size} src="data:image/{kind};base64,{base64.b64encode(content).decode("ascii")}">'


def sheet(thumbnails, class_names: list[str] | None, enlarge_below: int) -> str:
    """The contact sheet; images of which no side has `enlarge_below` px are shown with square pixels."""
    figures = []
    for shown in thumbnails:
        named = class_names is not None and 0 <= shown.label < len(class_names)
        lines = [f"#{shown.number}" + (f" &middot; {shown.size[0]} &times; {shown.size[1]}" if shown.jpeg else "")]
        lines += [f"<b>{escaped(class_names[shown.label])}</b>"] if named else []
        lines += [escaped(shown.key)] if shown.key else []
        small = " small" if max(shown.size) < enlarge_below else ""
        content = image(shown.jpeg, "jpeg", shown.key) if shown.jpeg else f"<span>{escaped(shown.fault)}</span>"
        caption = "".join(f"<div>{line}</div>" for line in lines)
        figures.append(
            f'<figure title="{escaped(shown.key)}"><div class="frame{small}">{content}</div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="sheet">{"".join(figures)}</div>'


def report(content) -> str:
    """What a conversion reported, whatever it holds: numbers and words as facts, mappings and lists below them."""
    if not isinstance(content, dict):
        return f"<p>{escaped(json.dumps(content))}</p>"
    plain = [(_words(name), _plain(value)) for name, value in content.items() if not isinstance(value, (dict, list))]
    plain += [(_words(name), f"{len(value):,}") for name, value in content.items() if isinstance(value, list)]
    plain += [(_words(name), "none") for name, value in content.items() if value == {}]
    parts = [facts(plain)]
    for name, value in content.items():
        if isinstance(value, dict) and value:
            parts.append(f"<h3>{escaped(_words(name))}</h3>{facts([(key, _plain(inner)) for key, inner in value.items()])}")
        elif isinstance(value, list) and value:
            parts.append(f"<h3>{escaped(_words(name))}: {len(value):,}</h3>{_entries(value)}")
    return "".join(parts)


def _entries(entries: list) -> str:
    """How often each reason is given where entries have one, and the entries themselves, folded."""
    reasons = collections.Counter(str(entry["reason"]) for entry in entries if isinstance(entry, dict) and "reason" in entry)
    top = bars(reasons.most_common(12)) if reasons else ""
    listed = [
        [entry["key"], _plain({k: v for k, v in entry.items() if k not in ("key", "reason")} or entry.get("reason", ""))]
        if isinstance(entry, dict) and "key" in entry else ["", _plain(entry)]
        for entry in entries[:_LISTED]
    ]  # fmt: skip
    more = f", the first {_LISTED} of {len(entries):,}" if len(entries) > _LISTED else ""
    return f"{top}<details><summary>Entries{more}</summary>{facts(listed)}</details>"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False)
