"""The probes of the demo: scene classification, land-cover segmentation, and detection of new buildings.

Command:  pera-jax probe --run demo/run --config demo_probes      (`make demo` runs it)
Results:  docs/evaluate.md, "The demo".
"""

from ml_collections import ConfigDict


def get_config(argument=None):
    del argument
    scenes, window = dict(data="demo/shards"), dict(window=64, stride=32)
    return ConfigDict(
        dict(
            tasks=dict(
                knn=dict(task="knn", **scenes),
                linear=dict(task="linear", **scenes),
                cover=dict(task="segmentation", data="demo/mosaics/cover", **window),
                change=dict(task="change", data="demo/mosaics/change", **window),
            )
        )
    )
