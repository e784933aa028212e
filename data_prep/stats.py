"""Prints statistics of every band of a dataset folder, from its histograms.

    pera-jax stats shards/aid
    pera-jax stats shards/aid --split train --output statistics

prints a table for each split; with --output it also writes SPLIT.statistics.csv, SPLIT.statistics.json and
SPLIT.histograms.png to that folder, which is created if missing.

All values are in stored units, over all valid pixels. `low` and `high` are the range that maps to [0, 1] by default,
`mean in range` and `std in range` are computed after that mapping. For float32 the histogram distinguishes values to
1/4096 or better.
"""

import argparse
import csv
import dataclasses
import io
import pathlib

import numpy as np

from data_prep.inspect import folder_info, histogram_picture, tables
from pera_jax.common import files, owned, paths
from pera_jax.common.errors import UserError, run
from pera_jax.common.text import printable
from pera_jax.data import records, statistics

_LEAST = 1e-300  # percent: more than 0, but less than one pixel


@dataclasses.dataclass(frozen=True)
class BandStatistics:
    """One band of one split, in stored units.

    Attributes:
      band: name of the band.
      pixels: number of valid pixels.
      minimum, maximum, mean, std: over the valid pixels.
      percentiles: by name, as in info.json.
      low, high: the range that maps to [0, 1] by default.
      mean_in_range, std_in_range: after that mapping, with clipping.
    """

    band: str
    pixels: int
    minimum: float
    percentiles: dict[str, float]
    maximum: float
    mean: float
    std: float
    low: float
    high: float
    mean_in_range: float
    std_in_range: float

    def row(self) -> dict[str, str | int | float]:
        """The values by column name."""
        fields = dataclasses.asdict(self)
        shares = {f"p{share}": value for share, value in fields.pop("percentiles").items()}
        names = list(fields)
        first = names.index("minimum") + 1
        return {name: fields[name] for name in names[:first]} | shares | {name: fields[name] for name in names[first:]}


def describe(info: records.DatasetInfo, split: str, counts: statistics.Histogram) -> list[BandStatistics]:
    """The statistics of each band; `counts` is the histogram of the split, with at least one pixel per band."""
    ranges = info.splits[split].ranges
    shares = (_LEAST, *statistics.PERCENTILES, 100.0)
    found = statistics.percentiles(counts, info.dtype, shares)  # [S, C]
    least, most = found[0], found[-1]
    # the full range, without clipping
    whole = [[low, high if high > low else low + 1.0] for low, high in zip(least, most)]
    mean, std = statistics.moments(counts, info.dtype, whole)
    extent = np.array([high - low for low, high in whole])
    in_range = statistics.moments(counts, info.dtype, ranges)
    return [
        BandStatistics(
            band=name, pixels=int(statistics.table(counts[i])[1].sum()), minimum=float(least[i]),
            percentiles={f"{share:g}": float(found[1 + k, i]) for k, share in enumerate(statistics.PERCENTILES)},
            maximum=float(most[i]), mean=float(least[i] + extent[i] * mean[i]), std=float(extent[i] * std[i]),
            low=float(ranges[i][0]), high=float(ranges[i][1]),
            mean_in_range=float(in_range[0][i]), std_in_range=float(in_range[1][i]),
        )
        for i, name in enumerate(info.bands)
    ]  # fmt: skip


def cells(described: list[BandStatistics]) -> list[list[str]]:
    """The rows of a table, the first with the column names."""
    rows = [[name.replace("_", " ").replace("minimum", "min").replace("maximum", "max") for name in described[0].row()]]
    for band in described:
        rows.append([value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else number(value)
                     for value in band.row().values()])  # fmt: skip
    return rows


def number(value: float) -> str:
    """Formats integers exactly, other numbers with five digits."""
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.5g}"


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    parser = argparse.ArgumentParser(prog="pera-jax stats", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=paths.local_path, help="dataset folder")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--output", type=paths.local_path, help="folder for CSV, JSON and a picture per split")
    args = parser.parse_args(argv)
    info, names = folder_info.load(args.folder, args.split)
    counts = {name: folder_info.histogram(args.folder, info, name) for name in names}
    for name in names:
        described = describe(info, name, counts[name])
        print(f"{printable(info.name)}, {printable(name)}: {info.splits[name].records:,} images of {info.dtype}")
        print(tables.text(cells(described)))
        if args.output:
            _write(args.output, info, name, counts[name], described)
    if args.output:
        print(f"written to {printable(args.output)}")


def _write(
    output: pathlib.Path, info, split: str, counts: statistics.Histogram, described: list[BandStatistics]
) -> None:
    rows = [band.row() for band in described]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    facts = {"name": info.name, "split": split, "dtype": info.dtype, "records": info.splits[split].records}
    content = {
        "statistics.csv": table.getvalue().encode("utf-8"),
        "statistics.json": owned.json_text({**facts, "bands": rows}),
        "histograms.png": owned.png(histogram_picture.draw(info, split, counts)),
    }
    for name in content:
        owned.check(output / f"{split}.{name}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, bytes_ in content.items():
            files.write(output / f"{split}.{name}", bytes_)
    except OSError as error:
        raise UserError(
            f"cannot write to {output}: {error.strerror}; free disk space or choose another --output"
        ) from error


if __name__ == "__main__":
    run(main)
