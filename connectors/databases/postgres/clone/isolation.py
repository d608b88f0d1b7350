"""Make the copy of a cluster harmless before its server is started: nothing in it may reach production.

A copy believes that it is production: it would write into production's archive, wait for production's standbys, pull
from production's publishers and reach for production's tablespaces. So its server never reads production's
configuration. It gets one of its own, in a folder `trigpoint` inside the copy; what belongs to the life of the
original (lock file, slots, `ALTER SYSTEM` settings) is taken out, and every link is pointed at the copy's own files.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from connectors.databases.postgres.clone.inside import Held, Part, empty, folder_of, held, part_of
from connectors.databases.postgres.clone.placement import Placement
from connectors.databases.postgres.log.files import entered, give
from connectors.databases.postgres.log.wal import history_timeline
from connectors.databases.postgres.lsn import Lsn
from trigger.errors import RestoreError
from trigger.model import Address, Bracket, Finding, Severity, Volume
from trigger.ports import Clone
from trigger.replay import Replay
from trigger.trusted import NotOursError, open_file, read_text

OWN_FOLDER = "trigpoint"
_OWN_LIFE = ("postmaster.pid", "postmaster.opts", "recovery.signal", "standby.signal", "backup_label.old")
_SET_ASIDE = ("postgresql.auto.conf", "backup_label", "tablespace_map")
_STATUS = "archive_status"
_EMPTIED = ("pg_replslot", "pg_stat_tmp")
_SEGMENT = re.compile(r"[0-9A-F]{24}(\.partial)?")
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_@+,./:=-]*")
_SETTING = re.compile(r"(\w+) setting")
_FULL_NAMES = {"max_prepared_xacts": "max_prepared_transactions", "max_locks_per_xact": "max_locks_per_transaction"}
_OUR_OWN = ("wal_level", "max_wal_senders")
"""Of the settings that the control file holds, those that a clone has otherwise: it is nobody's primary."""
_HBA = "local all all trust\nlocal replication all reject\n"
_HBA_OVER_TCP = "host replication all all reject\nhost all all all scram-sha-256\n"
_LEADS_OUT = (
    "its server would write into production's files; restore a commit from before it was there, or add that folder to"
    " the volumes and take a point"
)
_LISTEN_FILE = "listen.conf"
_STAGED = "staged"
_ORIGINS = "2000"
"""No log says how many origins there were; so many take a megabyte."""


class Stop(NamedTuple):
    """A place at which a replay is told to stop."""

    at: Lsn
    inclusive: bool
    """Whether the record that begins there is replayed, else the first one that begins there or behind stays out."""


@dataclass(frozen=True, slots=True)
class Isolated:
    """A copy that may be started: where it lies, who owns it, and what was taken out."""

    data: Path
    owner: tuple[int, int]
    major: int
    slots: tuple[str, ...]
    """The replication slots that were removed."""

    @property
    def folder(self) -> Path:
        """Where our own files of this copy lie."""
        return self.data / OWN_FOLDER


def plain(path: Path, what: str) -> Path:
    """Give `path` if it may stand in a list of folders in a configuration, else raise `RestoreError`."""
    if _PLAIN_PATH.fullmatch(str(path)) is None:
        raise RestoreError(
            f"{what} {str(path)!r} holds a character at which a list of folders could be cut",
            hint="use a path of letters, digits and _ @ + , . / : = - only",
        )
    return path


def isolate(clone: Clone, placement: Placement, volumes: Sequence[Volume], bracket: Bracket | None) -> Isolated:
    """Take everything out of a copy that ties it to production, and point its links at itself.

    Blocks on file operations. Doing it again, also after a half done try, gives the same.

    Raises:
        RestoreError: there is no cluster where it should be, it belongs to root, a part of it lies outside the
            copy, or its backup label is missing.
    """
    data = placement.cluster_in(clone)
    if bracket is not None and "START WAL LOCATION" not in bracket.document.get("label", ""):
        raise RestoreError(
            f"the backup label of point {clone.point} is missing",
            hint="its snapshot is not one instant and would start with damaged data; use another point",
        )
    with held_data(data, clone) as here:
        owner = _owner(data, here.path.stat())
        isolated = Isolated(here.path, owner, major_of(here.path), _names(here.path / "pg_replslot"))
        _own_folder(isolated)
        _take_out(isolated)
        _point_links_inside(isolated, clone, placement, volumes)
        if bracket is not None:
            with _log_in(here.path, clone, volumes) as log:
                _start_from_label(here.opened, log, bracket, owner)
    return replace(isolated, data=data)


@contextlib.contextmanager
def held_data(data: Path, clone: Clone) -> Iterator[Held]:
    """Hold the data directory of a clone, so that no link leads elsewhere, also none that is put on the way to it now.

    Raises:
        RestoreError: a link inside the clone leads to it: it is another's, production's say.
    """
    with contextlib.ExitStack() as stack:
        try:
            here = stack.enter_context(held(part_of(data, clone, ()), clone))
        except OSError as error:
            message = f"a link inside the clone leads to {data}"
            raise RestoreError(message, hint="see who put it there; use another point") from error
        yield here


def major_of(data: Path) -> int:
    """Give the major version of a data directory; raises `RestoreError` where its file does not say one."""
    try:
        return int(read_text(data / "PG_VERSION"))
    except ValueError:
        raise RestoreError(
            f"{data / 'PG_VERSION'} names no version of PostgreSQL",
            hint="the snapshot is damaged; use another point",
        ) from None
    except NotOursError as error:
        raise RestoreError(error.message, hint=error.remedy) from None


def _owner(data: Path, status: os.stat_result) -> tuple[int, int]:
    if status.st_uid == 0:
        raise RestoreError(
            f"the cluster at {data} belongs to root, and PostgreSQL does not run as root",
            hint="the snapshot did not keep its owner; check the storage driver and the volume",
        )
    if os.geteuid() not in (0, status.st_uid):
        raise RestoreError(
            f"the cluster at {data} belongs to user id {status.st_uid}, and we are {os.geteuid()}",
            hint="run trigpoint as that user, or as root",
        )
    return status.st_uid, status.st_gid


def _own_folder(isolated: Isolated) -> None:
    """Make our folder; what was set aside by an earlier try stays."""
    isolated.folder.mkdir(mode=0o700, exist_ok=True)
    if not stat.S_ISDIR(isolated.folder.lstat().st_mode):
        raise RestoreError(f"what is called {OWN_FOLDER} in the data directory of the clone is not a folder")
    give(isolated.folder, isolated.owner)


def _take_out(isolated: Isolated) -> None:
    for name in _OWN_LIFE:
        (isolated.data / name).unlink(missing_ok=True)
    with entered(isolated.folder) as aside:
        for name in _SET_ASIDE:
            if (isolated.data / name).exists():
                os.rename(isolated.data / name, f"production.{name}", dst_dir_fd=aside)
    for name in _EMPTIED:
        folder = isolated.data / name
        if folder.is_symlink():  # often a file system in memory, shared with production
            folder.unlink()
        folder.mkdir(mode=0o700, exist_ok=True)
        give(folder, isolated.owner)
        with entered(folder) as opened:
            empty(opened)


def _point_links_inside(isolated: Isolated, clone: Clone, placement: Placement, volumes: Sequence[Volume]) -> None:
    """Point every link of the data directory at the copy; one that would lead out of it refuses the restore (R11)."""
    for link, inside in list(_links_inside(isolated.data, clone, placement, volumes)):
        if inside is None:
            raise RestoreError(_leads_out(link, isolated.data), hint=_LEADS_OUT)
        link.unlink()
        link.symlink_to(inside)
        give(link, isolated.owner)


def _links_inside(
    data: Path, clone: Clone, placement: Placement, volumes: Sequence[Volume]
) -> Iterator[tuple[Path, Path | None]]:
    """Give every link of a data directory, and what it leads to in the copy; None where that has none of it."""
    known = {f"pg_tblspc/{oid}": spot for oid, spot in placement.tablespaces}
    known |= {"pg_wal": placement.wal} if placement.wal else {}
    for link in links(data, data / "pg_tblspc", data / "base"):
        name = str(link.relative_to(data))
        inside = folder_of(part_of(link.readlink(), clone, volumes), clone)
        if inside is None and name in known:
            inside = folder_of(Part(known[name].volume, Path(known[name].path)), clone)
        yield link, inside


def _leads_out(link: Path, data: Path) -> str:
    return f"{link.relative_to(data)} of the cluster leads to {link.readlink()}, which the clone has no copy of"


def outside(copy: Clone, placement: Placement, volumes: Sequence[Volume]) -> list[Finding]:
    """Give what `isolate` would refuse a copy for, by what its links lead to; blocks on reading them, changes nothing.

    Of what cannot be read nothing is known.
    """
    if (data := placement.data_in(copy)) is None:
        return []
    try:
        return [
            Finding(str(link.relative_to(data)), Severity.REFUSED, _leads_out(link, data), _LEADS_OUT)
            for link, inside in _links_inside(data, copy, placement, volumes)
            if inside is None
        ]
    except OSError:
        return []


def links(data: Path, *below: Path) -> Iterator[Path]:
    """Give the links in the places from which a server reads or writes data: its folder, and others of it."""
    for folder in (data, *below):
        for entry in sorted(folder.iterdir()):
            server_part = folder != data or entry.name.startswith("pg_") or entry.name in ("base", "global")
            if entry.is_symlink() and server_part and not entry.name.endswith(".conf"):
                yield entry


def _start_from_label(data: int, log: int, bracket: Bracket, owner: tuple[int, int]) -> None:
    """Make the server start from the label; the copied log is no witness, since it was copied while it was written."""
    empty(log, lambda name: is_segment(name) or history_timeline(name) is not None or name == _STATUS)
    _write_in(data, "backup_label", bracket.document["label"], owner)


@contextlib.contextmanager
def log_of(data: Path, clone: Clone, volumes: Sequence[Volume]) -> Iterator[int]:
    """Open the clone's own pg_wal; where that is a link, it may lead to production's by now.

    Raises:
        RestoreError: the clone has none.
    """
    with held_data(data, clone) as here, _log_in(here.path, clone, volumes) as log:
        yield log


@contextlib.contextmanager
def _log_in(here: Path, clone: Clone, volumes: Sequence[Volume]) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        try:
            if (here / "pg_wal").is_symlink():
                log = stack.enter_context(held(part_of((here / "pg_wal").readlink(), clone, volumes), clone)).opened
            else:
                log = stack.enter_context(entered(here / "pg_wal"))
        except OSError as error:
            message = f"pg_wal of clone {clone.name} does not lead to a folder of it"
            raise RestoreError(message, hint="see who put a link there") from error
        yield log


def is_segment(name: str) -> bool:
    """Whether a file of pg_wal is a segment."""
    return _SEGMENT.fullmatch(name) is not None


def control_data(text: str) -> dict[str, str]:
    """Give what `pg_controldata` printed, by its own names."""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def carried(control: Mapping[str, str], changes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Give the settings that decide how data and log are read, all that the control file has, as they have to be.

    Args:
        control: what `pg_controldata` printed of the snapshot.
        changes: what the log to be replayed says of them, in order: a size is the largest of all, since the replay
            has to hold all that there was at any time, anything else is what it was at last.
    """
    found = {match[1]: value for key, value in control.items() if (match := _SETTING.fullmatch(key))}
    for change in changes:
        for name in found.keys() & change.keys():
            both = (found[name], change[name])
            found[name] = max(both, key=int) if all(value.isdigit() for value in both) else change[name]
    return {_FULL_NAMES.get(name, name): value for name, value in found.items() if name not in _OUR_OWN}


def settings(
    carried: Mapping[str, str],
    isolated: Isolated,
    sockets: Path,
    libraries: Sequence[str],
    *,
    throwaway: bool,
) -> dict[str, str]:
    """Give the whole configuration of a clone's server; production's own is not read at all.

    What has to be as on the primary comes from the control file and the log (`carried`). Origins of replicated
    transactions are replayed too and need room (`max_replication_slots`, from version 18
    `max_active_replication_origins`), so these are not 0 although there are no slots.
    """
    found = dict(carried) | {
        "listen_addresses": "",
        "unix_socket_directories": str(sockets),
        "unix_socket_permissions": "0700",
        "hba_file": str(isolated.folder / "pg_hba.conf"),
        "ident_file": str(isolated.folder / "pg_ident.conf"),
        "ssl": "off",
        "archive_mode": "off",
        "archive_command": "",
        "archive_library": "",
        "primary_conninfo": "",
        "primary_slot_name": "",
        "synchronous_standby_names": "",
        "max_logical_replication_workers": "0",
        "max_sync_workers_per_subscription": "0",
        "max_replication_slots": _ORIGINS,
        "max_wal_senders": "0",
        "wal_level": "replica",
        "shared_preload_libraries": ",".join(libraries),
        "logging_collector": "off",
        "log_destination": "stderr",
        "log_line_prefix": "%m [%p] ",
        "log_timezone": "UTC",
        "lc_messages": "C",
        "log_startup_progress_interval": "250ms",
        "hot_standby": "off",  # nobody asks during the replay, and it need not keep what askers would need
        "fsync": "off",  # nobody relies on it before it is up; `PostgresRecovery` syncs all at once then
        "shared_buffers": "128MB",
        "max_wal_size": "4GB",
        "include_if_exists": _LISTEN_FILE,
    }
    if isolated.major >= 17:
        found |= {"sync_replication_slots": "off", "synchronized_standby_slots": "", "summarize_wal": "off"}
    if isolated.major >= 18:
        found["max_active_replication_origins"] = _ORIGINS
    if throwaway:
        found |= {"full_page_writes": "off", "synchronous_commit": "off", "autovacuum": "off"}
    return found


def point_at_log(isolated: Isolated, staged: Path) -> None:
    """Let the server of a copy find the folder of its log under a name of ours, whatever that folder is called."""
    with entered(isolated.folder) as folder:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_STAGED, dir_fd=folder)
        os.symlink(staged, _STAGED, dir_fd=folder)
        if os.geteuid() == 0:
            os.chown(_STAGED, *isolated.owner, dir_fd=folder, follow_symlinks=False)


def recovery_settings(replay: Replay, stop: Stop | None = None) -> dict[str, str]:
    """Give the settings that lead a replay to its target, or to where it is to `stop` before, and no further.

    The server copies the log with `cp` through a shell, as PostgreSQL does it, so no path of anybody else's may stand
    there: it works in its data directory, where `point_at_log` put a name. Files that are links would not do: the
    server writes into those that it was given.
    """
    target = replay.target
    found = {
        "restore_command": f"test -f {OWN_FOLDER}/{_STAGED}/%f && cp {OWN_FOLDER}/{_STAGED}/%f %p",
        "recovery_target_timeline": str(target.history.branch),
        "recovery_target_action": "promote",
        "recovery_target_inclusive": "on" if target.inclusive else "off",
    }
    if replay.as_cut:
        if replay.bracket is not None:
            found["recovery_target"] = "immediate"
    elif stop is not None:
        found["recovery_target_lsn"] = str(stop.at)
        found["recovery_target_inclusive"] = "on" if stop.inclusive else "off"
    elif target.at is not None:
        found["recovery_target_lsn"] = str(Lsn(target.at))
    elif target.time is not None:
        found["recovery_target_time"] = target.time.isoformat(sep=" ", timespec="microseconds")
    return found


def configuration(found: Mapping[str, str]) -> str:
    """Give the text of a configuration file."""
    marks = {"\\": "\\\\", "'": "''", "\n": "\\n"}
    quoted = {name: "".join(marks.get(sign, sign) for sign in value) for name, value in found.items()}
    return "".join(f"{name} = '{value}'\n" for name, value in quoted.items())


def write_configuration(isolated: Isolated, found: Mapping[str, str]) -> Path:
    """Write the clone's configuration; gives the path of its main file."""
    write(isolated.folder / "pg_hba.conf", _HBA, isolated.owner)
    write(isolated.folder / "pg_ident.conf", "", isolated.owner)
    return write(isolated.folder / "postgresql.conf", configuration(found), isolated.owner)


def listen(isolated: Isolated, address: Address | None) -> None:
    """Let the server of a copy listen over TCP from its next start on, or at its socket alone; blocks on small files.

    Over TCP a role has to prove its password (SCRAM; one that is stored as md5 or not at all cannot), nothing is
    encrypted, and nothing can be replicated.
    """
    write(isolated.folder / "pg_hba.conf", _HBA + (_HBA_OVER_TCP if address else ""), isolated.owner)
    if address is None:
        with entered(isolated.folder) as folder:
            empty(folder, lambda name: name == _LISTEN_FILE)
    else:
        found = {"listen_addresses": address.host, "port": str(address.port)}
        write(isolated.folder / _LISTEN_FILE, configuration(found), isolated.owner)


def write(path: Path, text: str, owner: tuple[int, int]) -> Path:
    """Write a small file of the owner's, readable by nobody else; never through a link that lies there."""
    with entered(path.parent) as folder:
        _write_in(folder, path.name, text, owner)
    return path


def _write_in(folder: int, name: str, text: str, owner: tuple[int, int]) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(open_file(Path(name), flags, folder=folder), "w") as file:
        file.write(text)
        if os.geteuid() == 0:
            os.fchown(file.fileno(), *owner)


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
