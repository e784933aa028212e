"""The training job.

    pera-jax train --config aid_small --config.data.path=shards/aid --workdir runs/aid

Runs the jitted step of the config's objective over a mesh. Re-run the same command to resume, bit for bit, from the
newest checkpoint of the workdir; `pera_jax.training.resume` lists the config fields that may change. Only one process
can train in a workdir. SIGTERM, SIGINT and SIGHUP save a checkpoint and exit with status 0; `pera_jax.common.errors`
lists the other statuses.

With several hosts, run the same command on each. They find each other on SLURM and TPU pods; elsewhere pass flags such
as `--coordinator host0:8476 --num_processes 4 --process_id 0`. SIGTERM to any host saves a checkpoint and stops all of
them.
"""

import contextlib
import functools
import gc
import os
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
from pera_jax.common.errors import UsageError, UserError
from pera_jax.common.text import several
from pera_jax.config import flags as config_flags
from pera_jax.data import mixture, pipeline
from pera_jax.objectives.base import judged
from pera_jax.parallel import cluster, distributed, global_arrays, sharding
from pera_jax.probes.online import Monitor
from pera_jax.training import metrics, opening, profiling, resume, schedules
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, checkpoint_store, run_meta
from pera_jax.training.loop import Loop, explain_out_of_memory
from pera_jax.training.optimizer import rate_factors
from pera_jax.training.watchdog import Watchdog
from pera_jax.weights import initial_state

_COMPILER_BYTES = 256 << 20  # minimum free memory for the compiler, which aborts the process if it runs out


@calls.logging_unchanged()
def train(
    config: str | os.PathLike | ConfigDict, workdir: str | os.PathLike, profile: str | None = None, *,
    data: str | os.PathLike | None = None, changes: Mapping[str, Any] | None = None, allow_config_change: bool = False,
) -> None:  # fmt: skip
    """Trains until `config.total`, or until SIGINT or SIGTERM; also available as `pera_jax.train(...)`.

    The same call resumes from the newest checkpoint of `workdir`. Ctrl-C saves a checkpoint after the current step and
    returns; a second Ctrl-C, or one before the first step, raises KeyboardInterrupt. On a single host, this function
    never ends the process; `config.stall_seconds` only applies to the command.

    Args:
      config: a name such as "pera_vitb16" or "demo:smoke", the path of a Python config or of a run's config.json, or a
        ConfigDict, which is not modified.
      workdir: folder for checkpoints and metrics; with several hosts, on shared storage.
      profile: "FIRST:LAST", the steps to trace into WORKDIR/profile.
      data: dataset folder, or several separated by commas; replaces `config.data.path`.
      changes: overrides of other config fields, e.g. {"total": "100 steps", "model.width": 384}.
      allow_config_change: resume even if fields differ that define the run, see `pera_jax.training.resume`.

    Raises:
      UserError: invalid input (before anything is written to `workdir`), a non-finite loss, or a full disk.
    """
    path = {} if data is None else {"data.path": os.fspath(data)}
    config = configs.load(config, path | dict(changes or {}))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(interrupts.StopInCall())
        _train(config, os.fspath(workdir), profile, allow_config_change, stop, stack)


def _train(config, workdir, profile, allow_config_change, stop, stack: contextlib.ExitStack) -> None:
    configs.check_fields(config)
    # before all else, because opening devices and data may hang
    watchdog = stack.enter_context(Watchdog(config.stall_seconds if stop.ends_process else 0))
    stack.enter_context(explain_out_of_memory(config))

    # ---- mesh; checks that need neither data nor model
    paths.local(workdir, "workdir")
    mesh = sharding.make_mesh(**config.mesh)
    configs.check(config, sharding.batch_shards(mesh), sharding.weight_shards(mesh), jax.process_count())

    # ---- dataset
    data = mixture.open_mixture(config.data)
    for source in data.sources:
        if source.damaged:
            lost = sum(source.split_info.shard_records[number] for number in source.damaged)
            distributed.say(
                f"{source.path}: skipping {len(source.damaged)} damaged shard(s); other records replace their {lost}"
            )
    watchdog.reset()
    steps_per_epoch = len(data) // config.batch_size
    if steps_per_epoch < 1:
        raise UserError(
            f"{config.data.path} has {len(data)} images in split {config.data.split!r}, fewer than "
            f"batch_size={config.batch_size}; reduce batch_size"
        )

    # ---- durations, schedules
    def duration(field: str, value: str, total: int | None) -> int:
        return schedules.parse_duration(
            value, total_steps=total, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size, name=field
        )

    total = duration("total", config.total, None)
    intervals = {
        "log": ("log_every", config.log_every),
        "save": ("checkpoint.every", config.checkpoint.every),
        "keep": ("checkpoint.keep_every", config.checkpoint.keep_every),
        "monitor": ("monitor.every", config.monitor.every),
    }
    every = {name: duration(*field, total) for name, field in intervals.items()}
    for name, value in every.items():
        if value < 1:
            raise UserError(
                f"{intervals[name][0]}={intervals[name][1]!r} is less than one step; use at least '1 steps'"
            )
    schedule = schedules.scalars(
        config, objectives.method(config.objective).schedules(), steps_per_epoch=steps_per_epoch, total_steps=total
    )

    # ---- normalization statistics of the run that is resumed, if any
    data = resume.with_own_statistics(data, initial_state.earlier_meta(config, workdir), config.data)

    # ---- objective, optimizer, step
    objective = objectives.from_config(config, data.bands)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    abstract = steps.abstract_state(objective, optimizer, mesh)
    rate_factors(abstract.params, config.optimizer.rate_factors)  # each rule must match a parameter
    train_step = steps.jit_step(
        steps.make_step(objective, optimizer, config.seed, config.optimizer, config.accumulate),
        jax.tree.map(lambda leaf: leaf.sharding, abstract),
        mesh,
    )
    meta = run_meta.describe(config, objective, data.card())
    monitor = None
    if config.monitor.data:
        monitor = Monitor(config.monitor, objective, judged(objective, abstract.params, abstract.teacher), mesh)

    # ---- take the lease on the workdir: from here on, no other process trains in it
    owned = []
    distributed.on_main_host(lambda: owned.append(stack.enter_context(lease.held(workdir, "--workdir"))))

    # ---- state: (1) checkpoint in the workdir, else (2) resume_from, else (3) init_from (weights), else (4) scratch
    state, position, changes = initial_state.restore_or_init(
        config, workdir, meta, objective, optimizer, abstract, mesh, data, allow_config_change
    )
    watchdog.reset()
    start = int(state.step)
    if start >= total:
        if distributed.main_host() and checkpoint.saved_steps(workdir):  # it may have been killed before this
            run_meta.mark_finished(workdir, start)
        distributed.say(f"{workdir} is at step {start} of {total}: nothing left to do")
        return
    traced = profiling.parse_range(profile, start, total)
    if changes is not None:
        distributed.say(resume.sentence(start, total, changes))
    said = opening.lines(
        config,
        objective,
        mesh,
        data,
        abstract.params,
        total=total,
        steps_per_epoch=steps_per_epoch,
        hosts=jax.process_count(),
    )
    for line in (*said, "compiling the step; without a compilation cache this can take minutes"):
        distributed.say(line)

    environment.check_memory(_COMPILER_BYTES)

    # ---- loop; nothing permanent is written to the workdir before this
    stop.several_hosts = jax.process_count() > 1
    shared = distributed.SharedStop() if stop.several_hosts else None
    stream = pipeline.make_pipeline(
        data,
        pipeline.Crops(objective.crops, config.crops.aspect, config.crops.flip, objective.host_draws),
        batch_size=config.batch_size,
        seed=config.seed,
        start_batch=position["batches"],
        workers=pipeline.workers_of(config.data.workers),
        rows=global_arrays.local_rows(jax.sharding.NamedSharding(mesh, sharding.BATCH), config.batch_size),
    )
    stack.callback(stream.close)
    # runs before `stream.close`: JAX releases the last batch, which is in the workers' shared memory
    stack.callback(gc.collect)
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
    stack.enter_context(explain_out_of_memory(config))  # again, because `exit_on_error` does not let exceptions pass

    loop = Loop(
        config, objective, mesh, store, meta, writer, watchdog, every, total, position, start, data.names(), monitor
    )
    for step in range(start, total):
        scalars = {name: np.asarray(value, config.parameter_precision) for name, value in schedule.at(step).items()}
        tracer.before(step + 1, state)
        batch, placed = loop.next_batch(stream, state), global_arrays.replicated(scalars, mesh)
        # All inputs of the step are on the devices by now; an implicit transfer would cost time in every step.
        with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, out = train_step(state, batch, placed)
        batch = None  # releases the workers' shared memory
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


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; not at import, which would give them to every program that imports this module."""
    DEFINE_config_file(
        "config", None, "a name such as demo or demo:smoke, your own file, or RUN/config.json", flag_values=into
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "folder for checkpoints, metrics and config.json; an existing run in it is resumed",
        flag_values=into,
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, if SLURM or TPU detection does not apply", flag_values=into
    )
    flags.DEFINE_integer("num_processes", None, "total number of processes, with --coordinator", flag_values=into)
    flags.DEFINE_integer("process_id", None, "index of this process from 0, with --coordinator", flag_values=into)
    flags.DEFINE_integer(
        "join_seconds", cluster.JOIN_SECONDS, "seconds to wait for all hosts at startup", flag_values=into
    )
    allow = "resume even if total, batch_size, schedules, ... differ; see pera_jax/training/resume.py"
    flags.DEFINE_bool("allow_config_change", False, allow, flag_values=into)
    flags.DEFINE_string("profile", None, "FIRST:LAST, the steps to trace into WORKDIR/profile", flag_values=into)


def main(argv, stop: interrupts.StopSignal):
    given = flags.FLAGS
    if argv[1:]:
        raise UsageError(f"unexpected argument {several(argv[1:])}; options start with --, e.g. --workdir runs/NAME")
    opening.show_device_warnings()
    # Orbax logs each phase of a save, and a traceback of what it also raises.
    logging.set_verbosity(logging.FATAL)
    if not given.config:
        raise UsageError("no config; choose one with --config, e.g. --config demo")
    if not given.workdir:
        raise UsageError("no folder for checkpoints and metrics; choose one with --workdir, e.g. --workdir runs/NAME")
    arguments = cluster.from_flags(given.coordinator, given.num_processes, given.process_id, os.environ)
    cluster.initialize(arguments, given.join_seconds)
    with distributed.exit_on_error(), contextlib.ExitStack() as stack:
        _train(given.config, given.workdir, given.profile, given.allow_config_change, stop, stack)


def run():
    # After an immediate exit, multiprocessing's resource tracker removes semaphores and shared memory: suppress its
    # warning.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    define_flags()
    with interrupts.StopSignal() as stop:
        try:
            errors.run(lambda: app.run(functools.partial(main, stop=stop), flags_parser=config_flags.parse))
        except SystemExit as end:
            if end.code:  # everything is closed; a normal exit would wait for threads of failed libraries
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else errors.INPUT)
            raise
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the exit of the interpreter remains


if __name__ == "__main__":
    run()
else:
    calls.make_callable(__name__, train)
