"""Cost of the input pipeline on the host: CPU time by part, and images delivered per second.

    python benchmarks/input.py                                 # published crops; JPEGs of 512 and 2,000 px, quality 90
    python benchmarks/input.py --config configs/aid_small.py --data shards/aid --workers 1 2 --json input.json

First, the parts are timed one by one in this process. They are CPU times, so other load on the machine matters little.
With synthetic images, the costs of two image sizes are compared. Then the real pipeline runs with each number of
workers. The CPU time of all its processes without startup, per image, minus the parts, is the overhead of batching,
transfer to the main process and Grain. Images per second are wall-clock times and need an otherwise idle machine; the
load before is printed.
"""

import argparse
import io
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections import defaultdict

import numpy as np
from array_record.python import array_record_module
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pera_jax import config as configs  # noqa: E402
from pera_jax.common import errors, files  # noqa: E402
from pera_jax.common.errors import UserError  # noqa: E402
from pera_jax.data import codecs, decode, pipeline, records  # noqa: E402
from pera_jax.data import crops as geometry  # noqa: E402
from pera_jax.data.mixture import Mixture  # noqa: E402
from pera_jax.objectives import base  # noqa: E402

_SYNTHETIC_SIZES = {512: 64, 2000: 8}  # side in pixels: number of images
_PARTS = {
    "read": "read the record",
    "decode": "draw boxes, decode, convert layout",
    "global": "global crops",
    "local": "local crops",
}


def main() -> None:
    arguments = _arguments()
    settings = (configs.load(arguments.config) if arguments.config else configs.default()).crops
    crops = pipeline.Crops(base.crop_specs(settings), settings.aspect, settings.flip)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data:
            sources = {arguments.data: records.open_split(arguments.data, arguments.split)}
        else:
            sources = {
                f"{side} px": _make_records(pathlib.Path(folder) / str(side), side, number)
                for side, number in _SYNTHETIC_SIZES.items()
            }
        parts = {name: time_parts(source, crops, arguments.images) for name, source in sources.items()}
        first = next(iter(sources))
        runs = {
            workers: time_pipeline(sources[first], crops, arguments.images, arguments.batch_size, workers)
            for workers in arguments.workers
        }

    totals = {name: sum(spent[part] for part in _PARTS if part in spent) for name, spent in parts.items()}
    print(f"{'CPU ms per image':48}" + "".join(f"{name:>14}" for name in parts))
    for part, words in _PARTS.items():
        print(f"{words:48}" + "".join(f"{spent.get(part, 0.0):14.3f}" for spent in parts.values()))
    print(f"{'all but reading':48}" + "".join(f"{totals[n] - spent['read']:14.3f}" for n, spent in parts.items()))
    print(
        f"{'for comparison: decode whole images':48}" + "".join(f"{spent['whole']:14.3f}" for spent in parts.values())
    )
    if not arguments.data:
        small, large = (totals[name] - parts[name]["read"] for name in parts)
        pixels = (max(_SYNTHETIC_SIZES) / min(_SYNTHETIC_SIZES)) ** 2
        print(f"the larger image costs {large / small:.1f} times the smaller one, for {pixels:.1f} times the pixels")

    print(f"\npipeline, {first}; {os.cpu_count()} cores")
    headings = f"{'images/s':>12}{'CPU ms/image':>15}{'beyond parts':>15}{'startup, s':>15}"
    print(f"{'workers':>8}{'load before':>14}{headings}")
    for workers, run in runs.items():
        print(
            f"{workers:8}{run['load']:14.1f}{run['images_per_second']:12.1f}{run['ms_per_image']:15.3f}"
            f"{run['ms_per_image'] - totals[first]:15.3f}{run['startup_seconds']:15.2f}"
        )
    fewest, most = runs[min(runs)], runs[max(runs)]
    if most is not fewest:
        ratio = most["images_per_second"] / fewest["images_per_second"]
        print(f"{max(runs)} workers deliver {ratio:.2f} times the images of {min(runs)}")
    if arguments.json:
        result = {
            "crops": vars(crops),
            "images": arguments.images,
            "batch_size": arguments.batch_size,
            "cpu_ms_per_image": parts,
            "pipeline": runs,
        }
        files.write_json(pathlib.Path(arguments.json), result)


def time_parts(source: records.RecordSource, crops: pipeline.Crops, images: int) -> dict[str, float]:
    """CPU milliseconds per image of each part, without workers; "whole" is a full decode, for comparison only."""
    pipeline.keep_memory()
    rng = np.random.default_rng(0)
    info, places = source.info, tuple(range(len(source.info.bands)))
    out = {
        name: np.empty((number, size, size, len(places)), info.dtype) for name, (number, size, _) in crops.specs.items()
    }
    spent = defaultdict(float)
    images = min(images, 8 * len(source))
    warm_up = images // 4
    for i in range(-warm_up, images):
        if i == 0:
            spent.clear()
        clock = [time.thread_time()]
        encoded = records.decode_record(source.read(i % len(source))).image
        clock.append(time.thread_time())
        image, drawn = decode.read_image(encoded, info, places, rng, crops)
        clock.append(time.thread_time())
        for name in out:
            for place, crop in zip(out[name], drawn[name], strict=True):
                geometry.crop_resize(image, *crop, place)
            clock.append(time.thread_time())
        codecs.decode_image(encoded)
        clock.append(time.thread_time())
        for name, start, stop in zip(["read", "decode", *out, "whole"], clock, clock[1:], strict=False):
            spent[name] += stop - start
    return {name: 1e3 * seconds / images for name, seconds in spent.items()}


def time_pipeline(
    source: records.RecordSource, crops: pipeline.Crops, images: int, batch_size: int, workers: int
) -> dict[str, float]:
    """Images delivered per second, CPU milliseconds per image of all processes, CPU seconds of their startup."""
    batch_size = min(batch_size, len(source))
    batches, warm_up = max(images // batch_size, 1), 4 * max(workers, 1)
    load, began = os.getloadavg()[0], _cpu()
    stream = pipeline.make_pipeline(Mixture.from_source(source), crops, batch_size=batch_size, seed=0, workers=workers)
    for _ in range(warm_up):
        next(stream)
    started, clock = _cpu(), time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds, ended = time.perf_counter() - clock, _cpu()
    stream.close()
    return {
        "load": load,
        "images_per_second": batches * batch_size / seconds,
        "ms_per_image": 1e3 * (ended - started) / (batches * batch_size),
        "startup_seconds": started - began,
    }


def _cpu() -> float:
    """CPU seconds so far of this process and of its worker processes (the latter from Linux's /proc)."""
    seconds = time.process_time()
    for process in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # user and system
    return seconds


def _make_records(folder: pathlib.Path, side: int, number: int) -> records.RecordSource:
    """Synthetic images of `side` x `side` pixels with the spectrum of natural images, as JPEG of quality 90 (512 px:
    100 kB)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shard = folder / "made.array_record"
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)) + 1 / 512
    for i in range(number):
        noise = rng.normal(size=(2, side, side))
        gray, tint = (np.fft.irfft2(np.fft.rfft2(n) / frequency**p) for n, p in zip(noise, (1.45, 1.6), strict=True))
        gray, tint = (50 * gray / gray.std())[..., None], (15 * tint / tint.std())[..., None]
        pixels = (127 + gray + tint * np.array([1.0, 0.2, -1.0])).clip(0, 255).astype(np.uint8)  # [side, side, 3]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        writer.write(records.encode_record(file.getvalue(), f"{i}.jpg", None))
    writer.close()
    size = shard.stat().st_size
    print(f"created {number} images of {side} x {side} pixels, {size / number / 1e3:.0f} kB each")
    split = records.SplitInfo(
        number, [shard.name], [number], [size], [[0.0, 255.0]] * 3, [0.5] * 3, [0.2] * 3, {}, "", ""
    )
    version = records.FORMAT_VERSION
    info = records.DatasetInfo("made", list(records.RGB), "uint8", None, False, version, {"train": split})
    return records.RecordSource(folder, info, "train")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="config whose crops are used (default: the published crops)")
    parser.add_argument("--data", help="dataset folder (default: synthetic JPEGs of two sizes)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=400, help="number of images in each of the two measurements")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to measure")
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    if min(arguments.images, arguments.batch_size) < 1 or min(arguments.workers) < 0:
        raise UserError("--images and --batch-size must be >= 1, --workers >= 0")
    return arguments


if __name__ == "__main__":
    errors.run(main)
