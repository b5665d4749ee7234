"""Runs pytest on the installed mlpkit, not on the source folder beside the tests."""

import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
sys.exit(pytest.main(sys.argv[1:]))
