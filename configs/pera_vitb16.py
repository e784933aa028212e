"""PerA ViT-B/16 as published (Shen et al., arXiv:2505.19447): 5 million overhead images, 200 epochs.

Command:  pera-jax train --config pera_vitb16 --config.data.path=SHARDS --workdir runs/vitb16
Cost:     86 M parameters in the backbone; 425 GFLOP per image (docs/cost.md).
Results:  none yet; it has not been trained to the end.

The paper gives the batch per GPU (16) but not the number of GPUs, so batch_size is a choice; the learning rate is not
scaled with it. KoLeo and drop path work on groups of 16 images, the batch of one GPU in the paper, on any mesh.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default()
    config.name = "pera_vitb16"
    config.total = "200 epochs"
    config.batch_size = 1024
    config.model.update(dict(variant="B/16", remat="block"))
    config.pera.loss.koleo_group = 16
    config.drop_path.update(dict(rate=0.3, group=16))
    config.pera.teacher_momentum.start = 0.992
    config.pera.teacher_temperature.update(dict(start=0.03, end=0.05, warmup="30 epochs"))
    return configs.finish(config, argument)
