"""Starts a command as one or several processes on localhost, for multi-host tests."""

import os
import pathlib
import socket
import subprocess

import toy_runs
from conftest import FAST

ROOT = pathlib.Path(__file__).resolve().parents[2]


def launch(command: list[str], hosts: int, devices: int) -> list[subprocess.Popen]:
    """The processes of a command that takes the flags of `train`, each with so many virtual devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | toy_runs.PATH | {"XLA_FLAGS": f"{FAST} --xla_force_host_platform_device_count={devices}"}
    flags = [[]]
    if hosts > 1:
        flags = [
            [f"--coordinator=127.0.0.1:{port}", f"--num_processes={hosts}", f"--process_id={i}"] for i in range(hosts)
        ]
    return [
        subprocess.Popen([*command, *own], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for own in flags
    ]
