"""A small ViT on a few thousand images of about 150 px, half an hour on 2 CPU cores. Settings under test."""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default()
    config.name = "aid_small"
    config.total = "2600 steps"
    config.batch_size = 64
    config.precision = "float32"
    config.data.update(dict(path="shards/aid", normalise="dataset", workers=1))
    config.crops.update(dict(global_size=96, local_size=48, local_number=4))
    config.model.update(dict(width=192, depth=6, heads=6, patch=16, remat=False))
    config.heads.update(dict(hidden=512, bottleneck=128, prototypes=1024))
    config.stochastic_depth.update(dict(rate=0.0, group=0))
    config.loss.koleo_group = 0
    config.schedules.learning_rate.update(dict(peak=7e-4, warmup="10 percent"))
    config.schedules.momentum.start = 0.992
    config.schedules.teacher_temperature.update(dict(start=0.03, end=0.05, warmup="15 percent"))
    config.checkpoint.update(dict(every="25 percent", keep_every="100 percent"))
    return configs.finish(config, argument)
