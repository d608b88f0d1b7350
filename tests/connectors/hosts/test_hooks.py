from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.hosts.hooks import Hook, read_hooks, require_trusted, run_hook
from connectors.hosts.local import LocalAgent
from trigger.errors import AgentError
from trigger.model import EPOCH, Volume
from trigger.point_names import point_id

POINT = point_id(EPOCH, 1)


@pytest.fixture
def trusted() -> Iterator[Path]:
    """Give a folder that nobody else can write to, all folders above it included (/tmp will not do)."""
    above = Path("/run") if os.geteuid() == 0 else Path.home()
    folder = Path(tempfile.mkdtemp(prefix="trg-hooks-", dir=above))
    yield folder
    shutil.rmtree(folder)


def shell(text: str, deadline_seconds: float = 10) -> Hook:
    return Hook("test", ("/bin/sh", "-c", text), "before", deadline_seconds)


def run(hook: Hook) -> None:
    asyncio.run(run_hook(hook, POINT))


def write_hooks(folder: Path, text: str, mode: int = 0o644) -> Path:
    path = folder / "hooks.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


GOOD = """
[hooks.app-1]
command = ["/bin/true", "-x"]
when = "after"
deadline_seconds = 2
[hooks.b]
command = ["/bin/true"]
"""


def test_hooks_are_read_in_the_order_of_the_file(trusted: Path) -> None:
    first, second = read_hooks(write_hooks(trusted, GOOD))
    assert first == Hook("app-1", ("/bin/true", "-x"), "after", 2.0)
    assert second == Hook("b", ("/bin/true",), "before", 10.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[hooks.a", "cannot be read"),
        ("hook = 1", "expected [hooks.<id>]"),
        ("hooks = 1", "expected [hooks.<id>]"),
        ("[hooks.a]\nwhen = 'before'", "command is a list"),
        ("[hooks.a]\ncommand = '/bin/true'", "command is a list"),
        ("[hooks.a]\ncommand = []", "command is a list"),
        ("[hooks.a]\ncommand = ['/bin/true', 1]", "command is a list"),
        ("[hooks.a]\ncommand = ['true']", "whole path"),
        ("[hooks.a]\ncommand = ['../bin/true']", "whole path"),
        ('[hooks.a]\ncommand = ["/bin/true", "\\u0000"]', "whole path"),
        ("[hooks.a]\ncommand = ['/bin/no-such-program']", "cannot be looked at"),
        ("[hooks.a]\ncommand = ['/bin/true']\nwhen = 'during'", "before or after"),
        ("[hooks.a]\ncommand = ['/bin/true']\ndeadline_seconds = 0", "deadline_seconds"),
        ("[hooks.a]\ncommand = ['/bin/true']\ndeadline_seconds = true", "deadline_seconds"),
        ("[hooks.a]\ncommand = ['/bin/true']\ndeadline_seconds = inf", "deadline_seconds"),
        ("[hooks.a]\ncommand = ['/bin/true']\nshell = true", "expected the keys"),
        ("[hooks.'../a']\ncommand = ['/bin/true']", "an id has"),
        ("[hooks.'']\ncommand = ['/bin/true']", "an id has"),
        ("[hooks.'A']\ncommand = ['/bin/true']", "an id has"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_with_the_place(trusted: Path, text: str, words: str) -> None:
    with pytest.raises(AgentError) as raised:
        read_hooks(write_hooks(trusted, text))
    assert words in raised.value.message
    assert not raised.value.retryable


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o622])
def test_a_file_that_others_can_write_is_refused(trusted: Path, mode: int) -> None:
    with pytest.raises(AgentError, match="can be written by others"):
        read_hooks(write_hooks(trusted, GOOD, mode))


@pytest.mark.parametrize("level", [0, 1])
def test_a_folder_above_that_others_can_write_is_refused(trusted: Path, level: int) -> None:
    inner = trusted / "one" / "two"
    inner.mkdir(parents=True)
    path = write_hooks(inner, GOOD)
    read_hooks(path)
    path.parents[level].chmod(0o777)
    with pytest.raises(AgentError, match="can be written by others"):
        read_hooks(path)


def test_a_folder_where_everybody_writes_is_refused_although_it_is_sticky(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(AgentError, match="can be written by others"):
        read_hooks(write_hooks(tmp_path, GOOD))


def test_a_symbolic_link_to_the_file_or_above_it_is_refused(trusted: Path) -> None:
    (trusted / "real").mkdir()
    path = write_hooks(trusted / "real", GOOD)
    (trusted / "link").symlink_to(trusted / "real")
    (trusted / "link.toml").symlink_to(path)
    for wrong in (trusted / "link.toml", trusted / "link" / "hooks.toml"):
        with pytest.raises(AgentError, match="symbolic link"):
            read_hooks(wrong)


@pytest.mark.volume
def test_a_file_or_program_of_another_user_is_refused(trusted: Path) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid
    program = trusted / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    path = write_hooks(trusted, f'[hooks.a]\ncommand = ["{program}"]')
    read_hooks(path)
    os.chown(program, nobody, -1)
    with pytest.raises(AgentError, match=f"belongs to user {nobody}"):
        read_hooks(path)
    os.chown(program, 0, -1)
    os.chown(path, nobody, -1)
    with pytest.raises(AgentError, match=f"belongs to user {nobody}"):
        read_hooks(path)


def test_a_program_that_was_made_writable_later_is_not_run(trusted: Path) -> None:
    program = trusted / "program"
    program.write_text(f"#!/bin/sh\ntouch {trusted}/ran\n")
    program.chmod(0o755)
    run(Hook("a", (str(program),), "before", 5))
    (trusted / "ran").unlink()
    program.chmod(0o777)
    with pytest.raises(AgentError, match="can be written by others"):
        run(Hook("a", (str(program),), "before", 5))
    assert not (trusted / "ran").exists()


def test_the_program_that_is_trusted_is_where_a_link_leads() -> None:
    require_trusted(Path("/bin/sh").resolve())


def test_a_hook_is_told_the_point_and_nothing_of_our_environment(
    trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "canary")
    run(shell(f"env > {trusted}/env; pwd >> {trusted}/env"))
    seen = (trusted / "env").read_text()
    assert f"TRIGPOINT_POINT={POINT}\n" in seen
    assert "canary" not in seen
    assert {line.split("=")[0] for line in seen.splitlines()} <= {
        "TRIGPOINT_POINT", "PATH", "LANG", "PWD", "OLDPWD", "SHLVL", "_", "/",
    }  # fmt: skip


def test_arguments_are_handed_over_as_they_are(trusted: Path) -> None:
    nasty = ["; touch /tmp/x", "$(id)", "`id`", "a\nb", "--", "-rf", "*", "é"]
    script = f'for word in "$@"; do printf "%s\\0" "$word" >> {trusted}/words; done'
    run(Hook("a", ("/bin/sh", "-c", script, "sh", *nasty), "before", 5))
    assert (trusted / "words").read_text().split("\0")[:-1] == nasty


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no room; exit 3", "exit code 3: no room"),
        ("echo one >&2; echo two; exit 1", "one | two"),
        ("kill -9 $$", "exit code -9"),
        ("exec /no/such/program", "exit code 127"),
        ("head -c 3000000 /dev/zero | tr '\\0' x; echo; echo the end; exit 1", "| the end"),
        ("printf '\\377\\376'; exit 1", "exit code 1"),
        ("for i in 1 2 3 4 5 6 7 8 9; do echo line $i; done; exit 1", "line 4 | line 5"),
    ],
)
def test_a_hook_that_says_no_fails_with_its_last_words(script: str, words: str) -> None:
    with pytest.raises(AgentError) as raised:
        run(shell(script))
    assert words in raised.value.message
    assert len(raised.value.message) < 3000


@pytest.mark.parametrize(
    "script",
    ["sleep 60", "trap '' TERM INT HUP; sleep 60", "sleep 60 & sleep 60 & wait", "yes", "cat /dev/zero"],
)
def test_a_hook_that_does_not_end_is_killed_with_all_it_started(script: str, trusted: Path) -> None:
    before = time.monotonic()
    with pytest.raises(AgentError, match=r"did not end within 0\.3 s"):
        run(shell(f"echo $$ > {trusted}/pid; {script}", 0.3))
    assert time.monotonic() - before < 3
    assert _group_is_gone(int((trusted / "pid").read_text()))


def test_a_daemon_left_behind_is_killed_and_holds_up_nothing(trusted: Path) -> None:
    before = time.monotonic()
    run(shell(f"echo $$ > {trusted}/pid; sleep 60 & exit 0"))
    assert time.monotonic() - before < 3
    assert _group_is_gone(int((trusted / "pid").read_text()))


def test_a_daemon_in_a_session_of_its_own_holds_up_nothing(trusted: Path) -> None:
    before = time.monotonic()
    run(shell(f"setsid sh -c 'echo $$ > {trusted}/pid; exec sleep 5' & while ! test -s {trusted}/pid; do :; done"))
    assert time.monotonic() - before < 3
    os.kill(int((trusted / "pid").read_text()), signal.SIGKILL)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 5
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)


def _group_is_gone(group: int) -> bool:
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        alive = [path for path in Path("/proc").glob("[0-9]*/stat") if _in_group(path, group)]
        if not alive:
            return True
        time.sleep(0.02)
    return False


def _in_group(path: Path, group: int) -> bool:
    try:
        state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(process_group) == group and state != "Z"


def test_a_cancelled_hook_is_killed(trusted: Path) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(run_hook(shell(f"echo $$ > {trusted}/pid; sleep 60"), POINT))
        await asyncio.to_thread(_wait_for, trusted / "pid")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert _group_is_gone(int((trusted / "pid").read_text()))


def _agent(trusted: Path, hooks: dict[str, tuple[str, str]]) -> LocalAgent:
    text = "".join(
        f'[hooks.{name}]\ncommand = ["/bin/sh", "-c", "{script}"]\nwhen = "{when}"\ndeadline_seconds = 5\n'
        for name, (when, script) in hooks.items()
    )
    (trusted / "volume").mkdir(exist_ok=True)
    return LocalAgent("host", state_folder=trusted, hooks=write_hooks(trusted, text))


async def _flush(agent: LocalAgent, trusted: Path, deadline_seconds: float = 10) -> int:
    await agent.prepare([Volume("data", str(trusted / "volume"))])
    try:
        return len(await agent.flush(POINT, deadline_seconds))
    finally:
        await agent.close()


def test_hooks_run_before_and_after_the_flush_in_the_order_of_the_file(trusted: Path) -> None:
    said = f"{trusted}/said"
    agent = _agent(
        trusted,
        {
            "z-last": ("after", f"echo third >> {said}"),
            "one": ("before", f"echo first >> {said}"),
            "two": ("before", f"echo second >> {said}"),
        },
    )
    assert asyncio.run(_flush(agent, trusted)) == 1
    assert Path(said).read_text().split() == ["first", "second", "third"]


def test_a_failed_hook_fails_the_flush_and_those_after_it_still_run(trusted: Path) -> None:
    said = f"{trusted}/said"
    agent = _agent(
        trusted,
        {
            "hold": ("before", "echo cannot hold; exit 1"),
            "never": ("before", f"echo never >> {said}"),
            "broken": ("after", "exit 7"),
            "release": ("after", f"echo released >> {said}"),
        },
    )
    with pytest.raises(AgentError, match="hook hold failed with exit code 1: cannot hold") as raised:
        asyncio.run(_flush(agent, trusted))
    assert Path(said).read_text().split() == ["released"]
    assert "hook broken failed with exit code 7" in "".join(raised.value.__notes__)


def test_a_failed_hook_after_the_flush_fails_it_too(trusted: Path) -> None:
    agent = _agent(trusted, {"release": ("after", "exit 2")})
    with pytest.raises(AgentError, match="hook release failed"):
        asyncio.run(_flush(agent, trusted))


def test_the_deadline_of_the_flush_holds_for_the_hooks_before_it(trusted: Path) -> None:
    agent = _agent(trusted, {"slow": ("before", "sleep 60"), "release": ("after", f"touch {trusted}/released")})
    before = time.monotonic()
    with pytest.raises(AgentError, match="waiting for a hook"):
        asyncio.run(_flush(agent, trusted, 0.3))
    assert time.monotonic() - before < 3
    assert (trusted / "released").exists()


def test_a_bad_hook_file_is_refused_by_prepare(trusted: Path) -> None:
    agent = _agent(trusted, {"a": ("before", "true")})
    (trusted / "hooks.toml").chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IWOTH)
    with pytest.raises(AgentError, match="can be written by others"):
        asyncio.run(_flush(agent, trusted))


def test_a_hook_that_is_cancelled_while_it_starts_leaves_nothing_running() -> None:
    seconds = f"61.{os.getpid()}"

    async def cancel_early() -> None:
        for delay in (0, 0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.02):
            task = asyncio.create_task(run_hook(shell(f"sleep {seconds} & sleep {seconds}"), POINT))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel_early())
    deadline = time.monotonic() + 3
    while (left := _commands_with(seconds)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def _commands_with(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in command:
                found.append(command)
    return found
