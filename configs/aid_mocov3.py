"""MoCo v3 beside aid_small: the same ViT, crops, batch, normalization and precision, and as many FLOPs in all.

Command:  pera-jax train --config aid_mocov3 --config.data.path=shards/aid --workdir runs/aid_mocov3
Cost:     69,632 images; 55 TFLOP, as aid_small; a step takes 0.79 GFLOP per image.
Results:  none yet.

The learning rate is the official one for the batch, 1.5e-4 x 32 / 256, and the warm-up the same share of the run as in
the official 300 epochs. A batch of 32 is small for this method: it has 31 negatives, and statistics of 32 images.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("mocov3")
    config.name = "aid_mocov3"
    config.total = "2176 steps"
    config.batch_size = 32
    config.precision = "float32"
    config.data.update(dict(path="shards/aid", normalize="dataset", workers=1))
    config.crops.global_size = 64
    config.model.update(dict(width=96, depth=6, heads=3, patch=8, remat="none"))
    config.mocov3.heads.update(dict(hidden=512, outputs=128))
    config.schedules.learning_rate.update(dict(peak=1.5e-4 * config.batch_size / 256, warmup="13 percent"))
    config.checkpoint.update(dict(every="25 percent", keep_every="100 percent"))
    return configs.finish(config, argument)
