"""Why a clone does not become its target: refused before its server starts, or told by what that server said."""

from __future__ import annotations

from connectors.databases.postgres.lsn import Lsn
from connectors.databases.postgres.programs import last_lines
from trigger.errors import RestoreError
from trigger.replay import Replay, Running, Target

_HINTS = {
    "before consistent recovery point": "the base holds more than the target; an earlier point is needed",
    "recovery ended before configured recovery target": "the journal ends before the target, or is damaged there; for a"
    " time: no commit is later, and the running cluster did not make one (--to-latest gives all there is)",
    "resource manager with ID": "an extension wrote the log; name its library in restore.keep_libraries",
    "could not create lock file": "another server already runs on this clone",
    "could not create any TCP/IP sockets": "the address is not one of this host's, or its port is taken",
    "Permission denied": "the owner of the data must be able to reach the clone, the staged log and the programs",
}
_DAMAGED = {"WARNING", "pg_controldata"}
"""What `pg_controldata` begins with, up to the first colon, where the checksum is wrong: versions 15 to 17, and 18."""


def require_fit(control: dict[str, str], replay: Replay) -> None:
    """Refuse a clone of another cluster or server, and one that is consistent only behind the target.

    Raises:
        RestoreError: it is one of these.
    """
    target, bracket = replay.target, replay.bracket
    system = control["Database system identifier"]
    if system != target.history.system:
        raise RestoreError(f"the clone is of cluster {system}, the target in cluster {target.history.system}")
    _require_server(control, replay)
    if bracket is not None and target.at is not None and target.at < bracket.stop.at:
        raise RestoreError(
            f"the target {Lsn(target.at)} lies before {bracket.stop.place}, where the copy becomes consistent",
            hint="restore from an earlier point",
        )


def _require_server(control: dict[str, str], replay: Replay) -> None:
    """Refuse the files of another server than the one that said from where they are replayed, and how far they go.

    Between these two the server wrote the control file that was cut: it begins at or behind the first, and its newest
    checkpoint lies before the second. `cover` holds them against each other by now; points of before bear what an
    address said that led to another server, and its backup label. What is damaged is left to the server, which says so
    when it starts.
    """
    if _DAMAGED & control.keys():
        return
    redo, checkpoint = (Lsn.parse(control[f"Latest checkpoint{name}"]) for name in ("'s REDO location", " location"))
    timeline = int(control["Latest checkpoint's TimeLineID"])
    wrong = ""
    if replay.redo is not None and (timeline, redo) < (replay.redo.history.branch, replay.redo.at):
        wrong = f"are replayed from {redo} of timeline {timeline}, and the server's began at {replay.redo} by then"
    elif replay.held_until and checkpoint >= replay.held_until:
        wrong = f"have a checkpoint at {checkpoint}, and the server had come to {Lsn(replay.held_until)} at the most"
    if wrong:
        raise RestoreError(
            f"the point's files are not those of the server whose commits it is said to hold: they {wrong}",
            hint="the address led to another server then; name a commit from before that (trigpoint list)",
        )


def require_all(running: Running, replay: Replay) -> None:
    """Refuse a latest state that lacks some of the log: a server takes damage for the end; raises `RestoreError`."""
    if replay.target.is_latest and running.replayed < replay.until:
        raise RestoreError(
            f"the replay ended at {Lsn(running.replayed)}, the log that is kept goes to {Lsn(replay.until)}: it is"
            " damaged there",
            hint="name a commit before that place (--to-xid); what comes after it needs a point behind the damage",
        )


def failure(target: Target, words: str, why: str) -> RestoreError:
    """Give the error of a server that did not come to a target, by its last words, or by `why` where that is known."""
    said = [line for line in words.splitlines() if "FATAL" in line or "PANIC" in line] or words.splitlines()[-6:]
    hint = next((hint for sign, hint in _HINTS.items() if sign in words), "the server's log has more")
    return RestoreError(
        f"the clone did not reach {target.description}: {why or last_lines(chr(10).join(said))}", hint=hint
    )
