"""A file of reference numbers, and what the check needs to know of its method; derived once for each method."""

import jax
import jax.numpy as jnp
import numpy as np

from pera_jax.formats import tables
from pera_jax.training import step as steps


def set_clip(optimizer, limit: float | None) -> None:
    """Sets `clip_norm` of `config.optimizer`; in the official programs, 0 or None is no clipping."""
    optimizer.update(dict(clip_norm=limit) if limit else dict(clip="none"))


class Reference:
    """One file, and our config and objective of the same sizes; derived for each method in `tests/references/`.

    Attributes, set by `__init__` of the derived class:
      config, objective: of the sizes in the file.
      batch: number of images.
      OUTPUT: bound of outputs and features. SKIPPED: names whose gradient and change are not compared.
    """

    OUTPUT = 5e-5
    LOSS = 1e-5
    SKIPPED: tuple[str, ...] = ()

    def __init__(self, arrays: dict[str, np.ndarray], meta: dict, precision: str):
        raise NotImplementedError

    def of(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names start with `prefix`, without it."""
        return {name[len(prefix) :]: value for name, value in self.arrays.items() if name.startswith(prefix)}

    def fits(self, devices: int) -> bool:
        """Whether batch and prototypes divide over the mesh of so many devices."""
        heads = [head for name, head in vars(self.objective).items() if name.endswith("prototype_head") and head]
        return self.batch % devices == 0 and (devices == 1 or all(head.outputs % 2 == 0 for head in heads))

    @property
    def number_of_steps(self) -> int:
        return sum(f"step{n}/loss/total" in self.arrays for n in range(100))

    # ---- what a method defines

    def entries(self) -> list[tables.Entry]:
        return self.objective.official.entries(self.objective)

    def objective_state(self, prefix: str) -> dict[str, np.ndarray]:
        """The objective's state at "init/" or "final/", as the file has it."""
        return {}

    def examples(self, n: int) -> dict[str, np.ndarray]:
        """What `loss` reads of step `n`, from the file; axis 0 of every leaf is the batch."""
        raise NotImplementedError

    def scalars(self, n: int) -> dict[str, float]:
        raise NotImplementedError

    def loss(self, params, teacher, state, examples, scalars):
        """The objective's loss and `aux`, without any random draw."""
        raise NotImplementedError

    def outputs(self, params, teacher, state, examples, scalars) -> dict[str, jax.Array]:
        """Ours of the arrays `stepN/NAME`, by name; in any order of rows, see `arranged`."""
        return {}

    def arranged(self, n: int, name: str, ours: np.ndarray) -> np.ndarray:
        """`ours`, an output of step `n`, as the file has it."""
        return ours

    def losses(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Ours of `stepN/loss/NAME`, by name, from the result of `Objective.update`."""
        return {"total": metrics["loss"]}

    # ---- ours and theirs

    def tree(self, prefix: str):
        arrays = self.of(prefix)
        entries = [entry for entry in self.entries() if entry.name in arrays]
        encoder = self.objective.encoder
        tree = tables.from_named(arrays, entries, encoder.heads, encoder.patch)
        return jax.tree.map(lambda leaf: np.asarray(leaf, self.objective.precision.wide), tree)

    def official(self, **tree):
        encoder = self.objective.encoder
        return tables.to_named(tree, self.entries(), encoder.heads, encoder.patch)

    def initial(self, optimizer) -> steps.TrainState:
        tree, wide = self.tree("init/"), self.objective.precision.wide
        params, teacher = tree["params"], {key: tree["teacher"][key] for key in self.objective.teacher_keys}
        state = {name: np.asarray(value, wide) for name, value in self.objective_state("init/").items()}
        return steps.TrainState(jnp.zeros((), jnp.int32), params, teacher, optimizer.init(params), state)
