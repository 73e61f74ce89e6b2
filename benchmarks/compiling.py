"""How long until compiled steps run: in the first process, and in a second one that finds what the first compiled.

    python -m benchmarks.compiling [--shape 135M] [--repeats 3]

The model is loaded and has generated a token without compiled steps; `seconds` are then those of the first four tokens with them,
`import_seconds` those from the start of the process to there. Both libraries keep what they compile in an empty folder.
"""

from __future__ import annotations

import argparse
import tempfile

from benchmarks.common import child, llama_checkpoint, median, table, write

OURS = """
import sys, time, json
started = time.perf_counter()
import modelrig
model = modelrig.load(sys.argv[1], cache="static", context=512, compiler={"name": "inductor", "scope": sys.argv[2]})
prompt = list(range(7, 39))
model.generate(prompt, max_new_tokens=1)
before = time.perf_counter()
model.generate(prompt, max_new_tokens=5)
print(json.dumps({"first": time.perf_counter() - before, "ready": time.perf_counter() - started}))
"""

THEIRS = """
import sys, time, json
started = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model.generation_config.eos_token_id = None
ids = torch.arange(7, 39)[None]
def generate(count):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
                          cache_implementation="static", disable_compile=True)
generate(1)
eager, compiled = model.forward, torch.compile(model.forward, fullgraph=True)
def forward(input_ids=None, **kwargs):
    return (compiled if input_ids.shape[1] == 1 else eager)(input_ids=input_ids, **kwargs)
model.forward = forward
before = time.perf_counter()
generate(5)
print(json.dumps({"first": time.perf_counter() - before, "ready": time.perf_counter() - started}))
"""

SETTINGS = {
    "modelrig, scope block": (OURS, "block"),
    "modelrig, scope step": (OURS, "step"),
    "transformers, static cache": (THEIRS, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1.1B", "135M"), action="append")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    figures = {}
    for shape in arguments.shape or ("1.1B", "135M"):
        path = str(llama_checkpoint(shape))
        rows: dict[str, dict[str, list[dict]]] = {name: {"cold": [], "second": []} for name in SETTINGS}
        for _ in range(arguments.repeats):
            for name, (code, scope) in SETTINGS.items():
                with tempfile.TemporaryDirectory() as kept:
                    where = {"XDG_CACHE_HOME": kept, "TORCHINDUCTOR_CACHE_DIR": f"{kept}/inductor"}
                    for process in ("cold", "second"):
                        rows[name][process].append(child(code, path, scope, **where))
        found = {
            name: {
                "cold_seconds": round(median(row["cold"], "first"), 2),
                "second_seconds": round(median(row["second"], "first"), 2),
                "second_ready_seconds": round(median(row["second"], "ready"), 2),
            }
            for name, row in rows.items()
        }
        theirs = found["transformers, static cache"]["cold_seconds"]
        for row in found.values():
            row["cold_ratio"] = round(theirs / row["cold_seconds"], 1)
        figures[shape] = found
        print(f"\n{shape}, bf16\n")
        header = ["setting", "first process, s", "×", "second process, s", "of that process since its start, s"]
        columns = ["cold_seconds", "cold_ratio", "second_seconds", "second_ready_seconds"]
        print(table(header, [[name, *(row[column] for column in columns)] for name, row in found.items()]), flush=True)
    write("compiling", {"repeats": arguments.repeats, "shapes": figures})


if __name__ == "__main__":
    main()
