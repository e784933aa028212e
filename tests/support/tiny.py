"""A PerA that compiles in seconds, for tests of models, precision and step."""

import dataclasses

import numpy as np

from pera_jax import config as configs
from pera_jax.bands import Bands
from pera_jax.objectives import base
from pera_jax.objectives.pera import objective as pera

HYPER = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "one_minus_momentum": 0.1,
    "teacher_temperature": 0.04,
    "student_temperature": 0.1,
}


def config(**changes):
    """2 global crops of 4 x 4 patches and 2 local ones of 3 x 3; `changes` are written a__b=value for the field a.b."""
    result = configs.smoke(configs.default())
    result.precision = "float32"
    result.crops.update(dict(global_size=32, local_size=24))
    result.model.update(dict(width=16, depth=4, heads=2, patch=8, remat="none"))
    result.pera.heads.update(dict(hidden=24, bottleneck=16, prototypes=64))
    result.drop_path.update(dict(rate=0.3, group=2))
    result.pera.loss.koleo_group = 4
    result.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return result


def objective(settings):
    bands = dataclasses.replace(Bands.plain(), mean=(0.4, 0.45, 0.5), std=(0.2, 0.22, 0.25))
    return pera.PerA.from_config(settings, bands)


def batch(settings, seed=0):
    """uint8 crops {crop type: [B, V, H, W, 3]}."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 256, (settings.batch_size, spec.number, spec.size, spec.size, 3), np.uint8)
        for name, spec in base.crop_specs(settings.crops).items()
    }
