"""The wheel holds all that is needed at run time, and the house's rules are written down once."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = [
    "merge_kit/cli.py",
    "merge_kit/templates/model_card.md.j2",
    "merge_kit/configs/merge/mean.yaml",
    "finetune/training.py",
    "evaluate/templates/page/page.html.j2",
    "evaluate/templates/page/style.css",
    "evaluate/templates/page/page.js",
    "evaluate/demo.py",
    "merge_kit/py.typed",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_what_is_needed_at_run_time(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(NEEDED) <= names
    assert not any(name.startswith("tests/") for name in names)


def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from merge_kit.cli import main; main()"
    base = [sys.executable, "-c", code, str(tmp_path / "site")]
    arguments = ["merge", "x", "--recipe", "ties", "--print-recipe"]
    done = subprocess.run(
        [*base, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "density: 0.2" in done.stdout
