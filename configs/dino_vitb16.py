"""DINO ViT-B/16, the official recipe (Caron et al., arXiv:2104.14294) on the overhead images and crops of pera_vitb16.

Command:  pera-jax train --config dino_vitb16 --config.data.path=SHARDS --workdir runs/dino_vitb16
Cost:     86 M parameters in the backbone; 1,408 GFLOP per image (docs/methods.md).
Results:  none yet; it has not been trained.

As in the official program: 100 epochs (300 are better), learning rate 5e-4 for each 256 images of a batch, each
parameter clipped by its own norm, the last layer frozen for one epoch and its gains for good. Unlike it: both flips,
because overhead images have no upright direction (it flips horizontally only); global crops of 448 px as in
pera_vitb16 (it has 224 px); bilinear resampling (it has bicubic). The weaker views of PerA's authors, who train DINO
for comparison, are `dino.views` without grayscale, blur and solarize, and with jitter 0.1 in `global_2`.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("dino")
    config.name = "dino_vitb16"
    config.total = "100 epochs"
    config.batch_size = 1024
    config.model.update(dict(variant="B/16", remat="block"))
    config.schedules.learning_rate.update(dict(peak=5e-4 * config.batch_size / 256, warmup="10 epochs"))
    config.dino.teacher_momentum.start = 0.996
    config.dino.teacher_temperature.update(dict(start=0.04, end=0.04))  # end=0.07 is better where it is stable
    return configs.finish(config, argument)
