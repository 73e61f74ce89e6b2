"""How long from process start to the first token, how fast is decoding, how much memory: against transformers, on CPU, in bf16.

    python -m benchmarks.generation [--shape 135M] [--repeats 5] [--tokens 64]

Each measurement is a process of its own: import, load, one token from a prompt of 32 ids, then greedy decoding of --tokens tokens,
twice: `first` as it comes, with whatever a library does while it warms up (ours packs weights), `steady` after that. transformers
runs eagerly with each cache and attention that it offers there; ratios are against its best.
"""

from __future__ import annotations

import argparse

from benchmarks.common import SHAPES, child, llama_checkpoint, median, table, write

OURS = """
import sys, time, json, resource
path, cache, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
import modelrig
model = modelrig.load(path, cache=cache, context=256)
prompt = list(range(7, 39))
model.generate(prompt, max_new_tokens=1)
first = time.time()
cold, steady = (tokens / model.generate(prompt, max_new_tokens=tokens + 1).stats.decode_seconds for _ in range(2))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"first": first, "cold": cold, "steady": steady, "peak": peak}))
"""

THEIRS = """
import sys, time, json, resource, logging
path, cache, tokens, attention = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation=attention)
model.generation_config.eos_token_id = None
ids = torch.arange(7, 39)[None]
class Clock:
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.perf_counter())
    def end(self): pass
def generate(count, streamer=None):
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
                          streamer=streamer, **options)
generate(1)
first = time.time()
def rate():
    clock = Clock()
    generate(tokens + 1, clock)
    times = clock.times[1:]  # the first put is the prompt
    return tokens / (times[-1] - times[0])
cold, steady = rate(), rate()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"first": first, "cold": cold, "steady": steady, "peak": peak}))
"""

SETTINGS = {
    "modelrig, dynamic": (OURS, "dynamic", "sdpa"),
    "modelrig, static": (OURS, "static", "sdpa"),
    "transformers sdpa, dynamic": (THEIRS, "dynamic", "sdpa"),
    "transformers sdpa, static": (THEIRS, "static", "sdpa"),
    "transformers eager, dynamic": (THEIRS, "dynamic", "eager"),
}


def measure(shape: str, repeats: int, tokens: int) -> dict[str, dict[str, float]]:
    path = str(llama_checkpoint(shape))
    rows: dict[str, list[dict]] = {name: [] for name in SETTINGS}
    for repeat in range(repeats + 1):
        for name, (code, cache, attention) in SETTINGS.items():
            row = child(code, path, cache, str(tokens), attention)
            row["first_token_seconds"] = row["first"] - row["started"]
            if repeat:  # the first round fills the page cache
                rows[name].append(row)
    return {
        name: {
            "first_token_seconds": round(median(found, "first_token_seconds"), 3),
            "first_tokens_per_second": round(median(found, "cold"), 2),
            "tokens_per_second": round(median(found, "steady"), 2),
            "peak_mib": round(median(found, "peak") / 2**20),
        }
        for name, found in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    figures = {}
    for shape in arguments.shape or SHAPES:
        measured = measure(shape, arguments.repeats, arguments.tokens)
        theirs = [row for name, row in measured.items() if name.startswith("transformers")]
        best_rate = max(row["tokens_per_second"] for row in theirs)
        best_start = min(row["first_token_seconds"] for row in theirs)
        for row in measured.values():
            row["start_ratio"] = round(best_start / row["first_token_seconds"], 2)
            row["decode_ratio"] = round(row["tokens_per_second"] / best_rate, 2)
        figures[shape] = measured
        print(f"\n{shape}, bf16, ratios against transformers' best\n")
        header = ["setting", "start to first token, s", "×", "first decode, tokens/s", "steady decode, tokens/s", "×", "peak, MiB"]
        columns = ["first_token_seconds", "start_ratio", "first_tokens_per_second", "tokens_per_second", "decode_ratio", "peak_mib"]
        print(table(header, [[name, *(row[column] for column in columns)] for name, row in measured.items()]), flush=True)
    write("generation", {"repeats": arguments.repeats, "tokens": arguments.tokens, "shapes": figures})


if __name__ == "__main__":
    main()
