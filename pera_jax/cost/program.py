"""The training step of a config, traced and compiled for a mesh without data or weights.

Imports no data library, so that it runs where none is installed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.bands import RGB, Bands
from pera_jax.objectives import batches
from pera_jax.parallel import sharding
from pera_jax.training import schedules
from pera_jax.training import step as steps


class Program:
    """The training step on a mesh.

    Attributes:
      batch: shape and dtype of each entry of a batch, see `objectives.batches`.
      hyper: values of the scheduled hyperparameters, which are inputs of the step.
    """

    def __init__(
        self, config, devices: list | None = None, bands: Bands | None = None, make: Callable = objectives.from_config
    ):
        """
        Args:
          config: checked as in training.
          devices: default: all local devices; may also be those of a topology description.
          bands: default: uint8, named by config.data.bands, or else red, green and blue.
          make: builds the objective from (config, bands, device).

        Raises:
          UserError: see `config.check` and `objectives.from_config`.
        """
        self.config = config
        self.mesh = sharding.make_mesh(**config.mesh, devices=devices)
        configs.check(config, sharding.batch_shards(self.mesh), sharding.weight_shards(self.mesh), 1)
        bands = bands or Bands.plain(config.data.bands or RGB)
        self.objective = make(config, bands, self.mesh.devices.flat[0])
        self.optimizer = steps.make_optimizer(self.objective, config.optimizer)
        # The values do not matter for compilation; these are from the middle of a run longer than every warmup.
        run = schedules.scalars(config, self.objective.schedules(), steps_per_epoch=1000, total_steps=10**9)
        middle = run.at(10**9 // 2)
        self.hyper = {name: np.asarray(value, config.parameter_precision) for name, value in middle.items()}
        self.batch = batches.layout(self.objective, config.batch_size)

    def trace(self) -> Any:
        """The traced step, with `.jaxpr` and `.lower()`."""
        state = steps.abstract_state(self.objective, self.optimizer, self.mesh)
        config = self.config
        function = steps.make_step(
            self.objective, self.optimizer, config.seed, config.optimizer, config.accumulate
        )
        step = steps.jit_step(function, jax.tree.map(lambda leaf: leaf.sharding, state), self.mesh)
        with jax.set_mesh(self.mesh):
            return step.trace(state, self.batch, self.hyper)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a compiled step on one device, in bytes."""

    arguments: int  # state (parameters, optimizer, teacher, ...) and batch; the new state is written in place
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def memory_of(compiled) -> Memory:
    """The compiler's memory plan; outputs that do not reuse the memory of an argument count as temporaries."""
    found = compiled.memory_analysis()
    extra = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes + extra)
