"""One suite for each port, run against every driver, and against broken drivers that it must catch."""

import pytest

_CLAIMED = ("storage", "storage_errors", "agent", "source")
pytest.register_assert_rewrite(*(f"tests.conformance.{what}_claims" for what in _CLAIMED))
