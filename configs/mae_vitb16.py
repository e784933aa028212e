"""MAE ViT-B/16 by the official recipe (He et al., arXiv:2111.06377, appendix A.1), on overhead images of 448 px.

Command:  pera-jax train --config mae_vitb16 --config.data.path=SHARDS --workdir runs/mae
Cost:     86 M parameters in the backbone, 26 M in the decoder; 256 GFLOP per image.
Results:  none yet; it has not been trained to the end.

What differs from the official recipe: crops of 448 px in place of 224, as for the other methods; bilinear resampling
in place of bicubic; and flips on both axes (p = 0.5 each) in place of one, because overhead images have no upright
position. The learning rate is 1.5e-4 x batch_size / 256: change both together.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default("mae")
    config.name = "mae_vitb16"
    config.total = "800 epochs"
    config.batch_size = 4096
    config.crops.update(dict(global_size=448, global_number=1, global_area=(0.2, 1.0)))
    config.model.update(dict(variant="B/16", remat="block"))
    config.mae.removed = 0.75
    config.mae.decoder.update(dict(width=512, depth=8, heads=16))
    config.schedules.learning_rate.update(dict(peak=2.4e-3, warmup="40 epochs"))
    return configs.finish(config, argument)
