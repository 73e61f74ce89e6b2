"""How fast are the things that must not import torch: `import modelrig`, `modelrig plugins`, `modelrig plan` of 100,000 tensors.

python -m benchmarks.planning [--repeats 7]
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

from benchmarks.common import child, median, storage, table, write

TENSORS, SHARDS = 100_000, 200

IMPORT = """
import sys, time, json
started = time.perf_counter()
import modelrig
print(json.dumps({"inside": time.perf_counter() - started, "torch": "torch" in sys.modules}))
"""
COMMAND = """
import sys, json, contextlib, io
from modelrig.cli import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    assert main(sys.argv[1:]) == 0
print(json.dumps({"torch": "torch" in sys.modules, "characters": len(out.getvalue())}))
"""
NOTHING = "import json; print(json.dumps({}))"


def synthetic_checkpoint() -> Path:
    """A llama of 11,111 narrow layers: 100,002 tensors in 200 shards of sparse zeros, with its index."""
    folder = storage() / "synthetic-100k"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    hidden, ffn, vocab, layers = 8, 8, 16, (TENSORS - 3) // 9
    block = {
        "input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden],
        "self_attn.q_proj.weight": [hidden, hidden], "self_attn.k_proj.weight": [hidden, hidden],
        "self_attn.v_proj.weight": [hidden, hidden], "self_attn.o_proj.weight": [hidden, hidden],
        "mlp.gate_proj.weight": [ffn, hidden], "mlp.up_proj.weight": [ffn, hidden], "mlp.down_proj.weight": [hidden, ffn],
    }  # fmt: skip
    tensors = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    tensors |= {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden], "lm_head.weight": [vocab, hidden]}
    names = sorted(tensors)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, offset = {}, 0
        for name in names[shard::SHARDS]:
            size = 2
            for dimension in tensors[name]:
                size *= dimension
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [offset, offset + size]}
            offset, weight_map[name] = offset + size, file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
    total = sum(Path(folder / file).stat().st_size for file in set(weight_map.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": vocab, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    folder = str(synthetic_checkpoint())
    questions = {
        "python alone": (NOTHING, ()),
        "import modelrig": (IMPORT, ()),
        "modelrig plugins": (COMMAND, ("plugins",)),
        "modelrig plan tiny": (COMMAND, ("plan", "tiny")),
        f"modelrig plan, {TENSORS:,} tensors in {SHARDS} shards": (COMMAND, ("plan", folder)),
    }
    rows: dict[str, list[dict]] = {name: [] for name in questions}
    for repeat in range(repeats + 1):
        for name, (code, arguments) in questions.items():
            row = child(code, *arguments)
            assert not row.get("torch"), f"{name} imported torch"
            if repeat:
                rows[name].append(row)
    figures = {name: round(median(found, "seconds") * 1000) for name, found in rows.items()}
    figures["import modelrig, inside the process"] = round(median(rows["import modelrig"], "inside") * 1000, 1)
    print(table(["what", "milliseconds, process start included"], [[name, value] for name, value in figures.items()]))
    write("planning", {"repeats": repeats, "milliseconds": figures})


if __name__ == "__main__":
    main()
