"""Judges each checkpoint of a run that trains elsewhere, as it appears.

What has been judged is known from the results beside the run, so a job that was killed goes on where it was: in the
middle of a checkpoint's tasks, too. A task that fails leaves its failure as its result, and the others go on; where the
machine failed (no memory, no threads), nothing is left, and the job ends with a status that says to start it again.
"""

import contextlib
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from pera_jax.common import lease
from pera_jax.common.environment import EnvironmentFault, passing
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several
from pera_jax.data.labelled import folders
from pera_jax.encoder import load
from pera_jax.encoder.load import Weights
from pera_jax.parallel import distributed
from pera_jax.probes.runner import keys, results
from pera_jax.probes.runner.job import Job, Network, Result
from pera_jax.probes.runner.specs import Spec
from pera_jax.training.checkpoints import checkpoint

_NOTHING = -1  # no checkpoint to judge


def follow(
    run: str, specs: Sequence[Spec], base: pathlib.Path, batch_size: int, poll: float, patience: float,
    reading: folders.Reading = folders.Reading(),
) -> list[dict[str, Any]]:
    """Returns the entries of this call when the run has ended and all of its checkpoints are judged.

    Args:
      poll: seconds between two looks for a new checkpoint.
      patience: seconds without one after which to give up.
      reading: how folders of images and of scenes are read.

    Raises:
      UserError: bad data, before anything is judged; another job that follows the run; no new checkpoint for `patience`.
    """
    with lease.held(base, "--output", name=".follow.lease") if distributed.main_host() else contextlib.nullcontext():
        job = Job(specs, base, batch_size, reading)
        entries = _follow(run, job, poll, patience)
        if distributed.main_host():
            results.write_table(base)  # of a job that was killed before it could
        return entries


def _follow(run: str, job: Job, poll: float, patience: float) -> list[dict[str, Any]]:
    entries, network, idle, waits = [], None, time.monotonic(), False
    passed_over: set[tuple[int, str]] = set()  # saves
    unfinished: list[str] = []  # tasks that the machine has not let end
    while True:
        # On one host, and the end before the look for checkpoints: else the last one could be missed.
        ended = distributed.broadcast_from_main(int((pathlib.Path(run) / "FINISHED").exists()))
        step = distributed.broadcast_from_main(_next(run, job, passed_over) if distributed.main_host() else _NOTHING)
        if step == _NOTHING:
            if ended and unfinished:
                raise EnvironmentFault(f"the machine failed in {several(unfinished)}; start this job again for them")
            if ended:
                return entries
            if distributed.any_host(time.monotonic() - idle > patience):
                raise UserError(
                    f"{run} has no new checkpoint for {patience / 3600:g} hours and has not ended; see what has become "
                    "of the training, then start this job again"
                )
            if not waits:
                distributed.say(f"waiting for a checkpoint in {run}")
            waits = True
            time.sleep(poll)
            continue
        weights = _load(run, step, passed_over)
        if weights is None:
            time.sleep(poll)
            continue
        job.prepare(weights.meta)
        network = Network.of(weights, run, "teacher", checkpoint.identity(_folder(run, step)), network)
        for spec in job.specs:
            if distributed.broadcast_from_main(int(_judged(run, job, step, spec))):
                continue
            result = _judge(job, network, spec)
            if distributed.any_host(result is None):
                unfinished.append(f"{printable(spec.name)} of step {step}")
                passed_over.add((step, network.saved))
                continue
            job.write(result)
            entries.append(result.entry)
            found = {name: f"{score['value']:.4f}" for name, score in result.entry.get("scores", {}).items()}
            said = result.entry.get("failure") or ", ".join(f"{name} {value}" for name, value in found.items())
            distributed.say(f"step {step}, {spec.name}: {said}")
        job.forget()  # the next checkpoint has other features
        idle, waits = time.monotonic(), False


def _judge(job: Job, network: Network, spec: Spec) -> Result | None:
    """What a task found, or that it failed; None where it may succeed another time, as the machine failed."""
    try:
        return job.judge(network, spec)
    except Exception as error:  # whatever it is: the other tasks and checkpoints are worth having
        if passing(error) or isinstance(error, EnvironmentFault):
            distributed.say(f"step {network.step}, {printable(spec.name)}: no result yet ({printable(error)})")
            return None
        return job.failed(network, spec, error)


def _next(run: str, job: Job, passed_over: set[tuple[int, str]]) -> int:
    """The first checkpoint for which a result is missing."""
    steps = (step for step in checkpoint.saved_steps(run) if _save(run, step) not in passed_over)
    return next((step for step in steps if not all(_judged(run, job, step, spec) for spec in job.specs)), _NOTHING)


def _judged(run: str, job: Job, step: int, spec: Spec) -> bool:
    """Whether a result is there of this very checkpoint and spec, on this very data."""
    return any(_fits(entry, run, job, step, spec) for entry in results.read_place(job.base, "teacher", step, spec.name))


def _fits(entry: dict[str, Any], run: str, job: Job, step: int, spec: Spec) -> bool:
    of = entry["checkpoint"]
    same_run = of["origin"] == keys.origin(job.base, run) if "origin" in of else of["run"] == run
    if not same_run or entry["spec"] != spec.described():
        return False
    prints = job.fingerprints(spec)
    same_data = prints is None or [entry["data"].get(f"{part}_fingerprint") for part in ("train", "test")] == list(prints)
    return same_data and of["saved"] == checkpoint.identity(_folder(run, step))


def _save(run: str, step: int) -> tuple[int, str]:
    """A step and what tells its save from another one under the same step."""
    return step, checkpoint.identity(_folder(run, step))


def _load(run: str, step: int, passed_over: set[tuple[int, str]]) -> Weights | None:
    """The teacher of a checkpoint on every host, or None: for good where it is gone or damaged, else for now."""
    weights = damaged = None
    save = _save(run, step)
    try:
        weights = load_if_kept(run, step)
    except checkpoint.Damaged as error:
        damaged = error
    if distributed.any_host(damaged is not None):
        distributed.say(str(damaged or f"the checkpoint of step {step} cannot be read on another host"))
        passed_over.add(save)
        return None
    if not distributed.any_host(weights is None):
        return weights
    if not distributed.broadcast_from_main(int(_folder(run, step).is_dir())):  # else another host does not see it yet
        distributed.say(f"the checkpoint of step {step} was removed before it could be read")
        passed_over.add(save)
    return None


def _folder(run: str, step: int) -> pathlib.Path:
    return pathlib.Path(run).absolute() / checkpoint.FOLDER / str(step)


def load_if_kept(run: str, step: int) -> Weights | None:
    """The teacher of a checkpoint, or None where training removes it before all of it is read.

    Raises:
      Damaged: it is there and cannot be read.
    """
    try:
        return checkpoint.while_kept(run, step, lambda chosen: load.load_weights(run, chosen))
    except checkpoint.Removed:
        return None
    except UserError:
        if _folder(run, step).is_dir():
            raise
        return None
