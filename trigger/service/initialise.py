"""What `trigpoint init` writes: a configuration for a cluster as it was found on this host.

`propose` decides from what was found and touches nothing; `text` writes it down with a comment at every line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from trigger.config.reference import sections, toml
from trigger.config.sections import DatabaseOptions
from trigger.host import Mount, mount_of
from trigger.model import Layout
from trigger.service import costs
from trigger.shape import plain


@dataclass(frozen=True, slots=True)
class Proposal:
    """A configuration, before it is written."""

    name: str
    state_folder: Path
    conninfo: str
    """How the cluster is reached, for people."""
    database: Mapping[str, Any]
    """What its driver wants to be told, by key."""
    databases: tuple[str, ...]
    volumes: tuple[tuple[str, Path], ...]
    driver: str
    storage_folder: Path
    why: tuple[str, ...]
    """Why this storage, for people; one sentence each."""
    interval_seconds: float = 1.0
    """How far apart points are to be: rare, where each of them costs log."""
    keep_free_bytes: int = 1 << 30
    """How much is to stay free where the snapshots lie."""
    points_why: tuple[str, ...] = ()
    """Why so far apart; nothing where a point costs next to nothing."""


def propose(
    section: DatabaseOptions,
    databases: Sequence[str],
    layout: Layout,
    *,
    state_folder: Path,
    name: str = "main",
    mounts: Sequence[Mount],
    subvolume_of: Callable[[Path], Path],
    root: bool,
    ours: Callable[[Path], bool] = lambda _: True,
    free_bytes: Callable[[Path], int] = lambda _: 1 << 50,
    size_bytes: Callable[[Path], int] = lambda _: 1 << 50,
    number: int = 1,
) -> Proposal:
    """Give the configuration for a cluster.

    Args:
        section: how it was reached, through databases that every cluster has.
        databases: what there is; those of `section` are left out where there is another.
        layout: where its files lie.
        state_folder: where we may keep our state.
        name: what the service is called.
        mounts: the mounts of this host.
        subvolume_of: gives the root of the btrfs subvolume around a path on btrfs.
        root: whether we are root; an ordinary user may not delete btrfs snapshots everywhere.
        free_bytes: gives how much is free where a path lies.
        size_bytes: gives how large the filesystem is that a path lies on.
        number: counts proposals, where the folder for snapshots in the last one is another service's.
        ours: whether nobody else can change what lies in a folder, or what leads there.
    """
    parts = list(layout.places.items())
    host = _Host(mounts, subvolume_of, ours, _own_name(state_folder), f"-{number}" if number > 1 else "", root=root)
    driver, volumes, folder, why = _storage(parts, host, state_folder)
    wanted = tuple(name for name in databases if name not in section.databases) or tuple(databases)
    told = {"driver": section.driver} | section.model_dump(mode="json", exclude_unset=True, exclude={"databases"})
    interval, points_why = 1.0, tuple[str, ...]()
    if driver != "btrfs" or len(volumes) > 1:
        interval, points_why = _rare(layout.log_file_bytes, free_bytes(state_folder))
    found = tuple(volumes)
    return Proposal(
        *(name, state_folder, section.address, told, wanted, found),
        *(driver, folder, tuple(why), interval, _kept_free(size_bytes(folder)), points_why),
    )


def _own_name(state_folder: Path) -> str:
    """Give what a service's folders are called: like its state folder, which no two share."""
    name = state_folder.name
    return name if name.startswith("trigpoint") else f"trigpoint-{name}"


def _kept_free(size_bytes: int) -> int:
    """Give how much of a filesystem is to stay free: a tenth of it, in whole MiB, and no more than a GiB."""
    return min(size_bytes // 10 >> 20 << 20, 1 << 30)


def _written(size_bytes: int) -> str:
    """Give a size in whole MiB as a configuration has it."""
    return "1GiB" if size_bytes == 1 << 30 else f"{size_bytes >> 20}MiB"


def _rare(segment_bytes: int, free_bytes: int) -> tuple[float, tuple[str, ...]]:
    """Give how far apart points inside the backup bracket are to be, and why."""
    seconds = costs.proposed_interval_seconds(segment_bytes, free_bytes)
    each = costs.SEGMENTS_A_POINT * segment_bytes >> 20
    a_day = costs.SEGMENTS_A_POINT * segment_bytes * costs.DAY_SECONDS // seconds >> 20
    return float(seconds), (
        f"Each point makes a checkpoint and ends {costs.SEGMENTS_A_POINT} segments of log, {each} MiB in the journal:"
        f" at most {a_day} MiB a day like this, with {free_bytes >> 20} MiB free.",
        "Every commit between two is restored exactly too, from the journal; `trigpoint point` takes a point at once.",
    )


@dataclass(frozen=True, slots=True)
class _Host:
    """What is known of this host."""

    mounts: Sequence[Mount]
    subvolume_of: Callable[[Path], Path]
    ours: Callable[[Path], bool]
    own_name: str
    """What is made on it for this service is called so."""
    suffix: str
    """Stands behind a folder for snapshots."""
    _: KW_ONLY
    root: bool

    def beside(self, path: Path) -> Path | None:
        """Give the nearest folder above `path`, on its filesystem, that nobody else can change; None where none is."""
        mount = mount_of(path, self.mounts)
        above = (folder for folder in path.parents if mount_of(folder, self.mounts) == mount)
        return next((folder for folder in above if self.ours(folder)), None)


def _storage(
    parts: Sequence[tuple[str, Path]], host: _Host, state_folder: Path
) -> tuple[str, list[tuple[str, Path]], Path, list[str]]:
    """Give driver, volumes, folder and the reasons: btrfs where all parts lie on it and a snapshot has a place."""
    copies, where = _for_copies(parts[0][1], host, state_folder)
    kinds = {name: mount_of(path, host.mounts) for name, path in parts}
    on = ", ".join(f"{name} on {mount.filesystem}" for name, mount in kinds.items())
    if any(mount.filesystem != "btrfs" for mount in kinds.values()):
        why = [f"{on}: files are copied (shared where the filesystem can).", *where]
        return "directory", list(parts), copies, why
    if not host.root:
        why = [f"{on}, but only root can use its snapshots fully: files are shared.", *where]
        return "directory", list(parts), copies, why
    roots = _distinct([(name, host.subvolume_of(path)) for name, path in parts])
    above = None if any(path == Path("/") for _, path in roots) else host.beside(roots[0][1])
    if above is None:
        why = [
            f"{on}, but there is no place of root's for snapshots beside the subvolume of the data: files are shared.",
            "For snapshots in an instant mount the top of the btrfs, let root own it, and put the data into a subvolume"
            " below it.",
            *where,
        ]
        return "directory", list(parts), copies, why
    return (
        "btrfs",
        roots,
        above / f"{host.own_name}{host.suffix}",
        [f"{on}, in subvolumes: snapshots are atomic and at once."],
    )


def _for_copies(data: Path, host: _Host, state_folder: Path) -> tuple[Path, list[str]]:
    """Give where copies belong, and what has to be said of it: beside the data where that is ours, else near by."""
    beside, own = f"{host.own_name}-snapshots{host.suffix}", state_folder / f"snapshots{host.suffix}"
    if host.ours(data.parent):
        return data.parent / beside, []
    whose = f"{data.parent} can be changed by others than us, so the snapshots lie elsewhere"
    if mount_of(data, host.mounts) == mount_of(state_folder, host.mounts):
        return own, [f"{whose}, on the same filesystem."]
    if (above := host.beside(data)) is not None:
        return above / beside, [f"{whose}, on the same filesystem."]
    return own, [f"{whose}, on another filesystem, where files share nothing with the data."]


def _distinct(volumes: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Give one volume a path; several parts may lie in one subvolume."""
    found: dict[Path, str] = {}
    for name, path in volumes:
        found.setdefault(path, name)
    return [(name, path) for path, name in found.items()]


def text(proposal: Proposal) -> str:
    """Give the proposal as a TOML file, each line under what it means; `trigpoint config check` accepts it."""
    lines = [
        "# Written by `trigpoint init`. Every option with its meaning: `trigpoint config reference`.",
        "",
        *_line("name", proposal.name),
        *_line("state_folder", proposal.state_folder),
        "",
        "[database]",
    ]
    for key, value in {**proposal.database, "databases": list(proposal.databases)}.items():
        lines += _line(f"database.{key}", value, proposal.database["driver"])
    for name, path in proposal.volumes:
        lines += ["", "[[volumes]]", *_line("volumes[].name", name), *_line("volumes[].path", path)]
    lines += ["", "[storage]", *(f"# {plain(why)}" for why in proposal.why)]
    lines += [f"driver = {toml(proposal.driver)}", *_line("storage.folder", proposal.storage_folder, proposal.driver)]
    lines += [*_line("storage.keep_free", _written(proposal.keep_free_bytes)), *_line("storage.budget", 200)]
    interval = proposal.interval_seconds
    lines += ["", "[points]", *(f"# {plain(why)}" for why in proposal.points_why)]
    lines += [*_line("points.min_interval_seconds", interval), *_line("points.per_minute", 60)]
    lines += _line("points.max_delay_seconds", max(60.0, interval))
    lines += _line("points.restore_objective_seconds", 30.0)
    lines += [*_line("points.catch_all_seconds", max(300.0, interval)), *_RULES]
    return "\n".join(lines) + "\n"


_RULES = (
    "",
    "# Without a rule every commit qualifies. Rules narrow that; a commit qualifies if one of them takes it.",
    "# Try them on live commits before they decide: `trigpoint rules test --watch 5`.",
    "#",
    "# [[rules]]",
    '# name = "large-or-marked"',
    "# expression = \"rows >= 1000 || markers.exists(m, m.startsWith('close-'))\"",
    "#",
    "# [[rules]]",
    '# name = "payments"',
    '# tables = ["public.payments*"]',
    '# operations = ["update", "delete", "truncate"]',
)


def _line(key: str, value: object, driver: str = "") -> list[str]:
    """Give an option under its meaning, as the driver has it that brings it."""
    options = (option for section in sections() for option in section.options if option.key == key)
    doc = next(option.doc for option in options if not option.drivers or driver in option.drivers)
    return [f"# {doc}", f"{key.rpartition('.')[2]} = {toml(value)}"]
