"""What the demo's features are judged on: its scenes' classes, land cover in patchworks of them, and what was built.

Command:  python -m pera_jax.probe --run demo/run --config configs/demo_probes.py      (`make demo` runs it)
Cost:     see the README.
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
