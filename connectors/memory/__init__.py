"""Every port in memory: the reference drivers, for simulation and for tests of the service.

A `World` holds what outlives the service: the cluster with its log, what the storage keeps, the journal, what was
restored. The drivers hold connections only, so a service that died is simulated by building them anew over the same
world. There are no threads and no waiting but asyncio's own, so a loop with virtual time runs all of it at once.

What is modelled, each after a measured fact of the real thing:

- The log is a row of records on a timeline. A commit is *inserted*, then *written* to the host's cache, then
  *flushed* by the server; a source sees flushed commits only, a snapshot may hold written ones.
- The host caches writes. A cut sees what was *stable* at that moment, which an agent's flush brings up to what was
  written; so a point that was sealed without its flush is a point without its commit.
- A restore replays by PostgreSQL's rules: it cannot stop before the end of the log inside its base, an inclusive
  stop at an LSN ends after the record that begins there, an exclusive one before it.
- A log has lives: an older copy that was put back goes on under the same identity (`lives`), and whoever connects
  looks whether that has happened.
- Two strangers (`manner`): a log in files with offsets, and a source that has no log, so that only points come back.
"""

from connectors.memory.book import Content
from connectors.memory.cluster import Cluster
from connectors.memory.database import MemoryDatabase
from connectors.memory.host import MemoryAgent
from connectors.memory.journal import MemoryJournal
from connectors.memory.manner import SEGMENT_BYTES
from connectors.memory.nolog import NoLog
from connectors.memory.recovery import MemoryRecovery
from connectors.memory.source import MemorySource
from connectors.memory.storage import MemoryStorage
from connectors.memory.world import Kept, MemoryClock, World

__all__ = [
    "SEGMENT_BYTES",
    "Cluster",
    "Content",
    "Kept",
    "MemoryAgent",
    "MemoryClock",
    "MemoryDatabase",
    "MemoryJournal",
    "MemoryRecovery",
    "MemorySource",
    "MemoryStorage",
    "NoLog",
    "World",
]
