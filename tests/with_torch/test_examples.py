"""The examples in PyTorch, on small exported weights."""

import logging
import pathlib
import re
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run make test-torch")
timm = pytest.importorskip("timm", reason="timm is not installed: run make test-torch")

import labelled_toys  # noqa: E402

from pera_jax import export  # noqa: E402
from pera_jax.bands import Bands  # noqa: E402
from pera_jax.encoder import model as features

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / "examples"))
import finetune  # noqa: E402
import pangaea_encoder  # noqa: E402

torch.set_num_threads(1)  # a network this small gains nothing from more


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return labelled_toys.write_run(tmp_path_factory.mktemp("run"), [(1, 0)])


def exported(run, folder: pathlib.Path) -> str:
    export.main(["timm", "--run", str(run), "--output", str(folder)])
    return str(folder)


FIVE = Bands(
    ("B2", "B3", "B4", "B8", "B11"), "uint16", ((0.0, 3000.0), (100.0, 4000.0), (0.0, 5000.0), (200.0, 2500.0), (0.0,
    1e4)),
    (0.2, 0.3, 0.4, 0.5, 0.6), (0.1, 0.15, 0.2, 0.25, 0.3),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["rgb", "five bands"])
def test_the_pangaea_encoder_gives_the_maps_of_the_jax_network(run, kind, tmp_path):
    run = run if kind == "rgb" else labelled_toys.write_run(tmp_path / "run", [(1, 0)], FIVE)
    model = features.load(run)
    given = {} if kind == "rgb" else {"input_bands": {"s2": list("abcde")}, "output_layers": [0, 3]}
    encoder = pangaea_encoder.PerA(exported(run, tmp_path / "weights"), **given).eval()
    modality, bands = next(iter(encoder.input_bands.items()))
    side, width = model.network.image_size, model.network.width
    assert len(bands) == len(model.bands) and encoder.input_size == side
    assert encoder.output_layers == ([0, 1, 2, 3] if kind == "rgb" else [0, 3])
    assert encoder.output_dim == [width] * len(encoder.output_layers) and not encoder.multi_temporal
    encoder.load_encoder_weights(logging.getLogger())
    high = 256 if model.bands.dtype == "uint8" else 12000
    # [B, T, H, W, C]
    images = np.random.default_rng(0).integers(0, high, (2, 3, side, side, len(bands)), model.bands.dtype)
    wanted = [np.stack([model(images[:, date], blocks=encoder.output_layers).block_maps[block] for date in range(3)],
        axis=1)
              for block in range(len(encoder.output_layers))]  # [B, T, h, w, D] of each block  # fmt: skip
    tensor = torch.from_numpy(images.astype(np.int32)).permute(0, 4, 1, 2, 3)  # [B, C, T, H, W]
    with torch.no_grad():
        for dates in (slice(0, 1), slice(0, 3)):
            for found, maps in zip(encoder({modality: tensor[:, :, dates]}), wanted, strict=True):
                np.testing.assert_allclose(found, maps[:, dates].mean(axis=1).transpose(0, 3, 1, 2), atol=1e-4)
        for found, maps in zip(encoder({modality: tensor[:, :, 0]}), wanted, strict=True):
            np.testing.assert_allclose(found, maps[:, 0].transpose(0, 3, 1, 2), atol=1e-4)


def test_fine_tuning_learns_and_its_weights_load(run, tmp_path, capsys):
    data = labelled_toys.write_folders(tmp_path / "data", {"train": [0, 1, 2] * 20, "test": [0, 1, 2] * 10})
    weights = exported(run, tmp_path / "weights")
    options = ["--epochs", "10", "--batch-size", "10", "--learning-rate", "1e-2", "--workers", "0"]
    finetune.main([weights, str(data), "--output", str(tmp_path / "tuned.pth"), *options])
    said = re.search(r"(\d+) of 30 test images correct", capsys.readouterr().out)
    assert int(said[1]) >= 24  # 10 by chance
    stored = torch.load(tmp_path / "tuned.pth")
    model = timm.create_model(f"local-dir:{weights}", pretrained=True, num_classes=3)
    model.load_state_dict(stored["model"])
    assert stored["classes"] == labelled_toys.CLASSES


def test_examples_refuse_what_they_cannot_use(run, tmp_path):
    weights = exported(run, tmp_path / "weights")
    data = labelled_toys.write_folders(tmp_path / "data", {"train": [0, 1, 2], "test": [0, 1]})
    with pytest.raises(
        SystemExit, match="the class folders of train and test differ in .*; give both the same classes"
    ):
        finetune.main([weights, str(data), "--output", str(tmp_path / "a")])
    config = tmp_path / "weights" / "config.json"
    config.write_text(config.read_text().replace('"red"', '"nir"'))
    with pytest.raises(SystemExit, match="expects uint8 images with the bands nir, green, blue, got RGB files"):
        finetune.main([weights, str(data), "--output", str(tmp_path / "a")])
