"""One way for bad input to end a command: one sentence on stderr, exit status 1, no traceback."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one sentence that names the thing and the mend."""


def run(main: Callable[[], None]) -> None:
    """Runs a command's `main`; a `UserError` becomes `error: SENTENCE` on stderr and exit status 1, Ctrl-C
    `error: interrupted` and status 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
