"""Some of what `make kill-test` does: every scenario, and system calls where strace is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KILLS = 13 * 14


def test_no_kill_leaves_a_checkpoint_that_is_neither_the_old_one_nor_the_new_one(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else tmp_path
    script = Path(__file__).parents[2] / "kill_saves.py"
    command = [sys.executable, str(script), "--quick", "--kills", str(KILLS), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert (KILLS, 0) == (found["kills"], found["wrong"])
    assert all(row["old"] + row.get("new", 0) == row["kills"] + row["system calls"] for row in found["scenarios"])
    assert [] == list(folder.glob(f"modelrig-kill-{found['pid']}-*"))
