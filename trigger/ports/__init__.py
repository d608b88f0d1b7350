"""What the service needs of the world, as Protocols; drivers in `connectors` implement them.

Contracts that hold for every port:

- A call may be cancelled at any await. A cancelled call may or may not have had its effect; calling it again with
  the same arguments is safe.
- Blocking work runs in threads; the event loop is never held for longer than a few milliseconds.
- Drivers do not retry, log or count. They raise the error of their port, with a hint, and say whether it is
  retryable; the service decides.
- Names, paths and ids are validated where they are made (`trigger.model`).
"""

from trigger.ports.agent import Agent
from trigger.ports.clock import Clock
from trigger.ports.database import Database, Seen
from trigger.ports.journal import Copies, Journal
from trigger.ports.progress import Progress
from trigger.ports.recovery import Recovery
from trigger.ports.source import Batch, Break, Source
from trigger.ports.storage import Capability, Clone, ClonePlace, Storage, Tagged

__all__ = [
    "Agent",
    "Batch",
    "Break",
    "Capability",
    "Clock",
    "Clone",
    "ClonePlace",
    "Copies",
    "Database",
    "Journal",
    "Progress",
    "Recovery",
    "Seen",
    "Source",
    "Storage",
    "Tagged",
]
