"""Exit statuses of commands, and Ctrl-C and SIGTERM before, during and after the first step."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time

import pytest

from pera_jax.common import environment, errors

WORK = """
import os, sys, time
from pera_jax.common import interrupts
kind = interrupts.StopSignal if sys.argv[1] == "command" else interrupts.StopInCall
with kind() as stop, interrupts.before_end(lambda: os.write(2, b"tidied\\n")):
    if "saves" in sys.argv:
        stop.saving()
    print("ready", flush=True)
    while not stop.reached(1):
        time.sleep(0.01)
    if "slow" in sys.argv:
        time.sleep(60)
print("asked by", stop.asked)
"""


def start(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_there_is_something_to_save_a_command_ends_at_once(number):
    process = start("command")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (128 + number, "")
    assert err == f"error: interrupted by {number.name}; nothing is lost\ntidied\n"


def test_in_a_program_of_others_it_is_a_keyboard_interrupt():
    process = start("library")
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == -signal.SIGINT and err.splitlines()[-1] == "KeyboardInterrupt"


def test_the_first_asks_and_says_so_the_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    process = start("command", "saves")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("asked by SIGTERM\n", "SIGTERM: saving a checkpoint after this step\n")
    process = start("command", "saves", "slow")
    for number in (signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.communicate()
    process = start("command", "saves", "slow")
    process.send_signal(signal.SIGINT)
    assert (
        process.stderr.readline()
        == "SIGINT: saving a checkpoint after this step; press Ctrl-C again to stop immediately\n"
    )
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert err == "error: stopped immediately; re-run the same command to resume from the newest checkpoint\ntidied\n"


def test_a_closed_terminal_asks_as_well_and_takes_no_messages():
    """SIGHUP, and writes that fail; under nohup neither."""
    for prefix, asked in (((), True), (("nohup",), False)):
        terminal, end = os.openpty()
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", WORK, "command", "saves"], stdout=subprocess.PIPE, stderr=end,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(2, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(end)
        assert process.stdout.readline() == b"ready\n"
        os.close(terminal)  # the kernel sends SIGHUP
        if asked:
            assert process.communicate(timeout=20)[0] == b"asked by SIGHUP\n" and process.returncode == 0
        else:
            time.sleep(0.3)
            assert process.poll() is None
            process.kill()
            process.communicate()


def test_a_line_without_a_reader_is_no_error():
    code = """
import sys
from pera_jax.common import progress
line = progress.Line(None)
for _ in range(3):
    line.say("x" * 1000)
print("done")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stderr.close()
    assert process.stdout.read() == b"done\n" and process.wait(20) == 0


def test_in_a_program_of_others_the_first_asks_and_the_second_ctrl_c_is_a_keyboard_interrupt():
    process = start("library", "saves")
    process.send_signal(signal.SIGTERM)
    said = "SIGTERM: saving a checkpoint after this step; press Ctrl-C to stop immediately\n"
    assert process.communicate(timeout=20) == ("asked by SIGTERM\n", said) and process.returncode == 0
    process = start("library", "saves", "slow")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == said.replace("SIGTERM", "SIGINT")
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == -signal.SIGINT and err.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize("module", ["pera_jax.train", "data_prep.images"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module):
    process = subprocess.Popen([sys.executable, "-m", module], stderr=subprocess.PIPE, text=True)
    while "numpy" not in open(f"/proc/{process.pid}/maps").read():  # among the first of what is imported
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "error: interrupted\n" and process.returncode == 130


@pytest.mark.parametrize("error, status", [
    (errors.UserError("x"), 1), (environment.EnvironmentFault("x"), 75), (ZeroDivisionError(), 70),
    (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_ends_of_different_kinds_have_statuses_of_their_own(error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        errors.run(main)
    assert ended.value.code == status
    assert ("Traceback" in capsys.readouterr().err) == (status == 70)


def test_a_stall_ends_by_sigalrm_with_the_stacks_also_where_python_cannot_run():
    start = "from pera_jax.training.watchdog import Watchdog\nwith Watchdog(0.5)"
    hang = f"import ctypes\n{start}:\n    ctypes.PyDLL(None).sleep(60)\n"  # which does not release the interpreter lock
    done = subprocess.run([sys.executable, "-c", hang], capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGALRM and 'File "<string>", line 4' in done.stderr
    loop = "for _ in range(20):\n        time.sleep(0.1)\n        dog.reset()"
    moves = f"import time\n{start} as dog:\n    {loop}\ntime.sleep(2)\n"
    assert subprocess.run([sys.executable, "-c", moves], capture_output=True, text=True, timeout=50).stderr == ""
