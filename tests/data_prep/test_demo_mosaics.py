"""The demo's mosaics: masks match the fields, pairs differ where their mask says, and the probes can read them."""

import numpy as np
import pytest
from PIL import Image

from data_prep import demo_mosaics
from pera_jax.bands import Bands
from pera_jax.common.errors import UserError
from pera_jax.data.labelled import scenes


def test_pairs_change_where_the_mask_says():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        fields = demo_mosaics.layout(rng)
        assert fields.shape == (demo_mosaics.SIZE,) * 2 and len(np.unique(fields)) > 1
        before, after = demo_mosaics.pair(rng, fields, changes=seed % 4 != 3)
        changed = (before != after)[fields]
        assert changed.any() == (seed % 4 != 3)
        assert (after[fields[changed]] == demo_mosaics.BUILT).all() and (
            before[fields[changed]] != demo_mosaics.BUILT
        ).all()


def test_the_probes_read_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_mosaics, "NUMBERS", {"train": 2, "test": 1})
    monkeypatch.setattr(demo_mosaics, "SIZE", 64)
    output = tmp_path / "mosaics"
    for _ in range(2):
        demo_mosaics.main(["--output", str(output)])
    assert "already in" in capsys.readouterr().out
    cover = scenes.load(output / "cover", 1, Bands.plain())
    assert cover.class_names == demo_mosaics.CLASSES and cover.folds == (((0, 1), (2,)),)
    assert cover.scenes[0].images[0].shape == (64, 64, 3) and set(np.unique(cover.scenes[0].mask)) <= set(range(5))
    change = scenes.load(output / "change", 2, Bands.plain())
    assert [len(scene.images) for scene in change.scenes] == [2, 2, 2] and set(np.unique(change.scenes[0].mask)) == {
        0,
        1,
    }
    with (
        Image.open(output / "change/train/A/pair_00.png") as one,
        Image.open(output / "change/train/B/pair_00.png") as other,
    ):
        assert np.mean(np.asarray(one) != np.asarray(other)) > 0.5  # another day, another light
    with pytest.raises(UserError, match="already exists with other content"):
        demo_mosaics.main(["--output", str(output), "--seed", "1"])
