"""How fast each decoder family decodes, against transformers, on CPU, in bf16, at 0.5 to 1.1 billion parameters.

    python -m benchmarks.families [--family gemma2] [--repeats 3] [--tokens 32]

Random weights, a prompt of 32 ids, greedy; steady decoding, after a first generation of as many tokens. Each measurement is a
process of its own, the peers in turn. transformers runs eagerly with each cache and attention it offers there; ratios are against
its best.

`experts` measures one layer of Mixtral's experts against a dense feed-forward that does the same arithmetic.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.common import child, machine, median, storage, table, write
from benchmarks.generation import SETTINGS

COMMON = {
    "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 4096,
    "vocab_size": 32_000, "max_position_embeddings": 2048, "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
GEMMA = {"head_dim": 128, "vocab_size": 64_000, "tie_word_embeddings": True}
#: family → what its config says besides COMMON
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 1024},
    "Mixtral": {"num_hidden_layers": 12, "intermediate_size": 2048, "num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen2": {},
    "Qwen3": {"head_dim": 128},
    "Qwen3Moe": {
        "num_hidden_layers": 12, "head_dim": 128, "num_experts": 24, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
    },
    "Gemma": GEMMA,
    "Gemma2": GEMMA | {"sliding_window": 512},
    "Gemma3Text": GEMMA | {"sliding_window": 512},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.01, "logits_scaling": 6.0},
    "SmolLM3": {},
    "GPT2": {},
    "GPTNeoX": {},
}  # fmt: skip


def checkpoint(family: str) -> Path:
    """A random one, written by transformers."""
    folder = storage() / f"family-{family.lower()}"
    if (folder / "config.json").exists():
        return folder
    import torch
    import transformers

    torch.manual_seed(0)
    values = COMMON | FAMILIES[family]
    if family == "GPT2":
        values["n_inner"] = values.pop("intermediate_size")
        del values["num_key_value_heads"]
    config = getattr(transformers, f"{family}Config")(**values)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def measure(family: str, repeats: int, tokens: int) -> dict[str, Any]:
    path = checkpoint(family)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for repeat in range(repeats + 1):
        for name, (code, cache, attention) in SETTINGS.items():
            if family == "Gemma2" and attention == "sdpa" and name.startswith("transformers"):
                continue  # torch's kernel leaves its cap out
            row = child(code, str(path), cache, str(tokens), attention)
            if repeat:  # the first round fills the page cache
                rows[name].append(row)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    rates = {name: round(median(found, "steady"), 2) for name, found in rows.items() if found}
    best = max((name for name in rates if name.startswith("transformers")), key=lambda name: rates[name])
    ours = {cache: rates[f"modelrig, {cache}"] for cache in ("dynamic", "static")}
    return {
        "parameters": size // 2,
        "tokens_per_second": rates,
        "best_peer": best,
        "ratio": {cache: round(rate / rates[best], 2) for cache, rate in ours.items()},
    }


def measure_experts(repeats: int = 15) -> dict[str, Any]:
    """Milliseconds of one layer's experts, and of dense feed-forwards with the same products: as wide as all that a token chose
    together for a single token, and one for each expert on as many tokens as chose it for a prompt."""
    import torch
    import torch.nn.functional as F

    from modelrig.modules.decoder import GatedMLP
    from modelrig.modules.experts import SparseMLP
    from modelrig.modules.network import BuildContext
    from modelrig.planning.environment import read_environment
    from modelrig.planning.needs import QuantizerNeed
    from modelrig_plugins.quantizers.none import NoneOptions, NonePlanner
    from modelrig_plugins.quantizers.none_module import DenseLinear

    hidden, size, count, chosen, dtype = 2048, 2816, 8, 2, torch.bfloat16
    need = QuantizerNeed(device="cpu", dtype="bfloat16", scheme="none", shapes=frozenset(), cpu_flags=read_environment().cpu_flags)
    linear = DenseLinear(NonePlanner.settle(need, NoneOptions()))
    context = BuildContext(attention=None, linear=linear, dtype=dtype)  # type: ignore[arg-type]

    def made(module: torch.nn.Module) -> torch.nn.Module:
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(
                        torch.randn(parameter.shape, dtype=torch.float32).mul_(0.02).to(dtype), requires_grad=False
                    )
        for part in module.modules():
            if hasattr(part, "bind"):
                part.bind(linear)
        return module

    torch.manual_seed(0)
    figures: dict[str, Any] = {"kernel": linear.kernel}
    sizes: dict[int, list[int]] = {}  # tokens → how many of them each expert got
    # Several layers, so that weights come from memory and not from the processor's cache, as in a model.
    sparse = [made(SparseMLP(hidden, size, count, chosen, True, F.silu, context)) for _ in range(4)]
    dense = [made(GatedMLP(hidden, chosen * size, False, F.silu, context)) for _ in range(4)]
    each = [[made(GatedMLP(hidden, size, False, F.silu, context)) for _ in range(count)] for _ in range(2)]

    def experts(x: torch.Tensor) -> None:
        for layer in sparse:
            layer(x)

    def arithmetic(x: torch.Tensor) -> None:
        if x.numel() == hidden:
            for layer in dense:
                layer(x)
            return
        groups = x.repeat(chosen, 1).split(sizes[x.shape[0]])
        for layers in (*each, *each):
            for group, one in zip(groups, layers, strict=True):
                if group.shape[0]:
                    one(group)

    for tokens in (1, 16, 512):
        x = torch.randn(tokens, hidden).to(dtype)
        x = x[0] if tokens == 1 and linear.vector else x
        sizes[tokens] = sparse[0].gate(x)[0].flatten().bincount(minlength=count).tolist()  # type: ignore[operator, index]
        with torch.inference_mode():
            times: dict[str, list[float]] = {"experts": [], "dense": []}
            for _ in range(30 if tokens == 1 else 2):  # until kernels have packed what they pack
                experts(x)
                arithmetic(x)
            for _ in range(repeats):
                for name, work in (("experts", experts), ("dense", arithmetic)):
                    started = time.perf_counter()
                    work(x)
                    times[name].append((time.perf_counter() - started) / 4 * 1000)
        row = {name: round(statistics.median(found), 3) for name, found in times.items()}
        figures[f"{tokens} tokens"] = row | {"ratio": round(row["dense"] / row["experts"], 2)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, a gigabyte or two each")
    arguments = parser.parse_args()
    figures = {}
    for family in arguments.family or FAMILIES:
        row = figures[family] = measure(family, arguments.repeats, arguments.tokens)
        print(family, row, flush=True)
        if not arguments.keep:
            shutil.rmtree(checkpoint(family))
    header = ["family", "parameters", "modelrig, dynamic", "modelrig, static", "transformers' best", "which", "×"]
    rows = [
        [
            family,
            f"{row['parameters'] / 1e9:.2f}B",
            row["tokens_per_second"]["modelrig, dynamic"],
            row["tokens_per_second"]["modelrig, static"],
            row["tokens_per_second"][row["best_peer"]],
            row["best_peer"].removeprefix("transformers "),
            max(row["ratio"].values()),
        ]
        for family, row in figures.items()
    ]
    print(f"\ntokens/s of steady decoding, {machine()['cpu']}\n\n{table(header, rows)}\n")
    code = "import json; from benchmarks.families import measure_experts; print(json.dumps(measure_experts()))"
    runs = [child(code) for _ in range(5)]
    experts = {
        key: sorted((run[key] for run in runs), key=lambda row: row["ratio"])[2] for key in runs[0] if key.endswith("tokens")
    }
    print("experts", experts)
    if not arguments.family:
        write("families", {"repeats": arguments.repeats, "tokens": arguments.tokens, "families": figures, "experts": experts})


if __name__ == "__main__":
    main()
