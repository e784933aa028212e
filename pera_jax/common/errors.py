"""How commands end: one sentence on stderr for what a user can mend, and a status that says what may be tried.

    0         done, or stopped by a signal after everything was saved (a run that is done has its file FINISHED)
    1         wrong input, or a run that a person must look at: the same command fails again
    2         unknown or missing options
    70        a fault of the program: the traceback says where
    75        the machine or another host failed: the same command may succeed
    128 + N   ended by signal N; 130 is Ctrl-C, 142 (SIGALRM) a training in which nothing moved any more
"""

import io
import signal
import sys
import traceback
from collections.abc import Callable

from pera_jax.common import interrupts
from pera_jax.common.text import printable

INPUT, CRASH, TRY_AGAIN = 1, 70, 75


class UserError(Exception):
    """What a user can mend. The message is one sentence that names the thing and the mend.

    Its text is one printable line of a bounded length whatever names it was made of: the last line of defense, where a
    sentence forgot to make a foreign name safe.

    Attributes:
      status: of a command that ends with it.
      longest: characters of the sentence at most.
    """

    status = INPUT
    longest = 2000

    def __str__(self) -> str:
        return printable(super().__str__(), self.longest)


class Misfit(UserError):
    """Weights that do not fit a network; names all of them, that is, every array of the largest networks there are."""

    longest = 1 << 17


def run(main: Callable[[], None]) -> None:
    """Runs a command's `main`; a `UserError` becomes `error: SENTENCE` on stderr and its status, Ctrl-C
    `error: interrupted` and status 130, any other exception its traceback and status 70.

    A fault of the machine, wherever it was raised (no memory, no threads, a disk that fails), is one line, too: status 75.
    """
    from pera_jax.common import environment  # here: it raises UserError

    interrupts.imported()
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does by itself: no name ends a command, in any locale
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        fault = environment.environment_fault(error)
        if fault is None:
            traceback.print_exc()
            sys.exit(CRASH)
        what = (str(error).splitlines() or [""])[0]
        told = printable(f"{type(error).__name__}: {what}".removesuffix(": "))
        print(f"error: the command cannot go on ({told}): {fault}, and start again", file=sys.stderr, flush=True)
        sys.exit(TRY_AGAIN if environment.passing(error) else INPUT)
