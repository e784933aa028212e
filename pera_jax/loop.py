"""What surrounds the step of a run: batches, metrics one step late, checkpoints, the end on request, the watchdog."""

import faulthandler
import math
import re
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pera_jax import distributed, sharding
from pera_jax.errors import UserError


class Loop:
    """The run around its step; all hosts do the same, the first one writes the metrics."""

    def __init__(self, config, mesh, store, meta, writer, every, total, replaced, speed, profile=None):
        """
        Args:
          writer: a `metrics.MetricsWriter`, None on hosts that write none.
          every: steps between "log", "save".
          replaced: records that were replaced before.
          speed: a `Speed`.
          profile: a `Profile`, or None.
        """
        self.config, self.store, self.meta, self.writer = config, store, meta, writer
        self.every, self.total, self.replaced, self.speed, self.profile = every, total, replaced, speed, profile
        self.where = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        self.rows = distributed.rows_here(self.where, config.batch_size)
        self.count = jax.jit(jnp.sum, out_shardings=jax.sharding.NamedSharding(mesh, sharding.P()))
        # (step, metrics on the device, hyper): fetched one step late, so that logging stalls nothing.
        self.pending = None
        self.saved = None
        self._alive()

    def next_batch(self, stream, kinds):
        """The next global batch, a dict of `kinds`; and how many of its records were replaced, on the device."""
        began = time.perf_counter()
        batch = next(stream)
        self.speed.waited(time.perf_counter() - began)
        wanted = {name: batch[name] for name in (*kinds, "replaced") if name in batch}
        batch = distributed.global_batch(wanted, self.where, self.config.batch_size, self.rows)
        return batch, self.count(batch.pop("replaced"))

    def before(self, step):
        """`step` steps are done and the next begins."""
        if self.profile:
            self.profile.before(step)

    def after(self, step, state, out, hyper, replaced):
        """`step` steps are done; takes the metrics of the last one, and saves where it is time."""
        self._fetch()
        self.pending = (step, out | {"data/replaced": replaced}, hyper)
        if self.profile:
            self.profile.after(step, out)
        if step % self.every["save"] == 0 and step != self.total:
            self._save(state)

    def finish(self, state):
        self._fetch()
        if self.saved != int(state.step):
            self._save(state)
        self.store.wait()
        self._alive()

    def close(self):
        faulthandler.cancel_dump_traceback_later()

    def _alive(self):
        """Winds the watchdog up: unless this is called again in time, it prints all threads' stacks and ends the process.

        It is a thread that needs nothing of Python, so that a hung collective or a stuck read cannot stop it.
        """
        if self.config.stall_seconds:
            faulthandler.dump_traceback_later(self.config.stall_seconds, exit=True, file=sys.__stderr__)

    def _save(self, state):
        self._fetch()  # a state whose loss is not finite is not worth keeping
        self.saved = int(state.step)
        self.store.save(state, self.meta, {"batches": self.saved, "replaced": self.replaced})
        self._alive()

    def _fetch(self):
        if self.pending is None:
            return
        (step, out, hyper), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(out).items()}
        self._alive()
        self._check_finite(step, values)
        self.replaced += int(values["data/replaced"])
        self.speed.seen(step)
        if self.writer and (step % self.every["log"] == 0 or step == self.total):
            hypers = {f"hyper/{k}": float(v) for k, v in hyper.items() if k != "one_minus_momentum"}
            hypers["hyper/momentum"] = 1.0 - float(hyper["one_minus_momentum"])
            extra = {"data/images": step * self.config.batch_size, "data/replaced": self.replaced}
            self.writer.write(step, values | hypers | extra | self.speed.rates(step))

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


class Speed:
    """Images per second since the last time that it was asked, and the share of that time that data were waited for."""

    def __init__(self, batch: int, chips: int, flops_per_image: float, peak_flops: float | None):
        """`peak_flops` of one chip, None where it is not known; `flops_per_image` of the method, without recomputation."""
        self.batch, self.chips, self.flops, self.peak = batch, chips, flops_per_image, peak_flops
        self.wait, self.since, self.step = 0.0, time.perf_counter(), None

    def waited(self, seconds: float) -> None:
        self.wait += seconds

    def seen(self, step: int) -> None:
        if self.step is None:  # the first step compiles; the clock starts after it
            self.step, self.since, self.wait = step, time.perf_counter(), 0.0

    def rates(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds, count = now - self.since, step - self.step
        if not count:
            return {}
        rate = count * self.batch / seconds
        result = {
            "time/images_per_second": rate,
            "time/images_per_second_per_chip": rate / self.chips,
            "time/data_wait_share": min(self.wait / seconds, 1.0),
        }
        if self.peak:
            result["time/mfu"] = rate * self.flops / (self.chips * self.peak)
        self.since, self.step, self.wait = now, step, 0.0
        return result


class Profile:
    """A trace of some steps by jax.profiler, for TensorBoard or xprof."""

    def __init__(self, text: str, start: int, total: int, folder: str):
        """
        Args:
          text: "20:25", the first and the last step.
          start: steps that are done; total: steps of the run.

        Raises:
          UserError: another form, or steps that this start does not run.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not int(match[1]) <= int(match[2]):
            raise UserError(f"--profile={text} is not of the form FIRST:LAST, such as 20:25")
        self.first, self.last = int(match[1]), int(match[2])
        if not start < self.first <= self.last <= total:
            raise UserError(f"--profile={text} lies outside of the steps {start + 1} to {total} that this start runs")
        self.folder = folder

    def before(self, step):
        if step + 1 == self.first:
            jax.profiler.start_trace(self.folder)

    def after(self, step, out):
        if step == self.last:
            jax.block_until_ready(out)
            jax.profiler.stop_trace()
            distributed.say(f"steps {self.first} to {self.last} are traced in {self.folder}")


class StopSignal:
    """While entered, SIGTERM and SIGINT ask for an end after the step under way; a second one ends at once.

    Where jax.distributed runs, SIGTERM is its own: it tells all hosts, which stop after the same step.
    """

    def __init__(self):
        self.asked = None
        self.together = jax.distributed.is_initialized()

    def __enter__(self):
        numbers = () if self.together else (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether to stop, now that `step` steps are done; the same on all hosts."""
        if self.together and multihost_utils.reached_preemption_sync_point(step):
            self.asked = "SIGTERM"
        return self.asked is not None

    def _handle(self, number, frame):
        self.asked = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
