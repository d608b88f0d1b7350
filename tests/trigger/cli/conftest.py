"""A configuration of a cluster that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "trigpoint.toml"
    path.write_text(
        f'state_folder = "{tmp_path}/state"\n[database]\nconninfo = "host={tmp_path}"\ndatabases = ["bank"]\n'
        f'[[volumes]]\nname = "data"\npath = "{tmp_path}/data"\n[storage]\nfolder = "{tmp_path}/snapshots"\n'
    )
    return path
