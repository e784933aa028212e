"""Calls from programs and notebooks: modules that can be called, and logging that stays as the program has set it.

`pera_jax.train` is the module of a command and the function that does its work. The import of a submodule binds its
name in the package, so a function of that name there would be replaced by it: the module itself is made callable.
"""

import contextlib
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator


def make_callable(module: str, function: Callable) -> None:
    """Lets a call of the module `module`, which is being imported, call `function`."""

    class CallableModule(types.ModuleType):
        __call__ = staticmethod(function)

    sys.modules[module].__class__ = CallableModule
    sys.modules[module].__signature__ = inspect.signature(function)  # for `help` and notebooks


@contextlib.contextmanager
def logging_unchanged() -> Iterator[None]:
    """While entered, and for a function as a decorator: the root logger has no other handlers afterwards.

    Orbax logs with absl, which calls `logging.basicConfig()` where the root logger has no handler. The program's own
    call of it would do nothing then.
    """
    before = list(logging.root.handlers)
    try:
        yield
    finally:
        if not before:
            for handler in [each for each in logging.root.handlers if type(each) is logging.StreamHandler]:
                logging.root.removeHandler(handler)
