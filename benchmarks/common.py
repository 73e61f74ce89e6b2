"""Checkpoints with random weights, the machine's name, medians, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "1.1B": {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 5632, "vocab_size": 32000,
    },
    "3.2B": {
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256,
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


#: of a measuring process: another one touches as much free memory as the work may take. A virtual machine may have given it back to
#: its host, and getting it again would take longer than the work.
TOUCH = """
import os, subprocess, sys
def status(key, path="/proc/self/status"):
    return next(int(line.split()[1]) * 1024 for line in open(path) if line.startswith(key))
def touch(count):
    code = "import mmap, sys; mmap.mmap(-1, int(sys.argv[1])).madvise(23)"  # MADV_POPULATE_WRITE
    subprocess.run([sys.executable, "-c", code, str(min(count, status("MemFree", "/proc/meminfo") // 10 * 9))], check=True)
def folder_bytes(path): return sum(entry.stat().st_size for entry in os.scandir(path))
"""


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


def random_checkpoint(name: str, config: Any, max_shard_size: str = "5GB") -> Path:
    """A checkpoint of transformers' `config` with random bf16 weights, written tensor by tensor: any size in little memory."""
    folder = storage() / name
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM

    from modelrig.checkpoint.saving.protocol import save_checkpoint
    from modelrig.components import StoredTensor
    from modelrig_plugins.formats.safetensors import SafetensorsPlanner

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = stored_shapes(model)
    torch.manual_seed(0)
    pool = (torch.randn(32 << 20) * 0.02).bfloat16().view(torch.uint8).numpy()

    def read(tensor: StoredTensor) -> Any:
        left = tensor.nbytes
        while left:
            part = pool[: min(left, pool.nbytes)]
            yield part.data
            left -= part.nbytes

    tensors = [StoredTensor(name, "bfloat16", shape) for name, shape in shapes.items()]
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    files = {"config.json": json.dumps(config.to_dict(), default=str, indent=2).encode()}
    save_checkpoint(folder, tensors, read, SafetensorsPlanner, max_shard_size=max_shard_size, files=files)
    return folder


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes as they lie on disk: mixtral's stacked experts one by one, as its published checkpoints have them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        head, found, leaf = name.partition(".mlp.experts.")
        if found:
            experts, rows, columns = tensor.shape
            names = (("w1", rows // 2), ("w3", rows // 2)) if leaf == "gate_up_proj" else (("w2", rows),)
            for expert in range(experts):
                for part, size in names:
                    shapes[f"{head}.block_sparse_moe.experts.{expert}.{part}.weight"] = (size, columns)
        else:
            shapes[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tuple(tensor.shape)
    return shapes


def drop_cache(folder: Path) -> None:
    """Make the next read of the folder's files come from the disk."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


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
        **{package: version(package) for package in ("torch", "transformers", "accelerate", "modelrig")},
    }


def child(code: str, *arguments: str, group: Path | None = None, python: str = sys.executable, **environ: str) -> dict[str, Any]:
    """Run Python `code` in a fresh process, in the control group `group`. It prints one JSON object; `seconds` and `started`
    (time.time()) are added."""
    started = time.time()
    join = None if group is None else (lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None)
    done = subprocess.run(
        [python, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in (os.environ | environ).items() if key != "MODELRIG_BENCH_DIR"},  # no request key
        preexec_fn=join,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {"started": started, "seconds": time.time() - started, **json.loads(done.stdout.splitlines()[-1])}


@contextmanager
def memory_limit(limit: int) -> Iterator[Path]:
    """A control group (v1 or v2) whose processes may hold `limit` bytes, page cache included. Needs root."""
    base = Path("/sys/fs/cgroup/memory")
    base = base if base.is_dir() else Path("/sys/fs/cgroup")
    group = base / f"modelrig-bench-{os.getpid()}"
    group.mkdir()
    try:
        name = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").exists() else "memory.max"
        (group / name).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


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
