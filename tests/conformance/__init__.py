"""One suite for each port, run against every driver, and against broken drivers that it must catch."""

import pytest

pytest.register_assert_rewrite(*(f"tests.conformance.{port}_claims" for port in ("storage", "agent", "source")))
