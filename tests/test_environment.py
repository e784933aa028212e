"""Faults of the machine, told apart from damaged data."""

import errno
import os
import pickle

import numpy as np
import pytest

from pera_jax.common import environment
from pera_jax.common.environment import EnvironmentFault, environment_fault, passing, patiently

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
        (OSError(errno.ENOSPC, "x"), "make room"),
        (BlockingIOError(errno.EAGAIN, "fork"), "no more threads or processes"),
        (PermissionError(errno.EACCES, "x"), "permission denied; allow access"),
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

    with pytest.raises(EnvironmentFault, match="make room"):
        patiently(full, "x cannot be written")
    assert next(once) == 1  # waiting makes no room
    with pytest.raises(FileNotFoundError):
        patiently(lambda: open("/nowhere"), "x")
