"""Evaluates each new checkpoint of a run that trains in another process (`probe --follow`).

Existing results beside the run say what has been evaluated, so an interrupted job resumes where it stopped, even
between the tasks of a checkpoint. If a task fails, its failure is written as the result and the other tasks continue.
If the machine fails (out of memory, no threads), no result is written, and the job ends with an exit status that says
to re-run it.
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

_NOTHING = -1  # no checkpoint to evaluate


def follow(
    run: str, specs: Sequence[Spec], base: pathlib.Path, batch_size: int, poll: float, patience: float,
    reading: folders.Reading = folders.Reading(),
) -> list[dict[str, Any]]:
    """Evaluates checkpoints until the run has ended and all are evaluated; returns the entries written by this call.

    Args:
      run: the run folder.
      specs: the tasks.
      base: folder for the results.
      batch_size: images decoded at a time; does not change scores.
      poll: seconds between checks for a new checkpoint.
      patience: seconds without a new checkpoint before giving up.
      reading: options for reading folders of images and of scenes.

    Raises:
      UserError: invalid data (before any evaluation); another job follows the run; no new checkpoint for `patience`.
      EnvironmentFault: the machine failed in some tasks; re-run the job.
    """
    with lease.held(base, "--output", name=".follow.lease") if distributed.main_host() else contextlib.nullcontext():
        job = Job(specs, base, batch_size, reading)
        entries = _follow(run, job, poll, patience)
        if distributed.main_host():
            results.write_table(base)  # in case an earlier job was killed before it wrote the table
        return entries


def _follow(run: str, job: Job, poll: float, patience: float) -> list[dict[str, Any]]:
    entries, network, idle, waits = [], None, time.monotonic(), False
    skipped: set[tuple[int, str]] = set()  # (step, save)
    unfinished: list[str] = []  # tasks without a result because the machine failed
    while True:
        # On the main process only, and FINISHED before the checkpoints: otherwise the last one could be missed.
        ended = distributed.broadcast_from_main(int((pathlib.Path(run) / "FINISHED").exists()))
        step = distributed.broadcast_from_main(_next(run, job, skipped) if distributed.main_host() else _NOTHING)
        if step == _NOTHING:
            if ended and unfinished:
                raise EnvironmentFault(
                    f"the machine failed in {several(unfinished)}; re-run the same command to evaluate them"
                )
            if ended:
                return entries
            if distributed.any_host(time.monotonic() - idle > patience):
                raise UserError(
                    f"no new checkpoint in {run} for {patience / 3600:g} hours, and the run has not ended; check the "
                    "training, then re-run the same command"
                )
            if not waits:
                distributed.say(f"waiting for a checkpoint in {run}")
            waits = True
            time.sleep(poll)
            continue
        weights = _load(run, step, skipped)
        if weights is None:
            time.sleep(poll)
            continue
        job.prepare(weights.meta)
        network = Network.from_weights(weights, run, checkpoint.identity(_folder(run, step)), network)
        for spec in job.specs:
            if distributed.broadcast_from_main(int(_is_evaluated(run, job, step, spec))):
                continue
            result = _evaluate(job, network, spec)
            if distributed.any_host(result is None):
                unfinished.append(f"{printable(spec.name)} of step {step}")
                skipped.add((step, network.saved))
                continue
            job.write(result)
            entries.append(result.entry)
            found = {name: f"{score['value']:.4f}" for name, score in result.entry.get("scores", {}).items()}
            said = result.entry.get("failure") or ", ".join(f"{name} {value}" for name, value in found.items())
            distributed.say(f"step {step}, {spec.name}: {said}")
        job.clear_cache()  # the next checkpoint has other features
        idle, waits = time.monotonic(), False


def _evaluate(job: Job, network: Network, spec: Spec) -> Result | None:
    """The result or the failure of a task; None if the machine failed, so that the task may succeed later."""
    try:
        return job.evaluate(network, spec)
    except Exception as error:  # of any kind: continue with the other tasks and checkpoints
        if passing(error) or isinstance(error, EnvironmentFault):
            distributed.say(f"step {network.step}, {printable(spec.name)}: no result yet ({printable(error)})")
            return None
        return job.failed(network, spec, error)


def _next(run: str, job: Job, skipped: set[tuple[int, str]]) -> int:
    """The step of the first checkpoint without all results."""
    steps = (step for step in checkpoint.saved_steps(run) if _save(run, step) not in skipped)
    return next(
        (step for step in steps if not all(_is_evaluated(run, job, step, spec) for spec in job.specs)), _NOTHING
    )


def _is_evaluated(run: str, job: Job, step: int, spec: Spec) -> bool:
    """Whether there is a result of this checkpoint and spec on this data."""
    return any(
        _matches(entry, run, job, step, spec) for entry in results.read_step(job.base, step, spec.name)
    )


def _matches(entry: dict[str, Any], run: str, job: Job, step: int, spec: Spec) -> bool:
    stored = entry["checkpoint"]
    same_run = stored["origin"] == keys.origin(job.base, run) if "origin" in stored else stored["run"] == run
    if not same_run or entry["spec"] != spec.to_dict():
        return False
    prints = job.fingerprints(spec)
    same_data = prints is None or [entry["data"].get(f"{part}_fingerprint") for part in ("train", "test")] == list(
        prints
    )
    return same_data and stored["saved"] == checkpoint.identity(_folder(run, step))


def _save(run: str, step: int) -> tuple[int, str]:
    """A step and the identity of its save, which differs if the step is saved again."""
    return step, checkpoint.identity(_folder(run, step))


def _load(run: str, step: int, skipped: set[tuple[int, str]]) -> Weights | None:
    """Loads the evaluated network of a checkpoint on every process. None if the checkpoint is gone or damaged, and then
    it is added to `skipped`, or if it is not yet visible on some process."""
    weights = damaged = None
    save = _save(run, step)
    try:
        weights = load_if_kept(run, step)
    except checkpoint.Damaged as error:
        damaged = error
    if distributed.any_host(damaged is not None):
        distributed.say(
            damaged.reason if damaged else f"the checkpoint of step {step} cannot be read on another process"
        )
        skipped.add(save)
        return None
    if not distributed.any_host(weights is None):
        return weights
    # otherwise another process does not see it yet
    if not distributed.broadcast_from_main(int(_folder(run, step).is_dir())):
        distributed.say(f"the checkpoint of step {step} was removed before it could be read")
        skipped.add(save)
    return None


def _folder(run: str, step: int) -> pathlib.Path:
    return pathlib.Path(run).absolute() / checkpoint.FOLDER / str(step)


def load_if_kept(run: str, step: int) -> Weights | None:
    """Loads the evaluated network of a checkpoint; None if training removes it while it is read.

    Raises:
      Damaged: the checkpoint exists and cannot be read.
    """
    try:
        return checkpoint.read_while_present(run, step, lambda chosen: load.load_weights(run, chosen))
    except checkpoint.Removed:
        return None
    except UserError:
        if _folder(run, step).is_dir():
            raise
        return None
