"""How fast and in how much memory a checkpoint becomes a module on CPU: against transformers and accelerate.

    python -m benchmarks.loading [--case keep-1.1B ...] [--repeats 5]

Each measurement is a process of its own. `load` is the call that loads, imports done before; `touched` goes on until every weight
was read once, so that what was only mapped is paid for; `peak` is the most memory the process held, of which what is more than the
weights is the cost. Warm: the files are in the page cache; cold: they were dropped from it before. Ratios are against the best
peer. Just before, another process touches as much free memory as the load may take: a virtual machine may have given it back
to its host, and getting it again would take longer than the load.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, SHAPES, TOUCH, child, drop_cache, median, random_checkpoint, storage, table, write

HEAD = (
    TOUCH
    + """
import time, json
os.environ.setdefault("HF_HUB_OFFLINE", "1")
path, dtype = sys.argv[1], sys.argv[2]
import torch
def report(load):
    touch(folder_bytes(path) * (3 if dtype == "float32" else 1))
    base = resident()
    start = time.perf_counter()
    module = load()
    loaded = time.perf_counter() - start
    peak = high()
    tensors = {id(one): one for one in (*module.parameters(), *module.buffers())}.values()
    total = 0
    for one in tensors:
        flat = one.detach().reshape(-1).view(torch.uint8)
        total += int(flat[:: 4096].sum())
    touched = time.perf_counter() - start
    weights = sum(one.nbytes for one in tensors)
    print(json.dumps({"load": loaded, "touched": touched, "peak": peak - base, "high": high() - base, "weights": weights,
                      "tensors": len(tensors)}))
def resident(): return status("VmRSS")
def high(): return status("VmHWM")
"""
)

OURS = (
    HEAD
    + """
import modelrig
modelrig.load("tiny").close()
def load():
    global model
    model = modelrig.load(path, context=64, **({} if dtype == "auto" else {"dtype": dtype}))
    return model.module
report(load)
"""
)

OURS_MODULE = (
    HEAD
    + """
import modelrig
from modelrig.checkpoint.mapping import Concat, Rename, Stack
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM
config = AutoConfig.from_pretrained(path)
rules = [
    Concat(["{*p}.block_sparse_moe.experts.{e}.w1.weight", "{*p}.block_sparse_moe.experts.{e}.w3.weight"], "{*p}.gate_up.{e}"),
    Stack("{*p}.gate_up.{e}", "{*p}.mlp.experts.gate_up_proj", over="e"),
    Stack("{*p}.block_sparse_moe.experts.{e}.w2.weight", "{*p}.mlp.experts.down_proj", over="e"),
    Rename("{*p}.block_sparse_moe.gate.weight", "{*p}.mlp.gate.weight"),
]
modelrig.load("tiny").close()
def load():
    with modelrig.empty_weights():
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
    modelrig.load_checkpoint(module, path, mapping=rules)
    return module
report(load)
"""
)

TRANSFORMERS = (
    HEAD
    + """
import logging, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM
transformers.utils.logging.disable_progress_bar()
report(lambda: AutoModelForCausalLM.from_pretrained(path, dtype="auto" if dtype == "auto" else getattr(torch, dtype)))
"""
)

ACCELERATE = (
    HEAD
    + """
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
config = AutoConfig.from_pretrained(path)
def load():
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    with init_empty_weights():
        module = AutoModelForCausalLM.from_config(config, dtype=kind)
    return load_checkpoint_and_dispatch(module, path, device_map={"": "cpu"}, dtype=kind)
report(load)
"""
)

MANY = (
    HEAD
    + """
from torch import nn
class Many(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.parts = nn.ModuleList()
        for number in range(count):
            part = nn.Module()
            part.register_parameter("weight", nn.Parameter(torch.empty(16, 16, device="meta"), requires_grad=False))
            self.parts.append(part)
module = Many(20_000)
"""
)
MANY_OURS = (
    MANY
    + """
import modelrig
modelrig.load_checkpoint(nn.Linear(2, 2, device="meta"), sys.argv[3])
def load():
    modelrig.load_checkpoint(module, path)
    return module
report(load)
"""
)
MANY_ACCELERATE = (
    MANY
    + """
from accelerate import load_checkpoint_in_model
def load():
    load_checkpoint_in_model(module, path, device_map={"": "cpu"})
    return module
report(load)
"""
)
MANY_SAFETENSORS = (
    MANY
    + """
from safetensors.torch import load_file
def load():
    module.load_state_dict(load_file(path + "/model.safetensors"), assign=True)
    return module
report(load)
"""
)

LLAMA = {
    "modelrig": (OURS, {}),
    "transformers": (TRANSFORMERS, {}),
    "transformers, no threads": (TRANSFORMERS, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
    "accelerate": (ACCELERATE, {}),
}
MIXTRAL = {
    "modelrig": (OURS_MODULE, {}),
    "transformers": (TRANSFORMERS, {}),
    "transformers, no threads": (TRANSFORMERS, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),
}
SMALL = {"modelrig": (MANY_OURS, {}), "accelerate": (MANY_ACCELERATE, {}), "safetensors + load_state_dict": (MANY_SAFETENSORS, {})}

#: case → (checkpoint, dtype, settings)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "keep-1.1B": ("1.1B", "auto", LLAMA),
    "keep-3.2B": ("3.2B", "auto", LLAMA),
    "float32-1.1B": ("1.1B", "float32", LLAMA),
    "float32-3.2B": ("3.2B", "float32", LLAMA),
    "mixtral-keep": ("mixtral", "auto", MIXTRAL),
    "mixtral-float32": ("mixtral", "float32", MIXTRAL),
    "20,000 tensors": ("many", "auto", SMALL),
}


def checkpoint(name: str) -> Path:
    from transformers import LlamaConfig, MixtralConfig

    if name == "many":
        return _many(storage() / "many-small")
    if name == "mixtral":
        shape = {
            "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 12, "num_attention_heads": 16,
            "num_key_value_heads": 4, "num_local_experts": 8, "vocab_size": 32000, "max_position_embeddings": 2048,
        }  # fmt: skip
        return random_checkpoint("mixtral-1.1B", MixtralConfig(**shape))
    return random_checkpoint(f"random-llama-{name}", LlamaConfig(**SHAPES[name], max_position_embeddings=2048))


def _many(folder: Path) -> Path:
    if not (folder / "model.safetensors").exists():
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({f"parts.{number}.weight": torch.randn(16, 16) for number in range(20_000)}, folder / "model.safetensors")
        other = folder.with_name("one-small")
        other.mkdir(exist_ok=True)
        save_file({"weight": torch.randn(2, 2), "bias": torch.randn(2)}, other / "model.safetensors")
    return folder


def measure(case: str, repeats: int, *, cold: bool) -> dict[str, dict[str, float]]:
    name, dtype, settings = CASES[case]
    path = checkpoint(name)
    rows: dict[str, list[dict]] = {setting: [] for setting in settings}
    for repeat in range(repeats + (not cold)):
        for setting, (code, environ) in settings.items():
            if cold:
                drop_cache(path)
            row = child(code, str(path), dtype, str(path.with_name("one-small")), **environ)
            if repeat or cold:  # the first warm round fills the page cache
                rows[setting].append(row)
    return {
        setting: {
            "load_seconds": round(median(found, "load"), 4),
            "touched_seconds": round(median(found, "touched"), 3),
            "peak_mib": round(median(found, "peak") / 2**20),
            "high_mib": round(median(found, "high") / 2**20),
            "weights_mib": round(found[0]["weights"] / 2**20),
            "microseconds_per_tensor": round(median(found, "load") / found[0]["tensors"] * 1e6, 1),
        }
        for setting, found in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    for case in arguments.case or CASES:
        for cold in (False, True):
            measured = measure(case, max(2, arguments.repeats // 2) if cold else arguments.repeats, cold=cold)
            theirs = [row for name, row in measured.items() if name != "modelrig"]
            for key in ("load", "touched"):
                best = min(row[f"{key}_seconds"] for row in theirs)
                for row in measured.values():
                    row[f"{key}_ratio"] = round(best / row[f"{key}_seconds"], 2)
            title = f"{case}, {'cold' if cold else 'warm'}"
            figures[title] = {"repeats": arguments.repeats, "settings": measured}
            print(f"\n{title}\n")
            header = ["setting", "load, s", "×", "load and touch, s", "×", "peak of the load, MiB", "weights, MiB", "µs/tensor"]
            columns = ["load_seconds", "load_ratio", "touched_seconds", "touched_ratio", "peak_mib", "weights_mib"]
            columns.append("microseconds_per_tensor")
            print(table(header, [[name, *(row[column] for column in columns)] for name, row in measured.items()]), flush=True)
            kept = json.loads((RESULTS / "loading.json").read_text())["cases"] if (RESULTS / "loading.json").exists() else {}
            write("loading", {"cases": kept | figures})  # after each table; those that were not measured now stay


if __name__ == "__main__":
    main()
