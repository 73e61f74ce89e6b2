"""Checkpoints with random weights, the machine's name, medians, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "1.1B": {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 5632, "vocab_size": 32000,
    },
    "135M": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152,
    },
}  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def storage() -> Path:
    """Where big checkpoints are kept between runs: `MODELRIG_BENCH_DIR`, or a folder in the user's cache."""
    return Path(os.environ.get("MODELRIG_BENCH_DIR", Path.home() / ".cache" / "modelrig-benchmarks"))


def llama_checkpoint(name: str) -> Path:
    """A llama of shape `name` with random bf16 weights, written once by transformers."""
    folder = storage() / f"llama-{name}"
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        shape = {**SHAPES[name], "max_position_embeddings": 2048, "tie_word_embeddings": name == "135M"}
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, eos_token_id=None), dtype=torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    flags = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if flag in Path("/proc/cpuinfo").read_text()]
    return {
        "cpu": model,
        "flags": flags[:2],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "modelrig")},
    }


def child(code: str, *arguments: str) -> dict[str, Any]:
    """Run Python `code` in a fresh process. It prints one JSON object; `seconds` and `started` (time.time()) are added."""
    started = time.time()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {"started": started, "seconds": time.time() - started, **json.loads(done.stdout.splitlines()[-1])}


def median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def write(name: str, figures: dict[str, Any]) -> None:
    """Keep the figures of benchmark `name`, with the machine and the date."""
    RESULTS.mkdir(exist_ok=True)
    document = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])
