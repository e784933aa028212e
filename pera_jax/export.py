"""Weights in and out.

    python -m pera_jax.export timm --run runs/aid --output exported          # for timm: safetensors, config, model card
    python -m pera_jax.export released --run runs/aid --output aid.params    # for the authors' PyTorch program
    python -m pera_jax.export import-released pera.params --output runs/pera
    python -m pera_jax.export import-timm vit_base.safetensors --output runs/vit_base

An import is a run with one checkpoint, of step 0: probe it, export it, or begin a training from it with `init_from`.
Reading and writing files of torch.save needs PyTorch, the extra `torch`.
"""

import argparse
import pathlib
import re

from pera_jax import checkpoint, errors
from pera_jax.weights import imports, released, timm


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels, as 224, or HEIGHTxWIDTH, as 224x320")
    return int(found[1]), int(found[2] or found[1])


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pera_jax.export", description="Weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True)

    out = commands.add_parser("timm", help="a network for timm")
    out.add_argument("--output", required=True, type=pathlib.Path, help="folder for safetensors, config and model card")
    out.add_argument("--which", choices=("teacher", "student"), default="teacher")
    out.add_argument("--image-size", type=_size, help="px, SIDE or HEIGHTxWIDTH (default: the global crops' size)")
    dictionary = commands.add_parser("released", help="student, teacher and heads for the authors' PyTorch program")
    dictionary.add_argument("--output", required=True, type=pathlib.Path, help="file for torch.load")
    for command in (out, dictionary):
        command.add_argument("--run", required=True, help="folder of the run (the --workdir of the training)")
        command.add_argument("--step", type=int, help="the checkpoint (default: the latest)")

    theirs = commands.add_parser("import-released", help="a dictionary of the authors' PyTorch program")
    theirs.add_argument("--teacher-only", action="store_true", help="the teacher's backbone, without student and heads")
    vit = commands.add_parser("import-timm", help="a ViT under timm's names: DINO, DINOv2, MAE, supervised")
    for command in (theirs, vit):
        command.add_argument("file", type=pathlib.Path, help="NAME.safetensors, or a file of torch.save")
        command.add_argument("--output", required=True, type=pathlib.Path, help="folder for the run that it becomes")
        beside = " config.json beside the file, or" if command is vit else ""
        command.add_argument("--heads", type=int, help=f"of attention (default:{beside} width / 64)")
        command.add_argument("--bands", type=_words, help="names of the bands (default: red,green,blue)")
        command.add_argument("--mean", type=_numbers, help=f"of each band in [0, 1] (default:{beside} ImageNet's)")
        command.add_argument("--std", type=_numbers, help=f"of each band in [0, 1] (default:{beside} ImageNet's)")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = vars(_parser().parse_args(argv))
    command, output = options.pop("command"), options["output"]
    if command.startswith("import"):
        teacher_only = options.pop("teacher_only", False)
        file = options.pop("file")
        wanted = imports.Options(**{name: options[name] for name in ("heads", "bands", "mean", "std")})
        if command == "import-released":
            meta, left_out = imports.import_released(file, output, wanted, teacher_only), []
        else:
            meta, left_out = imports.import_timm(file, output, wanted)
        parts = "a backbone alone" if checkpoint.backbone_alone(meta) else "student, teacher and heads"
        print(f"{file}: {parts}, {_described(meta, (meta['model']['image_size'],) * 2)}")
        if left_out:
            print(f"left out: {', '.join(left_out)}")
    elif command == "timm":
        weights = checkpoint.load_weights(options["run"], options["step"], options["which"])
        timm.export(weights, options["which"], options["image_size"], output)
        size = options["image_size"] or (weights.meta["model"]["image_size"],) * 2
        print(f"{options['run']}, {options['which']} at step {weights.step}: {_described(weights.meta, size)}")
    else:
        step = released.export(options["run"], options["step"], output)
        print(f"{options['run']}, student, teacher and heads at step {step}")
    print(f"written to {output}")


def _described(meta: dict, size: tuple[int, int]) -> str:
    shape = meta["model"]
    mean, std = (", ".join(f"{value:g}" for value in meta[name]) for name in ("mean", "std"))
    return (
        f"a ViT of width {shape['width']}, depth {shape['depth']}, {shape['heads']} heads, patches of {shape['patch']} px, "
        f"for images of {size[0]} x {size[1]} px\nbands {', '.join(meta['bands'])}; mean {mean}; std {std}"
    )


if __name__ == "__main__":
    errors.run(main)
