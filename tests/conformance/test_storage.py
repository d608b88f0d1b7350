"""Every storage driver keeps every claim of the port."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from connectors.storage.directory import DirectoryStorage
from tests.conformance.members_claims import MEMBERS
from tests.conformance.storage_claims import EVERY, FILES
from tests.conformance.storage_errors_claims import LOSSES
from tests.conformance.storage_rigs import FileRig, MemoryRig, Rig, btrfs, directory, members, members_of_two_kinds
from tests.conformance.storage_unmounted_claims import what_is_away_is_not_taken_for_empty
from tests.fixtures.volumes import loop_volume

_numbers = itertools.count()


@pytest.fixture(scope="module")
def xfs_volume() -> Iterator[Path]:
    with loop_volume("xfs", 1024) as mount:
        yield mount


@pytest.fixture(scope="module")
def btrfs_volume() -> Iterator[Path]:
    with loop_volume("btrfs", 2048) as mount:
        yield mount


FILE_RIGS: dict[str, tuple[str, Callable[[Path], FileRig]]] = {
    "directory-plain": ("tmp_path", directory),
    "directory-paranoid": ("tmp_path", partial(directory, build=partial(DirectoryStorage, paranoid=True))),
    "directory-xfs": ("xfs_volume", directory),
    "directory-btrfs": ("btrfs_volume", directory),
    "btrfs": ("btrfs_volume", btrfs),
}
MEMBER_RIGS: dict[str, tuple[str, Callable[[Path], FileRig]]] = {
    "members-directory-directory": ("tmp_path", members),
    "members-btrfs-directory": ("btrfs_volume", members_of_two_kinds),
}


def _cases() -> list[Any]:
    kept = (*EVERY, *FILES, *LOSSES, what_is_away_is_not_taken_for_empty)
    marks = {"tmp_path": (), "xfs_volume": (pytest.mark.volume,), "btrfs_volume": (pytest.mark.volume,)}
    cases = [pytest.param("memory", claim, id=f"memory-{claim.__name__}") for claim in EVERY]
    for rigs, claims in ((FILE_RIGS, kept), (MEMBER_RIGS, (*EVERY, *MEMBERS))):
        for name, (place, _) in rigs.items():
            cases += [pytest.param(name, claim, id=f"{name}-{claim.__name__}", marks=marks[place]) for claim in claims]
    return cases


@pytest.mark.parametrize(("driver", "claim"), _cases())
def test_every_storage_keeps_every_claim(
    driver: str, claim: Callable[[Any], Awaitable[None]], request: pytest.FixtureRequest
) -> None:
    rig: Rig = MemoryRig()
    if driver != "memory":
        place, make = (FILE_RIGS | MEMBER_RIGS)[driver]
        root = Path(request.getfixturevalue(place)) / f"case-{next(_numbers)}"
        root.mkdir()
        rig = make(root)
    asyncio.run(asyncio.wait_for(_run(claim, rig), 60))


async def _run(claim: Callable[[Any], Awaitable[None]], rig: Rig) -> None:
    await claim(rig)
