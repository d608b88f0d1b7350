"""How the figures of a benchmark are written down: one JSON shape for all, with the date and the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def write(path: Path | None, benchmark: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write the figures of a run to `path`; to nowhere where it is None."""
    if path is None:
        return
    about = {
        "benchmark": benchmark,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "settings": dict(settings),
        "figures": dict(figures),
    }
    path.write_text(json.dumps(about, indent=2) + "\n")
