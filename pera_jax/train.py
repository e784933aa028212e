"""The training job.

    python -m pera_jax.train --config configs/aid_small.py --config.data.path=shards/aid --workdir runs/aid

One crop of each image, two looks, disjoint patches for the student and for its moving average, one jitted step. Start
the same command again and it goes on, bit for bit, from the newest checkpoint of the workdir. SIGTERM and SIGINT save
and end with status 0.
"""

import contextlib
import gc
import math
import signal
import sys
import time

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from pera_jax import checkpoint, metrics, run_meta, schedules, sharding
from pera_jax import config as configs
from pera_jax import errors
from pera_jax import step as steps
from pera_jax.data import pipeline, records
from pera_jax.errors import UserError
from pera_jax.objectives import pera

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/: configs/demo.py, configs/demo.py:smoke")
_WORKDIR = flags.DEFINE_string("workdir", None, "for checkpoints, metrics, config.json; resumed when not empty")


def train(config, workdir: str) -> None:
    """Trains to the end of `config.total` or to SIGTERM/SIGINT.

    Raises:
      UserError: for every wrong input, before anything is written to `workdir`; a loss that is not finite; a full disk.
    """
    # ---- mesh and checks that need neither data nor model
    mesh = sharding.make_mesh(**config.mesh)
    configs.check(config, sharding.batch_shards(mesh), jax.process_count())

    # ---- data set
    source = records.open_split(config.data.path, config.data.split)
    statistics = _statistics(config, source.info)
    steps_per_epoch = len(source) // config.batch_size
    if steps_per_epoch < 1:
        raise UserError(
            f"{config.data.path} holds {len(source)} images in split {config.data.split!r}, fewer than "
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
    }
    for name, value in every.items():
        if value < 1:
            raise UserError(f"the interval of {name} is zero steps; write at least \"1 steps\"")
    schedule = schedules.hyperparameters(
        config.schedules, steps_per_epoch=steps_per_epoch, total_steps=total, batch_size=config.batch_size
    )

    # ---- objective, optimiser, step
    objective = pera.from_config(config, statistics["mean"], statistics["std"], len(source.info.bands))
    optimiser = steps.make_optimiser(config.optimiser)
    abstract = steps.abstract_state(objective, optimiser, mesh)
    train_step = steps.jit_step(
        steps.make_step(objective, optimiser, config.seed, config.optimiser.decay, config.accumulate),
        jax.tree.map(lambda leaf: leaf.sharding, abstract),
        mesh,
    )
    data_card = {
        "name": source.info.name,
        "split": config.data.split,
        "records": len(source),
        "fingerprint": source.split_info.fingerprint,
        "class_names": source.info.class_names,
    }
    meta = run_meta.describe(config, objective, data_card, source.info.bands)

    # ---- state: (1) checkpoint in the workdir, else (2) resume_from, else (3) init_from (weights), else (4) scratch
    state, position = _first_state(config, workdir, meta, objective, optimiser, abstract, mesh)
    start = int(state.step)
    if start >= total:
        print(f"{workdir} is at step {start} of {total}: nothing left to do", file=sys.stderr)
        return

    # ---- loop; only from here on is anything written
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stream = pipeline.make_pipeline(
            source, config.crops, batch_size=config.batch_size, seed=config.seed, start_batch=position["batches"],
            workers=config.data.workers, process_index=jax.process_index(), process_count=jax.process_count(),
        )
        stack.callback(stream.close)
        stack.callback(gc.collect)  # before it: JAX lets go of the last batch, which lies in the workers' memory
        store = checkpoint.Store(workdir, config.checkpoint.keep_last, every["keep"])
        stack.callback(store.close)
        if jax.process_index() == 0:
            run_meta.write(workdir, meta)
        writer = metrics.MetricsWriter(workdir, resume_step=start, total=total, batch_size=config.batch_size)
        stack.callback(writer.close)
        stack.enter_context(jax.set_mesh(mesh))

        loop = Loop(config, store, meta, writer, every, total, position["replaced"])
        for step in range(start, total):
            hyper = {k: np.asarray(v, config.parameter_precision) for k, v in schedule.at(step).items()}
            state, out = train_step(state, loop.next_batch(stream, mesh), hyper)
            loop.after(step + 1, state, out, hyper)
            if stop.asked:
                break
        loop.finish(state)
        if stop.asked:
            print(f"stopped by {stop.asked} at step {int(state.step)} of {total}; checkpoint saved", file=sys.stderr)


class Loop:
    """What surrounds the step: metrics one step late, checkpoints of finite steps, the share of time spent on data."""

    def __init__(self, config, store, meta, writer, every, total, replaced):
        self.config, self.store, self.meta, self.writer = config, store, meta, writer
        self.every, self.total, self.replaced = every, total, replaced
        # (step, metrics on the device, hyper, replaced): fetched one step late, so that logging stalls nothing.
        self.pending = None
        self.saved = None
        self.waited, self.since, self.since_step = 0.0, time.perf_counter(), None

    def next_batch(self, stream, mesh):
        began = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - began
        self.replaced += int(np.sum(batch["replaced"]))
        where = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        crops = {kind: batch[kind] for kind in pera.KINDS if kind in batch}
        if jax.process_count() > 1:
            return jax.make_array_from_process_local_data(where, crops)
        return jax.device_put(crops, where)

    def after(self, step, state, out, hyper):
        self._fetch()
        self.pending = (step, out, hyper, self.replaced)
        if step % self.every["save"] == 0 and step != self.total:
            self._save(state)

    def finish(self, state):
        self._fetch()
        if self.saved != int(state.step):
            self._save(state)
        self.store.wait()

    def _save(self, state):
        self._fetch()  # a state whose loss is not finite is not worth keeping
        self.saved = int(state.step)
        self.store.save(state, self.meta, {"batches": self.saved, "replaced": self.replaced})

    def _fetch(self):
        if self.pending is None:
            return
        (step, out, hyper, replaced), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(out).items()}
        self._check_finite(step, values)
        if self.since_step is None:  # the first step compiles; the clock starts after it
            self.since_step, self.since, self.waited = step, time.perf_counter(), 0.0
        if step % self.every["log"] == 0 or step == self.total:
            now = time.perf_counter()
            seconds, count = now - self.since, step - self.since_step
            rates = {}
            if count:
                rates = {
                    "time/images_per_second": count * self.config.batch_size / seconds,
                    "time/data_wait_share": min(self.waited / seconds, 1.0),
                }
            hypers = {f"hyper/{k}": float(v) for k, v in hyper.items() if k != "one_minus_momentum"}
            hypers["hyper/momentum"] = 1.0 - float(hyper["one_minus_momentum"])
            extra = {"data/images": step * self.config.batch_size, "data/replaced": replaced}
            self.writer.write(step, values | hypers | extra | rates)
            self.since, self.since_step, self.waited = now, step, 0.0


    def _check_finite(self, step, values):
        """The norm of the parameters too: it is that of the state after the step, which would be saved."""
        wrong = [name for name in ("loss", "norm/gradient", "norm/parameters") if not math.isfinite(values[name])]
        if not wrong:
            return
        self.store.wait()
        raise UserError(
            f"{wrong[0]} is {values[wrong[0]]} at step {step}; {self.store.last_good()}: "
            "lower schedules.learning_rate.peak or optimiser.clip_norm and start again"
        )


class StopSignal:
    """While entered, SIGTERM and SIGINT ask for an end after the step under way; a second one ends at once."""

    def __init__(self):
        self.asked = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.asked = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


def _statistics(config, info) -> dict:
    if config.data.normalise == "dataset":
        return {"mean": info.mean, "std": info.std}
    if len(info.bands) != 3:
        raise UserError(
            f"data.normalise=imagenet is for 3 bands, {config.data.path} has {len(info.bands)}: "
            f"{', '.join(info.bands)}; use data.normalise=dataset"
        )
    return IMAGENET


def _first_state(config, workdir, meta, objective, optimiser, abstract, mesh):
    """The state to begin with and the position in the data, by the order of start-up."""
    run = workdir if checkpoint.saved_steps(workdir) else config.resume_from
    if run:
        newest, _ = checkpoint.folder_of(run, None)
        damaged = []
        for step in reversed(checkpoint.saved_steps(run)):
            folder = newest.with_name(str(step))
            try:
                run_meta.check_same_run(checkpoint.load_meta(folder), meta, run, config.data.allow_changed_data)
                restored = checkpoint.restore(folder, abstract)
            except checkpoint.Damaged as error:
                damaged.append((folder, error))
                continue
            for bad, error in damaged:
                moved = f"; moved to {checkpoint.set_aside(bad)}" if run == workdir else ""
                print(f"{error}{moved}; going on from the checkpoint of step {step}", file=sys.stderr)
            return restored
        raise UserError(f"no checkpoint of {run} can be read; the newest: {damaged[0][1]}")
    state = steps.born_sharded(objective, optimiser, mesh, config.seed)
    if config.init_from:
        state = checkpoint.with_weights(state, config.init_from)
    return state, {"batches": 0, "replaced": 0}


def main(argv):
    del argv
    # Orbax logs each step of a save, and tracebacks of what it raises as well; progress and one sentence are enough.
    logging.set_verbosity(logging.FATAL)
    if not _CONFIG.value:
        raise UserError("name a config: --config configs/demo.py")
    if not _WORKDIR.value:
        raise UserError("name the folder for checkpoints and metrics: --workdir runs/NAME")
    train(_CONFIG.value, _WORKDIR.value)


def _parse(argv):
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value:
            _CONFIG.value.is_locked  # that a file could not be loaded is told at the first use of what it holds
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        while error.args and isinstance(error.args[0], Exception):  # an AttributeError around a KeyError
            error = error.args[0]
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(f"a flag or the config is wrong: {' '.join(str(reason).split())}") from error


def run():
    errors.run(lambda: app.run(main, flags_parser=_parse))


if __name__ == "__main__":
    run()
