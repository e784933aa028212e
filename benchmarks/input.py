"""CPU time of the host's input pipeline, by part.

    python benchmarks/input.py                                        # published crops, 512 px JPEG of quality 90
    python benchmarks/input.py --config configs/aid_small.py --data shards/aid --workers 2 --json input.json

The parts are timed one after the other in this process. Then the real pipeline runs, and the CPU time of all its
processes, start-up aside, is divided by the images delivered: what it takes beyond the parts goes into batches, into
handing them to the main process and into Grain. All times are CPU time, so other work on the machine matters little.
"""

import argparse
import io
import json
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
from pera_jax import errors  # noqa: E402
from pera_jax.data import crops as geometry  # noqa: E402
from pera_jax.data import codecs, pipeline, records  # noqa: E402
from pera_jax.data.mixture import Mixture  # noqa: E402
from pera_jax.errors import UserError  # noqa: E402

_MADE_IMAGES = 64
_PARTS = {
    "read": "read the record",
    "decode": "decode",
    "lay_out": "lay out for cropping",
    "boxes": "draw boxes and flips",
    "global": "global crops",
    "local": "local crops",
}


def main() -> None:
    arguments = _arguments()
    crops = pipeline.Crops.of((configs.load(arguments.config) if arguments.config else configs.default()).crops)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data:
            source = records.open_split(arguments.data, arguments.split)
        else:
            source = _make_records(pathlib.Path(folder))
        parts = time_parts(source, crops, arguments.images)
        whole, startup = time_pipeline(source, crops, arguments.images, arguments.batch_size, arguments.workers)

    rows = [(_PARTS[name], 1e3 * seconds) for name, seconds in parts.items()]
    total = sum(parts.values())
    rows += [
        ("decode and crops together", 1e3 * (total - parts["read"])),
        ("all parts", 1e3 * total),
        (f"the pipeline with {arguments.workers} workers", 1e3 * whole),
        ("  beyond the parts: batches, hand-over, Grain", 1e3 * (whole - total)),
    ]
    print(f"{'part':48}{'CPU ms per image':>18}")
    for name, milliseconds in rows:
        print(f"{name:48}{milliseconds:18.3f}")
    print(f"{'start-up of the workers, once, CPU s':48}{startup:18.2f}")
    if arguments.json:
        result = {
            "crops": vars(crops),
            "images": arguments.images,
            "batch_size": arguments.batch_size,
            "workers": arguments.workers,
            "ms_per_image": {name: 1e3 * seconds for name, seconds in parts.items()},
            "decode_and_crops_ms_per_image": 1e3 * (total - parts["read"]),
            "pipeline_ms_per_image": 1e3 * whole,
            "startup_seconds": startup,
        }
        _write(arguments.json, json.dumps(result, indent=1) + "\n")


def time_parts(source: records.RecordSource, crops: pipeline.Crops, images: int) -> dict[str, float]:
    """CPU seconds per image of each part, without workers."""
    pipeline.keep_memory()
    rng = np.random.default_rng(0)
    channels = len(source.info.bands)
    out = {name: np.empty((number, size, size, channels), np.uint8) for name, number, size, _ in crops.kinds()}
    spent = defaultdict(float)
    warm_up = images // 4
    for i in range(-warm_up, images):
        if i == 0:
            spent.clear()
        clock = [time.thread_time()]
        raw = source.read(i % len(source))
        clock.append(time.thread_time())
        pixels = codecs.decode_image(records.decode_record(raw).image)
        clock.append(time.thread_time())
        image = geometry.Image(pixels)
        clock.append(time.thread_time())
        drawn = pipeline.draw_crops(rng, image.height, image.width, crops)
        clock.append(time.thread_time())
        for name in out:
            for place, crop in zip(out[name], drawn[name], strict=True):
                geometry.crop_resize(image, *crop, place)
            clock.append(time.thread_time())
        for name, start, stop in zip(["read", "decode", "lay_out", "boxes", *out], clock, clock[1:]):
            spent[name] += stop - start
    return {name: seconds / images for name, seconds in spent.items()}


def time_pipeline(
    source: records.RecordSource, crops: pipeline.Crops, images: int, batch_size: int, workers: int
) -> tuple[float, float]:
    """CPU seconds per image of the pipeline with all its processes; CPU seconds of its start and first batches."""
    batch_size = min(batch_size, len(source))
    batches, warm_up = max(images // batch_size, 1), 2 * max(workers, 1)
    began = _cpu()
    stream = pipeline.make_pipeline(Mixture.of(source), crops, batch_size=batch_size, seed=0, workers=workers)
    for _ in range(warm_up):
        next(stream)
    started = _cpu()
    for _ in range(batches):
        next(stream)
    ended = _cpu()
    stream.close()
    return (ended - started) / (batches * batch_size), started - began


def _cpu() -> float:
    """CPU seconds of this process so far, and of its worker processes (those from Linux's /proc)."""
    seconds = time.process_time()
    for process in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # user and system
    return seconds


def _make_records(folder: pathlib.Path) -> records.RecordSource:
    """Images of 512 x 512 pixels with the spectrum of natural ones, as JPEG of quality 90 and about 100 kB."""
    rng = np.random.default_rng(0)
    shard = folder / "made.array_record"
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)) + 1 / 512
    for i in range(_MADE_IMAGES):
        noise = rng.normal(size=(2, 512, 512))
        grey, tint = (np.fft.irfft2(np.fft.rfft2(n) / frequency**p) for n, p in zip(noise, (1.45, 1.6), strict=True))
        grey, tint = (50 * grey / grey.std())[..., None], (15 * tint / tint.std())[..., None]
        pixels = (127 + grey + tint * np.array([1.0, 0.2, -1.0])).clip(0, 255).astype(np.uint8)  # [512, 512, 3]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        writer.write(records.encode_record(file.getvalue(), f"{i}.jpg", None))
    writer.close()
    size = shard.stat().st_size
    print(f"made {_MADE_IMAGES} images of 512 x 512 pixels, {size / _MADE_IMAGES / 1e3:.0f} kB each")
    split = records.SplitInfo(_MADE_IMAGES, [shard.name], [_MADE_IMAGES], [size], [[0.0, 255.0]] * 3, [0.5] * 3, [0.2] * 3, {}, "", "")
    info = records.DatasetInfo("made", list(records.RGB), "uint8", None, False, records.FORMAT_VERSION, {"train": split})
    return records.RecordSource(folder, info, "train")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="a file of configs/, for its crops (default: the published crops)")
    parser.add_argument("--data", help="a data set folder (default: 512 px JPEG images made for the purpose)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=400, help="images to time, for each of the two measurements")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", help="file to write the numbers to")
    arguments = parser.parse_args()
    if min(arguments.images, arguments.batch_size) < 1 or arguments.workers < 0:
        raise UserError("--images and --batch-size must be at least 1, --workers at least 0")
    return arguments


def _write(path: str, text: str) -> None:
    part = pathlib.Path(f"{path}.part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    errors.run(main)
