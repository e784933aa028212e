"""A run that begins from weights (`init_from`): of another run, or imported; whole, or a teacher's backbone alone.

What fits is taken as it is. The position embedding is interpolated to the new crops' grid, as the network itself does;
the first layer is fitted to other bands (`fit.rebanded`). Optimiser and step are new; the centre is estimated.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pera_jax.common.errors import Misfit
from pera_jax.common.text import every
from pera_jax.data import pipeline
from pera_jax.objectives.pera import pera
from pera_jax.parallel import distributed, sharding
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint
from pera_jax.weights import fit


def with_weights(state: steps.TrainState, run: str, objective: pera.PerA) -> steps.TrainState:
    """`state` with the networks of the latest checkpoint of `run`; says on stderr what was taken and fitted.

    Of a teacher's backbone alone both backbones are made, and heads and mask token stay those of `state`. Of other bands,
    the pixel head's last layer does, where their number differs.

    Raises:
      UserError: no such run, or parameters of other names or shapes; all of them are named.
    """

    def read(step: int) -> list[checkpoint.Weights]:
        teacher = checkpoint.load_weights(run, step, "teacher")
        alone = checkpoint.backbone_alone(teacher.meta)
        return [teacher] if alone else [teacher, checkpoint.load_weights(run, step, "student")]

    teacher, *rest = checkpoint.while_kept(run, None, read)
    whole = bool(rest)
    student = rest[0].params if whole else {"backbone": teacher.backbone}
    there, here = teacher.meta["model"], objective.vit
    grid, bands = here.image_size // here.patch, (tuple(teacher.meta["bands"]), objective.bands.names)
    said = ["student, teacher and heads" if whole else "the teacher's backbone for both networks, with new heads"]
    if grid != there["image_size"] // there["patch"]:
        old = there["image_size"] // there["patch"]
        said.append(f"positions interpolated from {old} x {old} to {grid} x {grid} patches")

    def fitted(network: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        backbone = fit.resized(network["backbone"], there, grid, grid)
        result = new | network | {"backbone": fit.rebanded(backbone, there["patch"], *bands)}
        if "pixel_head" in network:
            result["pixel_head"] = _pixel_head(network["pixel_head"], new["pixel_head"], there["patch"], *bands)
        return result

    if fit.order_of(*bands) is None:
        said.append(
            f"the first layer's mean over {len(bands[0])} bands for each of {len(bands[1])}"
            + ", with a new last layer of the pixel head" * whole
        )
    elif set(bands[0]) != set(bands[1]):
        said.append(f"the bands {', '.join(bands[0])} taken for {', '.join(bands[1])}")
    params, follower = fitted(student, state.params), fitted(teacher.params, state.teacher)
    differing = sorted({*checkpoint.differences(params, state.params), *checkpoint.differences(follower, state.teacher)})
    if differing:
        raise Misfit(f"init_from={run} does not fit this config: {every(differing)}")
    distributed.say(f"begins from {run}, step {teacher.step}: {'; '.join(said)}")
    params, follower = jax.tree.map(_laid_out_as, (params, follower), (state.params, state.teacher))
    return state.replace(params=params, teacher=follower)


def _pixel_head(head: dict[str, Any], new: dict[str, Any], patch: int, there, here) -> dict[str, Any]:
    """The pixel head for other bands: rows of its last layer are ordered row, column, band."""
    order = fit.order_of(there, here)
    if order is None:
        return head | {name: new[name] for name in ("direction", "gain")}
    place = np.arange(patch * patch * len(there)).reshape(-1, len(there))[:, order].reshape(-1)
    return head | {name: np.asarray(head[name])[place] for name in ("direction", "gain")}


def _laid_out_as(value, like: jax.Array) -> jax.Array:
    """`value`, which each host holds whole, cut and spread over the devices of all hosts as `like` is."""
    if isinstance(value, jax.Array) and value.sharding == like.sharding:
        return value
    whole = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(whole.shape, like.sharding, lambda index: whole[index])


def with_center(state: steps.TrainState, config, objective: pera.PerA, data, mesh) -> steps.TrainState:
    """`state` with the teacher's mean output over the first `config.init_center_batches` batches as its centre.

    The released program does not store the centre, and one that begins at 0 takes tens of steps to come to where the
    teacher's outputs lie. Training sees the same batches afterwards, with looks and masks of its own.
    """
    number = config.init_center_batches
    if not number:
        return state
    where, whole = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, sharding.P())
    rows = distributed.rows_of(where, config.batch_size)

    def mean_output(teacher, batch, index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), steps.CENTER), index)
        parts = sharding.split_batch(objective.examples(key, batch), config.accumulate)
        return jnp.mean(jax.lax.map(lambda part: objective.mean_output(teacher, part), parts), axis=0)  # [K]

    layout = jax.tree.map(lambda leaf: leaf.sharding, state.teacher)
    center = state.objective["center"]
    with jax.set_mesh(mesh):
        compiled = jax.jit(mean_output, in_shardings=(layout, where, whole), out_shardings=center.sharding)
        stream = pipeline.make_pipeline(
            data, config.crops, batch_size=config.batch_size, seed=config.seed, rows=rows,
            workers=pipeline.workers_of(config.data.workers),
        )  # fmt: skip
        try:
            for index in range(number):
                batch = next(stream)
                crops = {kind: batch[kind] for kind in pera.KINDS if kind in batch}
                arrays = distributed.global_arrays(crops, where, rows, config.batch_size)
                center = center + compiled(state.teacher, arrays, np.int32(index)) / number
        finally:
            batch = crops = arrays = None  # they may lie in the workers' memory
            stream.close()
        norm = float(jax.jit(jnp.linalg.norm, out_shardings=whole)(center))
    distributed.say(f"the centre begins as the teacher's mean output over {number} batches, of norm {norm:.3g}")
    return state.replace(objective=state.objective | {"center": center})
