"""Commands of `data_prep` in this process, as a shell would see them."""

import contextlib
import io
import subprocess
from collections.abc import Callable

from data_prep.convert import processes
from pera_jax.common import errors


def run(main: Callable[[list[str]], None], *arguments) -> subprocess.CompletedProcess:
    """Runs a command with a single worker, unless `arguments` say otherwise; returns its status and output."""
    words = [str(argument) for argument in arguments]
    if "--workers" not in words:
        words += ["--workers", "1"]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            errors.run(lambda: main(words))
        except SystemExit as ended:
            status = ended.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def in_this_process(tasks, work, workers, keep_going=False):
    """Stands in for `processes.run` where workers are not the point: each takes a third of a second to start."""
    for task in tasks:
        news = []
        result = work(task, news.append)
        yield from ((processes.NEWS, task, each) for each in news)
        yield processes.DONE, task, result
