"""Exports and imports weights.

    pera-jax export timm --run runs/aid --output exported          # timm: safetensors, config, model card
    pera-jax export released --run runs/aid --output aid.params    # PyTorch state dict of the authors' code
    pera-jax export import-released pera.params --output runs/pera
    pera-jax export import-timm vit_base.safetensors --output runs/vit_base
    pera-jax export official --run runs/dino --output dino.safetensors          # names of the method's own program
    pera-jax export import-official mae_pretrain.pth --method mae --output runs/mae
    pera-jax export features --run runs/aid --input images --output features    # NumPy arrays of a dataset
    pera-jax export stablehlo --run runs/aid --output aid.stablehlo             # runs without pera_jax

An import becomes a run folder with one checkpoint at step 0: probe it, export it, or start a training from it with
`init_from`. Reading and writing torch.save files needs PyTorch (the extra `torch`).
"""

import argparse
import re

from pera_jax.common import errors, paths
from pera_jax.common.text import printable, several
from pera_jax.data.labelled import folders
from pera_jax.data.labelled.samples import open_images
from pera_jax.encoder import feature_folder, load, stablehlo
from pera_jax.encoder import model as features
from pera_jax.weights import imports, official, released, timm


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an image size; expected a number of pixels such as 224, or HEIGHTxWIDTH such as 224x320"
        )
    return int(found[1]), int(found[2] or found[1])


def _blocks(text: str) -> int | tuple[int, ...]:
    last = re.fullmatch(r"last(\d+)", text)
    if not last and not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of blocks; expected 0-based indices such as 3,7,11, or lastN such as last4"
        )
    return int(last[1]) if last else tuple(map(int, text.split(",")))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pera-jax export", description="Exports and imports weights.")
    commands = parser.add_subparsers(dest="command", required=True)

    out = commands.add_parser("timm", help="export an encoder for timm")
    out.add_argument(
        "--output", required=True, type=paths.local_path, help="output folder for safetensors, config and model card"
    )
    artifact = commands.add_parser("stablehlo", help="export an encoder as StableHLO, which runs without pera_jax")
    artifact.add_argument(
        "--output", required=True, type=paths.local_path, help="output file, read by jax.export.deserialize"
    )
    for command in (out, artifact):
        command.add_argument(
            "--image-size", type=_size, help="px, SIDE or HEIGHTxWIDTH (default: size of the global crops)"
        )
    folder = commands.add_parser("features", help="write the features of a dataset as NumPy arrays")
    folder.add_argument(
        "--input",
        required=True,
        type=paths.local,
        help="images: a folder of images, of class folders or of shards, or tfds:NAME",
    )
    folder.add_argument(
        "--split", default="", help="split to export (default: all images of a folder, or the only split of shards)"
    )
    folders.add_options(folder)
    folder.add_argument(
        "--output", required=True, type=paths.local_path, help="output folder for the arrays and their index"
    )
    folder.add_argument(
        "--image-size", type=int, help="px, a multiple of the patch size (default: size of the global crops)"
    )
    folder.add_argument("--maps", action="store_true", help="also write the maps of patch tokens")
    folder.add_argument(
        "--blocks", type=_blocks, default=(), help="also write the tokens of these blocks: 0-based 3,7,11, or last4"
    )
    folder.add_argument("--part-size", type=int, default=1024, help="images per file (default: 1024)")
    folder.add_argument(
        "--batch-size", type=int, default=256, help="images decoded at a time; does not change the features"
    )
    dictionary = commands.add_parser("released", help="export student, teacher and heads for the authors' PyTorch code")
    dictionary.add_argument("--output", required=True, type=paths.local_path, help="output file, read by torch.load")
    own = commands.add_parser("official", help="export all networks and heads for the method's official program")
    own.add_argument("--output", required=True, type=paths.local_path, help="output file, safetensors")
    for command in (out, artifact, folder):
        command.add_argument(
            "--which",
            choices=features.NETWORKS,
            help="network to export (default: the teacher, or the student if the method has no teacher)",
        )
    for command in (out, dictionary, own, artifact, folder):
        command.add_argument("--run", required=True, type=paths.local, help="run folder (the --workdir of the training)"
                             + ", or a folder exported for timm" * (command in (artifact, folder)))  # fmt: skip
        command.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")

    theirs = commands.add_parser("import-released", help="import a state dict of the authors' PyTorch code")
    theirs.add_argument(
        "--teacher-only", action="store_true", help="import only the teacher's backbone, without student and heads"
    )
    vit = commands.add_parser(
        "import-timm", help="import a ViT with timm's parameter names: DINO, DINOv2, MAE, supervised"
    )
    method = commands.add_parser(
        "import-official", help="import networks, heads and decoder of a method's official program"
    )
    method.add_argument("--method", required=True, help="the method that trained it, such as dino or mae")
    method.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help="a config field that the file does not say, e.g. mae.decoder.heads=8")  # fmt: skip
    for command in (theirs, vit, method):
        command.add_argument("file", type=paths.local_path, help="NAME.safetensors, or a torch.save file")
        command.add_argument("--output", required=True, type=paths.local_path, help="output run folder")
        config = " config.json beside the file, or" if command is vit else ""
        command.add_argument("--heads", type=int, help=f"number of attention heads (default:{config} width / 64)")
        command.add_argument("--bands", type=_words, help="comma-separated band names (default: red,green,blue)")
        command.add_argument(
            "--mean", type=_numbers, help=f"mean of each band, in [0, 1] (default:{config} ImageNet's)"
        )
        command.add_argument(
            "--std", type=_numbers, help=f"standard deviation of each band, in [0, 1] (default:{config} ImageNet's)"
        )
    for command in commands.choices.values():
        command.add_argument("--no-verify", action="store_true", help="do not check the weights against their digests")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = vars(_parser().parse_args(argv))
    command, output = options.pop("command"), options["output"]
    if command.startswith("import"):
        teacher_only = options.pop("teacher_only", False)
        file = options.pop("file")
        wanted = imports.Options(**{name: options[name] for name in ("heads", "bands", "mean", "std")})
        verify = not options["no_verify"]
        if command == "import-official":
            meta, left_out = official.import_official(
                options["method"], file, output, wanted, options["set"], verify
            )
        elif command == "import-released":
            meta, left_out = imports.import_released(file, output, wanted, teacher_only, verify), []
        else:
            meta, left_out = imports.import_timm(file, output, wanted, verify)
        networks = " and ".join(load.networks_of(meta))
        parts = "backbone only" if load.backbone_alone(meta) else f"{networks}, with all heads"
        print(f"{printable(file)}: {parts}, {_summary(meta, (meta['model']['image_size'],) * 2)}")
        print("\n".join(imports.summary(meta)))
        if left_out:
            print(f"ignored: {several(left_out, 12)}")
    elif command == "timm":
        weights = load.load_weights(
            options["run"], options["step"], options["which"], verify=not options["no_verify"], parts=("backbone",)
        )
        options["which"] = weights.network
        timm.export(weights, options["which"], options["image_size"], output)
        size = options["image_size"] or (weights.meta["model"]["image_size"],) * 2
        print(f"{printable(options['run'])}, {options['which']} at step {weights.step}: {_summary(weights.meta, size)}")
    elif command in ("features", "stablehlo"):
        source = {name: options.pop(name) for name in ("run", "step", "which")}
        weights = features.load_weights(
            source["run"], source["step"], source["which"], verify=not options.pop("no_verify"), parts=("backbone",)
        )
        source["which"] = source["which"] or weights.network
        if command == "stablehlo":
            said = stablehlo.export(weights, options["image_size"], output)
        else:
            reading = folders.Reading(options.pop("follow_links"), options.pop("max_corrupt_fraction"))
            images = open_images(options.pop("input"), options.pop("split"), reading)
            said = feature_folder.write(weights, images, **options)
        print(f"{printable(source['run'])}, {source['which']} at step {weights.step}: {_summary(weights.meta)}\n{said}")
    elif command == "official":
        step = official.export(options["run"], options["step"], output, verify=not options["no_verify"])
        print(f"{printable(options['run'])}, all networks and heads at step {step}")
    else:
        step = released.export(options["run"], options["step"], output, verify=not options["no_verify"])
        sidecar = printable(released.sidecar_path(output).name)
        print(
            f"{printable(options['run'])}, student, teacher and heads at step {step}\nbands, mean and std are in "
            f"{sidecar}"
        )
    print(f"written to {printable(output)}")


def _summary(meta: dict, size: tuple[int, int] | None = None) -> str:
    shape = meta["model"]
    sides = f", for images of {size[0]} x {size[1]} px" if size else ""
    mean, std = (", ".join(f"{value:g}" for value in meta[name]) for name in ("mean", "std"))
    return (
        f"a ViT of width {shape['width']}, depth {shape['depth']}, {shape['heads']} heads, patches of {shape['patch']} "
        f"px{sides}\nbands {several(meta['bands'], 20)}; mean {mean}; std {std}"
    )


if __name__ == "__main__":
    errors.run(main)
