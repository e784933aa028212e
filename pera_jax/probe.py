"""The probe command: scores the frozen features of a checkpoint.

    pera-jax probe --run runs/aid --data shards/aid --tasks knn,linear
    pera-jax probe --run runs/aid --config probes --follow

With `--follow` the command evaluates each new checkpoint of a run that trains in another process, until the run ends.
Hyperparameters are chosen on a held-out part of the training split; the test split is used once per score. Results are
written to RUN/probe/, see `probes.runner.results`.
"""

import argparse
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pera_jax import calls
from pera_jax.common import errors, paths
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data.labelled import folders
from pera_jax.parallel import cluster, distributed
from pera_jax.probes.runner import results, specs
from pera_jax.probes.runner.follow import follow
from pera_jax.probes.runner.job import ENCODERS, Job, load_network


@calls.logging_unchanged()
def probe(
    run: str | os.PathLike, tasks: Sequence[str] = ("knn", "linear"), *, data: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None, changes: Mapping[str, Any] | Sequence[str] = (),
    train_split: str | None = None, test_split: str | None = None, labels: str | os.PathLike | None = None,
    image_size: int | None = None, encoder: str | None = None, step: int | None = None,
    output: str | os.PathLike | None = None, batch_size: int = 256,
    reading: folders.Reading = folders.Reading(), verify: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluates a checkpoint of `run`; also available as `pera_jax.probe(...)`. The arguments are the options of the
    command.

    Args:
      run: the run folder.
      tasks: any of "knn", "linear", "logistic", "segmentation", "change", all on `data`; or
      config: a probe config by name or path, such as "probes": several tasks on several datasets.
      changes: overrides of task settings, such as {"knn.k": (20,)}.
      image_size: px; None for the size of the global crops in training.
      batch_size: images decoded at a time; does not change scores.
      encoder: "teacher", "student", or a baseline, "untrained" or "pixels"; None for the teacher, or for the student of
        a method without a teacher.
      reading: options for reading folders of images and of scenes.

    Returns:
      One entry per task, as written to RUN/probe (or `output`); `entry["scores"]` maps score names to value and
      interval.

    Raises:
      UserError: invalid arguments, run or data; raised before any score is computed.
    """
    fields = dict(data=data, train_split=train_split, test_split=test_split, labels=labels, image_size=image_size)
    fields = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in fields.items()}
    return _probe(
        os.fspath(run), specs.chosen(tasks, fields, config, changes), encoder, step, output, batch_size, reading, verify
    )


def _probe(
    run: str, chosen: list[specs.Spec], encoder, step, output, batch_size, reading, verify
) -> list[dict[str, Any]]:
    network, job = (
        load_network(run, step, encoder, verify),
        Job(chosen, output_folder(run, output), batch_size, reading),
    )
    job.prepare(network.meta)
    entries = []
    for spec in chosen:
        result = job.evaluate(network, spec)
        job.write(result)
        entries.append(result.entry)
    return entries


def output_folder(run: str, output: str | os.PathLike | None) -> pathlib.Path:
    """The folder for the results, RUN/probe by default."""
    return pathlib.Path(paths.local(output)) if output else pathlib.Path(paths.local(run)) / "probe"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pera-jax probe", description="Evaluates the frozen features of a checkpoint."
    )
    parser.add_argument("--run", required=True, type=paths.local, help="run folder (the --workdir of the training)")
    parser.add_argument(
        "--config",
        type=paths.local,
        help="probe config by name (e.g. probes) or path: several tasks on several datasets",
    )
    parser.add_argument(
        "--tasks", default="knn,linear", help=f"comma-separated list of {', '.join(specs.TASKS)} (default: knn,linear)"
    )
    parser.add_argument(
        "--data",
        type=paths.local,
        help="labeled images: a folder of shards, of class folders or of scenes, or tfds:NAME",
    )
    parser.add_argument("--train-split", help="training split (default: train)")
    parser.add_argument(
        "--test-split", help="test split (default: test); '' for leave-one-out on a small dataset without a test split"
    )
    parser.add_argument(
        "--labels", type=paths.local, help="CSV file of labels: key,label or key and one 0/1 column per class"
    )
    parser.add_argument(
        "--image-size", type=int, help="px, a multiple of the patch size (default: size of the global crops)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME.FIELD=VALUE", dest="changes",
                        help="override a task setting, e.g. linear.seeds=(0,1,2,3,4)")  # fmt: skip
    parser.add_argument("--encoder", help=f"one of {', '.join(ENCODERS)} (default: the teacher, or the "
                        "student if the method has no teacher)")  # fmt: skip
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    parser.add_argument("--output", type=paths.local, help="folder for the results (default: RUN/probe)")
    parser.add_argument("--batch-size", type=int, default=256, help="images decoded at a time; does not change scores")
    folders.add_options(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not check the weights against their digests")
    parser.add_argument("--follow", action="store_true", help="evaluate each new checkpoint until the run ends")
    parser.add_argument(
        "--poll", type=float, default=10.0, help="seconds between checks for a new checkpoint (default: 10)"
    )
    parser.add_argument(
        "--patience", type=float, default=24.0, help="hours without a new checkpoint before giving up (default: 24)"
    )
    parser.add_argument("--show", action="store_true", help="print existing results and exit")
    cluster.add_options(parser)
    options = parser.parse_args(argv)

    if options.show:
        found = results.read(output_folder(options.run, options.output))
        if not found:
            raise UserError(f"{output_folder(options.run, options.output)} has no results; probe the run first")
        print(results.markdown(found))
        return
    for name in ("batch_size", "poll", "patience"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be > 0")
    tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    fields = {name: getattr(options, name) for name in ("data", "train_split", "test_split", "labels", "image_size")}
    chosen = specs.chosen(tasks, fields, options.config, options.changes)
    if options.follow:
        if options.encoder is not None or options.step is not None or options.no_verify:
            raise UserError(
                "--follow evaluates the trained encoder of every checkpoint; remove --encoder, --step and --no-verify"
            )
    elif not pathlib.Path(options.run).is_dir():
        raise UserError(f"the run folder {options.run} does not exist; give the --workdir of a training")
    arguments = cluster.from_flags(options.coordinator, options.num_processes, options.process_id, os.environ)
    cluster.initialize(arguments, options.join_seconds)
    base, reading = output_folder(options.run, options.output), folders.reading_of(options)
    with distributed.exit_on_error():
        if options.follow:
            follow(options.run, chosen, base, options.batch_size, options.poll, 3600 * options.patience, reading)
            entries = results.read(base)
        else:
            entries = _probe(options.run, chosen, options.encoder, options.step, options.output, options.batch_size,
                             reading, not options.no_verify)  # fmt: skip
    if distributed.main_host():
        print(f"{results.markdown(entries)}\n\nwritten to {printable(base)}")


if __name__ == "__main__":
    errors.run(main)
else:
    calls.make_callable(__name__, probe)
