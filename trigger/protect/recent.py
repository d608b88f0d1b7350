"""The commits that were seen last, whether or not a rule took them: what `trigpoint rules test` tries rules on.

Kept in memory only, and bounded: a restart begins anew.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

from trigger.model import Commit

BOUND = 10_000
"""How many ordinary commits are remembered; one with many tables or long markers counts for several."""


class Recent:
    """The last commits of all streams, in the order in which they came."""

    def __init__(self, bound: int = BOUND) -> None:
        self._bound = bound
        self._commits: deque[Commit] = deque()
        self._weight = 0
        self._seen = 0

    def saw(self, commit: Commit) -> None:
        """Remember `commit`, and forget what there is no room for any more."""
        self._commits.append(commit)
        self._weight += commit.weight
        self._seen += 1
        while self._weight > self._bound:
            self._weight -= self._commits.popleft().weight

    @property
    def forgotten(self) -> int:
        """How many commits were seen and are not remembered."""
        return self._seen - len(self._commits)

    def behind(self, number: int, limit: int) -> tuple[Sequence[Commit], int]:
        """Give the next commits behind the one with this number, at most `limit`, and the number of the last of them.

        The first commit ever seen has number 1; those that are forgotten are passed over.
        """
        begin = max(number - self.forgotten, 0)
        commits = list(itertools.islice(self._commits, begin, begin + limit))
        return commits, self.forgotten + begin + len(commits)
