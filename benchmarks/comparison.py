"""Trains several configs with several seeds, probes each run, and collects the scores, their cost and their intervals.

    python benchmarks/comparison.py --configs aid_small aid_dino aid_dinov2 aid_mae aid_mocov3 \\
        --data shards/aid --output runs/comparison --share 0.25 --seeds 0 1 2
    python benchmarks/comparison.py --configs aid_mae --data shards/aid_search --train-split fit \\
        --test-split held_out --output runs/search --share 0.0625 --tasks knn \\
        --try aid_mae:schedules.learning_rate.peak=4e-4,8e-4,1.6e-3

Runs one command after the other; run it again after a kill, and it resumes where it was. Each combination of the values
of `--try` is a setting of its own. In OUTPUT: a run folder CONFIG/SETTING/seed_N for each training; runs.csv, a row for
each; summary.md, means over seeds with 95 % intervals (Student's t).
"""

import argparse
import csv
import itertools
import pathlib
import subprocess
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pera_jax import config as configs  # noqa: E402
from pera_jax import objectives  # noqa: E402
from pera_jax.common import errors, files, progress  # noqa: E402
from pera_jax.common.errors import UserError  # noqa: E402
from pera_jax.data import mixture  # noqa: E402
from pera_jax.training import schedules  # noqa: E402

_USUAL = "default"  # the setting without `--try`


def jobs(arguments) -> list[dict]:
    """The trainings: config, setting, overrides and seed of each.

    Raises:
      UserError: overrides that are malformed, or of a config that is not trained.
    """
    for each in (*arguments.set, *arguments.tried):
        if each.partition(":")[0] not in arguments.configs:
            raise UserError(f"{each!r} is of none of the configs {', '.join(arguments.configs)}; correct its name")
    found = []
    for name in arguments.configs:
        fixed = _assignments(arguments.set, name)
        tried = [(field, values.split(",")) for field, values in _assignments(arguments.tried, name).items()]
        for values in itertools.product(*(values for _, values in tried)):
            chosen = {field: value for (field, _), value in zip(tried, values, strict=True)}
            setting = ",".join(f"{field.split('.')[-1]}={value}" for field, value in chosen.items()) or _USUAL
            found += [
                {"config": name, "setting": setting, "seed": seed, "changes": fixed | chosen | {"seed": str(seed)}}
                for seed in arguments.seeds
            ]
    return found


def _assignments(given: list[str], config: str) -> dict[str, str]:
    """FIELD -> VALUE of those of CONFIG:FIELD=VALUE that are of `config`."""
    found = {}
    for each in given:
        name, colon, change = each.partition(":")
        field, equals, value = change.partition("=")
        if not colon or not equals:
            raise UserError(f"expected CONFIG:FIELD=VALUE, got {each!r}")
        if name == config:
            found[field] = value
    return found


def train(job: dict, arguments, folder: pathlib.Path) -> dict:
    """Trains a job unless it is finished; returns what it costs.

    Raises:
      UserError: the folder has a run with other settings.
    """
    changes = job["changes"] | {"data.path": arguments.data, "data.split": arguments.train_split}
    config = configs.load(job["config"], [f"{field}={value}" for field, value in changes.items()])
    data = mixture.open_mixture(config.data)
    steps = schedules.parse_duration(
        config.total, total_steps=None, steps_per_epoch=len(data) // config.batch_size, batch_size=config.batch_size,
        name="total",
    )  # fmt: skip
    steps = max(round(steps * arguments.share), 1)
    objective = objectives.from_config(config, data.bands)
    flops = sum(objective.flops_per_image().values())
    changes["total"] = f"{steps} steps"
    asked, told = files.as_json(changes), folder.with_name(f"{folder.name}.json")
    if told.exists() and told.read_bytes() != asked:
        raise UserError(f"{folder} was trained with other settings, see {told}; choose another --output, or remove it")
    files.write(told, asked)
    spent = folder.with_name(f"{folder.name}_seconds.txt")  # of each command, since a killed one is run again
    if not (folder / "FINISHED").exists():
        flags = [f"--config.{field}={value}" for field, value in changes.items()]
        began = time.perf_counter()
        try:
            _run("pera_jax.train", "--config", job["config"], *flags, "--workdir", str(folder))
        finally:
            before = spent.read_text() if spent.exists() else ""
            files.write(spent, f"{before}{time.perf_counter() - began:.1f}\n".encode())
    images = steps * config.batch_size
    return {
        "method": objective.name, "images": images, "gflop_per_image": flops / 1e9, "tflop": images * flops / 1e12,
        "seconds": sum(map(float, spent.read_text().split())) if spent.exists() else "",
    }  # fmt: skip


def probe(arguments, folder: pathlib.Path) -> dict[str, float]:
    """Probes a run unless that is done; returns the scores by name."""
    done = folder / "probe" / "done.txt"
    if not done.exists():
        common = ("--run", str(folder))
        splits = ("--train-split", arguments.train_split, "--test-split", arguments.test_split)
        size = ("--image-size", str(arguments.image_size)) if arguments.image_size else ()
        _run("pera_jax.probe", *common, "--data", arguments.data, "--tasks", arguments.tasks, *splits, *size)
        for config in arguments.probes:
            _run("pera_jax.probe", *common, "--config", config)
        files.write(done, b"")
    with (folder / "probe" / "results.csv").open(newline="") as file:
        return {f"{row['name']}/{row['score']}": float(row["value"]) for row in csv.DictReader(file) if row["value"]}


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command[1:])} failed with status {ended.returncode}: {last}")


def summary(rows: list[dict], scores: list[str]) -> str:
    """A Markdown table: for each config and setting the mean over seeds, and the half width of its interval."""
    names = ["config", "setting", "seeds", "TFLOP", "images", *scores]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    key = lambda row: (row["config"], row["setting"])  # noqa: E731
    for (config, setting), group in itertools.groupby(rows, key):
        group = list(group)
        cells = [_interval([row[score] for row in group if row.get(score) is not None]) for score in scores]
        first = group[0]
        lines.append(
            f"| {config} | {setting} | {len(group)} | {first['tflop']:.1f} | {first['images']:,} | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    from scipy import stats  # takes a second to import

    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, help="configs by name or path")
    parser.add_argument("--data", required=True, help="dataset folder with classes")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for runs and tables")
    parser.add_argument("--share", type=float, default=1.0, help="part of each config's steps to train (default: 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--set", action="append", default=[], metavar="CONFIG:FIELD=VALUE", help="override a field")
    parser.add_argument("--try", action="append", default=[], dest="tried", metavar="CONFIG:FIELD=VALUE,VALUE",
                        help="values to compare, which hold no commas")  # fmt: skip
    parser.add_argument("--train-split", default="train", help="split to train on, also for probes (default: train)")
    parser.add_argument("--test-split", default="test", help="split to test probes on (default: test)")
    parser.add_argument("--tasks", default="knn,logistic", help="probes on --data (default: knn,logistic)")
    parser.add_argument("--image-size", type=int, help="px, for these probes (default: the size of global crops)")
    parser.add_argument("--probes", nargs="*", default=[], help="further probe configs, by name or path")
    arguments = parser.parse_args()
    rows, todo, began = [], jobs(arguments), time.monotonic()
    for number, job in enumerate(todo):
        folder = arguments.output / job["config"].removesuffix(".py").split("/")[-1] / job["setting"]
        folder /= f"seed_{job['seed']}"
        row = {name: job[name] for name in ("config", "setting", "seed")}
        rows.append(row | train(job, arguments, folder) | probe(arguments, folder))
        scores = list(dict.fromkeys(name for row in rows for name in row if "/" in name))
        columns = [name for name in rows[0] if "/" not in name] + scores
        _write_table(arguments.output / "runs.csv", columns, rows)
        files.write(arguments.output / "summary.md", summary(rows, scores).encode())
        left = (time.monotonic() - began) / (number + 1) * (len(todo) - number - 1)
        what = f"{job['config']}, {job['setting']}, seed {job['seed']}"
        print(f"{number + 1}/{len(todo)}  {what}  ETA {progress.duration_text(left)}", flush=True)
    print(summary(rows, scores))


def _write_table(path: pathlib.Path, columns: list[str], rows: list[dict]) -> None:
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    text = "".join(",".join(f'"{cell}"' if "," in str(cell) else str(cell) for cell in line) + "\n" for line in lines)
    files.write(path, text.encode())


if __name__ == "__main__":
    errors.run(main)
