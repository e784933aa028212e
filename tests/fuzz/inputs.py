"""Damages everything that the program reads: bytes of files, fields of JSON, names of files and folders.

    python tests/fuzz/inputs.py --count 2000 --seed 0
    python tests/fuzz/inputs.py --only report --count 1 --seed 1234567

Each case must end in success or in one sentence (UserError): no traceback, no hang, no control character and no forged
line on the terminal, and weights and features must be those that were written. Prints how many cases of which kind
were made, and for each failure the command that makes it again; exit status 1 after a failure.
"""

import argparse
import collections
import contextlib
import faulthandler
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback
import unicodedata
import warnings
from collections.abc import Iterator

if __name__ == "__main__":
    sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1])]
    import conftest  # noqa: F401  sets the devices up

import artefacts
import mutations

from pera_jax.common.errors import UserError

SECONDS = 60
"""That one case may take; most take milliseconds."""
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class Hang(BaseException):
    pass


def fuzz(count: int, seed: int, folder: pathlib.Path, only: str = "") -> tuple[collections.Counter, list[str]]:
    """Makes `count` cases, of all targets in turn.

    Returns:
      (how often each target was "read" or "refused"; a text for each failure, with the seed of the case).
    """
    names = [only] if only else list(artefacts.TARGETS)
    sound: dict[str, tuple[pathlib.Path, object]] = {}
    counts, failures = collections.Counter(), []
    for case in range(count):
        name = names[case % len(names)]
        target = artefacts.TARGETS[name]
        if name not in sound:
            whole = folder / f"{name} whole"
            whole.mkdir()
            with _captured():
                target.make(whole)
            copy = shutil.copytree(whole, folder / "copy", symlinks=True)
            with _captured():
                sound[name] = whole, target.read(copy)
            shutil.rmtree(copy)
        whole, expected = sound[name]
        case_seed = seed if count == 1 else random.Random(f"{seed} {case}").getrandbits(40)
        outcome, failure = _case(target, whole, folder / "copy", expected, random.Random(case_seed))
        counts[f"{name}: {outcome}"] += 1
        if failure:
            failures.append(f"{name}, --only '{name}' --count 1 --seed {case_seed}: {failure}")
    return counts, failures


def _case(target, whole, copy, expected, rng) -> tuple[str, str]:
    """("read" or "refused" or "failed", what went wrong)."""
    shutil.copytree(whole, copy, symlinks=True)
    done, said, outcome, failure = "", [], "read", ""
    try:
        done = _damage(copy, target.damaged, rng)
        with _captured() as said, _limited():
            try:
                found = target.read(copy)
                if expected is not None and found != expected:
                    failure = "other values are read without a word"
            except UserError as error:
                outcome = "refused"
                print(f"error: {error}")
    except Hang:
        failure = f"it takes over {SECONDS} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        failure = "".join(traceback.format_exception(error)[-6:])
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    text = "".join(said)
    unsafe = sorted({c for c in text if c not in "\n" and unicodedata.category(c) in _UNSAFE})
    forged = any(line.lstrip().startswith(mutations.FORGED) for line in text.splitlines())
    if unsafe or forged or "Traceback" in text:
        failure = failure or f"the terminal shows {ascii(unsafe)}{', a forged line' * forged}: {ascii(text[:600])}"
    return ("failed" if failure else outcome), f"{done}: {failure}" if failure else ""


def _damage(folder: pathlib.Path, pattern: str, rng: random.Random) -> str:
    """Damages one file below `folder`, or gives it or a folder another name; says how, in ASCII."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink())
    file = rng.choice(files)
    where = ascii(str(file.relative_to(folder)))
    if pattern == "in/*/*" and rng.random() < 0.8:
        old = rng.choice((file, file.parent))
        new = old.with_name(mutations.name(rng) + (old.suffix if old is file else ""))
        with contextlib.suppress(OSError):
            old.rename(new)
        return f"{where} is called {ascii(new.name)}"
    if file.suffix in (".json", ".jsonl") and rng.random() < 0.8:
        import json

        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        at = rng.randrange(len(lines))
        lines[at] = mutations.of_json(json.loads(lines[at]), rng)
        file.write_text("\n".join(lines) + "\n")
        return f"{where} holds {lines[at][:200]}"
    if rng.random() < 0.03:
        file.unlink()
        return f"{where} is missing"
    file.write_bytes(mutations.of_bytes(file.read_bytes(), rng))
    return f"bytes of {where}"


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """What this process writes to stdout and stderr, in Python and below it."""
    text: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    kept, streams = (os.dup(1), os.dup(2)), (sys.stdout, sys.stderr)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # As a terminal in UTF-8: text that cannot be encoded must not end a command.
        sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        try:
            yield text
        finally:
            with contextlib.suppress(UnicodeError):
                sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            file.seek(0)
            text.append(file.read().decode("utf-8", "surrogateescape"))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Ends a case that hangs in Python by Hang, and one that hangs below it by ending the process."""

    def late(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(5 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(artefacts.TARGETS), default="")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    faulthandler.enable(os.fdopen(os.dup(2), "w"))  # a crash below Python is told, though a case's stderr is captured
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = fuzz(options.count, options.seed, pathlib.Path(folder), options.only)
    print(f"{options.count} cases, seed {options.seed}: {dict(sorted(counts.items()))}")
    print("\n".join(failures) or "none ended in a traceback, hung, reached the terminal raw or changed a value")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
