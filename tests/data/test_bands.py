"""Bands and mixtures of datasets: valid and invalid configs, and the stream of batches from several datasets."""

import json
import os
import pathlib

import numpy as np
import pytest
import toy_data

from data_prep import scenes
from pera_jax import config as configs
from pera_jax import train
from pera_jax.common.errors import UserError
from pera_jax.data import codecs, mixture, pipeline, records, statistics
from pera_jax.data.labelled import samples
from pera_jax.encoder import extract as features
from pera_jax.encoder import load

GEOTIFFS = pathlib.Path(
    os.environ.get("PERA_JAX_GEOTIFFS", pathlib.Path(__file__).parents[3] / "shared/data/geotiff")
)
NAMES = tuple(f"B{i:02d}" for i in range(1, 14))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return {
        "rgb": toy_data.write(root / "rgb", images=40),
        "more": toy_data.write(root / "more", images=20, undecodable=(3,), fingerprint="more"),
        "four": toy_data.write(root / "four", bands=("red", "green", "blue", "infrared")),
        "deep": toy_data.write(root / "deep", bands=NAMES, dtype="uint16"),
        "other": toy_data.write(root / "other", images=30, bands=NAMES[::-1], dtype="uint16"),
        "float": toy_data.write(root / "float", bands=NAMES, dtype="float32"),
    }


def settings(folders, *names, method="pera", **changes):
    config = configs.smoke(configs.default(method))
    config.data.path = ",".join(folders[name] for name in names)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def test_chosen_bands_come_in_their_order_with_statistics_of_their_ranges(folders):
    config = settings(folders, "deep", data__normalize="dataset", data__bands=("B08", "B02"), data__ranges=((0, 2000),))
    data = mixture.open_mixture(config.data)
    source = data.sources[0]
    stack = np.stack([codecs.decode_image(records.decode_record(source.read(i)).image) for i in range(48)])
    wanted = stack[..., [7, 1]]
    mapped = np.clip(wanted / 2000.0, 0, 1)
    np.testing.assert_allclose(data.bands.mean, mapped.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(data.bands.std, mapped.std(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(data.bands.mapped(wanted), mapped, atol=1e-6)
    config.crops.update(dict(global_size=32, global_area=(1.0, 1.0), local_number=0, flip=0.0))
    batch = next(pipeline.make_pipeline(data, toy_data.crops(config.crops), batch_size=8, seed=1))
    assert batch["global"].dtype == np.uint16 and batch["global"].shape == (8, 2, 32, 32, 2)
    level = wanted.mean(axis=(1, 2))[batch["index"]]
    np.testing.assert_allclose(batch["global"].mean(axis=(1, 2, 3)), level, rtol=0.05)  # these bands, of these records
    plain = mixture.choose_bands(settings(folders, "deep", data__normalize="dataset").data, data.sources, (1.0,))
    assert plain.names == NAMES and plain.ranges == tuple(map(tuple, source.split_info.ranges))


REFUSED = {
    "has no band 'B99'; it has B01": (["deep"], {"data__bands": ("B99",)}),
    "names a band twice": (["deep"], {"data__bands": ("B01", "B01")}),
    "data.normalize=imagenet requires the bands red, green, blue": (["four"], {}),
    "must be one \\(low, high\\) for all bands": (["deep"], {"data__ranges": ((0, 1),) * 2}),
    "with low < high": (["deep"], {"data__ranges": ((5, 5),)}),
    "set data.ranges to the range that maps": (["deep", "other"], {"data__normalize": "dataset"}),
    "expected uint16 values in": (["deep", "float"], {"data__ranges": ((0, 9000),)}),
    "has no band 'infrared'": (["four", "rgb"], {}),
    "names a dataset twice": (["rgb", "rgb"], {}),
    "is constant within its range": (["deep"], {"data__normalize": "dataset", "data__ranges": ((6000, 7000),)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_one_sentence(folders, message):
    names, changes = REFUSED[message]
    with pytest.raises(UserError, match=message):
        mixture.open_mixture(settings(folders, *names, **changes).data)


def test_a_mixture_draws_by_weight_and_resumes_anywhere_with_any_workers(folders):
    config = settings(folders, "rgb", "more", data__weights=(3.0, 1.0))
    data = mixture.open_mixture(config.data)
    assert data.shares == (0.75, 0.25) and data.names() == ["rgb", "more"]

    def take(number, start=0, workers=0, rows=None):
        stream = pipeline.make_pipeline(
            data, toy_data.crops(config.crops), batch_size=12, seed=3, start_batch=start, workers=workers, rows=rows
        )
        batches = [{name: value.copy() for name, value in next(stream).items()} for _ in range(number)]
        stream.close()
        return batches

    whole = take(20)
    drawn = {name: np.concatenate([batch[name] for batch in whole]) for name in ("set", "index", "replaced")}
    assert np.bincount(drawn["set"]).tolist() == [180, 60]
    for place, count in ((0, 40), (1, 20)):  # each dataset has whole epochs of its own
        turns = drawn["index"][drawn["set"] == place]
        for first in range(0, len(turns) - count + 1, count):
            assert sorted(turns[first : first + count]) == list(range(count))
    np.testing.assert_array_equal(drawn["replaced"], (drawn["set"] == 1) & (drawn["index"] == 3))
    for part in (take(5, start=8), take(5, start=8, workers=2)):
        for got, wanted in zip(part, whole[8:13], strict=True):
            assert all((got[name] == wanted[name]).all() for name in wanted)
    for got, wanted in zip(take(5, start=8, rows=range(6, 12)), whole[8:13], strict=True):
        assert all((got[name] == wanted[name][6:]).all() for name in wanted)


def sentinel(tmp_path) -> str:
    """Tiles of a scene of 13 bands of uint16: the real one where it is at hand, else one of noise."""
    rasterio = pytest.importorskip("rasterio")
    scene = GEOTIFFS / "sentinel2_13band_uint16.tif"
    if not scene.is_file():
        scene = tmp_path / "scene.tif"
        pixels = np.random.default_rng(0).integers(200, 4000, (13, 100, 101), np.uint16)
        place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
        with rasterio.open(scene, "w", "GTiff", 101, 100, 13, dtype="uint16", **place) as file:
            file.write(pixels)
    scenes.main(["--input", str(scene), "--output", str(tmp_path / "sentinel"), "--split", "train", "--tile", "480m",
                 "--stride", "120m", "--band-names", ",".join(NAMES), "--workers", "1"])  # fmt: skip
    return str(tmp_path / "sentinel")


def test_thirteen_bands_of_uint16_train_and_their_features_are_extracted(folders, tmp_path, one_device):
    folders = folders | {"deep": sentinel(tmp_path)}
    chosen = {"data__normalize": "dataset", "data__ranges": ((0, 10000),), "data__weights": (1.0, 3.0)}
    colorless = {"pera__views__saturation": 0.0, "pera__views__hue": 0.0}
    workdir = str(tmp_path / "run")
    with pytest.raises(UserError, match="pera.views.student_grayscale=0.1 needs red, green and blue bands"):
        train.train(settings(folders, "deep", "other", **chosen, **colorless), workdir)
    assert not (tmp_path / "run").exists()
    config = settings(folders, "deep", "other", method="toy_mae", **chosen, checkpoint__every="4 steps")
    train.train(config, workdir)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [rows[-1][f"data/drawn/{name}"] for name in ("sentinel", "other")] == [16, 48]
    weights = load.load_weights(workdir)
    assert weights.meta["bands"] == list(NAMES) and weights.meta["ranges"] == [[0.0, 10000.0]] * 13
    extractor = features.Extractor(weights.backbone, weights.meta)

    def extract(name):
        return features.extract(extractor, samples.open_samples(folders[name], "train"), 48, 10)

    found, same = extract("other"), extract("deep")
    assert (len(found.class_tokens), len(same.class_tokens)) == (30, 25)
    assert np.isfinite(found.class_tokens).all() and np.ptp(same.class_tokens[:, -1], axis=0).max() > 1e-3
    with pytest.raises(UserError, match="expected uint16 values in .*, got float32"):
        extract("float")


def test_random_ranges_give_the_statistics_of_the_clipped_values(folders):
    source = records.open_split(folders["float"], "train")
    counts = statistics.load(source.path, "train")
    stack = np.stack([codecs.decode_image(records.decode_record(source.read(i)).image) for i in range(48)])
    rng = np.random.default_rng(0)
    ranges = np.sort(rng.uniform(0, 5000, (13, 2)), axis=1) + [0, 200]
    mapped = np.clip((stack - ranges[:, 0]) / (ranges[:, 1] - ranges[:, 0]), 0, 1)
    mean, std = statistics.moments(counts, "float32", ranges.tolist())
    np.testing.assert_allclose(mean, mapped.mean(axis=(0, 1, 2)), atol=0.01)
    np.testing.assert_allclose(std, mapped.std(axis=(0, 1, 2)), atol=0.01)
