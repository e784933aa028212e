"""Failures of the machine, as opposed to damaged data."""

import errno
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import toy_shards

from data_prep.convert import processes
from data_prep.inspect import check_shard
from pera_jax.common import environment
from pera_jax.common.environment import EnvironmentFault, environment_fault, passing, patiently
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, shard_files

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error opening "zarr" driver: Error reading local file "/tmp/a/.zarray": Failed to open: '
    "\"/tmp/a/.zarray\": Too many open files [os_error_code='24'] [tensorstore_spec='{}']"
)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "x"), "too many files are open"),
        (OSError(errno.ENFILE, "x"), "too many files are open"),
        (OSError(errno.EIO, "x"), "input/output error"),
        (OSError(errno.ESTALE, "x"), "stale file handle"),
        (OSError(errno.ENOSPC, "x"), "free disk space"),
        (BlockingIOError(errno.EAGAIN, "fork"), "no more threads or processes"),
        (PermissionError(errno.EACCES, "x"), "permission denied; grant access"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("can't start new thread"), "no more threads or processes"),
        (RuntimeError("open() failed: Too many open files; opening /tmp/x"), "too many files are open"),
        (RuntimeError("read() failed: Input/output error; reading /tmp/x; at byte 9"), "input/output error"),
        (ValueError(TENSORSTORE), "too many files are open"),
        (ValueError("NOT_FOUND: x [os_error_code='116']"), "stale file handle"),
        (TimeoutError("barrier"), "took too long"),
        (raised(ValueError("cannot load"), OSError(errno.ENOMEM, "x")), "not enough memory"),
        (ExceptionGroup("several", [ValueError("x"), OSError(errno.EMFILE, "x")]), "too many files are open"),
        (RuntimeError(OSError(errno.EIO, "x")), "input/output error"),
    ],
)
def test_faults_of_the_machine(error, words):
    assert words in environment_fault(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "x"),
        IsADirectoryError(errno.EISDIR, "x"),
        OSError("image file is truncated (3 bytes not processed)"),
        RuntimeError("Corrupted Riegeli/records file: chunk header hash mismatch (computed 0x24, stored 0x0)"),
        ValueError("DATA_LOSS: [os_error_code='2']"),
        KeyError("Too many open files"),
    ],
)
def test_damage_is_no_fault_of_the_machine(error):
    assert environment_fault(error) is None and not passing(error)


def test_more_memory_than_the_machine_has_is_a_wrong_header():
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 50, np.uint8)
    assert environment_fault(caught.value) is None


def test_a_fault_that_was_dealt_with_is_not_found():
    def later():
        try:
            raise OSError(errno.EMFILE, "x")
        except OSError:
            raise ValueError("cut off") from None

    with pytest.raises(ValueError) as caught:
        later()
    assert environment_fault(caught.value) is None


def test_patience(monkeypatch):
    monkeypatch.setattr(environment, "PAUSES", (0.0, 0.0))
    tries, relieved = [], []

    def third_time_lucky():
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return "read"

    assert patiently(third_time_lucky, "x cannot be read", lambda: relieved.append(1)) == "read"
    assert len(relieved) == 2
    always = iter(range(100))

    def stale():
        next(always)
        raise OSError(errno.ESTALE, "x")

    with pytest.raises(EnvironmentFault, match="^x cannot be read: [sS]tale file handle; .*not damaged$") as caught:
        patiently(stale, "x cannot be read")
    assert next(always) == 3
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # workers hand it to the main process
    once = iter(range(100))

    def full():
        next(once)
        raise OSError(errno.ENOSPC, "x")

    with pytest.raises(EnvironmentFault, match="free disk space"):
        patiently(full, "x cannot be written")
    assert next(once) == 1  # waiting frees no disk space
    with pytest.raises(FileNotFoundError):
        patiently(lambda: open("/nowhere"), "x")


# ---------------------------------------------------------------- shards


def write_shards(folder, number: int):
    files = []
    for i in range(number):
        files.append(folder / f"{i:03d}")
        toy_shards.write_shard(files[-1], [b"%d %d" % (i, k) for k in range(2)])
    return files


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_more_shards_than_files_that_may_be_open(tmp_path):
    """In a process of its own: a hard limit cannot be raised again."""
    files = write_shards(tmp_path, 150)
    code = (
        "import pathlib, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 80))\n"
        "from pera_jax.data import shard_files\n"
        "owner = shard_files.OPEN.owner(shard_files.OPEN)\n"
        "files = [pathlib.Path(name) for name in sys.argv[1:]]\n"
        "held = [open('/dev/null') for _ in range(30)]\n"  # others need files too: fewer are left than the bound
        "for place in range(2):\n"
        "    for i, file in enumerate(files):\n"
        "        shard_files.check_shard(file, 2)\n"
        "        assert shard_files.OPEN.read(owner, file, place) == b'%d %d' % (i, place)\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (80, 80)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shards_are_kept_open_up_to_the_bound(tmp_path, monkeypatch):
    files = write_shards(tmp_path, 6)
    monkeypatch.setattr(shard_files, "MOST_OPEN", 3)
    shards, opened = shard_files.OpenShards(), []
    plain = shard_files._opened
    monkeypatch.setattr(shard_files, "_opened", lambda file: opened.append(file) or plain(file))

    class Holder:
        pass

    holder, before = Holder(), open_files()
    owner = shards.owner(holder)
    for i in (0, 1, 0, 2, 3, 0, 1):  # 3 closes 1, which was read least recently
        assert shards.read(owner, files[i], 1) == b"%d 1" % i
    assert [int(file.name) for file in opened] == [0, 1, 2, 3, 1] and open_files() == before + 3
    other = Holder()
    shards.read(shards.owner(other), files[0], 0)
    shards.close(owner)
    assert open_files() == before + 1
    del other
    shards.read(owner, files[5], 0)  # what was collected is closed at the next opening
    assert open_files() == before + 1


def test_a_machine_that_fails_damages_no_shard(tmp_path, monkeypatch):
    (file,) = write_shards(tmp_path, 1)
    monkeypatch.setattr(environment, "PAUSES", (0.0, 0.0))
    plain, faults = shard_files._opened, ["Too many open files", "Stale file handle"]

    def failing(file):
        if faults:
            raise RuntimeError(f"open() failed: {faults.pop()}; opening {file}")
        return plain(file)

    monkeypatch.setattr(shard_files, "_opened", failing)
    shard_files.check_shard(file, 2)
    faults += ["Input/output error"] * 3
    with pytest.raises(EnvironmentFault, match=f"^shard {file} cannot be read: [iI]nput/output error; check the disk"):
        shard_files.check_shard(file, 2)
    faults += ["Input/output error"] * 3
    found = check_shard.Findings()
    info = SimpleNamespace(splits={"train": SimpleNamespace(shards=["000"], shard_records=[2], shard_bytes=[1])})
    with pytest.raises(EnvironmentFault):
        list(check_shard._read(check_shard.Task(tmp_path, "train", 0, info), found))
    file.write_bytes(bytes(70_000))
    with pytest.raises(UserError, match="truncated or damaged"):
        shard_files.check_shard(file, 2)


@pytest.mark.parametrize("bands", [3, 4])  # PNG, TIFF
def test_a_machine_that_fails_damages_no_image(bands, monkeypatch):
    encoded = codecs.encode(np.zeros((8, 8, bands), np.uint8))

    def no_file(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # of a library that is loaded at its first use

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_file)
    monkeypatch.setattr("tifffile.TiffFile", no_file)
    with pytest.raises(EnvironmentFault, match="too many files are open"):
        codecs.decode_image(encoded)


# ---------------------------------------------------------------- workers


def work(task: str, say) -> None:
    if task == "hang":
        threading.Event().wait()
    raise MemoryError


def test_workers_that_hang_or_lack_memory_end_the_command(monkeypatch):
    with pytest.raises(EnvironmentFault, match="a worker cannot continue: there is not enough memory"):
        list(processes.run(["memory"], work, 1))
    monkeypatch.setattr(processes, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(processes, "IDLE_SECONDS", 1.0)
    with pytest.raises(EnvironmentFault, match="^the workers have not responded for .* use fewer --workers"):
        list(processes.run(["hang"], work, 1))
    assert not multiprocessing.active_children()


def test_threads_or_memory_that_cannot_be_had_are_a_fault_of_the_machine():
    """In a process of its own, which has no memory for their stacks; ArrayRecord would wait for them for ever."""
    code = (
        "import pathlib, resource\n"
        "from pera_jax.common import environment\n"
        "from pera_jax.data import shard_files\n"
        "environment.PAUSES = ()\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)\n"
        "try:\n"
        "    shard_files.open_shard(pathlib.Path('/nowhere'))\n"
        "except environment.EnvironmentFault as error:\n"
        "    print(error)\n"
        "environment.check_memory(1 << 20)\n"
        "try:\n"
        "    environment.check_memory(400 << 20)\n"
        "except OSError as error:\n"
        "    print(environment.environment_fault(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot be read: the system starts no more threads" in done.stdout, done.stderr
    assert "there is not enough memory" in done.stdout
