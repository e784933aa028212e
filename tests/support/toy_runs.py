"""Commands that train the toy method, for tests of what is the same for every method: it compiles in seconds."""

import os
import pathlib
import subprocess

import pytest

SUPPORT = pathlib.Path(__file__).resolve().parent
# Subprocesses import the method from this folder, and the program from the checkout.
PATH = {"PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])}


def write_config(folder: pathlib.Path) -> str:
    """Writes a config file of the toy method in its small version; returns its path."""
    path = folder / "toy.py"
    path.write_text(
        "from pera_jax import config as configs\n\n\ndef get_config():\n"
        '    return configs.smoke(configs.default("toy_mae"))\n'
    )
    return str(path)


def wait_for_step(process: subprocess.Popen, step: int) -> list[str]:
    """Reads stderr up to the line of `step`, or of a later one; returns the lines."""
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step ") and int(line.split("/")[0][5:]) >= step:
            return said
    pytest.fail(f"ended before step {step}: {''.join(said)}")
