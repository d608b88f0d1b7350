"""The agents that the suite is run against: each a rig that can write to a volume and look at its disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from connectors.hosts.local import LocalAgent
from connectors.memory import MemoryAgent, World
from tests.fixtures.volumes import FailingVolume, run
from trigger.model import Volume
from trigger.ports import Agent


class ClearableAgent(Agent, Protocol):
    """An agent whose poisoned volumes an operator can clear; every agent has that, outside of the port."""

    async def clear(self, volume: str) -> None:
        """Trust a volume again."""
        ...


class AgentRig(Protocol):
    """One agent under test, with a volume that it flushes."""

    volumes: tuple[Volume, ...]

    def driver(self) -> ClearableAgent:
        """Give the agent, built anew as after a restart."""
        ...

    def write(self, text: str) -> None:
        """Write into the last volume, into the cache of the host only."""
        ...

    def on_disk(self) -> str:
        """Give what the disk of the last volume would hold after a power cut right now."""
        ...

    def break_writes(self) -> None:
        """Make the host's next write-back of the last volume fail."""
        ...


@dataclass
class MemoryAgentRig:
    """The reference driver."""

    build: Callable[[World], ClearableAgent] = MemoryAgent
    world: World = field(default_factory=World)
    volumes: tuple[Volume, ...] = (Volume("data", "/data"), Volume("wal", "/wal"))

    def driver(self) -> ClearableAgent:
        return self.build(self.world)

    def write(self, text: str) -> None:
        self.world.cluster.commit("bank", markers=(text,))

    def on_disk(self) -> str:
        cluster = self.world.cluster
        held = [entry.commit for entry in cluster.entries(cluster.lineage()) if entry.end <= cluster.stable]
        markers = [commit.markers[0] for commit in held if commit is not None]
        return markers[-1] if markers else ""

    def break_writes(self) -> None:
        self.world.write_errors.add("wal")


@dataclass
class LocalAgentRig:
    """The local agent on an ext4 of its own, whose disk can be made to fail."""

    disk: FailingVolume
    build: Callable[..., ClearableAgent] = LocalAgent

    def __post_init__(self) -> None:
        self.volumes = tuple(Volume(name, str(self.disk.mount / name)) for name in ("data", "wal"))
        self.state = self.disk.folder / "state"
        self.state.mkdir()
        for volume in self.volumes:
            Path(volume.path).mkdir()

    def driver(self) -> ClearableAgent:
        return self.build("host", state_folder=self.state)

    def write(self, text: str) -> None:
        (Path(self.volumes[-1].path) / "row").write_text(text)

    def on_disk(self) -> str:
        with tempfile.TemporaryDirectory(dir=self.disk.folder) as folder:
            copy, mount = Path(folder) / "copy", Path(folder) / "mount"
            mount.mkdir()
            run("cp", "--sparse=always", self.disk.image, copy)
            run("mount", "-o", "loop", copy, mount)
            try:
                found = mount / "wal" / "row"
                return found.read_text() if found.exists() else ""
            finally:
                run("umount", mount)

    def break_writes(self) -> None:
        self.disk.overflow()
