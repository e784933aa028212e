"""Damages every file of a checkpoint in every way: each damage must be noticed, or change nothing.

    python tests/fuzz/checkpoint_damage.py --number 400 --seed 0

A run has two checkpoints, and the newer one is damaged: one bit or several flipped, a block set to 0, cut off, emptied,
removed. Then the run goes on and its teacher is read. It must go on with the newer checkpoint, bit for bit, or say that
it is damaged, move it aside and go on with the older one. Prints what became of each kind; exit status 1 after a
failure.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import pathlib
import random
import shutil
import sys
import tempfile
import warnings

if __name__ == "__main__":
    sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]
    import conftest  # noqa: F401  sets the devices up

import jax
import numpy as np
import tiny
import toy_states
from absl import logging

from pera_jax.common import digests
from pera_jax.common.errors import UserError
from pera_jax.encoder import load
from pera_jax.parallel import sharding
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, checkpoint_store, run_meta
from pera_jax.weights import initial_state

CARD = {"name": "toy", "fingerprint": "f", "class_names": None, "records": 10, "split": "train"}
KINDS = ("bit", "bits", "zeros", "cut", "emptied", "removed")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run with checkpoints of steps 1 and 2 and all that it takes to go on with it."""

    folder: pathlib.Path
    config: object
    objective: object
    optimizer: object
    mesh: jax.sharding.Mesh
    abstract: steps.TrainState
    meta: dict

    @classmethod
    def made(cls, folder: pathlib.Path) -> "Run":
        config = tiny.config()
        objective = tiny.objective(config)
        optimizer = steps.make_optimizer(objective, config.optimizer)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        meta = run_meta.describe(config, objective, CARD)
        run = cls(folder, config, objective, optimizer, mesh, steps.abstract_state(objective, optimizer, mesh), meta)
        born = toy_states.random_state(objective, optimizer, mesh)
        store = checkpoint_store.Store(str(folder), keep_last=2, keep_every=10)
        for step in (1, 2):
            # No two leaves and no two checkpoints alike.
            leaves, tree = jax.tree.flatten(born)
            leaves = [
                jax.device_put(leaf + np.asarray(step * i, leaf.dtype), leaf.sharding) for i, leaf in enumerate(leaves)
            ]
            state = jax.tree.unflatten(tree, leaves).replace(step=jax.device_put(np.int32(step), born.step.sharding))
            store.save(state, meta, run.position(step))
        store.close()
        return run

    @staticmethod
    def position(step: int) -> dict:
        return {"batches": step, "replaced": 10 * step, "drawn": [step]}

    def goes_on(self, workdir: pathlib.Path):
        """(state, position, what was said) of a training that is started again."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            state, position, _ = initial_state.restore_or_init(
                self.config,
                str(workdir),
                self.meta,
                self.objective,
                self.optimizer,
                self.abstract,
                self.mesh,
                None,
                False,
            )
        return state, {name: position[name] for name in self.position(0)}, said.getvalue()


def damage(file: pathlib.Path, kind: str, rng: random.Random) -> str:
    """Damages a file; says how."""
    content = bytearray(file.read_bytes())
    if kind == "removed" or not content:
        file.unlink()
        return "removed"
    where = rng.randrange(len(content))
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else rng.randint(2, 8)):
            content[where] ^= 1 << rng.randrange(8)
            where = rng.randrange(len(content))
    elif kind == "zeros":
        content[where : where + 512] = bytes(len(content[where : where + 512]))
    else:
        del content[0 if kind == "emptied" else where :]
    file.write_bytes(content)
    return f"{kind} at {where}"


def fuzz(number: int, seed: int, folder: pathlib.Path) -> tuple[collections.Counter, list[str]]:
    """(how often each kind of damage was "noticed" or "harmless", failures in words) of `number` damages over all
    files."""
    rng, run = random.Random(seed), Run.made(folder / "whole")
    saved = {step: run_digests(run, step) for step in (1, 2)}
    newest = run.folder / "checkpoints" / "2"
    files = sorted(path.relative_to(run.folder) for path in newest.rglob("*") if path.is_file())
    rng.shuffle(files)
    counts, failures = collections.Counter(), []
    for index in range(number):
        file = files[index % len(files)]
        kind = KINDS[(index + index // len(files)) % len(KINDS)]
        copy = folder / "copy"
        shutil.copytree(run.folder, copy)
        done = f"{file}, {damage(copy / file, kind, rng)}"
        try:
            weights = None
            try:
                weights = load.load_weights(copy, 2)
            except checkpoint.Damaged:
                pass
            if weights and (digests.leaf_digests(weights.params), weights.meta) != saved[2][1:]:
                failures.append(f"{done}: other weights are read without a word")
            state, position, said = run.goes_on(copy)
            step = int(state.step)
            if (digests.leaf_digests(checkpoint.split(state)), position) != (saved[step][0], run.position(step)):
                failures.append(f"{done}: other values are gone on with, without a word")
            noticed = "resuming from the checkpoint of step 1" in said and (copy / "damaged_2").is_dir()
            if noticed != (step == 1):
                failures.append(f"{done}: goes on from step {step} and says {said!r}")
            counts[f"{kind}: {'noticed' if step == 1 else 'harmless'}"] += 1
        except UserError as error:
            failures.append(f"{done}: the run does not go on: {error}")
        except Exception as error:
            failures.append(f"{done}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(copy)
    return counts, failures


def run_digests(run: Run, step: int):
    folder = run.folder / "checkpoints" / str(step)
    state, _ = checkpoint.restore(folder, run.abstract)
    weights = load.load_weights(run.folder, step)
    return digests.leaf_digests(checkpoint.split(state)), digests.leaf_digests(weights.params), weights.meta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that Orbax gives up
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = fuzz(options.number, options.seed, pathlib.Path(folder))
    print(f"{options.number} damages, seed {options.seed}: {dict(sorted(counts.items()))}")
    print("\n".join(failures) or "none passed without a word, none ended in a traceback")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
