"""Tables for a terminal."""

from collections.abc import Sequence

from pera_jax.common.text import printable


def text(rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns: the first left, the others right. `rows[0]` are the column names.

    Unsafe characters in cells are escaped.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
