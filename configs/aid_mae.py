"""MAE beside `aid_small`: the same small ViT, crops, batch, normalization and precision, with a small decoder.

Command:  pera-jax train --config aid_mae --config.data.path=shards/aid --workdir runs/aid_mae
Cost:     448,000 images, 0.12 GFLOP each: as many FLOPs as `aid_small`, which sees 128,000 images.
Results:  none yet.

The decoder has two thirds of the encoder's width and a third of its depth. The peak learning rate is that of
`aid_small`; the official 1.5e-4 x batch_size / 256 is made for batches of thousands and would be 1.9e-5 here. No other
has been tried.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("mae")
    config.name = "aid_mae"
    config.total = "14000 steps"
    config.batch_size = 32
    config.precision = "float32"
    config.data.update(dict(path="shards/aid", normalize="dataset", workers=1))
    config.crops.global_size = 64
    config.model.update(dict(width=96, depth=6, heads=3, patch=8, remat="none"))
    config.mae.decoder.update(dict(width=64, depth=2, heads=2))
    config.schedules.learning_rate.update(dict(peak=8e-4, warmup="10 percent"))
    config.checkpoint.update(dict(every="25 percent", keep_every="100 percent"))
    return configs.finish(config, argument)
