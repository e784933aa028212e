"""Every command and every Python block of the README and of docs/ is run on small data, or parsed by its own parser.

The blocks are run in their order, in one folder that stands for the reader's: what one command writes, a later one
reads. Configs are shrunk as by `:smoke`. A command that this file does not know is a failure.
"""

import argparse
import contextlib
import glob
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
import zipfile
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import toy_commands
import toy_data
import toy_scenes
from absl import flags
from conftest import ROOT
from PIL import Image

import pera_jax
from data_prep.convert import processes
from pera_jax import __main__ as command
from pera_jax import config as configs
from pera_jax import objectives
from pera_jax.config import flags as config_flags
from pera_jax.data import mixture
from pera_jax.objectives.pera import health
from pera_jax.probes.runner import specs

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "data", "pretrain", "evaluate", "weights", "pods", "methods", "cost", "develop"))]  # fmt: skip
LANGUAGES = {"bash", "python", "text"}
# What is not on this machine: commands that name it are parsed and not run.
ELSEWHERE = re.compile(r"eurosat|:4x4|:16x16|/data/|/mnt/|--runner=")
# Workdirs whose trainings are run, from scratch and resumed; of others flags, config, data and objective are checked.
TRAINED = {"runs/aid"}
# Settings of probes, and the report's options, with less to fit.
_DENSE = {
    "window": 48, "stride": 48, "tile": 16, "blocks": (1,), "steps": 4, "batch": 512, "learning_rates": (0.1,),
    "seeds": (0,),
}  # fmt: skip
FEWER = {
    "linear": {"blocks": (1,), "steps": 4, "epochs": 1, "seeds": (0,)},
    "logistic": {"blocks": (1,), "smallest": -6, "largest": -5, "seeds": (0,)},
    "segmentation": _DENSE,
    "change": _DENSE,
}
FEWER_IMAGES = ["--images", "2", "--pairs", "1", "--image-size", "32"]
# Modules that are not installed for the tests; their commands are parsed.
TORCH_ONLY = {("pera_jax.export", "released"), ("pera_jax.export", "import-released")}


class Block(NamedTuple):
    page: pathlib.Path
    line: int
    language: str
    text: str


def blocks(page: pathlib.Path) -> list[Block]:
    """The fenced blocks of a page, without the indentation of a list around them."""
    found, opened = [], None
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = number
        else:
            text = textwrap.dedent("\n".join(lines[opened : number - 1]))
            found.append(Block(page, opened, lines[opened - 1].strip().removeprefix("```"), text))
            opened = None
    assert opened is None, f"{page.name}:{opened} opens a block that nothing closes"
    return found


def commands() -> Iterator:
    """Each shell command once, with the place where it stands first."""
    seen = set()
    for page in PAGES:
        for block in blocks(page):
            if block.language != "bash":
                continue
            number = block.line
            for line in re.split(r"(?<!\\)\n", block.text):
                number += 1
                words = shlex.split(line.replace("\\\n", " "), comments=True)
                if words and tuple(words) not in seen:
                    seen.add(tuple(words))
                    yield pytest.param(words, id=f"{page.name}:{number}")
                number += line.count("\n")


def python_blocks() -> Iterator:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                yield pytest.param(block, id=f"{page.name}:{block.line}")


# ---------------------------------------------------------------- the reader's folder


def picture(path: pathlib.Path, seed: int, label: int = 0, side: int = 48) -> None:
    pixels = np.random.default_rng(seed).integers(60, 120, (side, side, 3), np.uint8)
    pixels[:: 4 + 4 * label] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mask(path: pathlib.Path, seed: int, values: tuple[int, ...], side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).choice(values, (side // 8, side // 8)).astype(np.uint8)
    coarse.flat[: len(values)] = values
    Image.fromarray(np.kron(coarse, np.ones((8, 8), np.uint8))).save(path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The folder in which the commands run, with the inputs that the pages speak of."""
    here = tmp_path_factory.mktemp("reader")
    for name in ("configs", "tests", "benchmarks", "examples", "launch"):
        (here / name).symlink_to(ROOT / name)
    for split, number in (("train", 10), ("test", 6)):
        for label, name in enumerate(("airport", "beach", "forest")):
            for index in range(number):
                picture(
                    here / "aid" / split / name / f"{index}.jpg", 100 * label + index + (split == "test") * 50, label
                )
    with zipfile.ZipFile(here / "aid_test.zip", "w") as archive:
        for file in (here / "aid" / "test").rglob("*.jpg"):
            archive.write(file, file.relative_to(here / "aid" / "test"))
    for seed in (0, 1):
        toy_scenes.write(here / "scenes" / f"naip_{seed}.tif", toy_scenes.values((4, 160, 160), "uint8", seed))
    toy_data.write(here / "shards" / "sentinel2", 16, bands=("B2", "B3", "B4", "B8"), dtype="uint16")
    for folder in (here / "zurich_summer", here / "data" / "zurich_summer"):
        for index in range(2):
            picture(folder / "image" / f"{index}.png", index)
            mask(folder / "label" / f"{index}.png", index, tuple(range(8)))
    for folder in (here / "levir_cd", here / "data" / "levir_cd"):
        for index in range(5):
            picture(folder / "A" / f"{index}.png", index)
            picture(folder / "B" / f"{index}.png", 9 + index)
            mask(folder / "label" / f"{index}.png", index, (0, 255))
    return here


@pytest.fixture
def here(workspace, monkeypatch, one_device):
    """One device, no processes for conversions, less to fit for probes: the same code with less to wait for."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(processes, "run", toy_commands.in_this_process)
    for task, changes in FEWER.items():
        for name, value in changes.items():
            monkeypatch.setitem(specs.TASKS[task].SETTINGS, name, value)
    return workspace


# ---------------------------------------------------------------- how a command is run


class Parsed(Exception):
    """The command's own parser has taken its arguments."""


@contextlib.contextmanager
def only_parsed():
    """Commands end where their parser has taken all arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(*arguments, **named):
        parse(*arguments, **named)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args), pytest.raises(Parsed):
        yield


def loaded(file: str) -> types.ModuleType:
    """A script of the checkout as a module, as if PyTorch and timm were there."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    names = ["torch", "torch.utils", "torch.utils.data", "torchvision", "torchvision.transforms", "timm", "timm.optim"]
    absent = {name: mock.MagicMock() for name in names if importlib.util.find_spec(name.split(".")[0]) is None}
    with mock.patch.dict(sys.modules, absent), mock.patch.object(sys, "path", [str((ROOT / file).parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


def small(config):
    """The config as by `:smoke`, and shorter; of an earlier run only shorter."""
    if not config.name.endswith("_smoke"):
        configs.smoke(config)
    config.model.update(dict(width=16, depth=4, remat="none"))
    config.precision, config.batch_size, config.data.workers = "float32", 8, 0
    config.crops.update(dict(global_size=32, local_size=16, global_number=1, local_number=0))
    config.checkpoint.keep_last = 1
    return config


def run_train(arguments: list[str], only_parse: bool) -> None:
    """Up to the checks of its config, up to its objective, or to its end: see `ELSEWHERE` and `TRAINED`."""
    given, argv = flags.FlagValues(), ["pera-jax train", *arguments]
    pera_jax.train.define_flags(given)
    with mock.patch.object(flags, "FLAGS", given), mock.patch.object(sys, "argv", argv):  # which ml_collections reads
        assert config_flags.parse(list(argv)) == argv[:1]
    assert given.workdir and given.config.data.path
    configs.check(given.config, 1, 1, 1)
    if only_parse:
        return
    if given.workdir not in TRAINED:
        objectives.from_config(given.config, mixture.open_mixture(given.config.data).bands)
        return
    config = small(given.config)
    config.total = "3 steps" if given.allow_config_change else "2 steps"
    pera_jax.train(config, given.workdir, given.profile, allow_config_change=given.allow_config_change)
    assert (pathlib.Path(given.workdir) / "FINISHED").is_file()


def run_pera_jax(words: list[str]) -> None:
    (module, *first), _ = command.COMMANDS[words[0]]
    arguments = [*first, *words[1:]]
    elsewhere = any(ELSEWHERE.search(word) for word in arguments) or (module, arguments[0]) in TORCH_ONLY
    if module == "pera_jax.train":
        run_train(arguments, elsewhere)
        return
    if module == "pera_jax.report":
        arguments += FEWER_IMAGES
    if module == "pera_jax.probe":
        arguments = ["32" if before == "--image-size" else word for before, word in zip(["", *arguments], arguments)]
    module = importlib.import_module(module)
    with only_parsed() if elsewhere else contextlib.nullcontext():
        module.main(arguments)


def run_python(words: list[str]) -> None:
    file, arguments = words[0], words[1:]
    if words[:2] == ["-m", "pytest"]:
        paths = [word for word in words[2:] if not word.startswith("-")]
        assert paths and all((ROOT / path).exists() for path in paths)
    elif file == "tests/check_reference.py":  # tests/objectives/test_reference.py runs it
        assert arguments and all((ROOT / each).is_file() for each in arguments)
    else:
        main = loaded(file).main
        with mock.patch.object(sys, "argv", [file, *arguments]), only_parsed():
            main()
        for name, value in zip(arguments, arguments[1:]):
            if name == "--config":
                configs.load(value)


def run_make(words: list[str]) -> None:
    for target in words:
        shown = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0 and shown.stdout, shown.stderr


def run_pip(words: list[str]) -> None:
    assert words == ["install", "."] and (ROOT / "pyproject.toml").is_file()  # tests/api/test_installed.py does it


def run_script(words: list[str]) -> None:
    """A script of the shell: it parses, and its first arguments are those that it takes."""
    script = ROOT / words[0]
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0 and os.access(script, os.X_OK)
    for word in words[1:]:
        if word.startswith("configs/"):
            configs.load(word)
    usage = re.search(r"usage: [^}]*?" + re.escape(words[0]) + r"((?: [A-Z]+)*)", script.read_text())
    assert len(words) - 1 == (len(usage[1].split()) if usage else 0)


def run_docker(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["build"])
    parser.add_argument("context", choices=["."])
    parser.add_argument("-f", required=True)
    parser.add_argument("-t", required=True)
    parser.add_argument("--build-arg", action="append", default=[])
    given = parser.parse_args(words)
    text = (ROOT / given.f).read_text()
    for argument in given.build_arg:
        assert f"\nARG {argument.split('=')[0]}=" in text


def run_sha256sum(words: list[str]) -> None:
    assert subprocess.run(["sha256sum", *words], capture_output=True).returncode == 0


RUNNERS = {
    "pera-jax": run_pera_jax, "python": run_python, ".venv/bin/python": run_python, "make": run_make, "pip": run_pip,
    "docker": run_docker, "sha256sum": run_sha256sum, "sbatch": run_script,
}  # fmt: skip


@pytest.mark.parametrize("words", list(commands()))
def test_command(words, here):
    if words[0].endswith(".sh"):
        run_script(words)
    else:
        assert words[0] in RUNNERS, f"{shlex.join(words)} is a command that this test cannot run"
        RUNNERS[words[0]]([file for word in words[1:] for file in sorted(glob.glob(word)) or [word]])
    if not (here / "vit").exists() and (here / "exported" / "aid").exists():
        # weights under timm's names, for the page that imports some
        shutil.copytree(here / "exported" / "aid", here / "vit")


@pytest.mark.parametrize("block", list(python_blocks()))
def test_python(block, here):
    """After the commands, whose runs and exports they load."""
    code = compile(block.text, f"{block.page.name}:{block.line}", "exec")
    if any(importlib.util.find_spec(name) is None for name in re.findall(r"^(?:import|from) (\w+)", block.text, re.M)):
        pytest.skip("a package that it imports is not installed; it is compiled only")
    train, probe = pera_jax.train.train, pera_jax.probe.probe

    def short(config, workdir, *, data, changes=()):
        train(small(configs.load(config)), workdir, data=data, changes=dict(changes) | {"total": "3 steps"})

    def few(run, tasks, **options):
        return probe(run, tasks, **options | ({"image_size": 32} if "image_size" in options else {}))

    names = {"images": np.zeros((2, 128, 128, 3), np.uint8), "image": np.zeros((150, 150, 3), np.uint8)}
    with mock.patch.multiple(pera_jax, train=short, probe=few, create=True):
        exec(code, names)
    if "get_config" in names:
        configs.check(names["get_config"]("smoke"), 1, 1, 1)


# ---------------------------------------------------------------- the pages themselves


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_command_stands_outside_a_block_and_links_lead_somewhere(page):
    outside = re.sub(r"(?ms)^\s*```.*?^\s*```", "", page.read_text())
    assert not re.search(r"(?m)^\s*(\$ |python |make |pera-jax |pip |sbatch |docker )", outside)
    assert {block.language for block in blocks(page)} <= LANGUAGES
    for target in re.findall(r"\]\(([^)#]*(?:#[^)]*)?)\)", outside):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = page if not path else page.parent / path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


def test_the_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {page.name for page in PAGES[2:]}
    assert all(f"(docs/{page.name})" in text for page in PAGES[2:])


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        for name in re.findall(
            r"`((?:pera_jax|data_prep|configs|tests|examples|benchmarks|launch)/[\w/.]+)`", page.read_text()
        ):
            assert (ROOT / name).exists() or name.endswith("toy_mae.py") and "objectives" in name, (
                f"{page.name}: {name}"
            )


def fields_of(fields, prefix=""):
    """Names and shown defaults; fields that several views have are one, with the value of each view or of all."""
    rows = {}
    for name, value in fields.items():
        if name == "views" and all(isinstance(view, dict) for view in value.values()):
            for field in next(iter(value.values())):
                shown = [shown_value(view[field]) for view in value.values()]
                rows[f"views.VIEW.{field}"] = ", ".join(shown) if len(set(shown)) > 1 else shown[0]
        elif isinstance(value, dict):
            rows |= fields_of(value, f"{prefix}{name}.")
        else:
            rows[f"{prefix}{name}"] = shown_value(value)
    return rows


def shown_value(value):
    return json.dumps(value) if isinstance(value, str) else repr(value)


SECTIONS = dict(re.findall(
    r"(?ms)^### Fields of `config\.(\w+)`\n(.*?)^\w", (ROOT / "docs" / "methods.md").read_text()
))  # fmt: skip


@pytest.mark.parametrize("method", SECTIONS)
def test_every_field_of_a_method_is_listed_with_its_default(method):
    rows = re.findall(r"(?m)^\| `([A-Za-z_0-9.]+)` \| ([^|]+?) \|", SECTIONS[method])
    assert dict(rows) == fields_of(objectives.default_config(method).to_dict())


def test_alarms_are_listed_with_their_bounds():
    text = (ROOT / "docs" / "pretrain.md").read_text()
    rows = re.findall(r"(?m)^\| ([a-z ]+) \| [^|]* \| ([\d.]+) \| ([\d.]+) \|$", text)
    assert [(name, float(begins), float(ends)) for name, begins, ends in rows] == [
        (each.name, each.begins, each.ends) for each in health.CONDITIONS
    ]
    values = dict(effective=2.6, prototypes=256, kl_to_uniform=4.58, log_k=5.55, entropy_nats=0.27)
    assert health.CONDITIONS[0].text.format(**values) in " ".join(text.split())
