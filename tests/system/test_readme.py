"""What the README tells people to type does what the README says, in a fresh clone, as root and as anybody else.

Every `$` line of its `console` blocks is run in one shell, in order. The lines below a command must appear in its
output in that order; numbers may differ, and `…` stands for anything.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from connectors.databases.postgres.programs import as_owner
from tests.fixtures.volumes import ground, plain_folder

ROOT = Path(__file__).resolve().parents[2]
BANK = "/var/tmp/bank"
"""Where the README puts the demo that is kept; a test has its own place."""
DEADLINE_SECONDS = 540
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Step:
    """One command of the README, and what it says that one sees."""

    command: str
    expected: list[str] = field(default_factory=list)


def steps(readme: str) -> list[Step]:
    """Give the commands of all `console` blocks, in order."""
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Step(line[2:]))
            elif line.strip() not in ("", "…"):
                found[-1].expected.append(line)
    return found


def pattern(line: str) -> re.Pattern[str]:
    """Give what matches a line with other figures in it."""
    words = re.escape(line.strip())
    words = re.sub(r"\d+(?:\\?[.,]\d+)*", r"\\d[\\d.,]*", words)
    return re.compile(re.sub(r"(?:\\ )+", r"\\s+", words).replace("…", ".*"))


def missing(step: Step, output: str) -> list[str]:
    """Give the lines that do not appear in the output, in order."""
    gone, rest = [], output.splitlines()
    for line in step.expected:
        at = next((number for number, seen in enumerate(rest) if pattern(line).search(seen)), None)
        if at is None:
            gone.append(line)
        else:
            rest = rest[at + 1 :]
    return gone


def script(found: list[Step], mark: str) -> str:
    """Give a script that ends each command's output with `mark` and its exit code, and stops at the first failure."""
    parts = [f"{step.command}\nprintf '\\n%s %s\\n' {mark} $?\n" for step in found]
    return "set -u\n" + "".join(parts)


def play(clone: Path, home: Path, user: tuple[int, int] | None) -> list[str]:
    """Run the README of a clone as `user` (user and group id; oneself if None); gives what went otherwise."""
    bank = str(ground() / f"trg-readme-{secrets.token_hex(4)}")
    found = steps((clone / "README.md").read_text().replace(BANK, bank))
    assert len(found) > 8, "the README has lost its commands"
    mark = secrets.token_hex(8)
    inherited = {
        name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "SSL_CERT_FILE"
    }
    try:
        done = subprocess.run(
            ["bash", "-c", script(found, mark)],
            cwd=clone,
            env=inherited | {"HOME": str(home), "PATH": SYSTEM_PATH, "LANG": "C.UTF-8", "TERM": "dumb"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_SECONDS,
            **as_owner(user),
        )
    finally:
        subprocess.run(
            [str(clone / ".venv/bin/trigpoint"), "demo", "--stop", "--folder", bank], capture_output=True, timeout=100
        )
    outputs = re.split(rf"\n{mark} (\d+)\n", done.stdout)
    wrong = []
    for step, output, code in zip(found, outputs[::2], outputs[1::2], strict=False):
        if code != "0":
            wrong.append(f"$ {step.command}: exit code {code}\n{output[-3000:]}")
        elif gone := missing(step, output):
            wrong.append(f"$ {step.command}: not seen: {gone} in\n{output[-3000:]}")
    if len(outputs) // 2 < len(found):
        wrong.append(f"$ {found[len(outputs) // 2].command}: did not end: {outputs[-1][-3000:]}")
    return wrong


@pytest.fixture
def clone() -> Iterator[Path]:
    """Give a fresh clone of what is committed, in a folder that anybody can reach."""
    with plain_folder() as outer:
        command = [
            "git",
            "-c",
            "safe.directory=*",
            "clone",
            "--quiet",
            "--depth=1",
            f"file://{ROOT}",
            str(outer / "trigpoint"),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        (outer / "home").mkdir()
        yield outer / "trigpoint"


@pytest.mark.root
def test_the_readme_holds_as_root_in_a_fresh_clone(clone: Path) -> None:
    assert play(clone, Path.home(), None) == []


def test_the_readme_holds_as_an_ordinary_user_in_a_fresh_clone(clone: Path) -> None:
    user = None
    if os.geteuid() == 0:
        entry = pwd.getpwnam("nobody")
        user = entry.pw_uid, entry.pw_gid
        for path in (clone.parent, *clone.parent.rglob("*")):
            shutil.chown(path, *user) if not path.is_symlink() else None
    assert play(clone, clone.parent / "home", user) == []


def test_a_promise_of_the_readme_that_is_not_kept_is_found_out() -> None:
    (step,) = steps("```console\n$ trigpoint demo\n  done in 1.5 s, from … 33\n✔ all\n```\n")
    assert missing(step, "x\ndone in 22 s, from point 4\n✔ all") == []
    assert missing(step, "✔ all\ndone in 22 s, from point 4") == ["✔ all"]
    assert missing(step, "done in no time, from point 4\n✔ all") == ["  done in 1.5 s, from … 33"]


def test_the_make_targets_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`make ([a-z]+)|^\$? *make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {a or b for a, b in named} <= targets
