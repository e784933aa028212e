"""Summary of the records of a split without decoding pixels, and thumbnails of a sample."""

import collections
import contextlib
import dataclasses
import io

import numpy as np
from PIL import Image

from pera_jax.bands import RGB
from pera_jax.common import json_files
from pera_jax.common.errors import UserError
from pera_jax.common.json_files import Finite
from pera_jax.common.progress import Progress
from pera_jax.common.text import first_line, several
from pera_jax.data import codecs, records
from pera_jax.data.images import picture_files

MOST_RECORDS = 100_000  # for larger splits, a survey uses a sample of this size
THUMBNAIL = 160  # px, the longer side at most
_STREAM_SURVEY, _STREAM_SAMPLE = 0, 1  # of the random generator


@dataclasses.dataclass
class _Place:
    """The fields of a tile's place that are counted."""

    source: str | None = None
    crs: str | None = None
    date: str | None = None
    bounds: tuple[Finite, Finite, Finite, Finite] | None = None


@dataclasses.dataclass
class Survey:
    """Counts over `looked` of `total` records.

    Attributes:
      sizes: number of images by (width, height), px.
      labels: number of images by class index.
      unreadable: number of damaged records, which are not in the other counts.
      facts: for tiles of scenes, number of records by value of "source", "crs" and "date".
      bounds: [left, bottom, right, top] of all tiles, by CRS.
    """

    total: int
    looked: int = 0
    sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    labels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unreadable: int = 0
    facts: dict[str, collections.Counter] = dataclasses.field(
        default_factory=lambda: {name: collections.Counter() for name in ("source", "crs", "date")}
    )
    bounds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, raw: bytes) -> None:
        """Raises ValueError if the record or the header of its image is damaged."""
        record = records.decode_record(raw)
        size = image_size(record.image)
        self.sizes[size] += 1
        self.labels[record.label] += 1
        if record.place:
            with contextlib.suppress(json_files.Invalid):  # reported by `data_prep.verify`
                self._add_place(json_files.parse(record.place, _Place))

    def _add_place(self, place: "_Place") -> None:
        for name, counter in self.facts.items():
            if (value := getattr(place, name)) is not None:
                counter[value] += 1
        if place.bounds is not None:
            left, bottom, right, top = bounds = list(place.bounds)
            crs = "no CRS" if place.crs is None else place.crs
            old = self.bounds.get(crs, bounds)
            self.bounds[crs] = [min(old[0], left), min(old[1], bottom), max(old[2], right), max(old[3], top)]


def image_size(encoded: bytes) -> tuple[int, int]:
    """(width, height) of a stored image, from its header. Raises ImageDecodeError."""
    if encoded[:2] in (b"II", b"MM"):
        with codecs.decoding(Exception):  # for damaged bytes, tifffile raises almost any exception
            import tifffile  # imported late: not needed for JPEG and PNG

            with tifffile.TiffFile(io.BytesIO(encoded)) as file:
                return file.pages.first.imagewidth, file.pages.first.imagelength
    with codecs.decoding(), picture_files.opened(encoded) as image:
        return image.size


def survey(source: records.RecordSource, seed: int) -> Survey:
    """Counts over every record, or over a random sample of `MOST_RECORDS`."""
    found = Survey(len(source))
    chosen = (
        range(len(source)) if len(source) <= MOST_RECORDS else _sample(len(source), MOST_RECORDS, seed, _STREAM_SURVEY)
    )
    with Progress(len(chosen), "records", f"survey {source.split}") as progress:
        for i in chosen:
            try:
                found.add(source.read(int(i)))
            except (ValueError, RuntimeError):
                found.unreadable += 1
            found.looked += 1
            progress.update()
    return found


def _sample(total: int, number: int, seed: int, stream: int) -> np.ndarray:
    """Sorted unique indices."""
    return np.sort(np.random.default_rng([seed, stream]).choice(total, min(number, total), replace=False))


# ---------------------------------------------------------------- thumbnails


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """One image of the sample.

    Attributes:
      number: index of the record in its split.
      key, label: of the record; "" and -1 if it is damaged.
      size: (width, height) of the image, px.
      jpeg: the thumbnail; None for a damaged image, with the reason in `fault`.
    """

    number: int
    key: str = ""
    label: int = -1
    size: tuple[int, int] = (0, 0)
    jpeg: bytes | None = None
    fault: str = ""


def shown_bands(info: records.DatasetInfo, wanted: str | None) -> list[int]:
    """Channel indices shown as red, green and blue; the same index three times for gray.

    Args:
      wanted: --bands: three names, or one for gray; None uses red, green and blue if there are such bands, else the
        first three, or the first as gray if there are fewer.

    Raises:
      UserError: an unknown band, or not one or three bands.
    """
    if wanted is None:
        names = RGB if set(RGB) <= set(info.bands) else info.bands[: 3 if len(info.bands) > 2 else 1]
    else:
        names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in info.bands:
            raise UserError(f"--bands: unknown band {name!r}; the dataset has {several(info.bands, 20)}")
    if len(names) not in (1, 3):
        raise UserError(
            f"--bands={wanted} has {len(names)} bands; expected three, for red, green and blue, or one for gray"
        )
    return [info.bands.index(name) for name in names] * (3 // len(names))


def thumbnails(source: records.RecordSource, places: list[int], number: int, seed: int) -> list[Thumbnail]:
    """Thumbnails of a random sample of `number` images in record order; the ranges of the split map to 0 and 255."""
    return [_thumbnail(source, int(i), places) for i in _sample(len(source), number, seed, _STREAM_SAMPLE)]


def _thumbnail(source: records.RecordSource, i: int, places: list[int]) -> Thumbnail:
    record = None
    try:
        record = records.decode_record(source.read(i))
        pixels = codecs.decode_bands(record.image, source.info, places)
    except (ValueError, RuntimeError) as error:
        known = {} if record is None else {"key": record.key, "label": record.label}
        return Thumbnail(i, **known, fault=first_line(error) if record else "the record is damaged")
    height, width = pixels.shape[:2]
    step = max(1, max(height, width) // (4 * THUMBNAIL))  # subsampling, since a scene may be large
    low, high = np.array(source.split_info.ranges, np.float32)[places].T
    values = (np.nan_to_num(pixels[::step, ::step].astype(np.float32)) - low) / (high - low)
    picture = Image.fromarray(np.round(255 * values.clip(0, 1)).astype(np.uint8))
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return Thumbnail(i, record.key, record.label, (width, height), buffer.getvalue())
