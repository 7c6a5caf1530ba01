"""Damaged files are refused or read right; `benchmarks/fuzz_files.py` does more of the same."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "fuzz_files.py"


def test_three_thousand_damaged_files_are_refused_or_read_right(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--files", "3000", "--seed", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["files"], found["wrong"]) == (3000, 0)
    refused = [outcomes["refused"] for outcomes in found["outcomes"].values()]
    assert len(refused) == 13
    assert min(refused) > 100
