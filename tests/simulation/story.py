"""What happens in one simulated run, drawn from its seed before anything runs: load, options, and every mishap.

A story is a list of acts with their times. Acts change the world, never the service, so they need no service to be
alive. The weather says how often a call of a port is late, fails, or loses its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pydantic import ByteSize

from connectors.memory.manner import ANNOUNCED, BINLOG, MEMORY, POSTGRES, Manner
from trigger.config.options import PointOptions, RuleOptions
from trigger.model import Changes, Commit
from trigger.ports import Capability

STREAMS = ("bank", "shop", "audit")
WANTED_TABLE, OTHER_TABLE = "public.accounts", "public.log"
WANTED_MARKER = "payday"

SORTS: dict[str, tuple[Manner, ...]] = {
    "memory": (MEMORY,),
    "binlog": (BINLOG,),
    "announced": (ANNOUNCED,),
    "both": (MEMORY, BINLOG),
    "upgrade": (POSTGRES,),
}
"""What databases a run has: of one kind, of two at once, or one whose catalog is of an earlier version at times."""

Matters = Callable[[Commit], bool]


class RuleSet(NamedTuple):
    """Rules, and what they mean in words that do not pass through the code under test."""

    rules: tuple[RuleOptions, ...]
    matters: Matters


def _rows(commit: Commit) -> int:
    return sum(changes.inserted + changes.updated + changes.deleted for changes in commit.tables.values())


RULE_SETS = (
    RuleSet((), lambda _: True),
    RuleSet((RuleOptions(name="accounts", tables=["public.acc*"]),), lambda commit: WANTED_TABLE in commit.tables),
    RuleSet((RuleOptions(name="marked", markers=["pay*"]),), lambda commit: WANTED_MARKER in commit.markers),
    RuleSet(
        (RuleOptions(name="big", expression="rows > 3"), RuleOptions(name="shop", database="shop")),
        lambda commit: _rows(commit) > 3 or commit.stream == "shop",
    ),
)


class Act(NamedTuple):
    """One thing that happens to the world at a moment of virtual time."""

    at: float
    name: str
    arguments: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Weather:
    """How likely each mishap of one call is; a crash of the service is counted in calls."""

    late: float = 0.0
    """The call takes up to `late_seconds`."""
    late_seconds: float = 0.2
    fails_before: float = 0.0
    """It fails without any effect."""
    fails_after: float = 0.0
    """It has its effect, and fails: the answer was lost."""
    hangs: float = 0.0
    """It takes very long, then fails."""


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that a seed decides."""

    seed: int
    streams: tuple[str, ...]
    rules: RuleSet
    points: PointOptions
    capabilities: frozenset[Capability]
    volumes: int
    budget: int
    """How many snapshots the storage bears."""
    weather: Weather
    acts: tuple[Act, ...]
    ends_at: float
    """From here on nothing goes wrong any more."""
    crash_at_call: tuple[tuple[str, int], ...] = ()
    """(which, how often it is passed first), one a life: the life ends before, in the middle of, or behind this call;
    "" is any call."""
    at_failpoint: tuple[tuple[str, int, str], ...] = ()
    """(name, how often it is passed first, what then happens), one after the other."""
    targets: int = field(default=4)
    """How many restores are tried at the end."""
    sort: str = "memory"
    manners: tuple[Manner, ...] = (MEMORY,)
    """How each database counts."""
    older_at_lives: tuple[int, ...] = ()
    """Before which lives the catalog and the tags are put into the form of version 1, as if that had run until then."""


FAILPOINTS = (
    "after-open",
    "after-flush",
    "after-cover",
    "after-snapshot",
    "after-ceiling",
    "after-retag",
    "after-seal",
    "after-close-gaps",
    "after-settle",
    "after-expiring",
    "after-delete",
    "catalog-open-committed",
    "catalog-seal-begun",
    "catalog-blocks-written",
    "catalog-settled-written",
    "catalog-point-sealed",
    "catalog-seal-committed",
    "catalog-point-opened",
    "catalog-point-failed",
    "catalog-gap-recorded",
    "catalog-missed-written",
)


def tell(seed: int, sort: str = "") -> Story:
    """Give the story of a seed; of its own sort where none is asked for, and without lives of logs if it is `plain`."""
    story = _tell(seed)
    draw = random.Random(seed ^ 0x4B1D)
    drawn = draw.choice(("memory", *SORTS))
    if sort == "plain":
        return story
    sort = sort or drawn
    manners, streams = SORTS[sort], story.streams
    if len(manners) > len(streams):
        streams = STREAMS[: len(manners)]
    story = replace(story, sort=sort, manners=manners, streams=streams, volumes=max(story.volumes, len(manners)))
    calm = story.weather == Weather()
    acts = [] if calm or draw.random() < 0.4 else _lives(draw, story.ends_at)
    if sort == "upgrade":
        acts = [Act(draw.uniform(1, story.ends_at), draw.choice(("crash", "stop"))) for _ in range(2)]
        story = replace(story, older_at_lives=tuple(draw.sample((2, 3, 4), 2)))
    elif acts and draw.random() < 0.3:
        places = ("after-open", "after-flush", "after-cover", "after-snapshot", "after-ceiling")
        turn = draw.choice(places if manners[0].replays else places[:1]), draw.randint(0, 4), "put_back"
        story = replace(story, at_failpoint=(turn, *story.at_failpoint))
    if not calm and draw.random() < 0.25:
        acts += _blink(draw, streams, draw.uniform(0.5, story.ends_at))
    if not calm and draw.random() < 0.15:
        acts += _half_a_record(draw.choice(streams), draw.uniform(0.5, story.ends_at))
    if sort == "announced":  # nothing leads from one of its points to another, so that none of them may go
        story = replace(story, capabilities=frozenset(Capability), budget=1000)
    acts = [act for act in (*story.acts, *acts) if act.at < story.ends_at]
    return replace(story, acts=tuple(sorted(acts, key=lambda act: act.at)))


def _lives(draw: random.Random, ends_at: float) -> list[Act]:
    """An older copy that is put back, a log that begins anew, and old log that is let go of meanwhile."""
    acts = [Act(draw.uniform(0, ends_at), "copy") for _ in range(draw.choice((1, 2, 3)))]
    if draw.random() < 0.2:
        acts += _quiet_copy(draw.uniform(0.5, ends_at), draw.choice((1, 2, 4)))
    if draw.random() < 0.2:
        acts += _way_back(draw, draw.uniform(0.5, ends_at))
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.uniform(0.5, ends_at)
        if draw.random() < 0.25:
            acts.append(Act(at, "reset_log"))
        else:
            acts.append(Act(at, "put_back", (draw.random(), draw.choice((0, 0, 1, 4, 12)))))
    acts += [Act(draw.uniform(1, ends_at), "give_up") for _ in range(draw.choice((0, 0, 1)))]
    return acts


def _quiet_copy(at: float, ahead: int) -> list[Act]:
    """Nothing but records that commit nothing lies between a copy and what was seen when that is put back."""
    unseen = [Act(at + number * 0.01, "ddl", (400,)) for number in range(1, 13)]
    return [Act(at, "copy"), *unseen, Act(at + 0.4, "put_back", (0.999, ahead))]


def _way_back(draw: random.Random, at: float) -> list[Act]:
    """The server leaves its history for another one, and comes back to it with all that was known then, or less."""
    left, back = at + draw.choice((0.02, 1.0)), at + draw.choice((1.5, 3.0))
    away = Act(left, "promote", (draw.choice((0, 1, 2)), draw.random() < 0.6))
    return [Act(at, "checkpoint"), Act(at + 0.01, "copy"), away, Act(back, "put_back", (0.999, draw.choice((0, 3))))]


def _blink(draw: random.Random, streams: tuple[str, ...], at: float) -> list[Act]:
    """The connections break; commits come, and slots are moved or lost, before anybody is back."""
    acts = [Act(at, "cut_connections")]
    for stream in streams:
        acts.append(
            Act(at + 0.05, "commit", (stream, {WANTED_TABLE: Changes(updated=4)}, (WANTED_MARKER,), 80, "sync"))
        )
        how = draw.choice(("drop_slot", "recreate_slot", "advance_slot", "lose_slot", "cut_connections"))
        acts.append(Act(at + 0.1, how, (stream,) if how.endswith("_slot") else ()))
    return acts


def _half_a_record(stream: str, at: float) -> list[Act]:
    """A point is asked for while the log is flushed as far as the middle of a record."""
    long = Act(at, "commit", (stream, {WANTED_TABLE: Changes(updated=4)}, (WANTED_MARKER,), 2000, "async"))
    return [long, Act(at + 0.001, "flush_pages"), Act(at + 0.002, "demand")]


def _tell(seed: int, commits: int = 22) -> Story:
    """Give the story of a seed for one database of which no older copies are put back."""
    draw = random.Random(seed)
    ends_at = draw.uniform(6, 18)
    streams = STREAMS[: draw.choice((1, 1, 2, 2, 3))]
    calm = draw.random() < 0.15
    acts = [*_load(draw, streams, ends_at, draw.randint(commits // 2, commits * 3 // 2))]
    if not calm:
        acts += _mishaps(draw, streams, ends_at)
    return Story(
        seed=seed,
        streams=streams,
        rules=draw.choice(RULE_SETS),
        points=_point_options(draw),
        capabilities=draw.choice(
            (
                frozenset(Capability),
                frozenset(Capability),
                frozenset({Capability.ATOMIC}),
                frozenset[Capability](),
            )
        ),
        volumes=draw.choice((1, 1, 2)),
        budget=draw.choice((1000, 8, 6)),
        weather=Weather() if calm else _weather(draw),
        acts=tuple(sorted((act for act in acts if act.at < ends_at), key=lambda act: act.at)),
        ends_at=ends_at,
        crash_at_call=() if calm else tuple(_crash(draw) for _ in range(draw.choice((0, 0, 1, 1, 2)))),
        at_failpoint=() if calm else tuple(_turn(draw) for _ in range(draw.choice((0, 1, 1, 2)))),
    )


def _crash(draw: random.Random) -> tuple[str, int]:
    if draw.random() < 0.5:
        return "", draw.randint(1, 250)
    return draw.choice(("storage.snapshot", "storage.retag", "catalog.seal", "storage.delete")), draw.randint(1, 5)


def _turn(draw: random.Random) -> tuple[str, int, str]:
    """A crash of the service, a failover, or a burst of writes right between two steps of a round."""
    match draw.randrange(8):
        case 0:
            return (
                draw.choice(("after-open", "after-flush", "after-cover", "after-snapshot")),
                draw.randint(0, 4),
                "failover",
            )
        case 1 | 2:
            return "after-cover", draw.randint(0, 4), "burst"
        case 3:
            return "after-cover", draw.randint(0, 4), "unseen"
    return draw.choice(FAILPOINTS), draw.randint(0, 4), "crash"


def _point_options(draw: random.Random) -> PointOptions:
    min_interval = draw.choice((0.0, 0.2, 1.0))
    return PointOptions(
        min_interval_seconds=min_interval,
        max_delay_seconds=max(min_interval, draw.choice((0.5, 2.0, 5.0))),
        per_minute=draw.choice((6, 30, 600)),
        interval_seconds=draw.choice((None, None, 4.0)),
        cron=draw.choice((None, None, None, "* * * * *")),
        catch_all_seconds=draw.choice((None, 3.0, 300.0)),
        restore_objective_seconds=draw.choice((30.0, 30.0, 1.0)),
        replay_bytes_per_second=ByteSize(draw.choice((50_000_000, 4000, 500))),
        retry_seconds=draw.choice((0.2, 1.0)),
    )


def _weather(draw: random.Random) -> Weather:
    def one_of(*choices: float) -> float:
        return draw.choice(choices)

    return Weather(
        late=one_of(0.0, 0.1, 0.5),
        late_seconds=one_of(0.05, 0.5, 2.0),
        fails_before=one_of(0.0, 0.0, 0.01, 0.05),
        fails_after=one_of(0.0, 0.0, 0.01, 0.05),
        hangs=one_of(0.0, 0.0, 0.0, 0.005),
    )


def _load(draw: random.Random, streams: tuple[str, ...], ends_at: float, commits: int) -> list[Act]:
    """Bursts of commits with idle times between, visible or not, synchronous or not."""
    acts: list[Act] = []
    while len(acts) < commits:
        at = draw.uniform(0, ends_at)
        for _ in range(draw.choice((1, 1, 2, 5, 12))):
            acts.append(_commit(draw, at, streams))
            at += draw.choice((0.0, 0.001, 0.05, 0.4))
        if draw.random() < 0.2:
            acts.append(Act(at, "ddl", (draw.choice((40, 400, 4000)),)))
        if draw.random() < 0.3:
            housekeeping = draw.choice(("write", "write_back", "flush", "flush_pages", "flush_pages", "checkpoint"))
            acts.append(Act(at + draw.random(), housekeeping))
    if draw.random() < 0.4:
        began = draw.uniform(0, ends_at / 2)
        ended, stream = draw.uniform(began, ends_at), draw.choice(streams)
        acts += [Act(began, "begin_long", (stream,)), Act(ended, "end_long", (stream,))]
    acts += [Act(draw.uniform(0, ends_at), "demand") for _ in range(draw.choice((0, 0, 1, 2)))]
    return acts


def _commit(draw: random.Random, at: float, streams: tuple[str, ...]) -> Act:
    tables: dict[str, Changes] = {}
    if draw.random() < 0.7:
        tables[WANTED_TABLE] = Changes(inserted=draw.randint(0, 3), updated=draw.randint(1, 3))
    if draw.random() < 0.4:
        tables[OTHER_TABLE] = Changes(inserted=draw.randint(1, 2))
    markers = (WANTED_MARKER,) if draw.random() < 0.3 else ()
    size = draw.choice((0, 0, 80, 200, 2000))
    how = draw.choice(("sync", "sync", "sync", "async", "written"))
    return Act(at, "commit", (draw.choice(streams), tables, markers, size, how))


def _mishaps(draw: random.Random, streams: tuple[str, ...], ends_at: float) -> list[Act]:
    """What goes wrong outside the service; each story has a few kinds of it."""
    acts: list[Act] = []
    for _ in range(draw.choice((0, 1, 2, 3, 5))):
        at = draw.uniform(0.1, ends_at)
        acts += draw.choice((_slot, _outage, _failover, _failover, _storage, _journal, _elsewhere))(draw, streams, at)
    return acts


def _slot(draw: random.Random, streams: tuple[str, ...], at: float) -> list[Act]:
    how = draw.choice(("drop_slot", "recreate_slot", "advance_slot", "lose_slot"))
    return [Act(at, how, (draw.choice(streams),))]


def _outage(draw: random.Random, _: tuple[str, ...], at: float) -> list[Act]:
    return [Act(at, "server_crash", (draw.random() < 0.3,)), Act(at + _length(draw), "server_restart")]


def _failover(draw: random.Random, _: tuple[str, ...], at: float) -> list[Act]:
    return [Act(at, "promote", (draw.choice((0, 0, 1, 2, 4)), draw.random() < 0.6))]


def _storage(draw: random.Random, _: tuple[str, ...], at: float) -> list[Act]:
    begin, end = draw.choice(
        (
            ("lose_snapshot", ""),
            ("lose_cut", ""),
            ("storage_full", "storage_room"),
            ("catalog_full", "catalog_room"),
            ("write_error", "clear_write_error"),
        )
    )
    if not end:
        return [Act(at, begin, (draw.random(),))]
    return [Act(at, begin), Act(at + _length(draw), end)]


def _journal(draw: random.Random, _: tuple[str, ...], at: float) -> list[Act]:
    return [Act(at, "damage_journal")]


def _elsewhere(draw: random.Random, _: tuple[str, ...], at: float) -> list[Act]:
    if draw.random() < 0.3:
        return [Act(at, "skew", (draw.choice((-3600.0, -5.0, 5.0, 3600.0)),))]
    return [Act(at, draw.choice(("cut_connections", "stop", "crash", "crash")))]


def _length(draw: random.Random) -> float:
    """Give how long a mishap lasts."""
    return draw.choice((0.05, 1.0, 5.0))
