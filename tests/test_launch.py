"""The scripts of launch/: they parse, and what they call exists."""

import pathlib
import re
import shutil
import subprocess

import pytest

from pera_jax import config as configs
from pera_jax import train

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_say_how_they_are_used(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
    bare = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert bare.returncode != 0 and "usage: " in bare.stderr


@pytest.mark.parametrize("file", [*SCRIPTS, LAUNCH / "Dockerfile"], ids=lambda path: path.name)
def test_what_they_call_exists(file):
    text = file.read_text()
    assert "pera_jax.train" in text
    for name in re.findall(r"configs/\w+\.py", text):
        assert (LAUNCH.parent / name).is_file()
    command = text[text.index("-m pera_jax.train") :].split("\n\n")[0]
    for flag in set(re.findall(r"--([a-z_]+)(?:=| )", command)):
        assert flag in train.flags.FLAGS or flag == "config"
    for field in re.findall(r"--config\.([a-z_.]+)=", text):
        section = configs.default()
        for name in field.split("."):
            section = section[name]
