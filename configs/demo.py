"""The demo: a small ViT on procedurally generated scenes. `make demo` runs it.

Command:  pera-jax train --config demo --workdir demo/run
Cost:     2 to 3 minutes on two cores.
Results:  docs/evaluate.md, "The demo".
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default()
    config.name = "demo"
    config.total = "640 steps"
    config.batch_size = 32
    config.precision = "float32"
    config.data.update(dict(path="demo/shards", normalize="dataset", workers=1))
    config.crops.update(dict(global_size=64, local_size=32, local_number=2))
    config.model.update(dict(width=96, depth=4, heads=3, patch=8, remat="none"))
    config.pera.heads.update(dict(hidden=256, bottleneck=64, prototypes=256))
    config.drop_path.update(dict(rate=0.0, group=0))
    config.pera.loss.koleo_group = 0
    config.schedules.learning_rate.update(dict(peak=1e-3, warmup="10 percent"))
    config.pera.teacher_momentum.start = 0.98
    config.pera.teacher_temperature.update(dict(start=0.03, end=0.05, warmup="15 percent"))
    config.checkpoint.update(dict(every="50 percent", keep_every="100 percent"))
    return configs.finish(config, argument)
