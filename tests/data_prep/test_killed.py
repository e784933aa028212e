"""Killed and resumed conversions, with archives and with images that are left out."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_commands
from PIL import Image
from toy_files import encode, pack

from data_prep import images
from data_prep.convert import duplicates, folder, split_plan
from data_prep.inputs import sources
from pera_jax.common.errors import UserError


def processes_of(group: int) -> list[int]:
    """The processes that are alive in a group."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("ending", ["tar.gz", "zip"])
def test_killed_at_random_moments_with_dropped_images(tmp_path, ending):
    """KILLS (2 by default) says how often: the main process alone is killed, and its workers must end by themselves."""
    rng = np.random.default_rng(5)
    pictures = [encode(rng.integers(0, 256, (40, 40, 3), np.uint8), "WEBP") for _ in range(300)]
    pictures[7] = encode(np.zeros((40, 40, 3), np.uint8), "WEBP")
    pack(tmp_path / f"in.{ending}", {f"a/{i:04d}.webp": pictures[i % 300] for i in range(600)})
    words = ["--input", str(tmp_path / f"in.{ending}"), "--split", "train", "--shard-size", "10", "--drop",
             "duplicates,blank", "--output"]  # fmt: skip
    args = [sys.executable, "-m", "data_prep.images", "--workers", "2", *words]
    began = time.monotonic()
    subprocess.run([*args, str(tmp_path / "whole/set")], check=True, capture_output=True, timeout=120)
    taken, killed, out = time.monotonic() - began, 0, tmp_path / "killed/set"
    for moment in rng.uniform(0, taken, int(os.environ.get("KILLS", 2))):
        if (out / "info.json").exists():  # the last one was killed after it was done: from the beginning again
            assert contents(out) == contents(tmp_path / "whole/set")
            shutil.rmtree(out)
        process = subprocess.Popen(
            [*args, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        until = time.monotonic() + 20
        while processes_of(process.pid) and time.monotonic() < until:
            time.sleep(0.02)
        assert not processes_of(process.pid)
    assert toy_commands.run(images.main, *words, out).returncode == 0
    print(f"killed {killed} times")
    assert killed and contents(out) == contents(tmp_path / "whole/set")
    assert json.loads((out / "train.report.json").read_text())["duplicates"]["number"] == 300


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_images_that_were_changed_while_a_conversion_rests_are_no_other_shards(tmp_path):
    rng = np.random.default_rng(6)
    files = [encode(Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)), "BMP") for _ in range(9)]
    root = tmp_path / "in"
    root.mkdir()
    for i, content in enumerate([*files, files[0]]):
        (root / f"{i}.png").write_bytes(content)
    inventory = sources.take_stock([root])
    split = images.make_split(inventory, tmp_path / "out", "set", "train", 3, {})
    (tmp_path / "out").mkdir()
    split_plan.write(split_plan.without(split, duplicates.find(inventory, sources.read, 1)))
    (root / "9.png").write_bytes(files[1][:-1] + b"?")  # as many bytes, and a duplicate no more
    changed = split_plan.without(split, duplicates.find(inventory, sources.read, 1))
    with pytest.raises(UserError, match="images have changed since"):
        folder.write_split(changed, images.convert_file, workers=1, max_corrupt_fraction=0)
