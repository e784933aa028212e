"""Conversion and start of training at scale: time and memory for more and more small images.

    python benchmarks/convert.py --numbers 10000 100000 1000000 --json convert.json

Makes a tar of as many JPEG images of 64 px as the largest number asks for, converts the first N of them for each number with
`python -m data_prep.images`, and opens and shuffles the result as training does. CPU time is that of all processes of the
conversion; memory is the largest resident size of the main process and of a worker. The files need about 3 kB an image and
lie in a folder of their own below --folder, which is deleted.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pera_jax import config as configs  # noqa: E402
from pera_jax import errors  # noqa: E402
from pera_jax.data import pipeline, records  # noqa: E402
from pera_jax.data.mixture import Mixture  # noqa: E402
from pera_jax.metrics import Progress  # noqa: E402

_KINDS = 500  # different pictures; each image of them differs in a comment, so that no two files are the same


def make(path: pathlib.Path, number: int) -> None:
    """A tar of `number` images in ten class folders."""
    rng, pictures = np.random.default_rng(0), []
    for _ in range(_KINDS):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        coarse.save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    with tarfile.open(path, "w") as archive, Progress(number, "images", "make") as progress:
        for i in range(number):
            picture = pictures[i % _KINDS]
            comment = b"\xff\xfe" + (10).to_bytes(2, "big") + f"{i:08d}".encode()
            content = picture[:2] + comment + picture[2:]
            member = tarfile.TarInfo(f"class{i % 10}/{i:08d}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
            archive.members = []  # it would keep them all
            progress.update()


def peak(process: int) -> int:
    """The largest resident memory so far of a running process, bytes."""
    status = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in status if line.startswith("VmHWM"))  # 0 once it has ended


def convert(archive: pathlib.Path, folder: pathlib.Path, workers: int) -> dict[str, float]:
    """Seconds, CPU seconds and largest resident memory (bytes) of one conversion: of its main process and of a worker, as
    seen ten times a second."""
    command = [sys.executable, "-m", "data_prep.images", "--input", archive, "--output", folder, "--split", "train",
               "--workers", workers]  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    largest = {"main": 0, "worker": 0}
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error, OSError):
                largest["main"] = max(largest["main"], peak(process.pid))
                largest["worker"] = max([largest["worker"], *(peak(child.pid) for child in watched.children())])
            time.sleep(0.1)
    if process.returncode:
        raise errors.UserError("the conversion failed; its message is above")
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "main_bytes": largest["main"], "worker_bytes": largest["worker"]}


def start(folder: pathlib.Path) -> dict[str, float]:
    """Seconds to open a split, and from there to the first batch of shuffled crops."""
    crops = configs.smoke(configs.default()).crops
    began = time.perf_counter()
    source = records.open_split(folder, "train")
    opened = time.perf_counter()
    stream = pipeline.make_pipeline(Mixture.of(source), crops, batch_size=64, seed=0)
    next(stream)
    ended = time.perf_counter()
    stream.close()
    return {"open_seconds": opened - began, "first_batch_seconds": ended - opened, "shards": len(source.split_info.shards)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=(10_000, 100_000), help="images (default 10000 100000)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    rows = []
    print(f"{'images':>10}{'wall s':>9}{'images/s':>10}{'CPU ms/image':>14}{'main MB':>9}{'worker MB':>11}{'open s':>8}"
          f"{'first batch s':>15}{'shards':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for number in sorted(arguments.numbers):
            archive, shards = pathlib.Path(folder) / f"{number}.tar", pathlib.Path(folder) / f"set{number}"
            make(archive, number)
            row = {"images": number} | convert(archive, shards, arguments.workers) | start(shards)
            archive.unlink()
            rows.append(row)
            print(
                f"{number:10,}{row['seconds']:9.1f}{number / row['seconds']:10,.0f}{1e3 * row['cpu_seconds'] / number:14.3f}"
                f"{row['main_bytes'] / 1e6:9.0f}{row['worker_bytes'] / 1e6:11.0f}{row['open_seconds']:8.2f}"
                f"{row['first_batch_seconds']:15.2f}{row['shards']:8}", flush=True,
            )  # fmt: skip
            shutil.rmtree(shards)
    if arguments.json:
        part = arguments.json.with_name(arguments.json.name + ".part")
        part.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(part, arguments.json)


if __name__ == "__main__":
    errors.run(main)
