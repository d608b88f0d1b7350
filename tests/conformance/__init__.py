"""One suite for each port, run against every driver, and against broken drivers that it must catch."""

import pytest

pytest.register_assert_rewrite("tests.conformance.storage_claims", "tests.conformance.agent_claims")
