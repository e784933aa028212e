"""DINO beside aid_small: the same ViT, crops and batch, and as much computation.

Command:  pera-jax train --config aid_dino --config.data.path=shards/aid --workdir runs/aid_dino
Cost:     58,240 images of 0.94 GFLOP, as much as 128,000 images of aid_small.
Results:  none yet.

Learning rate, warmup and momentum are those of aid_small, not searched for DINO: 5e-4 for 256 images, the official
scaling, would be 6e-5 for a batch of 32, too little for so few steps.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("dino")
    config.name = "aid_dino"
    config.total = "1820 steps"
    config.batch_size = 32
    config.precision = "float32"
    config.data.update(dict(path="shards/aid", normalize="dataset", workers=1))
    config.crops.update(dict(global_size=64, local_size=32, local_number=2))
    config.model.update(dict(width=96, depth=6, heads=3, patch=8, remat="none"))
    config.dino.heads.update(dict(hidden=512, bottleneck=128, prototypes=1024))
    config.drop_path.rate = 0.0
    config.schedules.learning_rate.update(dict(peak=8e-4, warmup="10 percent"))
    config.dino.teacher_momentum.start = 0.985
    config.dino.teacher_temperature.warmup = "15 percent"
    config.dino.freeze_last_layer = "1 percent"
    config.checkpoint.update(dict(every="25 percent", keep_every="100 percent"))
    return configs.finish(config, argument)
