"""The port of what turns a clone into a running server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

from trigger.model import Address, Finding, System, Volume
from trigger.ports.progress import Progress
from trigger.ports.storage import Clone
from trigger.position import Lineage
from trigger.replay import Follows, Replay, Running, Target


class Recovery(Protocol):
    """Turns a clone of a cluster's volumes into a running, isolated server at a target."""

    async def start(
        self,
        clone: Clone,
        volumes: Sequence[Volume],
        replay: Replay,
        log_folder: Path,
        progress: Progress,
        *,
        throwaway: bool = False,
    ) -> Running:
        """Isolate the clone, replay what lies in `log_folder`, let it go on in a history of its own, and wait.

        `throwaway` trades the clone's own crash safety for speed; for sandboxes of `verify`.

        Raises:
            RestoreError: it did not reach the target; the message holds the server's own last words.
        """
        ...

    def inspect(
        self, running: Running, target: Target, log_folder: Path, *, deep: bool, follows: Follows | None = None
    ) -> AsyncIterator[tuple[str, bool, str]]:
        """Give (what was checked, whether it held, what was seen), one a check.

        The target's commit is there; the next commit record in the log behind it is not: it is read, by a program that
        is not ours, from `log_folder`, and where that has none, asked of `follows`; with `deep` also structures and
        pages are clean. A check that had nothing to look at is not given. `deep` is for sandboxes, which it changes:
        nobody may use one afterwards but `query`.
        """
        ...

    async def query(self, running: Running, database: str, sql: str) -> str:
        """Give the first column of the first row of `sql` as text; raises `RestoreError`."""
        ...

    async def stop(self, clone: Clone) -> None:
        """Stop the server of a clone; one that does not run is no error."""
        ...

    async def resume(self, clone: Clone, listen: Address | None = None) -> Running:
        """Start the stopped server of a clone as it was left; with `listen` it is reached there too, with a password.

        Raises `RestoreError` where it was never brought up, `release` was begun with it, its server would write into
        files that are not the clone's, or it does not come up.
        """
        ...

    async def running(self, clone: Clone) -> Running | None:
        """Give the server of a clone if it runs."""
        ...

    async def used(self, clone: Clone) -> int | None:
        """Give how many transactions a clone began since it was brought up, unasked ones too; None if none can tell."""
        ...

    async def unfit(self, clone: Clone, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what keeps a clone from going on as the cluster in `volumes`: another copy went on under its branch."""
        ...

    async def systems(self, copy: Clone) -> list[System]:
        """Give what lies in a copy of the volumes, as far as its files say it; never raises.

        The volumes themselves, or the snapshots of a point, may be given as a copy; nothing is changed in them.
        """
        ...

    async def lineage(self, copy: Clone, volumes: Sequence[Volume]) -> Lineage | None:
        """Give the lineage in which the cluster in a copy goes on, or in the volumes themselves, given as a copy.

        By what lies there alone, so that it is the same whether a server works there or not; two copies that went on
        by themselves differ in it. None where no cluster can be read. Never raises.
        """
        ...

    async def outside(self, copy: Clone, volumes: Sequence[Volume]) -> list[Finding]:
        """Give what of the cluster in `volumes` lies outside a copy of them, for which `start` refuses it.

        The snapshots of a point may be given as a copy; nothing is changed in them. Never raises.
        """
        ...

    async def at_work(self, volumes: Sequence[Volume]) -> list[Finding]:
        """Give the servers that work in one of the volumes, also where their processes are not seen; never raises."""
        ...

    async def strangers(self, clone: Clone) -> list[Finding]:
        """Give the servers that work in a clone, or may, and were started neither by `start` nor by `resume`."""
        ...

    async def release(self, clone: Clone, volumes: Sequence[Volume]) -> None:
        """Make a stopped clone fit to take the place of the cluster it was made of.

        It gets back the configuration, and the links into `volumes`, as its snapshot had them, and what isolated it
        is taken away; so it works only where the volumes lie. Repeating the call changes nothing, and finishes one
        that was cut off: from its first change on the clone's server is not started any more. Raises `RestoreError`
        where its server still runs, or what was put aside is not there.
        """
        ...
