"""`--config` for commands with absl flags: a name or file, optionally with `--config.FIELD=VALUE`."""

import sys
from collections.abc import Container

from absl import flags
from ml_collections import ConfigDict

from pera_jax.common.errors import UsageError
from pera_jax.config.load import load
from pera_jax.config.renamed import new_name


def parse(argv: list[str]) -> list[str]:
    """A `flags_parser` for `app.run` of a command whose flag `config` is an ml_collections config file.

    Returns:
      The program name and the positional arguments.

    Raises:
      UsageError: an unknown flag or field, or an invalid value.
      UserError: the config cannot be loaded, see `load`.
    """
    try:
        argv = resolve([with_underscores(each, flags.FLAGS) for each in argv])
        sys.argv[1:] = argv[1:]  # from which ml_collections reads the overridden fields
        return flags.FLAGS(argv)
    except SystemExit:  # after `--help`, with status 1
        sys.exit(0)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        while error.args and isinstance(error.args[0], Exception):  # an AttributeError that wraps a KeyError
            error = error.args[0]
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise UsageError(f"invalid flag or config: {' '.join(str(reason).split())}") from error


def resolve(arguments: list[str]) -> list[str]:
    """Replaces the config X after `--config` by "THIS_FILE:X", with which ml_collections calls `get_config` below, and
    renamed fields by their current names."""
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
            argument = f"{__file__}:{argument}"
        elif equals and name in ("--config", "-config"):
            argument = f"--config={__file__}:{value}" if value else "--config="
        value_expected = argument in ("--config", "-config")
        result.append(argument)
    return result


def with_underscores(argument: str, known: Container[str]) -> str:
    """Replaces `--num-processes=2` by `--num_processes=2` if that is a known flag."""
    name, equals, value = argument.partition("=")
    flag = name[2:].replace("-", "_")
    return f"--{flag}{equals}{value}" if name.startswith("--") and flag in known else argument


def get_config(config: str) -> ConfigDict:
    """Loads a config for ml_collections, which only knows Python files with such a function."""
    return load(config)
