"""Judges each checkpoint of a run that trains elsewhere, as it appears.

What has been judged is known from the results beside the run, so a job that was killed goes on where it was: in the
middle of a checkpoint's tasks, too. A task that fails leaves its failure as its result, and the others go on.
"""

import contextlib
import fcntl
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pera_jax import checkpoint, distributed
from pera_jax.errors import UserError
from pera_jax.probes import results
from pera_jax.probes.job import Job, Network
from pera_jax.probes.specs import Spec

_NOTHING = -1  # no checkpoint to judge


def follow(
    run: str, specs: Sequence[Spec], base: pathlib.Path, batch_size: int, poll: float, patience: float
) -> list[dict[str, Any]]:
    """Returns the entries of this call when the run has ended and all of its checkpoints are judged.

    Args:
      poll: seconds between two looks for a new checkpoint.
      patience: seconds without one after which to give up.

    Raises:
      UserError: bad data, before anything is judged; another job that follows the run; no new checkpoint for `patience`.
    """
    entries, job, idle = [], None, time.monotonic()
    gone: set[int] = set()
    with _only_one(base):
        while True:
            ended = (pathlib.Path(run) / "FINISHED").exists()  # before the look for checkpoints, or the last is missed
            step = distributed.of_main_host(_next(run, base, specs, gone))
            if step == _NOTHING:
                if distributed.anywhere(ended):
                    return entries
                if distributed.anywhere(time.monotonic() - idle > patience):
                    raise UserError(
                        f"{run} has no new checkpoint for {patience / 3600:g} hours and has not ended; see what has become "
                        "of the training, then start this job again"
                    )
                time.sleep(poll)
                continue
            weights = load_if_kept(run, step)
            if distributed.anywhere(weights is None):
                distributed.say(f"the checkpoint of step {step} was removed before it could be read")
                gone.add(step)
                continue
            job = job or Job(specs, weights.meta, base, batch_size)
            network = Network.of(weights, run, "teacher")
            for spec in specs:
                if distributed.of_main_host(int(_judged(base, step, spec))):
                    continue
                entry = _judge(job, network, spec)
                said = entry.get("failure") or ", ".join(f"{k} {v['value']:.4f}" for k, v in entry["scores"].items())
                distributed.say(f"step {step}, {spec.name}: {said}")
                entries.append(entry)
            job.forget()  # the next checkpoint has other features
            idle = time.monotonic()


def _judge(job: Job, network: Network, spec: Spec) -> dict[str, Any]:
    try:
        return job.judge(network, spec)
    except Exception as error:  # whatever it is: the other tasks and checkpoints are worth having
        return job.failed(network, spec, error)


def _next(run: str, base: pathlib.Path, specs: Sequence[Spec], gone: set[int]) -> int:
    """The first checkpoint for which a result is missing."""
    steps = (step for step in checkpoint.saved_steps(run) if step not in gone)
    return next((step for step in steps if not all(_judged(base, step, spec) for spec in specs)), _NOTHING)


def _judged(base: pathlib.Path, step: int, spec: Spec) -> bool:
    """Whether the result of this very spec is there; one of other data or settings is none."""
    entry = results.read_one(base, "teacher", step, spec.name)
    return entry is not None and entry["spec"] == spec.described()


def load_if_kept(run: str, step: int) -> checkpoint.Weights | None:
    """The teacher of a checkpoint, or None where training removes it before all of it is read.

    Raises:
      Damaged: it is there and cannot be read.
    """
    folder = pathlib.Path(run).absolute() / "checkpoints" / str(step)
    before = _files(folder)
    try:
        weights = checkpoint.load_weights(run, step)
    except UserError:
        if _files(folder) >= before > set():
            raise
        return None
    # Removed one by one: what is still there after reading was there while reading.
    return weights if _files(folder) >= before > set() else None


def _files(folder: pathlib.Path) -> set[pathlib.Path]:
    with contextlib.suppress(FileNotFoundError):
        return {path for path in folder.rglob("*")}
    return set()


@contextlib.contextmanager
def _only_one(base: pathlib.Path) -> Iterator[None]:
    """Raises UserError where another job follows the same run; the lock goes with the process that holds it."""
    if not distributed.main_host():
        yield
        return
    try:
        base.mkdir(parents=True, exist_ok=True)
        lock = open(base / "follow.lock", "w")
    except OSError as error:
        raise UserError(f"cannot write to {base}: {error.strerror}; make room or choose another --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another job follows this run into {base}; wait for it, or choose another --output") from error
        yield
