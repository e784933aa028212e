"""Commands that train the toy method, for tests of what is the same for every method: it compiles in seconds."""

import os
import pathlib

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
