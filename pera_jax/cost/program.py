"""The training step of a config as a program: traced and compiled for a mesh, without any data or values.

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
from pera_jax.parallel import sharding
from pera_jax.training import schedules
from pera_jax.training import step as steps


class Program:
    """The step that training runs, over a mesh.

    Attributes:
      crops: shapes and dtype of a batch, [B, V, H, W, bands] of each crop type.
      hyper: a value for each scalar that a step takes.
    """

    def __init__(self, config, devices: list | None = None, bands: Bands | None = None, make: Callable = objectives.from_config):
        """
        Args:
          config: checked here as training would.
          devices: all of them by default; those of a topology that is not there will do.
          bands: uint8 of the names in config.data.bands by default, or red, green and blue.
          make: the objective from (config, bands, device).

        Raises:
          UserError: as `config.check` and `objectives.from_config`.
        """
        self.config = config
        self.mesh = sharding.make_mesh(**config.mesh, devices=devices)
        configs.check(config, sharding.batch_shards(self.mesh), sharding.weight_shards(self.mesh), 1)
        bands = bands or Bands.plain(config.data.bands or RGB)
        self.objective = make(config, bands, self.mesh.devices.flat[0])
        self.optimizer = steps.make_optimizer(config.optimizer)
        # Any values will do; those of the middle of a run that is longer than every warm-up.
        run = schedules.scalars(config, self.objective.schedules(), steps_per_epoch=1000, total_steps=10**9)
        middle = run.at(10**9 // 2)
        self.hyper = {name: np.asarray(value, config.parameter_precision) for name, value in middle.items()}
        self.crops = {
            name: jax.ShapeDtypeStruct(
                (config.batch_size, spec.number, spec.size, spec.size, len(bands)), np.dtype(bands.dtype)
            )
            for name, spec in self.objective.crops.items()
        }

    def trace(self) -> Any:
        """The traced step: `.lower().compile()` it, or look at its `.jaxpr`."""
        state = steps.abstract_state(self.objective, self.optimizer, self.mesh)
        config = self.config
        function = steps.make_step(
            self.objective, self.optimizer, config.seed, config.optimizer, config.accumulate
        )
        step = steps.jit_step(function, jax.tree.map(lambda leaf: leaf.sharding, state), self.mesh)
        with jax.set_mesh(self.mesh):
            return step.trace(state, self.crops, self.hyper)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a compiled step on one device."""

    arguments: int  # parameters, optimizer, teacher, centre, the batch; the new state takes the old one's place
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def memory_of(compiled) -> Memory:
    """What the compiler has planned; outputs that are no argument's memory again count as temporaries."""
    found = compiled.memory_analysis()
    extra = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes + extra)
