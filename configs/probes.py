"""Scene classification, semantic segmentation and change detection on frozen features.

Command:  pera-jax probe --run runs/aid --config probes
          (also with --encoder untrained or --encoder pixels, and with --follow during a training)
Cost:     5 to 15 minutes on two cores for the network of `aid_small`, most of it for the logistic regression.
Results:  docs/evaluate.md, "Half an hour on two cores".
"""

from ml_collections import ConfigDict

ZURICH = ("road", "building", "tree", "grass", "bare soil", "water", "railway", "swimming pool")


def get_config(argument=None):
    del argument
    aid = dict(data="shards/aid", image_size=128)
    # Chosen on held-out labels for patches of 8 px. For patches of 14 or 16 px, use the default window 224 and stride
    # 112.
    window = dict(window=64, stride=32)
    return ConfigDict(
        dict(
            tasks=dict(
                aid_knn=dict(task="knn", **aid),
                aid_logistic=dict(task="logistic", **aid),
                # Cross-validated, because these two scenes and eleven pairs have no splits.
                zurich=dict(task="segmentation", data="data/zurich_summer", class_names=ZURICH, **window),
                levir=dict(task="change", data="data/levir_cd", scale=2, **window),
            )
        )
    )
