"""The house stands as pyproject.toml says: three wings over one ground floor."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_no_wing_knows_another_and_nothing_knows_what_is_above_it():
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 kept, 0 broken" in done.stdout


def test_the_code_is_as_ruff_wants_it():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
