"""The scripts of launch/: their syntax, the files they call, and requeueing."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
from absl import flags

from pera_jax import config as configs
from pera_jax import train

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
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
    known = flags.FlagValues()
    train.define_flags(known)
    for flag in set(re.findall(r"--([a-z_]+)(?:=| )", command)):
        assert flag in known
    for field in re.findall(r"--config\.([a-z_.]+)=", text):
        section = configs.default()
        for name in field.split("."):
            section = section[name]


@pytest.mark.parametrize("options", [[], ["--config.total=3 steps", "--config.name=it's"]])
def test_every_host_of_a_tpu_gets_the_arguments_as_they_were_given(options, tmp_path):
    tools, host = tmp_path / "bin", tmp_path / "host"
    (host / "pera_jax/.venv/bin").mkdir(parents=True)
    tools.mkdir()
    for place, content in (
        (tools / "git", 'echo "https://host/$3"'),
        (tools / "gcloud", 'case "${@: -1}" in *pera_jax.train*) cd "$HOST_FOLDER" && bash -c "${@: -1}";; esac'),
        (host / "pera_jax/.venv/bin/python", 'printf "%s\\n" "$@" > arguments'),
    ):
        place.write_text(f"#!/usr/bin/env bash\n{content}\n")
        place.chmod(0o755)
    given = ["configs/x.py", "/mnt/my shards", "/mnt/runs/$x"]
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "HOST_FOLDER": str(host)}
    subprocess.run(["bash", str(LAUNCH / "tpu_vm.sh"), "name", "zone", *given, *options], check=True, env=environment)
    config, shards, workdir = given
    wanted = [
        "-m",
        "pera_jax.train",
        "--config",
        config,
        f"--config.data.path={shards}",
        "--workdir",
        workdir,
        *options,
    ]
    assert (host / "pera_jax/arguments").read_text().splitlines() == wanted


OUTCOMES = [  # status of each task, what it leaves, how often the job was started before, whether it is queued again
    ((0, 0), "FINISHED", 0, False),
    ((0, 0), "", 0, True),  # SIGTERM: saved
    ((143, 143), "", 0, True),  # SIGTERM before the first step
    ((1, 137), "", 0, False),  # a wrong config on one host, and the others are killed
    ((1, 1), "checkpoints/20", 0, False),  # a loss that is not finite
    ((2, 2), "", 0, False),
    ((130, 130), "", 0, False),  # Ctrl-C
    ((75, 75), "", 0, True),
    ((142, 137), "", 2, True),  # a step that hangs
    ((142, 137), "", 3, False),  # and hangs, and hangs
    ((142, 137), "checkpoints/20", 40, True),  # each start gets on
    ((70, 137), "checkpoints/20", 0, True),
    ((0, 0), "", 50, False),
]


@pytest.mark.parametrize("statuses, leaves, before, again", OUTCOMES)
def test_slurm_queues_again_only_what_may_come_out_otherwise(statuses, leaves, before, again, tmp_path):
    tools, run = tmp_path / ".venv" / "bin", tmp_path / "run"
    tools.mkdir(parents=True)
    (run / "checkpoints" / "9").mkdir(parents=True)
    programs = {
        "srun": 'shift; worst=0; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; status=$?; '
                '[ $status -gt $worst ] && worst=$status; done; exit $worst',
        "python": f'{f"mkdir -p {run}/{leaves};" if leaves else ""} exit $(echo {statuses[0]} {statuses[1]} | cut -d" '
                  '" -f$((SLURM_PROCID + 1)))',
        "scontrol": f'echo "$@" > {tmp_path}/queued',
    }  # fmt: skip
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (tools / "activate").write_text(f"PATH={tools}:$PATH\n")
    environment = {
        **os.environ,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(before),
    }
    script = [shutil.which("bash"), str(LAUNCH / "slurm.sh"), "configs/demo.py", "shards", "run"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == max(statuses), done.stderr
    assert (tmp_path / "queued").exists() == again, done.stderr
    assert not again or (tmp_path / "queued").read_text() == "requeue 7\n"
    assert not (tmp_path / ".slurm-7").exists()
