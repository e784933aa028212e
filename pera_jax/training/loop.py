"""Everything around the jitted step: moving batches to the devices, metrics, alarms, the monitor and checkpoints."""

import contextlib
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pera_jax.common.errors import UserError
from pera_jax.objectives import batches
from pera_jax.objectives.base import judged
from pera_jax.parallel import chips, global_arrays, sharding
from pera_jax.training.alarms import NOT_FINITE, Alarms


class Loop:
    """The work between two steps; the same on every host, except that only process 0 has a writer.

    Order of operations of step `t` (steps are counted from 1; `train` drives it):

    1. Evaluate the schedules for `t` in float64 on the host.
    2. Start the profiler trace if `t` is its first step.
    3. `next_batch`: wait for the batch, move it to the devices, and add to the example counts on the devices.
    4. Dispatch the jitted step. Nothing waits for its result; a transfer between host and device inside it is an error.
    5. Stop the profiler trace if `t` is its last step.
    6. `after`: check that this process still owns the workdir.
    7. Fetch the metrics of step `t - 1` (waits until that step has finished) and restart the watchdog's countdown.
    8. Check that they are finite, else stop the run.
    9. Update the alarms with them and record those that begin.
    10. Log them if step `t - 1` was due, was the last, or ran the monitor.
    11. Run the monitor on the state after step `t` if it is due.
    12. Save the state if due: first do 7 to 10 for step `t` itself, so that no state with a non-finite loss is saved.
    13. Leave the loop if a stop was requested on any host.

    After the last step, `finish` does 7 to 10 for it, saves the state unless 12 did, and waits until it is written.
    """

    def __init__(
        self, config, objective, mesh, store, meta, writer, watchdog, every, total, position, first_step, sets, monitor
    ):
        """
        Args:
          writer: a `MetricsWriter`; None on hosts that write no metrics.
          every: interval in steps of "log", "save" and "monitor".
          position: data position, from a checkpoint or for a new run: "batches" and "images" consumed so far, images
            "replaced", examples "drawn" from each dataset, and the state of the "alarms".
          first_step: number of steps done before.
          sets: names of the datasets.
          monitor: a `probes.online.Monitor`, or None.
        """
        self.config, self.store, self.meta, self.writer, self.watchdog = config, store, meta, writer, watchdog
        self.every, self.total, self.monitor = every, total, monitor
        peak = config.schedules.learning_rate.peak
        self.alarms = Alarms(objective.health_checks(config.batch_size), peak, position.get("alarms"))
        self.devices, self.chip = mesh.size, chips.chip_of(mesh.devices.flat[0].device_kind)
        self.objective, self.image_flops = objective, sum(objective.flops_per_image().values())
        self.where = NamedSharding(mesh, sharding.BATCH)
        self.rows = global_arrays.local_rows(self.where, config.batch_size)
        # Summed on the devices over all hosts, so that no step waits for it; fetched only when logged or saved.
        self.add = jax.jit(
            lambda total, counts: total + jnp.sum(counts, axis=0, dtype=jnp.uint32),
            out_shardings=NamedSharding(mesh, sharding.P()),
        )
        self.sets = sets
        self.first_batch, self.first_images, self.first_step = position["batches"], position["images"], first_step
        # reset if the datasets changed
        drawn = position["drawn"] if len(position["drawn"]) == len(sets) else [0] * len(sets)
        self.tally = np.uint32([position["replaced"], *drawn])  # replaced images, examples from each dataset
        # (step, metrics on the device, scheduled scalars, tally, monitor metrics); fetched one step late, so that
        # logging does not stall the devices.
        self.pending = None
        self.saved = None
        self.waited, self.since, self.since_step = 0.0, time.perf_counter(), None

    def next_batch(self, stream, state):
        """The next global batch as global arrays, `objectives.batches.layout`, sharded over the devices of all hosts.

        If the stream raises a UserError, saves `state` before re-raising it, so that a lost worker loses no training.
        """
        began = time.perf_counter()
        try:
            batch = next(stream)
        except UserError as error:
            raise self._kept(state, error) from error
        self.waited += time.perf_counter() - began
        wanted = {name: batch[name] for name in batches.layout(self.objective, self.config.batch_size)}
        wanted["counts"] = np.column_stack([batch["replaced"], batch["set"][:, None] == np.arange(len(self.sets))])
        arrays = global_arrays.assemble(wanted, self.where, self.rows, self.config.batch_size)
        self.tally = self.add(self.tally, arrays.pop("counts"))  # [1 + S]
        return arrays

    def after(self, step, state, out, hyper):
        """Items 6 to 12 of the order of operations.

        Args:
          step: number of the step, from 1. state: the state after it.
          out: its metrics, on the devices. hyper: its scheduled scalars, on the host.
        """
        self.store.check_owned()
        self._fetch()
        monitored = self.monitor and (step % self.every["monitor"] == 0 or step == self.total)
        self.pending = (
            step,
            out,
            hyper,
            self.tally,
            self.monitor(judged(self.objective, state.params, state.teacher)) if monitored else {},
        )
        if step % self.every["save"] == 0 and step != self.total:
            self._save(state)

    def finish(self, state):
        """Fetches the last metrics, saves `state` if it is not saved yet, and waits until the checkpoint is written."""
        self._fetch()
        if self.saved != int(state.step):
            self._save(state)
        self.store.wait()
        self.watchdog.reset()

    def _kept(self, state, error):
        """Saves the state and returns the error, which then says so; with several hosts, which cannot save alone, only
        the error."""
        step = int(state.step)
        if jax.process_count() > 1 or step == self.first_step:
            return error
        self.finish(state)
        kept = type(error)(f"{error}; the state of step {step} is saved")
        kept.status = error.status
        return kept

    def _save(self, state):
        self._fetch()  # never saves a state whose loss is not finite
        self.saved = int(state.step)
        replaced, *drawn = np.asarray(self.tally).tolist()
        done = self.saved - self.first_step
        position = {
            "batches": self.first_batch + done, "images": self._images(self.saved), "replaced": replaced,
            "drawn": drawn, "alarms": self.alarms.state(),
        }  # fmt: skip
        self.store.save(state, self.meta, position)
        self.watchdog.reset()

    def _fetch(self):
        if self.pending is None:
            return
        (step, out, hyper, tally, monitored), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(out).items()}
        self.watchdog.reset()
        self._check_finite(step, values)
        for alarm in self.alarms.update(values, float(hyper["learning_rate"])):
            if self.writer:
                self.writer.write_alarm(step, *alarm)
        if self.since_step is None:  # the first step compiles; the clock starts after it
            self.since_step, self.since, self.waited = step, time.perf_counter(), 0.0
        if step % self.every["log"] == 0 or step == self.total or monitored:
            now = time.perf_counter()
            if self.writer:
                rates = self._rates(step - self.since_step, now - self.since)
                scalars = self.objective.logged_scalars({name: float(value) for name, value in hyper.items()})
                hypers = {f"hyper/{name}": value for name, value in scalars.items()}
                replaced, *drawn = np.asarray(tally).tolist()
                extra = {"data/images": self._images(step), "data/replaced": replaced}
                if len(drawn) > 1:
                    extra |= {f"data/drawn/{name}": count for name, count in zip(self.sets, drawn, strict=True)}
                self.writer.write(step, values | hypers | extra | rates | monitored | self.alarms.metrics())
            self.since, self.since_step, self.waited = now, step, 0.0

    def _images(self, step: int) -> int:
        """Images trained on after `step`; accounts for another batch size before the resume."""
        return self.first_images + (step - self.first_step) * self.config.batch_size

    def _rates(self, steps: int, seconds: float) -> dict[str, float]:
        if not steps:
            return {}
        waited = {"time/data_wait_share": min(self.waited / seconds, 1.0)}
        return waited | speed(steps * self.config.batch_size / seconds, self.devices, self.image_flops, self.chip)

    def _check_finite(self, step, values):
        """Includes the norm of the parameters, which belongs to the state after the step, the one that would be
        saved."""
        wrong = [name for name in ("loss", "norm/gradient", "norm/parameters") if not math.isfinite(values[name])]
        if not wrong:
            return
        self.store.wait()
        text = (
            f"{wrong[0]} is {values[wrong[0]]} at step {step}; {self.store.last_good()}: "
            "lower schedules.learning_rate.peak or optimizer.clip_norm and resume with --allow-config-change"
        )
        if self.writer:
            self.writer.write_alarm(step, NOT_FINITE, text, say=False)  # the error is printed anyway
        raise UserError(text)


@contextlib.contextmanager
def explain_out_of_memory(config):
    """Turns JAX's out-of-memory error into a UserError that says which settings need less memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(r"[Aa]llocat\w* ([\d.]+ ?(?:[KMGT]i?B|bytes))", str(error))
        deeper = "block" if config.model.remat != "block" else "block and a larger mesh.fsdp"
        raise UserError(
            f"a device ran out of memory{f' while allocating {wanted[1]}' if wanted else ''}; set a smaller batch_size "
            f"than {config.batch_size}, or keep it and set accumulate={2 * config.accumulate} or model.remat={deeper} "
            "(pera-jax plan shows the memory of each), then re-run the same command to resume"
        ) from error


def speed(images_per_second: float, devices: int, image_flops: float, chip: chips.Chip | None) -> dict[str, float]:
    """Images per second, in total and per device, and "mfu", the fraction of the devices' peak bf16 FLOP/s.

    Counts the FLOPs of the method (`Objective.flops_per_image`) without recomputation. No "mfu" on an unknown chip.
    """
    result = {
        "time/images_per_second": images_per_second,
        "time/images_per_second_per_chip": images_per_second / devices,
    }
    if chip:
        result["time/mfu"] = images_per_second * image_flops / (devices * chip.peak_flops)
    return result
