"""Saving and converting: against transformers' `save_pretrained`, in time and peak memory.

    python -m benchmarks.saving [--repeats 3]

Each measurement is a process of its own that writes into a fresh folder. Ours forces everything to the disk before it commits and
hashes every file; `fsync` after transformers' save gives its figure with the first of these. `convert` reads a checkpoint and
writes it in another dtype or in smaller files; transformers loads it and saves it. Free memory is touched before, as in
`benchmarks.loading`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from benchmarks.common import TOUCH, child, median, storage, table, write
from benchmarks.loading import checkpoint

HEAD = (
    TOUCH
    + """
import time, json
os.environ.setdefault("HF_HUB_OFFLINE", "1")
path, out = sys.argv[1], sys.argv[2]
def timed(work):
    touch(folder_bytes(path) * 2)
    base = status("VmRSS")
    start = time.perf_counter()
    work()
    print(json.dumps({"seconds_of_work": time.perf_counter() - start, "over": status("VmHWM") - base, "peak": status("VmHWM")}))
def sync(folder):
    for name in os.listdir(folder):
        descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
"""
)
SAVE_OURS = (
    HEAD
    + """
import modelrig
model = modelrig.load(path, context=64)
timed(lambda: model.save(out))
"""
)
SAVE_THEIRS = (
    HEAD
    + """
from transformers import AutoModelForCausalLM, LlamaForCausalLM
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
def work():
    model.save_pretrained(out)
    if os.environ.get("SYNC"): sync(out)
timed(work)
"""
)
CONVERT_OURS = (
    HEAD
    + """
import modelrig
timed(lambda: modelrig.convert(path, out, max_shard_size="2GB", dtype=os.environ.get("TO") or None))
"""
)
CONVERT_THEIRS = (
    HEAD
    + """
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
to = getattr(torch, os.environ["TO"]) if os.environ.get("TO") else "auto"
def work():
    AutoModelForCausalLM.from_pretrained(path, dtype=to).save_pretrained(out, max_shard_size="2GB")
    sync(out)
timed(work)
"""
)
CASES: dict[str, tuple[str, dict[str, tuple[str, dict[str, str]]]]] = {
    "save 1.1B": (
        "1.1B",
        {"modelrig": (SAVE_OURS, {}), "transformers": (SAVE_THEIRS, {}), "transformers, fsync": (SAVE_THEIRS, {"SYNC": "1"})},
    ),
    "convert 3.2B, smaller files": ("3.2B", {"modelrig": (CONVERT_OURS, {}), "transformers, fsync": (CONVERT_THEIRS, {})}),
    "convert 3.2B to float16": (
        "3.2B",
        {"modelrig": (CONVERT_OURS, {"TO": "float16"}), "transformers, fsync": (CONVERT_THEIRS, {"TO": "float16"})},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    for case in arguments.case or CASES:
        name, settings = CASES[case]
        path, out = checkpoint(name), storage() / "written"
        rows: dict[str, list[dict]] = {setting: [] for setting in settings}
        for _ in range(arguments.repeats):
            for setting, (code, environ) in settings.items():
                shutil.rmtree(out, ignore_errors=True)
                rows[setting].append(child(code, str(path), str(Path(out)), **environ))
        shutil.rmtree(out, ignore_errors=True)
        figures[case] = {
            setting: {
                "seconds": round(median(found, "seconds_of_work"), 2),
                "peak_mib": round(median(found, "peak") / 2**20),
                "over_mib": round(median(found, "over") / 2**20),
            }
            for setting, found in rows.items()
        }
        print(f"\n{case}\n")
        lines = [[setting, *row.values()] for setting, row in figures[case].items()]
        print(table(["setting", "s", "peak RSS, MiB", "grown by, MiB"], lines), flush=True)
    write("saving", {"repeats": arguments.repeats, "cases": figures})


if __name__ == "__main__":
    main()
