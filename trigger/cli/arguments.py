"""What several commands take: the configuration, the form of the answer, times, sizes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import time as clock
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo, available_timezones

import typer

from trigger.cli import show
from trigger.errors import ConfigError
from trigger.model import Address
from trigger.position import History, Name
from trigger.shape import plain

if TYPE_CHECKING:  # pydantic and CEL take a while to load, and help and completion do without
    from trigger.config.options import Options

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="The configuration; else $TRIGPOINT_CONFIG, ./trigpoint.toml, /etc/trigpoint/trigpoint.toml.",
        show_default=False,
        dir_okay=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
AcceptLoss = Annotated[
    bool,
    typer.Option(
        "--accept-loss",
        help="Believe a storage that shows no snapshot at all. Of several, what others keep of its points goes too.",
    ),
]
InHistory = Annotated[
    str | None,
    typer.Option("--history", help="Any history that `find` shows, such as 7391/1+1.", show_default=False),
]

before_command: ContextVar[Path | None] = ContextVar("before_command", default=None)
"""The configuration given before the command's name: `trigpoint -c FILE list`."""

SYSTEM_CONFIG = Path("/etc/trigpoint/trigpoint.toml")
LOCAL_CONFIG = Path("trigpoint.toml")


def given_text(words: str | None) -> str | None:
    """Give text of the command line in UTF-8, whatever the locale; a byte that is none as names and markers have it."""
    return words if words is None else os.fsencode(words).decode(errors="backslashreplace")


def config_path(given: Path | None) -> Path:
    """Give the configuration file to read; the last place is given where there is none, for the message's sake."""
    told = given or before_command.get()
    show.configured_by.set(shlex.quote(str(told.absolute())) if told else "")
    if told:
        return told
    if named := os.environ.get("TRIGPOINT_CONFIG"):
        return Path(named)
    return LOCAL_CONFIG if LOCAL_CONFIG.exists() else SYSTEM_CONFIG


def options(given: Path | None) -> Options:
    """Give the options, every rule in them compiled once so that a bad one is refused here.

    Raises:
        ConfigError: the file cannot be read, or is wrong.
    """
    from trigger.config.drivers import know_places
    from trigger.config.mistakes import place_in
    from trigger.config.options import load

    know_places()  # whatever is shown of a log is written as its users write it
    path = config_path(given)
    loaded = load(path)
    if not loaded.rules:
        return loaded
    from trigger.protect.qualify import Rules

    try:
        Rules(loaded.rules)
    except ConfigError as error:
        raise ConfigError(f"{place_in(path, error.message)}{error.message}", hint=error.hint) from None
    return loaded


def time(text: str) -> datetime:
    """Give the time written in `text`, aware, or the present one for `now`; raises `ConfigError` where it has no zone.

    A naive time would mean another moment on the operator's laptop than on the server. The zone may stand apart, as in
    PostgreSQL's log, and be a name or an abbreviation: `2026-03-01 12:00:05.250 CET`, `2026-03-01 12:00:05.250 -03`.
    """
    written = text.strip()
    if written == "now":
        return datetime.now(UTC)
    moment, _, zone = written.rpartition(" ")
    is_named = bool(moment) and zone[:1].isalpha()
    parsed = None
    with contextlib.suppress(ValueError):
        parsed = datetime.fromisoformat(moment if is_named else re.sub(r" +(?=[+-]\d)", "", written))
    if parsed is None or (is_named and parsed.tzinfo is not None):
        raise ConfigError(
            f"not a time: {text!r}", hint="times are ISO-8601 with a zone, such as 2026-03-01T12:00:05.25Z, or now"
        )
    if is_named:
        return _in_zone(parsed, zone)
    if parsed.tzinfo is None:
        raise ConfigError(
            f"the time {text!r} has no zone",
            hint=f"add Z for UTC ({written}Z) or an offset ({written}+02:00)",
        )
    return parsed


def _in_zone(moment: datetime, name: str) -> datetime:
    """Give the moment of a local time; raises `ConfigError` where the zone does not say which one that is."""
    found = [moment.replace(tzinfo=timezone(offset, name)) for offset in sorted(_offsets(moment, name))]
    if len(found) == 1:
        return found[0]
    there = " or ".join(one.isoformat()[-len("+00:00") :] for one in found)
    words = f"the zone {name} at {moment} may be {there}" if found else f"the zone {name!r} is not known"
    raise ConfigError(words, hint=f"give the offset in its place, such as {(*found, moment.replace(tzinfo=UTC))[0]}")


def _offsets(moment: datetime, name: str) -> set[timedelta]:
    """Give how far from UTC a local time may be in a zone, or by an abbreviation; none for no such.

    An abbreviation means what this host's own zone means by it, else whatever any zone means by it that year: the name
    of a zone may be one too (CET), which summer time has no part in then.
    """
    if name in (local := clock.tzname):  # both of it have an offset of their own, in summer and in winter
        return {timedelta(seconds=-(clock.altzone if local.index(name) else clock.timezone))}
    if name in ("UTC", "GMT", "Z"):
        return {timedelta(0)}
    seasons = [(moment.year, 1, 1), (moment.year, 7, 1)]
    zones = [] if "/" in name else [ZoneInfo(zone) for zone in available_timezones()]
    there = [datetime(*season, tzinfo=zone) for zone in zones for season in seasons]
    meant = [one for one in there if one.tzname() == name]
    if not meant:
        with contextlib.suppress(ValueError, OSError, KeyError):
            meant = [moment.replace(tzinfo=ZoneInfo(name), fold=fold) for fold in (0, 1)]  # it may be there twice
    return {offset for one in meant if (offset := one.utcoffset()) is not None}


def given(context: typer.Context) -> list[str]:
    """Give the options of a command line that stand there, in the order of the command's help."""
    sources = [
        (parameter.opts[0], context.get_parameter_source(parameter.name or "")) for parameter in context.command.params
    ]
    return [option for option, source in sources if source is not None and source.name == "COMMANDLINE"]


def require_alone(context: typer.Context, option: str, *beside: str) -> None:
    """Refuse a command line that gives an option with others than go `beside` it; raises `ConfigError`.

    Whatever is accepted is done as it says: what would be passed over in silence may be what somebody relies on.
    """
    require_apart(context, option, [one for one in given(context) if one not in (option, *beside, "--config")])


def require_apart(context: typer.Context, option: str, others: Sequence[str], why: str = "") -> None:
    """Refuse a command line that gives an option with any of some others; raises `ConfigError`."""
    there = given(context)
    refused = ", ".join(one for one in others if one in there)
    if option in there and refused:
        reason = f": {why}" if why else ""
        raise ConfigError(f"{option} does not go with {refused}{reason}", hint=f"leave out {refused}")


def pass_on(config: Path | None, *, as_json: bool) -> None:
    """Heed what stood before the name of an inner command, as before that of an outer one.

    Raises:
        ConfigError: something that belongs behind it.
    """
    if as_json:
        raise ConfigError("--json stands before the command", hint="put it at the end")
    if config is not None:
        before_command.set(config)


def transaction(text: str) -> Name:
    """Give the name of a commit written in `text`; raises `ConfigError` where there is none."""
    if not text.strip():
        raise ConfigError(
            "no transaction is named", hint="for PostgreSQL it is a whole number, as pg_current_xact_id() prints it"
        )
    return Name.parse(text.strip())


def point_reference(text: str) -> int | str:
    """Give what names a point: its number, or its id or name."""
    return int(text) if text.isascii() and text.isdigit() else text


def address(text: str) -> Address:
    """Give the `ADDRESS:PORT` written in `text`, an IPv6 address in brackets; raises `ConfigError` for another."""
    parts = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([0-9.]+)):([0-9]{1,5})", text.strip())
    with contextlib.suppress(ValueError):
        if parts and 0 < int(parts[3]) < 1 << 16:
            return Address(str(ip_address(parts[1] or parts[2])), int(parts[3]))
    raise ConfigError(
        f"not an address and a port: {text!r}", hint="such as 127.0.0.1:5433, [::1]:5433, or 0.0.0.0:5433 for all"
    )


def place(text: str, chosen: Options) -> None:
    """Refuse, by `PositionError`, what is no place as the configured kind of database writes it."""
    History(chosen.database.driver, "").parse_place(text)


def confirm(what: str, *, yes: bool) -> None:
    """Ask before something big; raises `ConfigError` where nobody can answer, `typer.Abort` on a no."""
    require_answer(what, yes=yes)
    if not yes:
        typer.confirm(plain(f"This will {what}. Go on?"), abort=True, err=True)


def require_answer(what: str, *, yes: bool, first: str = "") -> None:
    """Refuse what nobody will be there to say yes to, and name what to look at `first`; raises `ConfigError`."""
    if not yes and not sys.stdin.isatty():
        raise ConfigError(f"this will {what}", hint=f"{first}give --yes to do it without being asked")
