"""PerA ViT-G/16-1024, the paper's large model (Shen et al., arXiv:2505.19447): width 1024, 40 blocks.

Command:  pera-jax train --config pera_vitg16_1024 --config.data.path=SHARDS --workdir runs/vitg16
Cost:     505 M parameters in the backbone; parameters and optimizer state are sharded over the devices (`mesh.fsdp`);
          docs/pods.md has memory and chip-hours.
Results:  none yet; it has not been trained to the end.

Differs from pera_vitb16 in model size, teacher momentum and teacher temperature.
"""

from pera_jax import config as configs


def get_config(argument=None):
    config = configs.default()
    config.name = "pera_vitg16_1024"
    config.total = "200 epochs"
    config.batch_size = 1024
    config.model.update(dict(variant="G/16-1024", remat="block"))
    config.pera.loss.koleo_group = 16
    config.drop_path.update(dict(rate=0.3, group=16))
    config.pera.teacher_momentum.start = 0.998
    config.pera.teacher_temperature.update(dict(start=0.02, end=0.03, warmup="30 epochs"))
    config.mesh.update(dict(data=1, fsdp=-1))
    return configs.finish(config, argument)
