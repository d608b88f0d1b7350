"""The style rules that a machine can check and that ruff does not; docstrings, names and blocking calls are ruff's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONGEST_FILE = 500
LONGEST_FUNCTION = 60
SHORTEST_CLAIM = 4

BANNED_NAMES = {
    "utils": "say what is in it",
    "helpers": "say what is in it",
    "common": "say what is in it",
    "misc": "say what is in it",
    "manager": "say what it does",
}

SILENT = {"skip", "skipif", "importorskip", "SkipTest", "skipTest", "skipUnless", "skipIf"}
"""What lets a test pass without having run; what a machine cannot have is left out by `tests/conftest.py`, aloud."""

SHELLS = {"os.system", "os.popen", "asyncio.create_subprocess_shell"}

MARKS_OF_UNFINISHED_WORK = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.$}])/(?:wo" r"rk|ro" r"ot|ho" r"me/[a-z]\w*)/")


@cache
def sources() -> dict[str, str]:
    """Give the text of every Python file of ours by its path from the root."""
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ("trigger", "connectors", "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


@cache
def texts() -> dict[str, str]:
    """Give every file that people read: the sources, the documents, the set-up."""
    found = [
        path
        for pattern in (
            "*.md",
            "*.toml",
            "Makefile",
            ".ci/*",
            ".ci/*",
            "trigger/**/*.md",
            "connectors/**/*.md",
            "configs/**/*",
        )
        for path in sorted(ROOT.glob(pattern))
        if path.is_file()
    ]
    return sources() | {str(path.relative_to(ROOT)): path.read_text() for path in found}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(sources()[name])


def functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Give how many lines a function has, its docstring not counted."""
    first = function.body[0]
    is_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    words = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - words


def refuse(breaches: Iterable[str]) -> None:
    found = "\n".join(breaches)
    assert not found, found


def test_a_file_is_read_in_one_sitting() -> None:
    refuse(
        f"{name} has {lines} lines, {LONGEST_FILE} are enough: split it"
        for name, text in sources().items()
        if (lines := text.count("\n")) > LONGEST_FILE
    )


def test_a_function_is_read_in_one_screen() -> None:
    refuse(
        f"{name}:{function.lineno}: {function.name} has {lines} lines, {LONGEST_FUNCTION} are enough: split it"
        for name in sources()
        for function in functions(name)
        if (lines := code_lines(function)) > LONGEST_FUNCTION
    )


def test_no_name_says_that_nobody_knew_what_it_is() -> None:
    refuse(
        f"{name}: '{word}': {BANNED_NAMES[word]}"
        for name in sources()
        for word in (*re.split(r"[/._]", name), *words_of_classes(name))
        if word in BANNED_NAMES
    )


def test_the_name_of_a_test_is_a_claim() -> None:
    refuse(
        f"{name}:{function.lineno}: {function.name} claims nothing"
        for name in sources()
        if Path(name).name.startswith("test_")
        for function in functions(name)
        if function.name.startswith("test_") and len(function.name.split("_")) <= SHORTEST_CLAIM
    )


def test_no_test_is_left_out_in_silence() -> None:
    refuse(
        f"{name}:{node.lineno}: {called(node)}: a test runs or fails"
        for name in sources()
        if name.startswith("tests/")
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute | ast.Name) and called(node) in SILENT
    )


def test_no_program_is_run_through_a_shell() -> None:
    refuse(
        f"{name}:{node.lineno}: {ast.unparse(node.func)}: use an argument vector"
        for name in sources()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and is_shell(node)
    )


def test_nothing_unfinished_is_left_as_a_note() -> None:
    refuse(lines_with(MARKS_OF_UNFINISHED_WORK))


def test_no_file_knows_one_particular_machine() -> None:
    refuse(lines_with(MACHINE_PATHS))


def words_of_classes(name: str) -> list[str]:
    classes = [node.name for node in ast.walk(tree(name)) if isinstance(node, ast.ClassDef)]
    return [word.lower() for found in classes for word in re.findall(r"[A-Z][a-z]+", found)]


def called(node: ast.Attribute | ast.Name) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id


def is_shell(call: ast.Call) -> bool:
    """Whether `call` hands text to a shell; `shell=False` written out does not."""
    asked = [word.value for word in call.keywords if word.arg == "shell"]
    return ast.unparse(call.func) in SHELLS or any(
        not isinstance(value, ast.Constant) or value.value is not False for value in asked
    )


def lines_with(pattern: re.Pattern[str]) -> Iterator[str]:
    return (
        f"{name}:{number}: {line.strip()}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    )
