"""Warm start (`init_from`): starts a run from the weights of another run or of an import.

The position embedding is interpolated to the grid of the new crops, as in the forward pass of the network; the patch
projection is adapted to other bands (`fit.rebanded`). Optimizer and step start anew; the state of the objective, such
as a center, can be estimated from data.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pera_jax.bands import band_order
from pera_jax.common.errors import Misfit
from pera_jax.common.text import every
from pera_jax.data import pipeline
from pera_jax.encoder import fit
from pera_jax.encoder.load import Weights, backbone_alone, load_weights, networks_of
from pera_jax.objectives import batches
from pera_jax.objectives.base import Objective, Streams
from pera_jax.parallel import distributed, global_arrays, sharding
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, intact


def with_weights(state: steps.TrainState, run: str, objective: Objective) -> steps.TrainState:
    """Replaces the networks in `state` by those of the latest checkpoint of `run`; prints to stderr what was loaded.

    From a backbone-only import, or a run of another method, only the backbone is loaded; the rest of `state` is kept.

    Raises:
      UserError: a run that does not exist.
      Misfit: parameters with other names or shapes than in `state`; the error names all of them.
    """

    def read(step: int) -> dict[str, Weights]:
        first = load_weights(run, step)
        same = not backbone_alone(first.meta) and objective.name in first.meta["config"]
        if not same:
            return {"judged": first}
        return {"judged": first} | {name: load_weights(run, step, name) for name in networks_of(first.meta)}

    found = checkpoint.read_while_present(run, None, read)
    source, complete = found["judged"], "student" in found
    student = found["student"].params if complete else {"backbone": source.backbone}
    ema = found["teacher"].params if "teacher" in found else {"backbone": source.backbone}
    there, here = source.meta["model"], objective.encoder
    grid, bands = here.image_size // here.patch, (tuple(source.meta["bands"]), objective.bands.names)
    notes = ["all networks and heads" if complete else "the backbone, with new heads"]
    old, old_position = there["image_size"] // there["patch"], there.get("position", "learned")
    if old_position != here.position:
        notes.append(f"{old_position} positions in place of {here.position} ones" if here.position == "learned" else
                     f"{here.position} positions, but the weights were trained with {old_position} ones")
    elif grid != old:
        notes.append(f"positions interpolated from {old} x {old} to {grid} x {grid} patches")
    if bool(there.get("layer_scale")) != bool(here.layer_scale):
        notes.append("new gains of LayerScale, all 1" if here.layer_scale else "LayerScale folded into linear layers")

    def fitted(network: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        backbone = fit.rescaled(network["backbone"], bool(here.layer_scale))
        backbone = fit.repositioned(backbone, there, here.position, grid, grid)
        result = new | network | {"backbone": fit.rebanded(backbone, there["patch"], *bands)}
        return objective.adapt(result, new, there["patch"], *bands) if complete else result

    if band_order(*bands) is None:
        notes.append(
            f"the patch projection averaged over {len(bands[0])} bands for each of {len(bands[1])} bands; new layers "
            "where their size depends on the bands"
        )
    elif set(bands[0]) != set(bands[1]):
        notes.append(f"the weights of the bands {', '.join(bands[0])} used for {', '.join(bands[1])}")
    params = fitted(student, state.params)
    teacher = fitted(ema, state.teacher) if objective.teacher_keys else state.teacher
    differing = sorted({*intact.differences(params, state.params), *intact.differences(teacher, state.teacher)})
    if differing:
        raise Misfit(
            f"init_from={run} does not fit this config: {every(differing)}; change the config, or use other weights"
        )
    distributed.say(f"starting from {run}, step {source.step}: {'; '.join(notes)}")
    params, teacher = jax.tree.map(_sharded_like, (params, teacher), (state.params, state.teacher))
    return state.replace(params=params, teacher=teacher)


def _sharded_like(value, like: jax.Array) -> jax.Array:
    """`value`, complete on every process, with the sharding of `like`."""
    if isinstance(value, jax.Array) and value.sharding == like.sharding:
        return value
    whole = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(whole.shape, like.sharding, lambda index: whole[index])


def with_estimate(state: steps.TrainState, config, objective: Objective, data, mesh) -> steps.TrainState:
    """Sets the objective's state, such as a center, to its estimate over the first `warm_start_batches` batches.

    Training sees the same batches again, with other augmentation.
    """
    number = objective.warm_start_batches
    if not number:
        return state
    where, whole = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, sharding.P())
    rows = global_arrays.local_rows(where, config.batch_size)

    def estimate(teacher, batch, index):
        examples = objective.prepare(Streams.at(config.seed, "warm_start", index), batch)
        parts = sharding.split_batch(examples, config.accumulate)
        found = jax.lax.map(lambda part: objective.estimate(teacher, part), parts)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found)

    layout, total = jax.tree.map(lambda leaf: leaf.sharding, state.teacher), None
    with jax.set_mesh(mesh):
        compiled = jax.jit(estimate, in_shardings=(layout, where, whole))
        stream = pipeline.make_pipeline(
            data, pipeline.Crops(objective.crops, config.crops.aspect, config.crops.flip, objective.host_draws),
            batch_size=config.batch_size, seed=config.seed, rows=rows,
            workers=pipeline.workers_of(config.data.workers),
        )  # fmt: skip
        try:
            for index in range(number):
                batch = next(stream)
                wanted = {name: batch[name] for name in batches.layout(objective, config.batch_size)}
                arrays = global_arrays.assemble(wanted, where, rows, config.batch_size)
                found = jax.tree.map(lambda leaf: leaf / number, compiled(state.teacher, arrays, np.int32(index)))
                total = found if total is None else jax.tree.map(jnp.add, total, found)
        finally:
            batch = wanted = arrays = None  # they may be views of the workers' shared memory
            stream.close()
        started, note = objective.with_estimate(state.objective, total)
        started = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), started, state.objective)
    distributed.say(f"{note}; estimated over {number} batches")
    return state.replace(objective=started)
