"""Leases: one job per folder, on one or several hosts, after kills, and with simultaneous starts."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from pera_jax.common import lease
from pera_jax.common.errors import UserError
from pera_jax.common.lease import owner

SHORT = {"renewal": 0.1, "silence": 0.6}  # seconds
HOLD = """
import sys, time
from pera_jax.common import lease
with lease.held(sys.argv[1], '--output'):
    print('held', flush=True)
    time.sleep(60)
"""


def leave(folder: pathlib.Path, **changes) -> owner.Owner:
    """Writes the lease of an owner that is not this process."""
    folder.mkdir(exist_ok=True)
    left = dataclasses.replace(owner.Owner.this_process(), **changes)
    (folder / "new").write_bytes(left.content(3))
    os.replace(folder / "new", folder / lease.NAME)
    return left


def holder(folder: pathlib.Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_while_the_first_lives_and_takes_over_when_it_was_killed(tmp_path):
    folder = tmp_path / "a" / "run"
    process = holder(folder)
    try:
        with pytest.raises(
            lease.InUse,
            match=rf"^{folder} is in use by process {process.pid} on .*; wait until it ends, or choose another "
                  r"--workdir$",
        ):
            with lease.held(folder, "--workdir"):
                pass
        process.send_signal(signal.SIGSTOP)  # it does not renew, and lives
        with pytest.raises(lease.InUse), lease.held(folder, "--workdir", **SHORT):
            pass
        process.kill()
        while owner.process_began(process.pid) is not None:  # a zombie from now on: nobody has waited for it
            time.sleep(0.01)
        began = time.monotonic()
        with lease.held(folder, "--workdir"):
            assert time.monotonic() - began < 5 and os.listdir(folder) == [lease.NAME]
        assert os.listdir(folder) == []
    finally:
        process.kill()
        process.wait()


def test_a_process_id_that_was_given_anew_is_another_process(tmp_path):
    leave(tmp_path, began=1)
    with lease.held(tmp_path, "--workdir", **SHORT):
        pass
    leave(tmp_path)
    with pytest.raises(lease.InUse), lease.held(tmp_path, "--workdir", **SHORT):
        pass


@pytest.mark.parametrize(
    "content", [None, b"", b"[1, 2]", b'{"owner": {"token": "../../x"}}', b"\xff" * 3000], ids=range(5)
)
def test_an_owner_on_another_machine_is_dead_when_it_does_not_renew_whatever_its_clock_says(content, tmp_path):
    left = leave(tmp_path, machine="another", host="far\x1b[2J", since="2199-01-01 00:00:00 UTC")
    if content is not None:
        (tmp_path / lease.NAME).write_bytes(content)
    began = time.monotonic()
    with lease.held(tmp_path, "--workdir", **SHORT):
        assert time.monotonic() - began > SHORT["silence"]
        assert left.token not in (tmp_path / lease.NAME).read_text()
    assert os.listdir(tmp_path) == []


def test_an_owner_on_another_machine_that_renews_is_never_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "this_machine", lambda: "another")
    with lease.held(tmp_path, "--workdir", **SHORT):
        with pytest.raises(lease.InUse), lease.held(tmp_path, "--workdir", **SHORT):
            pass
        time.sleep(2 * SHORT["renewal"])
        assert json.loads((tmp_path / lease.NAME).read_bytes())["renewals"] >= 2


@pytest.mark.parametrize("machine", [None, "another"])
def test_of_many_that_find_a_dead_owner_at_once_exactly_one_takes_over(machine, tmp_path):
    for _ in range(5):
        leave(tmp_path, began=1, **({"machine": machine} if machine else {}))
        (tmp_path / f"{lease.NAME}.{'0' * 32}.tmp").write_bytes(b"")  # of a process that was killed as it took one
        start, inside, refused, done = threading.Barrier(12), [], [], threading.Event()

        def compete():
            start.wait()
            try:
                with lease.held(tmp_path, "--workdir", **SHORT):
                    inside.append(1)
                    done.wait()
            except lease.InUse:
                refused.append(1)

        threads = [threading.Thread(target=compete) for _ in range(12)]
        [thread.start() for thread in threads]
        while len(inside) + len(refused) < 12:
            time.sleep(0.01)
        done.set()
        [thread.join() for thread in threads]
        assert (len(inside), len(refused)) == (1, 11)
        assert os.listdir(tmp_path) == []
        if machine:  # watching takes its time
            break


def test_who_has_stood_still_too_long_learns_that_it_is_out(tmp_path):
    with lease.held(tmp_path, "--workdir", renewal=60.0) as first:
        first.check()
        other = leave(tmp_path, host="other")  # has taken over
        first.check()  # no need to look: it has renewed just now
        first._seen -= 1000
        with pytest.raises(
            UserError,
            match="was taken over by process .* on other, .* suspended; this process stops without further writes",
        ):
            first.check()
    assert owner.Owner.parse((tmp_path / lease.NAME).read_bytes()) == other  # not the first one's to remove


def test_a_lease_that_was_removed_by_hand_comes_back(tmp_path):
    with lease.held(tmp_path, "--workdir", **SHORT) as first:
        (tmp_path / lease.NAME).unlink()
        first._seen -= 1000
        first.check()
        with pytest.raises(lease.InUse), lease.held(tmp_path, "--workdir", **SHORT):
            pass
    assert os.listdir(tmp_path) == []


def test_a_job_that_was_started_again_waits_for_its_predecessor(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    left = leave(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(0.7, (tmp_path / lease.NAME).unlink).start()
    with lease.held(tmp_path, "--workdir", **SHORT):
        assert left.token not in (tmp_path / lease.NAME).read_text()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    leave(tmp_path)  # the same start: somebody gave the command twice
    with pytest.raises(lease.InUse), lease.held(tmp_path, "--workdir", **SHORT):
        pass


def test_without_hard_links_it_holds_as_well(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with lease.held(tmp_path / "new", "--workdir"):
        with pytest.raises(lease.InUse), lease.held(tmp_path / "new", "--workdir"):
            pass
    leave(tmp_path, began=1)
    with lease.held(tmp_path, "--workdir"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "inner"):
        with (
            pytest.raises(UserError, match=f"cannot write to {place}: .*; choose another --output"),
            lease.held(place, "--output"),
        ):
            pass
