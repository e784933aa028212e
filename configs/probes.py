"""Scene classification, semantic segmentation and change detection on frozen features, as the README's table has them.

Command:  python -m pera_jax.probe --run runs/aid --config configs/probes.py
          (and --encoder untrained, --encoder pixels; --follow beside a training)
Cost:     see the README.
"""

from ml_collections import ConfigDict

ZURICH = ("road", "building", "tree", "grass", "bare soil", "water", "railway", "swimming pool")


def get_config(argument=None):
    del argument
    aid = dict(data="shards/aid", image_size=128)
    # Chosen on held-out labels for patches of 8 px; for patches of 14 or 16 the tasks' defaults, 224 and 112.
    window = dict(window=64, stride=32)
    return ConfigDict(
        dict(
            tasks=dict(
                aid_knn=dict(task="knn", **aid),
                aid_logistic=dict(task="logistic", **aid),
                # Folders of two scenes and of eleven pairs, without splits: each is tested by a head trained on the others.
                zurich=dict(task="segmentation", data="data/zurich_summer", class_names=ZURICH, **window),
                levir=dict(task="change", data="data/levir_cd", scale=2, **window),
            )
        )
    )
