"""`--config` for commands with absl flags: a name or file, optionally with `--config.FIELD=VALUE`."""

import sys
from collections.abc import Container

from absl import flags
from ml_collections import ConfigDict

from pera_jax.common.errors import UsageError
from pera_jax.config.load import load
from pera_jax.config.renamed import new_name

_FLAG = ("--config", "-config")


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
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        if isinstance(error, KeyError) and reason.strip("'").isidentifier():
            reason = f"the config has no field {reason}"
        raise UsageError(f"invalid flag or config: {reason}") from error


def resolve(arguments: list[str]) -> list[str]:
    """Replaces the config X after `--config` by "THIS_FILE:X", with which ml_collections calls `get_config` below, and
    renamed fields by their current names."""
    result, value_expected = [], False
    for argument in _with_current_names(arguments):
        name, equals, value = argument.partition("=")
        if value_expected:
            argument = f"{__file__}:{argument}"
        elif equals and name in _FLAG:
            argument = f"--config={__file__}:{value}" if value else "--config="
        value_expected = argument in _FLAG
        result.append(argument)
    return result


def _with_current_names(arguments: list[str]) -> list[str]:
    result, config = [], None
    for argument in arguments:
        name, equals, value = argument.partition("=")
        field = name.removeprefix("--config.")
        if field != name and new_name(field) and (given := _given(arguments)):
            config = load(given) if config is None else config
            if now := new_name(field, config):
                print(f"note: the config field {field} is now called {now}", file=sys.stderr, flush=True)
                argument = f"--config.{now}{equals}{value}"
        result.append(argument)
    return result


def _given(arguments: list[str]) -> str:
    """The last value of `--config`; "" without one."""
    given = ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in _FLAG:
            given = value if equals else following
    return given


def with_underscores(argument: str, known: Container[str]) -> str:
    """Replaces `--num-processes=2` by `--num_processes=2` if that is a known flag."""
    name, equals, value = argument.partition("=")
    flag = name[2:].replace("-", "_")
    return f"--{flag}{equals}{value}" if name.startswith("--") and flag in known else argument


def get_config(config: str) -> ConfigDict:
    """Loads a config for ml_collections, which only knows Python files with such a function."""
    return load(config)
