"""Tables for a terminal."""

from collections.abc import Sequence


def text(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, two spaces apart; the first to the left, the others to the right. `rows[0]` holds their names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )
