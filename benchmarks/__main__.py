"""All benchmarks, one after the other: `python -m benchmarks`."""

import subprocess
import sys

for name in ("planning", "kernels", "generation", "compiling", "drafting", "pages", "loading", "offload", "saving", "families"):
    print(f"\n== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
