"""What new memory costs by itself: the least that a load which converts its weights can take.

    python -m benchmarks.pages [--mib 4196] [--repeats 3]

As many threads as there are cores give anonymous memory its pages and write it once, 2 MiB at a time; nothing is read, nothing is
converted. Touched before: another process held as much just before. Idle before: nothing did for some seconds, in which a virtual
machine may give its free memory back to its host.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.common import child, median, table, write

FILL = """
import ctypes, json, mmap, os, subprocess, sys, threading, time
size, way, touched = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "touched"
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
if touched:
    hold = "import mmap, sys; mmap.mmap(-1, int(sys.argv[1])).madvise(23)"
    subprocess.run([sys.executable, "-c", hold, str(3 * size)], check=True)
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if way == "huge":
    libc.madvise(base, size, mmap.MADV_HUGEPAGE)
count, step = len(os.sched_getaffinity(0)), 2 << 20
def work(first):
    for start in range(first * step, size, count * step):
        length = min(step, size - start)
        if way != "faults":
            libc.madvise(base + start, length, 23)  # MADV_POPULATE_WRITE
        ctypes.memset(base + start, 1, length)
threads = [threading.Thread(target=work, args=(first,)) for first in range(count)]
start = time.perf_counter()
for one in threads: one.start()
for one in threads: one.join()
print(json.dumps({"fill": time.perf_counter() - start}))
"""
WAYS = {"faults": "a fault for each page", "populated": "MADV_POPULATE_WRITE", "huge": "the same, huge pages"}
IDLE_SECONDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=4196)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for before in ("touched", "idle"):
        rows: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way in WAYS:
                if before == "idle":
                    time.sleep(IDLE_SECONDS)
                rows[way].append(child(FILL, str(arguments.mib << 20), way, before))
        figures[before] = {way: round(median(found, "fill"), 3) for way, found in rows.items()}
    print(
        table(
            ["way", *(f"{before} before, s" for before in figures)],
            [[WAYS[way], *(row[way] for row in figures.values())] for way in WAYS],
        )
    )
    write("pages", {"mib": arguments.mib, "repeats": arguments.repeats, "seconds": figures})


if __name__ == "__main__":
    main()
