"""The command `trigpoint`: runs the command line, and turns what went wrong into a message and an exit code."""

from __future__ import annotations

import codecs
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from trigger.errors import TrigpointError, remedy
from trigger.trusted import NotOursError

COLLECT_AFTER = 20_000
"""After how many new objects garbage is looked for; Python's own 700 looks hundreds of times at what is imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; expected errors are printed, errors of the program keep their trace."""
    gc.set_threshold(COLLECT_AFTER)
    try:
        return _run(arguments)
    finally:
        gc.freeze()  # what is left ends with the process; to look for garbage in it would take a tenth of a second


def _run(arguments: Sequence[str] | None) -> int:
    _open_what_was_closed()
    _escape_what_cannot_be_said()
    from trigger.cli.cli import Abort, UsageError, program

    try:
        code = program(
            args=None if arguments is None else list(arguments), prog_name="trigpoint", standalone_mode=False
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # Whoever read our output has left; Python must not try to flush it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Abort:
        return _fail("not done, as you wished", "", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", "", 130)
    except (TrigpointError, OSError, ExceptionGroup) as error:
        return _explain(error)
    except UsageError as error:
        return _fail(*_usage(error), 2)


def _open_what_was_closed() -> None:
    """Put the null device where the shell has closed input, output or errors, so that no file of ours gets its number.

    Python has None for a stream that was closed; what is printed there goes nowhere, as whoever closed it wished.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # by number: the lowest free one is given
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - it stays open to the end


def _escape_what_cannot_be_said() -> None:
    """Let a character that the encoding of our output has not be written as an escape, and end no command.

    As `\\u00f6`, which is the character in TOML too; `\\xf6` would be a byte of a name.
    """
    codecs.register_error("trigpoint", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="trigpoint")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    numbers = map(ord, error.object[error.start : error.end])
    return "".join(f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}" for number in numbers), error.end


def _explain(error: TrigpointError | OSError | ExceptionGroup[Exception]) -> int:
    """Print every expected error in `error` and give the code of the first; anything unexpected is raised on."""
    leaves = list(_leaves(error))
    if not all(isinstance(leaf, TrigpointError | OSError) for leaf in leaves):
        raise error
    codes = [_fail(*_words(leaf)) for leaf in leaves]
    return codes[0]


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _words(error: Exception) -> tuple[str, str, int]:
    """Give message, hint and exit code."""
    if isinstance(error, TrigpointError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, NotOursError):
        return error.message, error.remedy, 1
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return what, remedy(error), 1
    return str(error) or type(error).__name__, "", 1


def _usage(error: Any) -> tuple[str, str]:
    """Give message and hint of a command line that cannot be read."""
    context = error.ctx
    hint = f"`{context.command_path} --help` lists what can be given" if context is not None else ""
    return error.format_message().rstrip("."), hint


def _fail(message: str, hint: str, code: int) -> int:
    from trigger.cli import show

    show.error(message, hint)
    return code


if __name__ == "__main__":
    sys.exit(main())
