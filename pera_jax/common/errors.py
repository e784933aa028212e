"""Exit statuses of the commands, and the error that becomes one sentence on stderr.

    0         done, or stopped by a signal after a save (a finished run has a file FINISHED)
    1         wrong input, or a run that needs attention: re-running the same command fails again
    2         unknown, missing or malformed options
    70        a bug in this program: the traceback shows where
    75        the machine or another host failed: re-running the same command may succeed
    128 + N   ended by signal N; 130 is Ctrl-C, 142 (SIGALRM) a training run that stalled
"""

import io
import signal
import sys
import traceback
from collections.abc import Callable

from pera_jax.common import interrupts
from pera_jax.common.progress import write
from pera_jax.common.text import first_line, printable

INPUT, USAGE, CRASH, TRY_AGAIN = 1, 2, 70, 75


class UserError(Exception):
    """An error that the user can fix. The message is one sentence with the cause and the fix.

    `str(error)` is always one printable line of bounded length, even if the message contains unsafe names.

    Attributes:
      status: exit status of a command that ends with this error.
      longest: maximum length of the message in characters.
    """

    status = INPUT
    longest = 2000

    def __str__(self) -> str:
        return printable(super().__str__(), self.longest)


class UsageError(UserError):
    """An unknown, missing or malformed option of a command."""

    status = USAGE


class Misfit(UserError):
    """Weights that do not fit a network; the message lists every array, so it may be long."""

    longest = 1 << 17


def run(main: Callable[[], None]) -> None:
    """Runs a command's `main` and turns exceptions into messages on stderr and exit statuses.

    UserError: `error: MESSAGE` and its status. Ctrl-C: `error: interrupted`, status 130. A failure of the machine (out
    of memory, no threads, a failing disk): one line, status 75. Anything else: the traceback, status 70.
    """
    from pera_jax.common import environment  # here: it raises UserError

    interrupts.imported()
    # like stderr: a name that the locale cannot encode must not end the command
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        write(sys.stderr, f"error: {error}\n")
        sys.exit(error.status)
    except KeyboardInterrupt:
        write(sys.stderr, "error: interrupted\n")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        fault = environment.environment_fault(error)
        if fault is None:
            traceback.print_exc()
            sys.exit(CRASH)
        what = first_line(f"{type(error).__name__}: {error}".removesuffix(": "))
        write(sys.stderr, f"error: the command cannot continue ({what}): {fault}, and re-run the same command\n")
        sys.exit(TRY_AGAIN if environment.passing(error) else INPUT)
