"""The structure of the repository: imports between packages, sizes of files and folders, where methods may be named."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "pera_jax").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])

# and what they are started by: may import everything
COMMANDS = {"train", "probe", "export", "report", "plan", "features"}
# wing: what it may import. Modules of the top level that are no command (`bands`) are wings of their own.
MAY = {
    "common": set(),
    "bands": {"common"},
    "calls": set(),
    "parallel": {"common"},
    "data": {"bands", "common", "parallel", "calls"},
    "models": {"common", "parallel"},
    "augment": {"bands", "common"},
    "losses": {"models", "parallel", "common"},
    "objectives": {"models", "losses", "augment", "formats", "parallel", "bands", "common"},
    "config": {"objectives", "models", "common"},
    "formats": {"common", "models"},
    "training": {"objectives", "models", "config", "parallel", "data", "bands", "common", "calls"},
    "cost": {"objectives", "training", "config", "parallel", "bands", "common"},
    "encoder": {"models", "training", "formats", "data", "parallel", "bands", "common", "calls"},
    "probes": {"encoder", "objectives", "training", "data", "config", "parallel", "bands", "common"},
    "weights": {
        "encoder",
        "formats",
        "objectives",
        "training",
        "models",
        "data",
        "config",
        "parallel",
        "bands",
        "common",
    },
    "reports": {"probes", "encoder", "objectives", "training", "models", "data", "config", "bands", "common"},
    "data_prep": {"data", "bands", "common"},
}
NAMES_A_METHOD = {"pera_jax/weights/released.py"}  # the dictionary of that method's authors


def imports_of(file: pathlib.Path) -> set[str]:
    """The dotted names of the program's own modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("pera_jax", "data_prep")}


def wing_of(name: str) -> str:
    """The wing of a dotted name, "" for the package itself."""
    parts = name.split(".")
    return "data_prep" if parts[0] == "data_prep" else (parts[1] if len(parts) > 1 else "")


def name_of(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("wing", MAY)
def test_arrows_point_downward_only(wing):
    wrong = []
    for file in SOURCES:
        if wing_of(name_of(file)) != wing:
            continue
        for name in imports_of(file):
            other = wing_of(name)
            if other in MAY and other != wing and other not in MAY[wing]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
            if other in COMMANDS:
                wrong.append(f"{file.relative_to(ROOT)} imports the command {name}")
    assert not wrong


def test_the_table_is_complete_and_has_no_circle():
    wings = {wing_of(name_of(file)) for file in SOURCES} - {""}
    assert wings - COMMANDS - set(MAY) == STARTED
    below = {}

    def depth(wing, seen=()):
        assert wing not in seen, f"{' -> '.join((*seen, wing))} is a circle"
        if wing not in below:
            below[wing] = 1 + max((depth(other, (*seen, wing)) for other in MAY[wing]), default=0)
        return below[wing]

    assert all(depth(wing) for wing in MAY)


STARTED = {"__main__"}  # modules of the top level that are neither a wing nor a command


def test_nothing_but_the_registry_names_a_method():
    wrong = []
    for file in SOURCES:
        path = file.relative_to(ROOT).as_posix()
        if path.startswith("pera_jax/objectives/") or path in NAMES_A_METHOD:
            continue
        wrong += [f"{path}: {name}" for name in imports_of(file) if name.startswith("pera_jax.objectives.pera")]
    assert not wrong


def test_files_are_of_a_size_that_one_reads_at_once():
    long = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in SOURCES}
    assert not {name: lines for name, lines in long.items() if lines > 320}


def test_folders_hold_few_files():
    counts = {}
    for file in SOURCES:
        if file.name != "__init__.py":
            counts[file.parent.relative_to(ROOT).as_posix()] = (
                counts.get(file.parent.relative_to(ROOT).as_posix(), 0) + 1
            )
    assert not {folder: count for folder, count in counts.items() if count > 14}
