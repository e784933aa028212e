"""DINOv2 ViT-B/16 for overhead images (Oquab et al., arXiv:2304.07193): the official default recipe.

Command:  pera-jax train --config dinov2_vitb16 --config.data.path=SHARDS --workdir runs/dinov2
Cost:     86 M parameters in the backbone; 1,114 GFLOP per image (docs/methods.md).
Results:  none yet; it has not been trained.

From the published models: Sinkhorn-Knopp targets and separate heads (the default recipe has centering and one head).
Here: both flips, because overhead images have no up; crops of 448 and 96 px as in pera_vitb16, to compare with it;
bilinear resampling (the official program has bicubic); and the intended probabilities of blur. To compare methods,
set optimizer.layer_decay=1.0 and optimizer.rate_factors=(). The learning rate is 4e-3 sqrt(batch_size / 1024): set
schedules.learning_rate.peak with another batch.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("dinov2")
    config.name = "dinov2_vitb16"
    config.total = "100 epochs"
    config.batch_size = 1024
    config.model.update(dict(variant="B/16", remat="block"))
    config.schedules.learning_rate.update(dict(peak=4e-3 * (config.batch_size / 1024) ** 0.5, warmup="10 epochs"))
    config.schedules.weight_decay.update(dict(start=0.04, end=0.4))
    config.optimizer.update(dict(layer_decay=0.9, rate_factors=((r"patch_projection", 0.2),)))
    config.drop_path.update(dict(rate=0.3, group=16))
    config.dinov2.update(dict(targets="sinkhorn", separate_heads=True, layer_scale=1e-5, mask_group=16))
    config.dinov2.loss.koleo_group = 16
    config.dinov2.teacher_momentum.start = 0.992
    config.dinov2.teacher_temperature.update(dict(start=0.04, end=0.07, warmup="30 epochs"))
    return configs.finish(config, argument)
