"""One way for bad input to end a command: one sentence on stderr, exit status 1, no traceback."""

import io
import signal
import sys
from collections.abc import Callable

from pera_jax.common.text import printable

_LONGEST = 2000
"""Characters of an error's sentence at most."""


class UserError(Exception):
    """Bad input. The message is one sentence that names the thing and the mend.

    Its text is one printable line of a bounded length whatever names it was made of: the last line of defense, where a
    sentence forgot to make a foreign name safe.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), _LONGEST)


def run(main: Callable[[], None]) -> None:
    """Runs a command's `main`; a `UserError` becomes `error: SENTENCE` on stderr and exit status 1, Ctrl-C
    `error: interrupted` and status 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does by itself: no name ends a command, in any locale
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
