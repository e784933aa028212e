"""Writes a self-contained HTML page that shows a dataset folder.

    pera-jax browse shards/aid --output aid.html
    pera-jax browse shards/sentinel2 --output sentinel2.html --bands nir,red,green --images 96

The page has the metadata of the dataset and, for each split, sample images, counts of classes and sizes, locations and
dates of tiles, band statistics with histograms, and the report of the conversion. It needs no network and contains no
scripts. Sizes, classes and locations are counted over all records, or over a random sample of 100,000 for larger
splits.
"""

import argparse
import io
import pathlib

import numpy as np

from data_prep import stats
from data_prep.inspect import folder_info, histogram_picture, page
from data_prep.inspect.survey import THUMBNAIL, Survey, shown_bands, survey, thumbnails
from pera_jax.common import files, html, json_files, owned, paths
from pera_jax.common.errors import UserError, run
from pera_jax.common.text import printable
from pera_jax.data import records

_LISTED = 12  # maximum number of listed sizes, sources, dates, ...
_MOST_IMAGES = 1000  # about 8 kB each


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    parser = argparse.ArgumentParser(prog="pera-jax browse", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=paths.local_path, help="dataset folder")
    parser.add_argument(
        "--output", type=paths.local_path, required=True, help="the HTML file to write; an earlier page is replaced"
    )
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--bands", metavar="R,G,B", help="bands to show as red, green, blue; or one band as gray")
    parser.add_argument("--images", type=int, default=48, metavar="N", help="images per split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.images <= _MOST_IMAGES:
        raise UserError(f"--images is {args.images}; it must be in [0, {_MOST_IMAGES}]")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must be >= 0")
    if args.output.is_dir() or not args.output.resolve().parent.is_dir():
        raise UserError(
            f"--output {args.output} is a folder, or its folder does not exist; choose a file in an existing folder"
        )

    owned.check(args.output)
    info, names = folder_info.load(args.folder, args.split)
    places = shown_bands(info, args.bands)
    parts = [_heading(args.folder, info, names)]
    for name in names:
        parts.append(_split(args.folder, info, name, places, args.images, args.seed))
    try:
        files.write(args.output, content := html.document(info.name, parts, page.STYLE))
    except OSError as error:
        raise UserError(
            f"cannot write {args.output}: {error.strerror}; free disk space or choose another file"
        ) from error
    print(f"written to {printable(args.output)}, {len(content) / 1e6:.1f} MB")


def _heading(folder: pathlib.Path, info: records.DatasetInfo, names: list[str]) -> str:
    rows = [["split", "records", "shards", "MB", "fingerprint"]]
    for name in names:
        split = info.splits[name]
        size = f"{sum(split.shard_bytes) / 1e6:,.1f}"
        rows.append([name, f"{split.records:,}", len(split.shards), size, split.fingerprint[:16]])
    classes = "none" if info.class_names is None else f"{len(info.class_names):,}"
    card = [
        ("folder", folder.resolve()), ("bands", f"{len(info.bands)}: {', '.join(info.bands)}"), ("values", info.dtype),
        ("classes", classes), ("places on the ground", "yes" if info.has_places else "no"),
        ("format version", info.format_version),
    ]  # fmt: skip
    links = "".join(f'<a href="#{html.escaped(name)}">{html.escaped(name)}</a>' for name in names)
    return f"<h1>{html.escaped(info.name)}</h1><nav>{links}</nav>{html.facts(card)}<h3>Splits</h3>{html.table(rows)}"


def _split(
    folder: pathlib.Path, info: records.DatasetInfo, name: str, places: list[int], images: int, seed: int
) -> str:
    """The section for one split."""
    source = records.open_split(folder, name, skip_damaged=True)
    counts = folder_info.histogram(folder, info, name)
    found = survey(source, seed)
    sample = thumbnails(source, places, images, seed)
    source.close()
    names = [info.bands[place] for place in places]
    shown = f"{names[0]} as gray" if len(set(names)) == 1 else f"{', '.join(names)} as red, green, blue"
    low_high = sorted({tuple(info.splits[name].ranges[place]) for place in places})
    stretch = (
        f"{stats.number(low_high[0][0])} to {stats.number(low_high[0][1])}"
        if len(low_high) == 1
        else "the range of each"
    )
    of = (
        f"{found.total:,}" if found.looked == found.total else f"a random sample of {found.looked:,} of {found.total:,}"
    )
    parts = [
        f'<h2 id="{html.escaped(name)}">{html.escaped(name)}</h2>',
        f'<p class="quiet">{len(sample)} of {found.total:,} images, drawn with seed {seed}: {html.escaped(shown)}, '
        f"{stretch} stretched from black to white.</p>",
        page.sheet(sample, info.class_names, THUMBNAIL),
    ]
    if found.unreadable:
        parts.append(
            f'<p class="warn">Damaged records: {found.unreadable:,}; run pera-jax verify for details.</p>'
        )
    if info.class_names is not None:
        parts.append(f"<h3>Classes, over {of} records</h3>{html.bars(_classes(info.class_names, found))}")
    parts.append(f"<h3>Sizes, over {of} records</h3>{_sizes(found)}")
    if info.has_places:
        parts.append(f"<h3>Places, over {of} records</h3>{_places(found)}")
    described = stats.describe(info, name, counts)
    picture = io.BytesIO()
    drawn = histogram_picture.draw(info, name, counts)
    drawn.save(picture, "PNG", optimize=True)
    parts += [
        "<h3>Bands, in stored units, over all valid pixels</h3>", html.table(stats.cells(described)),
        html.image(picture.getvalue(), "png", "histograms of the bands", drawn.width // histogram_picture.SCALE),
        "<h3>Report of the conversion</h3>", _report(folder / f"{name}.report.json"),
    ]  # fmt: skip
    return "\n".join(parts)


def _classes(names: list[str], found: Survey) -> list[tuple[str, int]]:
    odd = sum(count for label, count in found.labels.items() if not 0 <= label < len(names))
    counts = [(name, found.labels[i]) for i, name in enumerate(names)]
    return counts + ([("(no class of the dataset)", odd)] if odd else [])


def _sizes(found: Survey) -> str:
    """All sizes if they are few, else a histogram of the longer side."""
    if not found.sizes:
        return "<p>no image</p>"
    if len(found.sizes) <= _LISTED:
        return html.bars([(f"{width} × {height}", count) for (width, height), count in found.sizes.most_common()])
    sides = np.array([max(size) for size in found.sizes])
    counts, edges = np.histogram(sides, _LISTED, weights=list(found.sizes.values()))
    edges = np.ceil(edges).astype(int)
    edges[-1] += 1
    steps = [
        (f"{low} to {high - 1}", int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False) if high > low
    ]
    spans = [
        f"{kind} {min(values)} to {max(values)} px" for kind, values in zip(("width", "height"), zip(*found.sizes))
    ]
    return f"<p>{len(found.sizes):,} sizes: {', '.join(spans)}. The longer side, px:</p>{html.bars(steps)}"


def _places(found: Survey) -> str:
    known = found.looked - found.unreadable
    parts = []
    for title, counter in zip(("Scenes", "CRS", "Dates"), found.facts.values(), strict=True):
        listed = counter.most_common(_LISTED)
        rest = len(counter) - len(listed)
        span = f", {min(counter)} to {max(counter)}" if title == "Dates" and len(counter) > 1 else ""
        without = known - sum(counter.values())
        parts.append(f"<h3>{title}: {len(counter):,}{html.escaped(span)}</h3>")
        parts.append(html.bars(listed))
        remarks = ([f"and {rest:,} more"] if rest else []) + ([f"{without:,} records without"] if without else [])
        parts += [f'<p class="quiet">{"; ".join(remarks)}</p>'] if remarks else []
    if found.bounds:
        rows = [["CRS", "left", "bottom", "right", "top"]]
        rows += [[crs[:60], *(f"{side:,.10g}" for side in box)] for crs, box in list(found.bounds.items())[:_LISTED]]
        parts.append(f"<h3>Bounds of all tiles</h3>{html.table(rows)}")
    return "".join(parts)


def _report(file: pathlib.Path) -> str:
    try:
        return page.report(json_files.loads(file.read_bytes()))
    except FileNotFoundError:
        return f'<p class="quiet">There is no {html.escaped(file.name)}.</p>'
    except (OSError, json_files.Invalid) as error:
        return f'<p class="warn">{html.escaped(file.name)} cannot be read: {html.escaped(error)}</p>'


if __name__ == "__main__":
    run(main)
