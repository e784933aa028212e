"""MoCo v3 ViT-B/16 for overhead images (Chen et al., arXiv:2104.02057): the official recipe of 300 epochs.

Command:  pera-jax train --config mocov3_vitb16 --config.data.path=SHARDS --workdir runs/mocov3
Cost:     86 M parameters in the backbone; 1,253 GFLOP per image.
Results:  none yet; it has not been trained.

Here: both flips, because overhead images have no up, and crops of 448 px as in pera_vitb16, to compare with it (the
official ones have 224 px). The learning rate is 1.5e-4 batch_size / 256: set schedules.learning_rate.peak with another
batch. Batch norm and negatives are those of the whole batch, on any mesh.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("mocov3")
    config.name = "mocov3_vitb16"
    config.total = "300 epochs"
    config.batch_size = 4096
    config.model.update(dict(variant="B/16", remat="block"))
    config.schedules.learning_rate.update(dict(peak=1.5e-4 * config.batch_size / 256, warmup="40 epochs"))
    return configs.finish(config, argument)
