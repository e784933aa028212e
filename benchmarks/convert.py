"""Scaling of dataset conversion and training startup: time and memory by number of images.

    python benchmarks/convert.py --numbers 10000 100000 1000000 --json convert.json
    python benchmarks/convert.py --source folder --numbers 100000

For each number, creates that many JPEG images of 64 px in a tar (or another archive, or a folder), converts them with
`pera-jax prep-images`, and opens and shuffles the result as training does, each in a separate process. CPU time
includes all processes of the conversion. Memory is the peak resident size of the conversion's main process, of its
largest worker, and of the training startup. Files need about 6 kB per image, in a temporary folder in --folder.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

import numpy as np
import psutil
from PIL import Image

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from pera_jax import config as configs  # noqa: E402
from pera_jax.common import errors, files  # noqa: E402
from pera_jax.common.progress import Progress  # noqa: E402
from pera_jax.data import pipeline, records  # noqa: E402
from pera_jax.data.mixture import Mixture  # noqa: E402
from pera_jax.objectives import base

_PICTURES = 500  # distinct pictures; a JPEG comment makes each file unique


def images(number: int):
    """Yields (name, bytes) of `number` images in ten class folders."""
    rng, pictures = np.random.default_rng(0), []
    for _ in range(_PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        coarse.save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    for i in range(number):
        comment = b"\xff\xfe" + (10).to_bytes(2, "big") + f"{i:08d}".encode()
        picture = pictures[i % _PICTURES]
        yield f"class{i % 10}/{i:08d}.jpg", picture[:2] + comment + picture[2:]


def make(path: pathlib.Path, number: int) -> None:
    """Writes `number` images to a folder or an archive, depending on the suffix of `path`."""
    with Progress(number, "images", "make") as progress:
        if path.suffix == ".folder":
            for name, content in images(number):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
                progress.update()
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in images(number):
                    archive.writestr(name, content)
                    progress.update()
        else:
            with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
                for name, content in images(number):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                    archive.members = []  # otherwise it keeps all of them in memory
                    progress.update()


def peak(process: int) -> int:
    """Peak resident memory of a running process so far, in bytes."""
    status = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in status if line.startswith("VmHWM"))  # 0 once it has ended


def convert(source: pathlib.Path, folder: pathlib.Path, workers: int, drop: str | None) -> dict[str, float]:
    """Seconds, CPU seconds, and peak resident memory of the main process and of the largest worker (bytes, sampled ten
    times a second) of one conversion."""
    command = [sys.executable, "-m", "data_prep.images", "--input", source, "--output", folder, "--split", "train",
               "--workers", workers, *(["--drop", drop] if drop else [])]  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    largest = {"main": 0, "worker": 0}
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, cwd=_ROOT) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error, OSError):
                largest["main"] = max(largest["main"], peak(process.pid))
                largest["worker"] = max([largest["worker"], *(peak(child.pid) for child in watched.children())])
            time.sleep(0.1)
    if process.returncode:
        raise errors.UserError("the conversion failed; see its error message above")
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "main_bytes": largest["main"], "worker_bytes": largest["worker"]}


def start(folder: pathlib.Path) -> dict[str, float]:
    """Seconds to open a split, and from then to the first batch of shuffled crops."""
    settings = configs.smoke(configs.default()).crops
    crops = pipeline.Crops(base.crop_specs(settings), settings.aspect, settings.flip)
    began = time.perf_counter()
    source = records.open_split(folder, "train")
    opened = time.perf_counter()
    stream = pipeline.make_pipeline(Mixture.from_source(source), crops, batch_size=64, seed=0)
    next(stream)
    ended = time.perf_counter()
    stream.close()
    return {
        "shards": len(source.split_info.shards),
        "open_seconds": opened - began,
        "first_batch_seconds": ended - opened,
        "start_bytes": peak(os.getpid()),
    }


def start_in_process(folder: pathlib.Path) -> dict[str, float]:
    """Runs `start` in a separate process."""
    code = "import json, sys; from benchmarks import convert; print(json.dumps(convert.start(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--numbers", type=int, nargs="+", default=(10_000, 100_000), help="numbers of images (default: 10000 100000)"
    )
    parser.add_argument(
        "--source", choices=("tar", "tar.gz", "zip", "folder"), default="tar", help="kind of input (default: tar)"
    )
    parser.add_argument("--drop", help="see pera-jax prep-images")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of processes (default: all cores)"
    )
    parser.add_argument("--folder", help="parent of the temporary folder (default: the system's)")
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    rows = []
    print(f"{'images':>10}{'wall s':>9}{'images/s':>10}{'CPU ms/image':>14}{'main MB':>9}{'worker MB':>11}{'shards':>8}"
          f"{'open s':>8}{'first batch s':>15}{'start MB':>10}", flush=True)  # fmt: skip
    for number in sorted(arguments.numbers):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            place = pathlib.Path(folder).resolve()
            source, shards = place / f"{number}.{arguments.source}", place / "set"
            make(source, number)
            row = {"images": number, "source": arguments.source}
            row |= convert(source, shards, arguments.workers, arguments.drop) | start_in_process(shards)
        rows.append(row)
        rate, cpu = number / row["seconds"], 1e3 * row["cpu_seconds"] / number
        main_mb, worker_mb, start_mb = (row[f"{name}_bytes"] / 1e6 for name in ("main", "worker", "start"))
        print(f"{number:10,}{row['seconds']:9.1f}{rate:10,.0f}{cpu:14.3f}{main_mb:9.0f}{worker_mb:11.0f}{row['shards']:8}"
              f"{row['open_seconds']:8.2f}{row['first_batch_seconds']:15.2f}{start_mb:10.0f}", flush=True)  # fmt: skip
        if arguments.json:
            files.write_json(arguments.json, rows)


if __name__ == "__main__":
    errors.run(main)
