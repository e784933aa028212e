"""The report: a complete page from any run folder, and the content of its figures."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import scipy.special
import toy_shards
import toy_states
from PIL import Image

from pera_jax import config as configs
from pera_jax import report
from pera_jax.bands import Bands
from pera_jax.common import errors, html
from pera_jax.data import codecs, records
from pera_jax.data.mixture import Mixture
from pera_jax.encoder import load
from pera_jax.models import vit
from pera_jax.objectives.pera import objective as pera
from pera_jax.objectives.pera import preview
from pera_jax.reports import folder
from pera_jax.reports.drawing import charts, images
from pera_jax.reports.drawing import grid as grids
from pera_jax.reports.sections import confusion, neighbors, overlays, pairs, tokens
from pera_jax.training import step as steps
from pera_jax.training.checkpoints import checkpoint, checkpoint_store, run_meta

EVIL = "<script>alert('1')</script>"
CLASSES = ["fields & woods", EVIL, "town"]
BANDS = ("nir", "red", "green", "blue")
pytestmark = pytest.mark.usefixtures("one_device")


def write_data(folder: pathlib.Path) -> pathlib.Path:
    """A dataset of four bands of uint16, three classes, images of several shapes."""
    splits, width = {}, len(BANDS)
    for name, number in (("train", 20), ("test", 5), ("empty", 0)):
        rng, images = np.random.default_rng(number), []
        for _ in range(number):
            height, columns = rng.integers(50, 90, 2)
            images.append(codecs.encode(rng.integers(500, 4000, (height, columns, width)).astype(np.uint16)))
        facts = {"ranges": [[0.0, 5000.0]] * width, "mean": [0.4] * width, "std": [0.1] * width, "fingerprint": name}
        keys = [f"{EVIL}/{index}.tif" for index in range(number)]
        splits[name] = toy_shards.Split(images, [index % 3 for index in range(number)], keys, facts=facts)
    return toy_shards.write(folder, splits, bands=BANDS, dtype="uint16", class_names=CLASSES)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return write_data(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> pathlib.Path:
    """A run with a checkpoint of step 4, of a network of random numbers; three of the four bands."""
    workdir = tmp_path_factory.mktemp("run")
    config = configs.smoke(configs.default())
    config.data.update(dict(path=str(data), bands=("red", "green", "nir")))
    config.data.rgb = ("nir", "red", "green")
    bands = Bands(("red", "green", "nir"), "uint16", ((0.0, 5000.0),) * 3, (0.4,) * 3, (0.1,) * 3)
    objective = pera.PerA.from_config(config, bands)
    meta = run_meta.describe(config, objective, Mixture.from_source(records.open_split(data, "train"), bands).card())
    store = checkpoint_store.Store(str(workdir), keep_last=5, keep_every=100)
    optimizer = steps.make_optimizer(objective, config.optimizer)
    state = toy_states.random_state(objective, optimizer, seed=77)
    store.save(state.replace(step=jax.numpy.int32(4)), meta, {"batches": 4, "replaced": 0})
    store.close()
    run_meta.write(str(workdir), meta)
    return workdir


def entry(task, encoder, step, value, data, **details):
    """A result of the probe as its job writes it."""
    score = {"value": value, "low": value - 0.05, "high": None if encoder == "pixels" else value + 0.05, "seeds": []}
    return {
        "name": f"{task}_{data['name']}", "task": task, "data": data, "settings": {}, "spec": {"task": task},
        "scores": {task: score},
        "checkpoint": {"run": "r", "step": step, "encoder": encoder, "image_size": 48}, "details": details,
    }  # fmt: skip


def write_results(run: pathlib.Path, folder: pathlib.Path) -> None:
    """Results of three checkpoints, of pixels and the untrained network; scenes of both dense tasks; a failure."""
    small = {"path": "x", "name": "small", "test_images": 12, "class_names": CLASSES}
    confused = [[3, 1, 0], [0, 4, 0], [2, 0, 2]]

    def put(place, value, key=""):
        file = run / "probe" / place / f"{value['name']}{key and '-' + key}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))

    put("pixels", entry("knn", "pixels", 0, 0.25, small))
    put("untrained", entry("knn", "untrained", 0, 0.5, small))
    put("step_000002", entry("knn", "teacher", 2, 0.625, small))
    put("step_000004", entry("knn", "teacher", 4, 0.75, small, confusion=confused))
    failed = entry("linear", "teacher", 4, 0.0, small) | {"failure": EVIL}
    put("step_000004", {name: value for name, value in failed.items() if name not in ("scores", "details")})
    (run / "probe/step_000004/odd.json").write_text('{"scores": 3}')
    # The same name and task on other images, at another size, with other settings, of another run: rows of their own.
    put("untrained", entry("knn", "untrained", 0, 0.125, small | {"test_fingerprint": "bbbbbbbbbb"}), "data")
    larger = entry("knn", "teacher", 4, 0.875, small)
    put("step_000004", larger | {"checkpoint": larger["checkpoint"] | {"image_size": 96}}, "size")
    put("step_000004", entry("knn", "teacher", 4, 0.375, small) | {"settings": {"temperature": 0.5}}, "settings")
    other = entry("knn", "teacher", 4, 0.999, small)
    put("step_000004", other | {"checkpoint": other["checkpoint"] | {"origin": "../../other", "run": EVIL}}, "run")
    rng = np.random.default_rng(0)
    for task, kinds in (("segmentation", ["image"]), ("change", ["A", "B"])):
        for kind in [*kinds, "label"]:
            (folder / task / "test" / kind).mkdir(parents=True)
            place = folder / task / "test" / kind
            if kind == "label":
                mask = rng.integers(0, 2, (30, 40)) if task == "segmentation" else 255 * np.eye(30, 40)
                Image.fromarray(mask.astype(np.uint8)).save(place / "key.png")
            else:
                (place / "key.tif").write_bytes(codecs.encode_tiff(rng.integers(0, 5000, (30, 40, 3), np.uint16)))
        scenes = {"path": str(folder / task), "name": "s", "test_split": "test", "class_names": CLASSES[:2]}
        put("step_000004", entry(task, "teacher", 4, 0.5, scenes, confusion=[[6, 2], [1, 3]]))
        (run / f"probe/step_000004/{task}_s").mkdir()
        Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(run / f"probe/step_000004/{task}_s/key.png")


def sections_of(text: str) -> list[str]:
    return re.findall(r'<section id="(\w+)">', text)


def check_whole(text: str) -> None:
    """The page loads nothing, runs nothing, and forbids both."""
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert "<script" not in text and "://" not in text and "@import" not in text and "url(" not in text
    assert not re.search(r'\b(src|href)="(?!data:image/(png|jpeg);base64,|#)', text)
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in text


def test_the_page_of_a_run_with_everything(run, tmp_path, capsys):
    run = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    write_results(run, tmp_path)
    lines = [{"step": s, "loss": 5.0 / s, "norm/gradient": 10.0**-s, EVIL: 1.0, "time/images_per_second": 50.0,
              "time/images_per_second_per_chip": 25.0, "monitor/knn20": 0.1 * s} for s in (1, 2, 3, 4)]  # fmt: skip
    lines[1]["loss"] = "nan"
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    (run / "alarms.jsonl").write_text(json.dumps({"step": 3, "alarm": "collapse", "text": EVIL}) + "\n")
    (run / "FINISHED").write_text("4\n")
    output = tmp_path / "new" / "report"
    report.main(["--run", str(run), "--output", str(output), "--images", "3", "--pairs", "9"])  # 5 images are there
    assert str(output / "index.html") in capsys.readouterr().out
    text = (output / "index.html").read_text(encoding="utf-8")
    check_whole(text)
    assert sections_of(text) == ["scores", "steps", "pairs", "tokens", "attention", "neighbors", "classes", "scenes",
                                 "curves", "config"]  # fmt: skip
    pictures = ["pairs", "tokens", "attention", "neighbors", "scenes_segmentation_s", "scenes_change_s"]
    assert {path.name for path in output.iterdir()} == {"index.html", *(f"{name}.png" for name in pictures)}
    for said in (
        "finished at step 4", "1 training alarm", "step 3, collapse: &lt;script&gt;", "0.750 (0.700 – 0.800)",
        "<td>0.250</td>", "Skipped: results of other runs in",
        "knn_small (small, 12 images, 48 px, no temperature, fingerprints None and None): knn",
        "linear_small of step 4 failed: &lt;script&gt;", "odd.json is not a probe result",
        "trained, step 4", "small, 12 images, 48 px", "fields &amp; woods", "Searched: 20 of 20 images of the split",
        "resized to 256 x 256 px: 32 x 32 patches", "kNN accuracy in training", "first date", "nir",
    ):  # fmt: skip
        assert said in text, said
    table = re.search(r'<section id="scores">.*?</table>', text, re.S)[0]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    assert (
        sorted(row[2:] for row in cells if row[:2] == ["knn", "knn_small"])
        == sorted(
            [
                [
                    "0.250",
                    "0.500 (0.450 – 0.550)",
                    "0.750 (0.700 – 0.800)",
                    "small, 12 images, 48 px, no temperature, fingerprints None and None",
                ],
                ["", "", "0.375 (0.325 – 0.425)", "small, 12 images, 48 px, temperature=0.5"],
                ["", "", "0.875 (0.825 – 0.925)", "small, 12 images, 96 px, no temperature"],
                [
                    "",
                    "0.125 (0.075 – 0.175)",
                    "",
                    "small, 12 images, 48 px, no temperature, fingerprints None and bbbbbbbb",
                ],
            ]
        )
        and "0.999" not in table
    )
    for bound in re.findall(r"[MLHV ](-?\d+\.\d|nan|inf)", " ".join(re.findall(r' d="([^"]*)"', text))):
        assert -1 <= float(bound) <= 300  # no line leaves its chart, and none is drawn through what is not finite
    # What is asked for anew takes the place of what was there, but of nothing else.
    shutil.rmtree(run / "checkpoints")  # this time without what needs a network
    (output / "scenes_change_s.png").rename(output / "kept")
    (output / "scenes_change_s.png").write_bytes(b"mine")
    with pytest.raises(errors.UserError, match="scenes_change_s.png already exists and was not written by"):
        report.main(["--run", str(run), "--output", str(output)])
    assert (output / "scenes_change_s.png").read_bytes() == b"mine"
    assert (output / "index.html").read_text(encoding="utf-8") == text
    (output / "kept").rename(output / "scenes_change_s.png")
    report.main(["--run", str(run), "--output", str(output)])
    text = (output / "index.html").read_text(encoding="utf-8")
    assert sections_of(text)[0] == "scores" and "the run has no complete checkpoint yet" in text


def test_the_page_of_a_run_that_has_just_begun(run, tmp_path, capsys):
    young = tmp_path / "young"
    young.mkdir()
    meta = json.loads((run / "config.json").read_text())
    meta["config"]["data"]["path"], meta["config"]["name"] = "gone", EVIL
    (young / "config.json").write_text(json.dumps(meta))
    report.main(["--run", str(young), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out/index.html").read_text()
    check_whole(text)
    assert sections_of(text) == ["config", "missing"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]
    for title, why in (
        ("Scores", "the run has not been probed yet"), ("Pairs", "the run has no complete checkpoint yet"),
        ("Nearest neighbors", "the run has no complete"), ("Training", "no metrics.jsonl"),
        ("Classes", "no probe result"),
    ):  # fmt: skip
        assert re.search(rf"<td>{title}</td><td class=\"text\">[^<]*{why}", text), title
    assert "not finished: step 0 is the last logged step" in text


def test_images_that_the_run_was_not_trained_on_are_told_and_damage_is_passed_only_if_asked(
    run, data, tmp_path, capsys
):
    changed = pathlib.Path(shutil.copytree(data, tmp_path / "data"))
    info = json.loads((changed / "info.json").read_text())
    info["splits"]["train"]["fingerprint"] = "made anew"
    (changed / "info.json").write_text(json.dumps(info))
    work = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    arrays = max((work / "checkpoints/4/teacher").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    command = ["--run", str(work), "--data", str(changed), "--output", str(tmp_path / "out")]
    command += ["--images", "3", "--pairs", "5"]  # as many as above: the same programs
    with pytest.raises(errors.UserError, match="its teacher does not match its digests"):
        report.main(command)
    report.main([*command, "--split", "train", "--no-verify"])
    told = f"The images of {changed} are not the training data of this run: their fingerprint differs."
    text = (tmp_path / "out/index.html").read_text()
    assert told in capsys.readouterr().err.splitlines() and told in text and "Searched: 20 of 20" in text


def test_what_acts_unseen_is_spelled_in_a_page():
    assert html.escaped("a\u202eb\x1b[31m<i>\n\u2066é") == "a\\u202eb\\x1b[31m&lt;i&gt;\n\\u2066é"


def test_broken_lines_doubled_steps_and_results_of_a_checkpoint_that_was_saved_anew_are_told(run, tmp_path):
    work = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in ((1, 5), (2, 4), (2, 3), (3, 2), (4, 1))]
    lines.insert(1, lines[1][:-4])
    (work / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')  # the last one is being written
    shutil.rmtree(work / "probe", ignore_errors=True)
    saved = checkpoint.identity(work / "checkpoints/4")
    for name, of in (("knn", saved), ("linear", "another")):
        of = {"run": "r", "origin": "..", "step": 4, "encoder": "teacher", "saved": of}
        entry = {
            "name": name,
            "task": name,
            "checkpoint": of,
            "data": {"path": "d"},
            "spec": {"task": name},
            "scores": {},
        }
        (work / "probe/step_000004").mkdir(parents=True, exist_ok=True)
        (work / f"probe/step_000004/{name}.json").write_text(json.dumps(entry))
    found = folder.read(str(work), None)
    assert [(line["step"], line["loss"]) for line in found.metrics] == [(1, 5), (2, 3), (3, 2), (4, 1)]
    assert [entry["name"] for entry in found.results] == ["knn"]
    told = " ".join(found.faults)
    for text in (
        "linear.json is a result of an earlier checkpoint of step 4",
        "invalid JSON in line 2.",
        "has 1 duplicate step(s)",
    ):
        assert text in told
    assert len(found.faults) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--run", "{tmp}/nothing"], "nothing does not exist"),
        (["--run", "{tmp}"], "is not a run folder: it has neither a checkpoint nor config.json"),
        (["--run", "{odd}"], "config.json is not the config of a run"),
        (["--step", "5"], "has no checkpoint of step 5; choose one of 4"),
        (["--data", "{tmp}/nothing"], "nothing does not exist"),
        (["--split", "val"], "has no split 'val'; it has empty, test, train"),
        (["--split", "empty"], "the split 'empty' of .* has no images"),
        (["--image-size", "50"], "image size 50 is not a multiple of the checkpoint's patch size 8 px"),
        (["--images", "0"], "--images is 0; it must be >= 1"),
        (["--pairs", "0"], "--pairs is 0; it must be >= 1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--output", "{tmp}/file"], "cannot write to .*file: it is a file"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, run, data, capsys, arguments, sentence):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"config": []}')
    places = {"tmp": tmp_path, "odd": tmp_path / "odd"}
    command = ["--run", str(run), "--data", str(data), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: report.main([*command, *(part.format(**places) for part in arguments)]))
    assert ended.value.code == 1
    assert re.match(f"error: .*{sentence}", capsys.readouterr().err.splitlines()[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "odd"]
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- what the pictures show


def test_pairs_show_disjoint_patches_and_the_guess(run, data):
    networks = {"student": load.load_weights(run, which="student")}
    found = pairs.preview(networks, records.open_split(data, "train"), 3, seed=0)
    columns, explained = found.columns, int(re.search(r"explains (-?\d+)%", found.caption)[1]) / 100
    assert list(columns) == list(preview.COLUMNS)
    assert all(tiles.shape == (3, 48, 48, 3) and tiles.dtype == np.uint8 for tiles in columns.values())
    assert explained < 0.2  # a network at birth guesses no better than the mean color

    def shown(name):  # [pairs, rows, columns of patches]: whether a patch holds anything but the color of hidden ones
        patches = columns[name].reshape(3, 6, 8, 6, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        return np.any(patches != preview.HIDDEN, axis=(3, 4, 5))

    student, teacher, wanted = shown("student sees"), shown("teacher sees"), shown("to be guessed")
    assert (student.sum(axis=(1, 2)) == 7).all() and (wanted.sum(axis=(1, 2)) == 14).all()
    np.testing.assert_array_equal(wanted, ~teacher)
    assert (student <= wanted).all()
    same = np.repeat(np.repeat(student, 8, axis=1), 8, axis=2)
    np.testing.assert_array_equal(columns["the guess"][same], columns["to be guessed"][same])
    different = columns["the guess"] != columns["to be guessed"]
    np.testing.assert_array_equal(np.any(different.reshape(3, 6, 8, 6, 8, 3), axis=(2, 4, 5)), wanted & ~student)


def plain_attention(params, heads: int, image: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """A forward pass in NumPy: (the class token's attention in the last block [H, N], tokens after the norm [N, D])."""

    def dense(x, layer, axes=1):
        return np.tensordot(x, layer["kernel"], axes) + layer["bias"]

    def norm(x, layer):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]

    side = len(image) // patch
    patches = np.stack([
        image[patch * row : patch * (row + 1), patch * column : patch * (column + 1)].ravel()
        for row in range(side) for column in range(side)
    ])  # fmt: skip
    x = np.concatenate([params["class_token"][None], dense(patches, params["patch_projection"])])
    x = x + params["position_embedding"]
    for stack in ("lower", "upper"):
        for depth in range(len(params[stack]["norm_1"]["scale"])):
            block = jax.tree.map(lambda leaf: leaf[depth], params[stack])  # noqa: B023
            qkv = dense(norm(x, block["norm_1"]), block["attention"]["qkv"])  # [N, 3, H, E]
            query, key, value = np.moveaxis(qkv, 1, 0)
            scores = np.einsum("qhe,khe->hqk", query, key) / np.sqrt(x.shape[1] / heads)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)  # [H, N, N]
            mixed = np.einsum("hqk,khe->qhe", weights, value)
            x = x + dense(mixed, block["attention"]["projection"], 2)
            hidden = dense(norm(x, block["norm_2"]), block["mlp"]["in"])
            x = x + dense(hidden * scipy.special.ndtr(hidden), block["mlp"]["out"])
    return weights[:, 0], norm(x, params["norm"])


def test_attention_is_that_of_a_plain_forward_pass(run, data):
    weights, source = load.load_weights(run), records.open_split(data, "test")
    # Tokens of a network at birth are nearly equal, so is their attention: larger weights make it differ.
    backbone = jax.tree.map(lambda leaf: np.float32(4.0 * leaf), weights.backbone)
    bands, size = Bands.from_metadata(weights.meta), weights.meta["model"]["image_size"]
    shown = [images.read(source, bands, index, size).pixels for index in (0, 1)]
    (encoded,) = tokens.encode(weights.meta, [backbone], shown)
    assert encoded.attention.shape == (2, 2, 1 + 36) and encoded.patches.shape == (2, 6, 6, 32)
    np.testing.assert_allclose(encoded.attention.sum(axis=2), 1.0, rtol=1e-6)
    for image, attention, patches in zip(shown, encoded.attention, encoded.patches, strict=True):
        normalized = (image / 5000.0 - 0.4) / 0.1
        wanted, after = plain_attention(jax.tree.map(np.float64, backbone), 2, normalized, 8)
        assert wanted.max() > 2.0 * wanted.min()
        np.testing.assert_allclose(attention, wanted, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(patches.reshape(36, 32), after[1:], rtol=1e-3, atol=1e-3)


def test_asking_for_attention_changes_no_other_output():
    shape = dict(width=16, depth=2, heads=2, patch=4, image_size=8, bands=3, split=1)
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    found, params = {}, jax.jit(vit.build(shape).init)(jax.random.key(0), image)
    for scan in (True, False):
        model = vit.build(shape, scan=scan)
        more = jax.jit(lambda p, x: model.apply(p, x, blocks=2, class_attention=True))(params, image)  # noqa: B023
        less = jax.jit(lambda p, x: model.apply(p, x, blocks=2))(params, image)  # noqa: B023
        attention = found[scan] = more.pop("class_attention")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), more, less)
    np.testing.assert_allclose(found[True], found[False], rtol=1e-5)
    assert attention.shape == (2, 2, 5)


def test_colors_of_tokens_stand_on_shared_axes():
    rng = np.random.default_rng(0)
    mixed = (rng.gamma(1.0, size=(2 * 36, 3)) * (9.0, 4.0, 2.0)) @ rng.normal(size=(3, 24)) + rng.normal(size=24)
    patches = mixed.reshape(2, 6, 6, 24)
    patches[1, :2] = patches[0, 4:]  # the same tokens in another image, elsewhere
    found, shares = tokens.colors(patches)
    assert found.shape == (2, 6, 6, 3) and found.dtype == np.uint8 and found.min() == 0 and found.max() == 255
    np.testing.assert_array_equal(found[1, :2], found[0, 4:])
    centered = patches.reshape(-1, 24) - patches.reshape(-1, 24).mean(axis=0)
    left, singular, _ = np.linalg.svd(centered, full_matrices=False)
    scores, _ = tokens.components(patches.reshape(-1, 24))
    np.testing.assert_allclose(np.abs(scores), np.abs(left[:, :3] * singular[:3]), atol=1e-8)
    np.testing.assert_allclose(shares, singular[:3] ** 2 / np.sum(singular**2))
    # Neither a turned nor a mirrored space of tokens changes a color, nor does the order of the images.
    turned = patches @ np.linalg.qr(rng.normal(size=(24, 24)))[0]
    for other in (turned, -turned):
        assert np.abs(tokens.colors(other)[0].astype(int) - found).max() <= 1
    assert np.abs(tokens.colors(patches[::-1])[0][::-1].astype(int) - found).max() <= 1
    flat, none = tokens.colors(np.ones((1, 4, 4, 8)))  # nothing varies
    assert (flat == flat[0, 0, 0]).all() and (none == 0).all()


def test_neighbors_are_those_of_brute_force():
    rng = np.random.default_rng(1)
    train, queries = rng.normal(size=(40, 8)), rng.normal(size=(6, 8))
    train[7] = 2.0 * train[3]  # an equal cosine; the query itself is left out, its twin is not

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    cosines, places = neighbors.nearest(train, queries, 5)
    every = unit(queries) @ unit(train).T
    np.testing.assert_array_equal(places, np.argsort(-every, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(cosines, -np.sort(-every, axis=1)[:, :5], atol=1e-6)
    own = np.array([3, 7, 20])
    cosines, places = neighbors.nearest(train, train[own], 39, own)
    every = unit(train[own]) @ unit(train).T
    every[np.arange(3), own] = -2.0
    assert [row[0] for row in places[:2]] == [7, 3] and (places != own[:, None]).all()
    np.testing.assert_allclose(cosines, -np.sort(-every, axis=1)[:, :39], atol=1e-6)


def test_images_are_of_many_classes_and_a_subset_reads_its_own(data, monkeypatch):
    labels = np.array([0] * 50 + [1] * 3 + [2] * 2)
    for number, counts in ((2, None), (3, [1, 1, 1]), (8, [3, 3, 2]), (9, [4, 3, 2])):
        chosen = images.choose(labels, number, seed=3)
        assert len(set(chosen)) == number and (np.diff(labels[chosen]) >= 0).all()
        assert counts is None or np.bincount(labels[chosen], minlength=3).tolist() == counts
    source = records.open_split(data, "train")
    picked = images.pick(source, 7, seed=0)
    found = [records.decode_record(source.read(i)).label for i in picked]
    assert found == sorted(found) and np.ptp(np.bincount(found)) == 1
    monkeypatch.setattr(images, "_MOST", 4)
    assert len(set(images.pick(source, 7, seed=0))) == 4
    subset = images.Subset(source, np.array([11, 2, 5]))
    assert [subset.record(i).key for i in range(3)] == [f"{EVIL}/{i}.tif" for i in (11, 2, 5)]


def test_heads_stand_in_rows_and_maps_over_their_image():
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.ones(17), size=(1, 14))
    rgb = np.full((1, 8, 8, 3), 255, np.uint8)
    grid = tokens.attention_grid([images.Shown(rgb[0], "k", -1)], rgb, attention, None)
    assert len(grid.names) == 8 and [len(row) for row in grid.rows] == [8, 8] and grid.rows[1][:2] == (None, None)
    assert [tile.text.split(":")[0] for tile in grid.rows[1][2:]] == [f"head {head}" for head in range(7, 13)]
    tile, values = grid.rows[0][2], attention[0, 0, 1:].reshape(4, 4)
    assert tile.text == f"head 1: max {values.max():.1%}"
    row, column = np.unravel_index(np.argmax(values), (4, 4))
    np.testing.assert_array_equal(tile.pixels[2 * row, 2 * column], tokens.heat(np.ones(())))  # white keeps the color
    darker = tokens.attention_grid([images.Shown(rgb[0], "k", -1)], rgb // 4, attention, None).rows[0][2]
    assert (darker.pixels <= tile.pixels).all() and darker.pixels.sum() < tile.pixels.sum()
    brightness = tokens.heat(np.linspace(0, 1, 50)) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > 0).all()
    assert grids.picture(grid).width > 8 * grid.side and grids.figures(grid).count("<figure>") == 14


# ---------------------------------------------------------------- charts, classes, scenes


def test_smoothing_is_the_weighted_mean():
    values = np.random.default_rng(0).normal(size=50)
    values[[7, 20, 21]] = np.nan, np.inf, np.nan
    for life in (1.0, 4.0):
        found = charts.smoothed(values, life)
        for t in range(50):
            counted = [i for i in range(t + 1) if np.isfinite(values[i])]
            weights = [2.0 ** ((i - t) / life) for i in counted]
            wanted = np.dot(weights, values[counted]) / np.sum(weights) if np.isfinite(values[t]) else values[t]
            np.testing.assert_allclose(found[t], wanted)


def test_few_points_are_drawn_and_no_spike_is_lost():
    rng, steps = np.random.default_rng(0), np.arange(12_345.0)
    values = rng.normal(size=len(steps))
    values[[100, 9_000]] = 50.0, -50.0
    values[2_000:4_000] = np.nan
    x, y = charts.decimated(steps, values)
    assert len(x) <= charts.MAX_POINTS and (np.diff(x) > 0).all()
    assert {50.0, -50.0} <= set(y) and np.isnan(y).any()
    np.testing.assert_array_equal(values[x.astype(int)], y)
    drawn = charts.svg(charts.Chart("t", (charts.Series("a", steps, values, smooth=True),)))
    assert max(len(re.findall("[ML]", path)) for path in re.findall(r' d="([^"]*)"', drawn)) <= charts.MAX_POINTS
    assert "nan" not in drawn
    assert charts.svg(charts.Chart("t", (charts.Series("a", steps[:3], np.full(3, np.nan)),))) == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 4.1), (0.0, 4e-4), (0.985, 1.0), (0, 625_000), (1e9, 1.1e9)])
def test_ticks_are_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 9 and min(found) >= low - 1e-9 * (high - low) and max(found) <= high + 1e-9 * (high - low)
    assert len({charts.number(tick) for tick in found}) == len(found)
    gaps = np.diff(found)
    np.testing.assert_allclose(gaps, gaps[0])
    assert round(gaps[0] / 10.0 ** np.floor(np.log10(gaps[0]) + 1e-9), 6) in (1, 2, 2.5, 5)
    logs = charts.log_ticks(max(low, 1e-9), high)
    assert all(max(low, 1e-9) * 0.99 <= tick <= high * 1.01 for tick in logs)


def test_texts_of_ticks_are_short():
    values = (0.0, 1500.0, 0.0008, 7.5e-4, 2e6, 625_000.0, -0.25, 1.02e9, -1.25e-5, 99_999.0)
    texts = ["0", "1,500", "0.0008", "7.5e-4", "2e6", "6.25e5", "-0.25", "1.02e9", "-1.25e-5", "99,999"]
    assert [charts.number(value) for value in values] == texts


def test_classes_are_counted_by_hand():
    counts = np.array([[3.0, 1, 0], [0, 4, 0], [2, 0, 2]])
    data = {"class_names": CLASSES}
    text = confusion.section({"task": "knn", "details": {"confusion": counts.tolist()}, "data": data})
    check = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in check]
    assert ["town", "fields &amp; woods", "2", "50%"] in cells
    assert ["fields &amp; woods", "4", "0.750", "0.600", "0.667", "0.500"] in cells  # 3 of 4; 3 of 5; 3 of 6 in either
    assert re.findall(r'class="cell \w+">(\d+)<', text) == ["75", "25", "100", "50", "50"]
    for wrong in (None, [[1, 2]], "x", [[1, 2, 3], [1, 2], [3]], [[float("nan")] * 3] * 3, [[-1] * 3] * 3):
        assert confusion.section({"task": "", "details": {"confusion": wrong}, "data": data}) == ""
    for per_class, row in (
        ({"town": 0.25, EVIL: None}, "<td>0.250</td>"),
        ({"town": {"average_precision": 0.5, "images": 1200}}, "<td>0.500</td><td>1,200</td>"),
    ):
        listed = confusion.section({"task": "", "details": {"per_class": per_class}, "data": data})
        assert f"<td>town</td>{row}" in listed and "<script" not in listed
    assert confusion.section({"task": "", "details": {"per_class": [1]}, "data": data}) == ""


def test_scenes_show_where_the_prediction_is_wrong(tmp_path):
    truth = np.array([[0, 1, 255], [1, 1, 0]], np.uint8)
    predicted = np.array([[0, 0, 1], [1, 0, 0]], np.uint8)
    for kind, content in (("label", truth), ("image", np.full((2, 3, 3), 90, np.uint8))):
        (tmp_path / kind).mkdir()
        Image.fromarray(content).save(tmp_path / kind / "7.png")
    (tmp_path / "probe").mkdir()
    Image.fromarray(predicted).save(tmp_path / "probe/7.png")
    result = {"task": "segmentation", "file": tmp_path / "probe.json",
              "data": {"path": str(tmp_path), "test_split": "", "class_names": ["no", "yes"]}}  # fmt: skip
    (tmp_path / "image/7.jgw").write_text("no image, though its name comes first")
    (tmp_path / "image/7.png").rename(tmp_path / "image/7.tif")
    grid, remarks = overlays.grid(result, Bands.plain(), ())
    assert remarks == [] and grid.names == ("image", "truth", "prediction", "errors")
    image, true, guess, wrong = (tile.pixels.astype(int) for tile in grid.rows[0])
    colors = np.array(overlays.colors_of(2))
    assert (image == 90).all()
    np.testing.assert_array_equal(guess, colors[predicted])
    np.testing.assert_array_equal(true[truth != 255], colors[truth[truth != 255]])
    np.testing.assert_array_equal(wrong[..., 0] > wrong[..., 1] + 50, (truth != predicted) & (truth != 255))
    (tmp_path / "label/7.png").write_bytes(b"no mask")
    grid, remarks = overlays.grid(result, Bands.plain(), ())
    assert grid is None and len(remarks) == 1 and "7.png is not shown" in remarks[0]
    (tmp_path / "label/7.png").unlink()
    grid, remarks = overlays.grid(result, Bands.plain(), ())
    assert grid is None and len(remarks) == 1 and "The scenes are not shown: " in remarks[0]
    assert len(set(overlays.colors_of(45))) == 45
