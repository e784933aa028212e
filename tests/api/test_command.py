"""The command `pera-jax`, in this process, and configs by name, by file and by run."""

import importlib.util
import pathlib
import re
import runpy
import sys

import pytest
import toy_data
from conftest import ROOT

from pera_jax import __main__ as command
from pera_jax import config as configs
from pera_jax import plan, train
from pera_jax.common.errors import UserError
from pera_jax.probes.runner import specs
from pera_jax.training.checkpoints import run_meta


def run(monkeypatch, *arguments: str) -> int:
    """The status of `pera-jax ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["pera-jax", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        command.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_every_command_is_a_module_that_can_be_run_and_has_a_line_of_help(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, ((module, *_), about) in command.COMMANDS.items():
        assert f"  {name:12}  {about}" in lines
        text = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
        assert 'if __name__ == "__main__":' in text, module
        assert (f"pera-jax {name}" in text or name == "features") and "python -m" not in text, module
    runnable = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for folder in ("pera_jax", "data_prep")
        for file in (ROOT / folder).glob("*.py")
        if file.stem != "__main__" and "__main__" in file.read_text()
    }
    assert runnable == {module for (module, *_), _ in command.COMMANDS.values()}


def test_the_rest_of_the_line_goes_to_the_module(monkeypatch, capsys, tmp_path):
    data = toy_data.write(tmp_path / "toy")
    monkeypatch.delitem(sys.modules, "data_prep.stats", raising=False)
    assert run(monkeypatch, "stats", str(data), "--split", "train") == 0
    assert "images of uint8" in capsys.readouterr().out
    assert run(monkeypatch, "stats", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no info.json")


def test_first_arguments_of_the_table_stand_first_and_own_modules_are_found(monkeypatch):
    seen = []
    monkeypatch.setattr(
        runpy, "run_module", lambda module, **how: seen.append((module, sys.argv[1:], sys.path[-1], how))
    )
    run(monkeypatch, "features", "--run", "x")
    assert seen == [
        (
            "pera_jax.export",
            ["features", "--run", "x"],
            str(pathlib.Path.cwd()),
            {"run_name": "__main__", "alter_sys": True},
        )
    ]


def test_an_unknown_command_is_one_sentence_and_none_is_the_help(monkeypatch, capsys):
    assert run(monkeypatch, "trian") == 2
    assert re.fullmatch("error: unknown command 'trian'; choose from train, probe, .*\n", capsys.readouterr().err)
    assert run(monkeypatch) == 2
    assert capsys.readouterr().err.startswith("usage: pera-jax COMMAND")


def test_configs_are_found_by_name_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # what `make demo` writes is no config
    assert configs.names() == sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
    assert configs.load("pera_vitb16").name == "pera_vitb16"
    assert configs.load("demo:smoke").name == "demo_smoke"
    assert {spec.name for spec in specs.from_config("demo_probes", [])} == {"knn", "linear", "cover", "change"}


def test_a_file_of_ones_own_and_a_run_are_configs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("own.py").write_text((ROOT / "configs" / "demo.py").read_text().replace('"demo"', '"own"'))
    config = configs.load("own.py:smoke", {"total": "3 steps", "data.path": "x"})
    assert (config.name, config.total, config.data.path) == ("own_smoke", "3 steps", "x")
    run_meta.write(str(tmp_path), {"config": config.to_dict()})
    assert configs.load("config.json").to_json() == config.to_json()


HEAD = "from pera_jax import config as configs\n\n\n"
WRONG_FILES = {
    "def get_config(:\n": r"own.py fails in line 4 \(SyntaxError: invalid syntax\); correct the file",
    "def get_config():\n    return [][1]\n": r"fails in line 5 \(IndexError: list index out of range\)",
    "import nothing_of_this_name\n": r"fails in line 4 \(ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "def get_config():\n    raise SystemExit(3)\n": r"fails in line 5 \(SystemExit: 3\)",
    "config = configs.default()\n": "own.py has no function get_config; define one",
    "def get_config():\n    return {}\n": "expected a ConfigDict from get_config in .*own.py, got dict; start from",
    "def get_config(size):\n    return size\n": "own.py needs an argument; give one as in .*own.py:smoke",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_file_that_is_no_config_is_one_sentence(text, tmp_path):
    (tmp_path / "own.py").write_text(HEAD + text)
    with pytest.raises(UserError, match=WRONG_FILES[text]):
        configs.load(tmp_path / "own.py")


def test_an_argument_that_a_file_does_not_take_is_one_sentence(tmp_path):
    (tmp_path / "own.py").write_text(HEAD + "def get_config():\n    return configs.default()\n")
    assert configs.load(tmp_path / "own.py").objective == "pera"
    with pytest.raises(UserError, match="get_config in .*own.py takes no argument 'smoke'; remove :smoke"):
        configs.load(f"{tmp_path}/own.py:smoke")


def test_a_probe_config_is_refused_by_trainings_and_plans(tmp_path):
    for use in (
        lambda: train("probes", tmp_path / "run"),
        lambda: plan.main(["--config", "probes", "--topology", "x"]),
    ):
        with pytest.raises(UserError, match="a probe config, with tasks; use it with pera-jax probe"):
            use()
    assert not (tmp_path / "run").exists()


def test_a_loaded_config_is_copied_before_it_is_changed():
    config = configs.load("demo")
    assert configs.load(config, {"model.width": 48}).model.width == 48 and config.model.width == 96
    with pytest.raises(UserError, match="the config has no field model.breadth"):
        configs.load(config, {"model.breadth.x": 1})
    with pytest.raises(UserError, match="expected model.width as int, such as the default 96, got 'wide'"):
        configs.load(config, {"model.width": "wide"})


KNOWN = sorted(file.stem for file in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("name", ["pera_vitb", "configs/none.py", "pera_vitb:smoke"])
def test_another_name_is_one_sentence_that_lists_the_known_ones(name):
    with pytest.raises(UserError) as raised:
        configs.load(name)
    assert str(raised.value) == (
        f"config {name.partition(':')[0]} does not exist; expected one of {', '.join(KNOWN)}, a Python file, or the "
        "config.json of a run"
    )
