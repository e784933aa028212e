"""Commands of `data_prep` in this process, as a shell would see them."""

import contextlib
import io
import subprocess
from collections.abc import Callable

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
