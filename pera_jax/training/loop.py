"""What surrounds the step: batches on their devices, metrics one step late, checkpoints, rates, the end on a signal."""

import contextlib
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pera_jax.common.errors import UserError
from pera_jax.objectives.base import judged
from pera_jax.parallel import chips, global_arrays, sharding
from pera_jax.training.alarms import NOT_FINITE, Alarms


class Loop:
    """Everything that is done between one step and the next, the same on each host; only process 0 has a writer."""

    def __init__(
        self, config, objective, mesh, store, meta, writer, watchdog, every, total, position, first_step, sets, monitor
    ):
        """
        Args:
          writer: None for a host that writes no metrics.
          every: steps between "log", between "save", between "monitor".
          position: of a checkpoint, or of the beginning: number of "batches" of the stream and of "images" before, images
            "replaced" among them, examples "drawn" of each data set, state of the "alarms".
          first_step: steps done before.
          sets: names of the data sets.
          monitor: a `monitor.Monitor`, or None.
        """
        self.config, self.store, self.meta, self.writer, self.watchdog = config, store, meta, writer, watchdog
        self.every, self.total, self.monitor = every, total, monitor
        peak = config.schedules.learning_rate.peak
        self.alarms = Alarms(objective.health_checks(config.batch_size), peak, position.get("alarms"))
        self.devices, self.chip = mesh.size, chips.chip_of(mesh.devices.flat[0].device_kind)
        self.objective, self.image_flops = objective, sum(objective.flops_per_image().values())
        self.where = NamedSharding(mesh, sharding.BATCH)
        self.rows = global_arrays.local_rows(self.where, config.batch_size)
        # Summed on the devices, over all hosts, so that nobody waits for it before it is logged.
        self.add = jax.jit(
            lambda total, counts: total + jnp.sum(counts, axis=0, dtype=jnp.uint32),
            out_shardings=NamedSharding(mesh, sharding.P()),
        )
        self.sets = sets
        self.first_batch, self.first_images, self.first_step = position["batches"], position["images"], first_step
        drawn = position["drawn"] if len(position["drawn"]) == len(sets) else [0] * len(sets)  # changed data, if allowed
        self.tally = np.uint32([position["replaced"], *drawn])  # images replaced, examples of each data set
        # (step, metrics on the device, hyper, tally, what the monitor says): fetched one step late, so that logging stalls
        # nothing.
        self.pending = None
        self.saved = None
        self.waited, self.since, self.since_step = 0.0, time.perf_counter(), None

    def next_batch(self, stream, state):
        """The crops of the next global batch, over the devices of all hosts.

        Raises UserError where the stream does, after `state` has been saved: what was computed is not lost with a worker.
        """
        began = time.perf_counter()
        try:
            batch = next(stream)
        except UserError as error:
            raise self._kept(state, error) from error
        self.waited += time.perf_counter() - began
        wanted = {name: batch[name] for name in self.objective.crops}
        wanted["counts"] = np.column_stack([batch["replaced"], batch["set"][:, None] == np.arange(len(self.sets))])
        arrays = global_arrays.assemble(wanted, self.where, self.rows, self.config.batch_size)
        self.tally = self.add(self.tally, arrays.pop("counts"))  # [1 + S]
        return arrays

    def after(self, step, state, out, hyper):
        self.store.check_owned()
        self._fetch()
        monitored = self.monitor and (step % self.every["monitor"] == 0 or step == self.total)
        self.pending = (step, out, hyper, self.tally, self.monitor(judged(self.objective, state.params, state.teacher)) if monitored else {})
        if step % self.every["save"] == 0 and step != self.total:
            self._save(state)

    def finish(self, state):
        self._fetch()
        if self.saved != int(state.step):
            self._save(state)
        self.store.wait()
        self.watchdog.reset()

    def _kept(self, state, error):
        """The error, after the state has been saved; not with several hosts, which would have to do it together."""
        step = int(state.step)
        if jax.process_count() > 1 or step == self.first_step:
            return error
        self.finish(state)
        kept = type(error)(f"{error}; the state of step {step} is saved")
        kept.status = error.status
        return kept

    def _save(self, state):
        self._fetch()  # a state whose loss is not finite is not worth keeping
        self.saved = int(state.step)
        replaced, *drawn = np.asarray(self.tally).tolist()
        done = self.saved - self.first_step
        position = {
            "batches": self.first_batch + done, "images": self._images(self.saved), "replaced": replaced, "drawn": drawn,
            "alarms": self.alarms.state(),
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
        """Images trained on after `step`; the batch size may have been another before."""
        return self.first_images + (step - self.first_step) * self.config.batch_size

    def _rates(self, steps: int, seconds: float) -> dict[str, float]:
        if not steps:
            return {}
        waited = {"time/data_wait_share": min(self.waited / seconds, 1.0)}
        return waited | speed(steps * self.config.batch_size / seconds, self.devices, self.image_flops, self.chip)

    def _check_finite(self, step, values):
        """The norm of the parameters too: it is that of the state after the step, which would be saved."""
        wrong = [name for name in ("loss", "norm/gradient", "norm/parameters") if not math.isfinite(values[name])]
        if not wrong:
            return
        self.store.wait()
        text = (
            f"{wrong[0]} is {values[wrong[0]]} at step {step}; {self.store.last_good()}: "
            "lower schedules.learning_rate.peak or optimizer.clip_norm and start again"
        )
        if self.writer:
            self.writer.write_alarm(step, NOT_FINITE, text, say=False)  # the error says it
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
        deeper = "block" if config.model.remat != "block" else "block and a mesh with more fsdp"
        raise UserError(
            f"a device has not enough memory{f' for {wanted[1]} more' if wanted else ''}; make batch_size="
            f"{config.batch_size} smaller, or keep it and set accumulate={2 * config.accumulate} or "
            f"model.remat={deeper} (python -m pera_jax.plan says what each takes), and start again: it goes on from the "
            "newest checkpoint"
        ) from error


def speed(images_per_second: float, devices: int, image_flops: float, chip: chips.Chip | None) -> dict[str, float]:
    """Images per second, of all and of each device, and "mfu": the share of the devices' peak bf16 FLOP/s.

    Counted are the FLOPs of the method (`Objective.flops_per_image`), not what is computed again. No share on an unknown chip.
    """
    result = {
        "time/images_per_second": images_per_second,
        "time/images_per_second_per_chip": images_per_second / devices,
    }
    if chip:
        result["time/mfu"] = images_per_second * image_flops / (devices * chip.peak_flops)
    return result
