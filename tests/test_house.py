"""The house stands as pyproject.toml says: three wings over one ground floor."""

import ast
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


def test_no_function_is_longer_than_a_screen():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    paths = [ROOT / "train.py", ROOT / "app.py", *(ROOT / "hatespeech").rglob("*.py")]
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, functions)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}
