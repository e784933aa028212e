"""The training job.

    python -m pera_jax.train --config aid_small --config.data.path=shards/aid --workdir runs/aid

Runs the jitted step of the config's objective over a mesh. Re-run the same command to resume, bit for bit, from the newest
checkpoint of the workdir; `pera_jax.training.resume` lists the config fields that may change. Only one process can train in a
workdir. SIGTERM and SIGINT save a checkpoint and exit with status 0; `pera_jax.common.errors` lists the other statuses.

With several hosts, run the same command on each. They find each other on SLURM and TPU pods; elsewhere pass flags such as
`--coordinator host0:8476 --num_processes 4 --process_id 0`. SIGTERM to any host saves a checkpoint and stops all of them.
"""

import contextlib
import functools
import gc
import os
import pathlib
import signal
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import DEFINE_config_file

from pera_jax import calls, objectives
from pera_jax import config as configs
from pera_jax.common import environment, errors, interrupts, lease, paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import several
from pera_jax.config import flags as config_flags
from pera_jax.data import mixture, pipeline
from pera_jax.objectives.base import judged
from pera_jax.parallel import cluster, distributed, global_arrays, sharding
from pera_jax.probes.online import Monitor
from pera_jax.training import metrics, opening, profiling, resume, schedules
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, checkpoint_store, intact, run_meta
from pera_jax.training.loop import Loop, explain_out_of_memory
from pera_jax.training.watchdog import Watchdog
from pera_jax.weights import warm_start

_COMPILER_BYTES = 256 << 20  # that the compiler must find at least: it aborts the process where it finds none


@calls.logging_unchanged()
def train(
    config: str | os.PathLike | ConfigDict, workdir: str | os.PathLike, profile: str | None = None, *,
    data: str | os.PathLike | None = None, changes: Mapping[str, Any] | None = None, allow_config_change: bool = False,
) -> None:  # fmt: skip
    """Trains to the end of `config.total`, or until Ctrl-C or SIGTERM asks for an end; also as `pera_jax.train(...)`.

    The same call resumes from the newest checkpoint of `workdir`. Ctrl-C saves after the step under way; a second one, and
    one before the first step, is a KeyboardInterrupt. On one host nothing here ends the process: `stall_seconds` is for
    the command.

    Args:
      config: a name, as "pera_vitb16" or "demo:smoke", a file of one's own, the config.json of a run, or a ConfigDict,
        which is not changed.
      workdir: folder for checkpoints and metrics; where several hosts train, one that all of them see.
      profile: "FIRST:LAST", the steps of which a trace is written to WORKDIR/profile.
      data: dataset folder, instead of `config.data.path`; several with commas between.
      changes: other fields, as {"total": "100 steps", "model.width": 384}.
      allow_config_change: resume although fields that shape the run differ, see `pera_jax.training.resume`.

    Raises:
      UserError: for every wrong input, before anything is written to `workdir`; a loss that is not finite; a full disk.
    """
    path = {} if data is None else {"data.path": os.fspath(data)}
    config = configs.load(config, path | dict(changes or {}))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(interrupts.StopInCall())
        _train(config, os.fspath(workdir), profile, allow_config_change, stop, stack)


def _train(config, workdir, profile, allow_config_change, stop, stack: contextlib.ExitStack) -> None:
    watchdog = stack.enter_context(Watchdog(config.stall_seconds if stop.ends_process else 0))  # first: opening devices and data may hang
    stack.enter_context(explain_out_of_memory(config))

    # ---- mesh and checks that need neither data nor model
    paths.local(workdir, "workdir")
    mesh = sharding.make_mesh(**config.mesh)
    configs.check(config, sharding.batch_shards(mesh), sharding.weight_shards(mesh), jax.process_count())

    # ---- data set
    data = mixture.open_mixture(config.data)
    for source in data.sources:
        if source.damaged:
            lost = sum(source.split_info.shard_records[number] for number in source.damaged)
            distributed.say(f"{source.path}: {len(source.damaged)} damaged shard(s); others replace their {lost} records")
    watchdog.reset()
    steps_per_epoch = len(data) // config.batch_size
    if steps_per_epoch < 1:
        raise UserError(
            f"{config.data.path} holds {len(data)} images in split {config.data.split!r}, fewer than "
            f"batch_size={config.batch_size}; make the batch smaller"
        )

    # ---- durations, schedules
    def duration(field: str, value: str, total: int | None) -> int:
        return schedules.parse_duration(
            value, total_steps=total, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size, name=field
        )

    total = duration("total", config.total, None)
    every = {
        "log": duration("log_every", config.log_every, total),
        "save": duration("checkpoint.every", config.checkpoint.every, total),
        "keep": duration("checkpoint.keep_every", config.checkpoint.keep_every, total),
        "monitor": duration("monitor.every", config.monitor.every, total),
    }
    for name, value in every.items():
        if value < 1:
            raise UserError(f"the interval of {name} must be at least \"1 steps\", got 0 steps")
    schedule = schedules.scalars(
        config, objectives.method(config.objective).schedules(), steps_per_epoch=steps_per_epoch, total_steps=total
    )

    # ---- what a run that is gone on with has been trained with so far
    data = resume.with_own_statistics(data, _earlier(config, workdir), config.data)

    # ---- objective, optimizer, step
    objective = objectives.from_config(config, data.bands)
    optimizer = steps.make_optimizer(config.optimizer)
    abstract = steps.abstract_state(objective, optimizer, mesh)
    train_step = steps.jit_step(
        steps.make_step(objective, optimizer, config.seed, config.optimizer, config.accumulate),
        jax.tree.map(lambda leaf: leaf.sharding, abstract),
        mesh,
    )
    meta = run_meta.describe(config, objective, data.card())
    monitor = None
    if config.monitor.data:
        monitor = Monitor(config.monitor, objective, judged(objective, abstract.params, abstract.teacher), mesh)

    # ---- from here on no other process works in the workdir, and this one may write to it
    owned = []
    distributed.on_main_host(lambda: owned.append(stack.enter_context(lease.held(workdir, "--workdir"))))

    # ---- state: (1) checkpoint in the workdir, else (2) resume_from, else (3) init_from (weights), else (4) scratch
    state, position, changes = _first_state(
        config, workdir, meta, objective, optimizer, abstract, mesh, data, allow_config_change
    )
    watchdog.reset()
    start = int(state.step)
    if start >= total:
        if distributed.main_host() and checkpoint.saved_steps(workdir):  # killed before it could say so
            run_meta.mark_finished(workdir, start)
        distributed.say(f"{workdir} is at step {start} of {total}: nothing left to do")
        return
    traced = profiling.parse_range(profile, start, total)
    if changes is not None:
        distributed.say(resume.sentence(start, total, changes))
    said = opening.lines(
        config, objective, mesh, data, abstract.params, total=total, steps_per_epoch=steps_per_epoch, hosts=jax.process_count()
    )
    for line in (*said, "compiling the step, which takes longest where it was never compiled before"):
        distributed.say(line)

    environment.check_memory(_COMPILER_BYTES)

    # ---- loop; only from here on is anything written that stays
    stop.several_hosts = jax.process_count() > 1
    shared = distributed.SharedStop() if stop.several_hosts else None
    stream = pipeline.make_pipeline(
        data, pipeline.Crops(objective.crops, config.crops.aspect, config.crops.flip), batch_size=config.batch_size, seed=config.seed, start_batch=position["batches"],
        workers=pipeline.workers_of(config.data.workers),
        rows=global_arrays.local_rows(jax.sharding.NamedSharding(mesh, sharding.BATCH), config.batch_size),
    )
    stack.callback(stream.close)
    stack.callback(gc.collect)  # before it: JAX lets go of the last batch, which lies in the workers' memory
    store = checkpoint_store.Store(workdir, config.checkpoint.keep_last, every["keep"], owned[0] if owned else None)
    stack.callback(store.close)
    writer = None
    if distributed.main_host():
        resume.keep_earlier(workdir, meta, start)
        run_meta.write(workdir, meta)
        run_meta.mark_finished(workdir, None)
        writer = metrics.MetricsWriter(workdir, resume_step=start, total=total, batch_size=config.batch_size)
        stack.callback(writer.close)
    tracer = profiling.Profile(traced, workdir)
    stack.callback(tracer.close)
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(distributed.exit_on_error())
    stack.enter_context(explain_out_of_memory(config))  # again: `exit_on_error` lets nothing through

    loop = Loop(
        config, objective, mesh, store, meta, writer, watchdog, every, total, position, start, data.names(), monitor
    )
    for step in range(start, total):
        scalars = {name: np.asarray(value, config.parameter_precision) for name, value in schedule.at(step).items()}
        tracer.before(step + 1, state)
        batch, placed = loop.next_batch(stream, state), global_arrays.replicated(scalars, mesh)
        # What the step needs lies on the devices by now: a transfer inside of it would be an oversight that costs every step.
        with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, out = train_step(state, batch, placed)
        batch = None  # it may lie in the workers' memory
        tracer.after(step + 1, state)
        if not shared:
            stop.saving()
        loop.after(step + 1, state, out, scalars)
        if (shared or stop).reached(step + 1):
            break
    loop.finish(state)
    if distributed.main_host() and int(state.step) == total:
        run_meta.mark_finished(workdir, total)
    if asked := (shared or stop).asked:
        distributed.say(f"stopped by {asked} at step {int(state.step)} of {total}; checkpoint saved")


def _earlier(config, workdir: str) -> dict | None:
    """The `meta` of the newest readable checkpoint of the run being resumed; None for a new run."""
    for run in filter(None, (workdir, config.resume_from)):
        for step in reversed(checkpoint.saved_steps(run)):
            with contextlib.suppress(checkpoint.Damaged, checkpoint.Removed):
                folder = pathlib.Path(run).absolute() / checkpoint.FOLDER / str(step)
                return intact.on_all_hosts(lambda: checkpoint.load_meta(folder))
    return None


def _first_state(config, workdir, meta, objective, optimizer, abstract, mesh, data, allow_config_change):
    """The initial state, from the workdir, `resume_from`, `init_from` or scratch, in this order.

    Returns:
      (state, data position, changes of the config); changes is None for a new run.
    """
    own = checkpoint.saved_steps(workdir)
    distributed.check_equal(
        own[-1] if own else -1, f"{workdir} is not the same folder on every host; choose one on storage that they share"
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
                return _first_state(config, workdir, meta, objective, optimizer, abstract, mesh, data, allow_config_change)
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
            f"none of the checkpoints of {run} can be read (the newest: {damaged[0][1].reason}); start again in another --workdir"
        )
    state = steps.init_sharded(objective, optimizer, mesh, config.seed)
    if config.init_from:
        state = warm_start.with_weights(state, config.init_from, objective)
        state = warm_start.with_estimate(state, config, objective, data, mesh)
    return state, {"batches": 0, "images": 0, "replaced": 0, "drawn": []}, None


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; not at import, which would give them to every program that imports this module."""
    DEFINE_config_file("config", None, "a name such as demo or demo:smoke, your own file, or RUN/config.json", flag_values=into)
    flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and config.json; an existing run in it is resumed", flag_values=into)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if SLURM or TPU detection does not apply", flag_values=into)
    flags.DEFINE_integer("num_processes", None, "total number of processes, as --coordinator", flag_values=into)
    flags.DEFINE_integer("process_id", None, "index of this process from 0, as --coordinator", flag_values=into)
    flags.DEFINE_integer("join_seconds", cluster.JOIN_SECONDS, "how long to wait for all hosts at startup", flag_values=into)
    allow = "resume with another total, batch_size, schedules, ...; see pera_jax/training/resume.py"
    flags.DEFINE_bool("allow_config_change", False, allow, flag_values=into)
    flags.DEFINE_string("profile", None, "FIRST:LAST, the steps to trace into WORKDIR/profile", flag_values=into)


def main(argv, stop: interrupts.StopSignal):
    given = flags.FLAGS
    if argv[1:]:
        raise UserError(f"unexpected argument {several(argv[1:])}; every option starts with --, as in --workdir runs/NAME")
    opening.show_device_warnings()
    # Orbax logs each step of a save, and tracebacks of what it raises as well; progress and one sentence are enough.
    logging.set_verbosity(logging.FATAL)
    if not given.config:
        raise UserError("name a config: --config demo")
    if not given.workdir:
        raise UserError("name the folder for checkpoints and metrics: --workdir runs/NAME")
    arguments = cluster.from_flags(given.coordinator, given.num_processes, given.process_id, os.environ)
    cluster.initialize(arguments, given.join_seconds)
    with distributed.exit_on_error(), contextlib.ExitStack() as stack:
        _train(given.config, given.workdir, given.profile, given.allow_config_change, stop, stack)


def run():
    # A process that ends at once leaves semaphores and memory to multiprocessing's tracker, which removes them: no warning.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    define_flags()
    with interrupts.StopSignal() as stop:
        try:
            errors.run(lambda: app.run(functools.partial(main, stop=stop), flags_parser=config_flags.parse))
        except SystemExit as end:
            if end.code:  # all is closed; the interpreter's own end would wait for threads of libraries that have failed
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else errors.INPUT)
            raise
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is the end of the interpreter


if __name__ == "__main__":
    run()
else:
    calls.make_callable(__name__, train)
