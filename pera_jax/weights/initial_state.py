"""The initial state of a training: from a checkpoint, from pretrained weights, or random."""

import contextlib
import pathlib

import jax

from pera_jax.common.errors import UserError
from pera_jax.parallel import distributed
from pera_jax.training import resume
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, intact
from pera_jax.weights import warm_start


def earlier_meta(config, workdir: str) -> dict | None:
    """The `meta` of the newest readable checkpoint of the run to resume; None for a new run."""
    for run in filter(None, (workdir, config.resume_from)):
        for step in reversed(checkpoint.saved_steps(run)):
            with contextlib.suppress(checkpoint.Damaged, checkpoint.Removed):
                folder = pathlib.Path(run).absolute() / checkpoint.FOLDER / str(step)
                return intact.on_all_hosts(lambda: checkpoint.load_meta(folder))
    return None


def restore_or_init(config, workdir, meta, objective, optimizer, abstract, mesh, data, allow_config_change):
    """The first available of: a checkpoint in the workdir, one in `resume_from`, weights from `init_from`, random
    weights.

    Every process must call it. Damaged checkpoints in the workdir are moved aside.

    Args:
      meta: of the run to start, see `run_meta.describe`.
      abstract: shapes, dtypes and shardings of the state.

    Returns:
      (state, data position, changes of the config); changes is None for a new run.

    Raises:
      UserError: the checkpoint belongs to another run, or no checkpoint can be read.
    """
    own = checkpoint.saved_steps(workdir)
    distributed.check_equal(
        own[-1] if own else -1, f"{workdir} is not the same folder on every host; choose one on shared storage"
    )
    run = workdir if own else config.resume_from
    if run:
        newest, _ = checkpoint.folder_of(run, None)
        damaged = []
        for step in reversed(checkpoint.saved_steps(run)):
            folder = newest.with_name(str(step))
            try:
                before = intact.on_all_hosts(lambda: checkpoint.load_meta(folder))
                changes = resume.check_same_run(before, meta, run, config.data.allow_changed_data, allow_config_change)
                found = checkpoint.restore(folder, abstract)
            except checkpoint.Removed:
                if run == workdir or jax.process_count() > 1:
                    raise
                return restore_or_init(
                    config, workdir, meta, objective, optimizer, abstract, mesh, data, allow_config_change
                )
            except checkpoint.Damaged as error:
                damaged.append((folder, error))
                continue
            for bad, error in damaged if distributed.main_host() else ():
                moved = f"; moved to {checkpoint.set_aside(bad)}" if run == workdir else ""
                distributed.say(f"{error.reason}{moved}; resuming from the checkpoint of step {step}")
            distributed.barrier("damaged checkpoints are set aside")
            state, position = found
            batches, images = resume.place_in_stream(position, before["config"]["batch_size"], config.batch_size)
            return state, position | {"batches": batches, "images": images}, changes
        raise UserError(
            f"none of the checkpoints of {run} can be read (the newest: {damaged[0][1].reason}); start again in "
            "another --workdir"
        )
    state = steps.init_sharded(objective, optimizer, mesh, config.seed)
    if config.init_from:
        state = warm_start.with_weights(state, config.init_from, objective)
        state = warm_start.with_estimate(state, config, objective, data, mesh)
    return state, {"batches": 0, "images": 0, "replaced": 0, "drawn": []}, None
