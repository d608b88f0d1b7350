"""The wheel, away from the checkout: it has all it needs, and nothing that belongs to us alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the wheel, built as `make wheel` does."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of programs of an environment that has the wheel, and what it depends on, and no checkout.

    The dependencies are those of our own environment, added to the path; that does not run its `.pth` files, so the
    checkout that is installed there for editing stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python.parent


def run(*arguments: str, cwd: str = "/") -> str:
    """Run a program outside the checkout and give what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_the_product_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"trigger", "connectors"}
    assert {"trigger/py.typed", "connectors/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    there = {
        str(path.relative_to(ROOT)) for package in ("trigger", "connectors") for path in (ROOT / package).rglob("*.py")
    }
    assert there == {name for name in names if name.endswith(".py")}


def test_the_command_runs_outside_the_checkout(programs: Path) -> None:
    assert run(str(programs / "trigpoint"), "--version").startswith("trigpoint 0.")
    listed = run(str(programs / "trigpoint"), "--help")
    for command in ("demo", "init", "check", "run", "restore", "verify", "config"):
        assert command in listed
    assert "state_folder" in run(str(programs / "trigpoint"), "config", "reference")


def test_every_module_can_be_loaded_from_the_wheel(programs: Path) -> None:
    program = (
        "import importlib, pkgutil, connectors, trigger\n"
        "for package in (trigger, connectors):\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not found.name.endswith('__main__'):\n"
        "            print(importlib.import_module(found.name).__file__)\n"
    )
    files = run(str(programs / "python"), "-c", program).splitlines()
    assert len(files) > 40
    assert [file for file in files if not file.startswith(str(programs.parent))] == []


def test_every_driver_named_in_the_table_is_in_the_wheel(programs: Path) -> None:
    program = (
        "from connectors import DRIVERS\n"
        "from trigger.config.drivers import driver\n"
        "for name in DRIVERS: print(driver(*name.rsplit('/', 1)).__name__)\n"
    )
    assert len(run(str(programs / "python"), "-c", program).splitlines()) >= 3
