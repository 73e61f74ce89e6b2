"""Decoding with most of the layers on disk: against accelerate's disk offload, and against what a plain reader gets from that disk.

    python -m benchmarks.offload [--share 0.6] [--tokens 8] [--repeats 3]

`limited`: the process lives in a control group (needs root) that has room for what the device map keeps in memory, two blocks and
700 MiB for the program itself; what it does not use of them may keep blocks of the disk tier. `cached`: no limit, and the files are
in the page cache. The reader reads the same bytes front to back with 4 MiB calls under the same limit; `of the reader` is the disk
tier's bytes for each token, over the time of a token, beside its rate.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.common import SHAPES, child, drop_cache, median, memory_limit, random_checkpoint, table, write

HEAD = """
import sys, time, json, os
os.environ.setdefault("HF_HUB_OFFLINE", "1")
path, tokens, on_disk, work = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
device_map = {"": "cpu", **{name: "disk" for name in on_disk}}
"""

OURS = (
    HEAD
    + """
import modelrig
model = modelrig.load(path, context=256, device_map=device_map)
prompt = list(range(7, 15))
model.generate(prompt, max_new_tokens=2, ignore_eos=True)
rate = tokens / model.generate(prompt, max_new_tokens=tokens + 1, ignore_eos=True).stats.decode_seconds
print(json.dumps({"rate": rate, "peak": status("VmHWM"), "anonymous": status("RssAnon")}))
"""
)

ACCELERATE = (
    HEAD
    + """
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(path)
device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
for number in range(config.num_hidden_layers):
    name = f"model.layers.{number}"
    device_map[name] = "disk" if name in on_disk else "cpu"
if os.environ.get("FROM_PRETRAINED"):
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=work, dtype=torch.bfloat16)
else:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = load_checkpoint_and_dispatch(model, path, device_map=device_map, offload_folder=work, dtype=torch.bfloat16).eval()
model.generation_config.eos_token_id = None
ids = torch.arange(7, 15)[None]
class Clock:
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.perf_counter())
    def end(self): pass
clock = Clock()
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, do_sample=False, pad_token_id=0, streamer=clock)
times = clock.times[1:]
print(json.dumps({"rate": tokens / (times[-1] - times[0]), "peak": status("VmHWM"), "anonymous": status("RssAnon")}))
"""
)

READER = """
import sys, time, json, os
names, size = json.loads(sys.argv[1]), int(sys.argv[2])
buffer, done = memoryview(bytearray(4 << 20)), 0
start = time.perf_counter()
for name in names:
    descriptor = os.open(name, os.O_RDONLY)
    while done < size and (count := os.readv(descriptor, [buffer])):
        done += count
print(json.dumps({"rate": done / (time.perf_counter() - start)}))
"""


THROUGH = "transformers with accelerate"


def measure(shape: str, share: float, tokens: int, repeats: int, work: Path) -> dict[str, Any]:
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048)
    path = random_checkpoint(f"random-llama-{shape}", config)
    layers = config.num_hidden_layers
    count = round(share * layers)
    chosen = sorted({round(number * layers / count) for number in range(count)})
    while len(chosen) < count:
        chosen = sorted({*chosen, next(number for number in range(layers) if number not in chosen)})
    heads, kv, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    block = 2 * (hidden * hidden * 2 + 2 * hidden * hidden * kv // heads + 3 * hidden * config.intermediate_size + 2 * hidden)
    disk = block * count
    kept = 2 * 2 * config.vocab_size * hidden + block * (layers - count)
    import json

    names = json.dumps([f"model.layers.{number}" for number in chosen])
    limit = kept + 2 * block + (700 << 20)  # the interpreter, torch and a prompt's activations
    files = json.dumps([str(file) for file in sorted(path.glob("*.safetensors"))])
    settings = {"modelrig": (OURS, {}), "accelerate": (ACCELERATE, {}), THROUGH: (ACCELERATE, {"FROM_PRETRAINED": "1"})}
    found: dict[str, Any] = {"disk_bytes": disk, "kept_bytes": kept, "limit_bytes": limit, "layers_on_disk": count}
    regimes = ["limited", "cached"] if os.geteuid() == 0 else ["cached"]
    for regime in regimes:
        rows: dict[str, list[dict]] = {name: [] for name in (*settings, "reader")}
        for repeat in range(repeats + (regime == "cached")):
            for name in (*settings, "reader"):
                (code, environ), arguments = settings.get(name, (READER, {})), (str(path), str(tokens), names, str(work))
                if name == "reader":
                    arguments = (files, str(min(disk, sum(file.stat().st_size for file in path.glob("*.safetensors")))))
                if regime == "limited":
                    drop_cache(path)
                    with memory_limit(limit) as group:
                        row = child(code, *arguments, group=group, **environ)
                else:
                    row = child(code, *arguments, **environ)
                if repeat or regime == "limited":
                    rows[name].append(row)
        reader = median(rows["reader"], "rate")
        found[regime] = {"reader_gb_per_second": round(reader / 1e9, 2)}
        for name in settings:
            rate = median(rows[name], "rate")
            found[regime][name] = {
                "tokens_per_second": round(rate, 3),
                "disk_gb_per_second": round(rate * disk / 1e9, 2),
                "of_the_reader": round(rate * disk / reader, 2),
                "peak_mib": round(median(rows[name], "peak") / 2**20),
                "anonymous_mib": round(median(rows[name], "anonymous") / 2**20),
            }
    return found


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure(arguments.shape, arguments.share, arguments.tokens, arguments.repeats, Path(work))
    rows = []
    for regime in ("limited", "cached"):
        for name in ("modelrig", "accelerate", THROUGH):
            if regime in found:
                row = found[regime][name]
                row["ratio"] = round(row["tokens_per_second"] / found[regime]["accelerate"]["tokens_per_second"], 2)
                keys = ("tokens_per_second", "ratio", "disk_gb_per_second", "of_the_reader", "peak_mib", "anonymous_mib")
                rows.append([regime, name, *(row[key] for key in keys)])
    print(
        table(["regime", "setting", "tokens/s", "×", "disk tier, GB/s", "of the reader", "peak RSS, MiB", "anonymous, MiB"], rows)
    )
    write("offload", {"shape": arguments.shape, "share": arguments.share, "tokens": arguments.tokens, **found})


if __name__ == "__main__":
    main()
