"""`--config` for commands with absl flags: a name or file, optionally with `--config.FIELD=VALUE`."""

import os
import sys
from collections.abc import Container

from absl import flags

from pera_jax.common.errors import UserError
from pera_jax.config.load import find
from pera_jax.config.renamed import new_name


def parse(argv: list[str]) -> list[str]:
    """A `flags_parser` for `app.run` of a command whose flag `config` is an ml_collections config file.

    Returns:
      The program name and the positional arguments.

    Raises:
      UserError: an unknown flag or field, a config that does not exist, or an invalid value.
    """
    try:
        argv = resolve([with_underscores(each, flags.FLAGS) for each in argv])
        sys.argv[1:] = argv[1:]  # from which ml_collections reads the overridden fields
        rest = flags.FLAGS(argv)
        if flags.FLAGS.config:
            flags.FLAGS.config.is_locked  # the first access raises if the file cannot be loaded
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        while error.args and isinstance(error.args[0], Exception):  # an AttributeError that wraps a KeyError
            error = error.args[0]
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(f"invalid flag or config: {' '.join(str(reason).split())}") from error


def resolve(arguments: list[str]) -> list[str]:
    """Replaces the name after `--config` by the path "FILE.py" or "FILE.py:ARGUMENT", which ml_collections needs, and
    renamed fields by their current names. Raises UserError if the config does not exist."""
    result, value_expected = [], False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--config.") and (now := new_name(name.removeprefix("--config."))):
            print(
                f"note: the config field {name.removeprefix('--config.')} is now called {now}",
                file=sys.stderr,
                flush=True,
            )
            name, argument = f"--config.{now}", f"--config.{now}{equals}{value}"
        if value_expected:
            argument = _resolve_config(argument)
        elif equals and name in ("--config", "-config"):
            argument = f"--config={_resolve_config(value)}"
        value_expected = argument in ("--config", "-config")
        result.append(argument)
    return result


def with_underscores(argument: str, known: Container[str]) -> str:
    """Replaces `--num-processes=2` by `--num_processes=2` if that is a known flag."""
    name, equals, value = argument.partition("=")
    flag = name[2:].replace("-", "_")
    return f"--{flag}{equals}{value}" if name.startswith("--") and flag in known else argument


def _resolve_config(config: str) -> str:
    file, argument = find(config)
    return os.path.abspath(file) + (f":{argument}" if argument else "")
