"""HTML of `data_prep.browse`: contact sheets and conversion reports."""

import json

from pera_jax.common.html import bars, escaped, facts, image

STYLE = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 16px 14px; }
figure { margin: 0; min-width: 0; }
.frame { display: flex; align-items: center; justify-content: center; height: 164px; background: #f1f3f5; }
.frame img { width: 160px; height: 160px; object-fit: contain; } .small img { image-rendering: pixelated; }
.frame span { padding: 8px; color: #a33030; font-size: 13px; overflow: hidden; overflow-wrap: anywhere;
  max-height: 140px; }
figcaption { font-size: 12.5px; line-height: 1.35; margin-top: 4px; }
figcaption div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
"""
_LISTED = 200  # maximum number of report entries on the page


def sheet(thumbnails, class_names: list[str] | None, enlarge_below: int) -> str:
    """The contact sheet; images smaller than `enlarge_below` px are shown with square pixels."""
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
    """The report of a conversion with any fields: one line per field, followed by details."""
    if not isinstance(content, dict):
        return f"<p>{escaped(_plain(content))}</p>"
    lines, parts = [], []
    for name, value in content.items():
        if isinstance(value, (dict, list)):
            count = len(value) if isinstance(value, list) else _count(value)
            detail = _detail(value)
            lines.append((_words(name), ("see below" if detail else "none") if count is None else f"{count:,}"))
            parts += [f"<h3>{escaped(_words(name))}</h3>{detail}"] if detail else []
        else:
            lines.append((_words(name), _plain(value)))
    return facts(lines) + "".join(parts)


def _count(value) -> int | None:
    """The number in an entry, or None."""
    value = value.get("number") if isinstance(value, dict) else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _detail(value: dict | list) -> str:
    """Bars for counts, and collapsed lists; "" without any."""
    if isinstance(value, list):
        return _entries(value)
    others = {name: inner for name, inner in value.items() if name != "number"}
    counted = {name: count for name, inner in others.items() if (count := _count(inner)) is not None}
    parts = [bars(list(counted.items()))] if counted else []
    for name, inner in others.items():
        if isinstance(inner, (dict, list)):
            parts.append(_detail(inner) if name not in counted else _detail({name: inner.get("first", [])}))
        elif name not in counted:
            parts.append(facts([(_words(name), _plain(inner))]))
    return "".join(parts)


def _entries(entries: list) -> str:
    if not entries:
        return ""
    lines = [
        (entry["key"], _plain({name: inner for name, inner in entry.items() if name not in ("key", "reason")} or
                              entry.get("reason", "")))
        if isinstance(entry, dict) and "key" in entry else (_plain(entry), "")
        for entry in entries[:_LISTED]
    ]  # fmt: skip
    which = f"the first {_LISTED} of {len(entries):,}" if len(entries) > _LISTED else f"{len(entries):,} named"
    return f"<details><summary>{which}</summary>{facts(lines)}</details>"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False)
