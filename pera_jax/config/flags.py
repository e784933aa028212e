"""`--config` of commands that parse absl's flags: by name or file, with `--config.FIELD=VALUE` beside it."""

import os
import sys
from collections.abc import Container

from absl import flags

from pera_jax.common.errors import UserError
from pera_jax.config.load import find
from pera_jax.config.renamed import new_name


def parse(argv: list[str]) -> list[str]:
    """The `flags_parser` of a command whose flag `config` is ml_collections' config file; returns what is no flag.

    Raises:
      UserError: unknown flags, no such config, values that do not fit.
    """
    try:
        argv = flags_of([with_underscores(each, flags.FLAGS) for each in argv])
        sys.argv[1:] = argv[1:]  # where ml_collections looks for the fields that are overridden
        rest = flags.FLAGS(argv)
        if flags.FLAGS.config:
            flags.FLAGS.config.is_locked  # that a file could not be loaded is told at the first use of what it holds
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        while error.args and isinstance(error.args[0], Exception):  # an AttributeError around a KeyError
            error = error.args[0]
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(f"a flag or the config is wrong: {' '.join(str(reason).split())}") from error


def flags_of(arguments: list[str]) -> list[str]:
    """The arguments of a command with `--config` as ml_collections takes it, "FILE.py" or "FILE.py:ARGUMENT", and the
    present names of fields. Raises UserError: no such config."""
    result, waits = [], False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--config.") and (now := new_name(name.removeprefix("--config."))):
            print(f"note: the config field {name.removeprefix('--config.')} is called {now} now", file=sys.stderr, flush=True)
            name, argument = f"--config.{now}", f"--config.{now}{equals}{value}"
        if waits:
            argument = _found(argument)
        elif equals and name in ("--config", "-config"):
            argument = f"--config={_found(value)}"
        waits = argument in ("--config", "-config")
        result.append(argument)
    return result


def with_underscores(argument: str, known: Container[str]) -> str:
    """`--num-processes=2` as `--num_processes=2`, where that is a known flag."""
    name, equals, value = argument.partition("=")
    flag = name[2:].replace("-", "_")
    return f"--{flag}{equals}{value}" if name.startswith("--") and flag in known else argument


def _found(config: str) -> str:
    file, argument = find(config)
    return os.path.abspath(file) + (f":{argument}" if argument else "")
