"""DINOv2 beside aid_small: the same ViT, crops, batch, normalization and precision, and as many FLOPs in all.

Command:  pera-jax train --config aid_dinov2 --config.data.path=shards/aid --workdir runs/aid_dinov2
Cost:     53,760 images; 55 TFLOP, as aid_small; a step takes 1.02 GFLOP per image.
Results:  none yet.

The learning rate is the official one for the batch, 4e-3 sqrt(32 / 1024). Without layer-wise learning rates and drop
path, as the other methods; durations are the same share of the run as in the official recipe of 100 epochs.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("dinov2")
    config.name = "aid_dinov2"
    config.total = "1680 steps"
    config.batch_size = 32
    config.precision = "float32"
    config.data.update(dict(path="shards/aid", normalize="dataset", workers=1))
    config.crops.update(dict(global_size=64, local_size=32, local_number=2))
    config.model.update(dict(width=96, depth=6, heads=3, patch=8, remat="none"))
    config.drop_path.update(dict(rate=0.0, group=0))
    config.optimizer.update(dict(layer_decay=1.0, rate_factors=()))
    config.schedules.learning_rate.update(dict(peak=4e-3 * (config.batch_size / 1024) ** 0.5, warmup="10 percent"))
    heads = dict(hidden=512, bottleneck=128, prototypes=1024, patch_prototypes=1024)
    config.dinov2.heads.update(heads)
    config.dinov2.loss.koleo_group = 0
    config.dinov2.teacher_temperature.update(dict(start=0.04, end=0.07, warmup="30 percent"))
    config.dinov2.freeze_last_layer = "1 percent"
    config.checkpoint.update(dict(every="25 percent", keep_every="100 percent"))
    return configs.finish(config, argument)
