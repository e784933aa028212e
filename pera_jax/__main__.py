"""The command `pera-jax`: `pera-jax train ...` is `python -m pera_jax.train ...`, and so on."""

import os
import runpy
import sys

COMMANDS = {
    "train": (("pera_jax.train",), "pre-train an encoder"),
    "probe": (("pera_jax.probe",), "score the frozen features of a checkpoint"),
    "features": (("pera_jax.export", "features"), "write the features of a whole dataset as NumPy arrays"),
    "export": (("pera_jax.export",), "export weights to timm, PyTorch or StableHLO, or import them"),
    "report": (("pera_jax.report",), "write an HTML page with figures, scores and curves of a run"),
    "plan": (
        ("pera_jax.plan",),
        "predict the memory and cost of a training, also on TPUs that this machine does not have",
    ),
    "prep-images": (("data_prep.images",), "convert a folder of images, or archives, to a dataset folder"),
    "prep-scenes": (("data_prep.scenes",), "cut georeferenced scenes into tiles of a dataset folder"),
    "prep-tfds": (("data_prep.tfds",), "convert a TensorFlow dataset to a dataset folder"),
    "prep-beam": (("data_prep.beam",), "convert images with Apache Beam"),
    "verify": (("data_prep.verify",), "check every record of a dataset folder"),
    "stats": (("data_prep.stats",), "print statistics of every band of a dataset folder"),
    "browse": (("data_prep.browse",), "write an HTML page with images of a dataset folder"),
    "demo-scenes": (("data_prep.demo_scenes",), "draw the demo's labeled scenes"),
    "demo-mosaics": (("data_prep.demo_mosaics",), "draw the demo's scenes with masks"),
}
"""Name -> ((module, first arguments...), help)."""


def overview() -> str:
    """The text of `pera-jax --help`."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items())
    return "\n".join(
        ["usage: pera-jax COMMAND [options]", "", *lines, "", "pera-jax COMMAND --help lists the options."]
    )


def main() -> None:
    """Runs the command that `sys.argv` names, as `python -m` would."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(overview())
    elif name not in COMMANDS:
        unknown = f"error: unknown command {name!r}; choose from {', '.join(COMMANDS)}"
        print(unknown if name else overview(), file=sys.stderr)
        sys.exit(2)
    else:
        module, *first = COMMANDS[name][0]
        sys.argv = [sys.argv[0], *first, *rest]
        sys.path.append(os.getcwd())  # where an objective of one's own lies; `python -m` looks there, too
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
