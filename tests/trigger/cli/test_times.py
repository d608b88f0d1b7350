"""How people write times."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from trigger import errors
from trigger.cli import arguments


def test_a_naive_time_is_refused_with_the_remedy() -> None:
    with pytest.raises(errors.ConfigError) as refused:
        arguments.time("2026-03-01T12:00:00")
    assert "2026-03-01T12:00:00Z" in refused.value.hint
    assert arguments.time("2026-03-01T12:00:00+02:00").utcoffset() is not None


def test_now_is_a_time() -> None:
    before = datetime.now(UTC)
    assert before <= arguments.time(" now ") <= datetime.now(UTC)
