"""How long from process start to the first token, how fast are prompts and decoding, how much memory: on CPU, in bf16.

    python -m benchmarks.generation [--shape 135M] [--repeats 5] [--tokens 64] [--llama-python PATH]

Each measurement is a process of its own: import, load, one token from a prompt of 32 ids, then greedy decoding of --tokens tokens,
twice: `first` as it comes, with whatever a library does while it warms up (ours packs weights, compilers compile), `steady` after
that; then a prompt of 512 ids. Peers: transformers, eagerly with each cache and attention that it offers there, and with its
static cache and a compiled forward; and llama.cpp, where --llama-python names a Python that has llama-cpp-python, gguf and numpy.
Ratios are against transformers' best.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from benchmarks.common import SHAPES, child, llama_checkpoint, median, storage, table, write

OURS = """
import sys, time, json, resource
path, setting, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
import modelrig
cache, _, rest = setting.partition(" ")
request = dict(part.split("=") for part in rest.split())
model = modelrig.load(path, cache=cache, context=1024, **request)
prompt = list(range(7, 39))
model.generate(prompt, max_new_tokens=1)
first = time.time()
cold, steady = (tokens / model.generate(prompt, max_new_tokens=tokens + 1).stats.decode_seconds for _ in range(2))
long = list(range(7, 519))
prompts = [512 / model.generate(long, max_new_tokens=1).stats.prefill_seconds for _ in range(3)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"first": first, "cold": cold, "steady": steady, "prompt": max(prompts), "peak": peak}))
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
eager = model.forward
def generate(count, streamer=None, ids=ids):
    options = {"cache_implementation": "static", "disable_compile": True} if cache != "dynamic" else {}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
                          streamer=streamer, **options)
generate(1)
first = time.time()
if cache == "compiled":
    compiled = torch.compile(model.forward, fullgraph=True)
    def forward(input_ids=None, **kwargs):
        return (compiled if input_ids.shape[1] == 1 else eager)(input_ids=input_ids, **kwargs)
    model.forward = forward
def rate():
    clock = Clock()
    generate(tokens + 1, clock)
    times = clock.times[1:]  # the first put is the prompt
    return tokens / (times[-1] - times[0])
cold, steady = rate(), rate()
def prompt():
    started = time.perf_counter()
    generate(1, ids=torch.arange(7, 519)[None])
    return 512 / (time.perf_counter() - started)
prompts = [prompt() for _ in range(3)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"first": first, "cold": cold, "steady": steady, "prompt": max(prompts), "peak": peak}))
"""

LLAMA = """
import sys, time, json, resource
path, _, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
from llama_cpp import Llama
model = Llama(path, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=2, n_threads_batch=2, verbose=False, logits_all=False)
def rate():
    model.reset()
    model.eval(list(range(7, 39)))
    started = time.perf_counter()
    for number in range(tokens):
        model.sample(temp=0.0)
        model.eval([7 + number])
    return tokens / (time.perf_counter() - started)
model.eval(list(range(7, 39)))
model.sample(temp=0.0)
first = time.time()
cold, steady = rate(), rate()
def prompt():
    model.reset()
    started = time.perf_counter()
    model.eval(list(range(7, 519)))
    return 512 / (time.perf_counter() - started)
prompts = [prompt() for _ in range(3)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"first": first, "cold": cold, "steady": steady, "prompt": max(prompts), "peak": peak}))
"""

#: a llama checkpoint of transformers as a GGUF file in BF16, norms in F32; run by the Python that has gguf
TO_GGUF = """
import sys, json, mmap
import numpy as np, gguf
folder, target = sys.argv[1], sys.argv[2]
config = json.load(open(folder + "/config.json"))
file = open(folder + "/model.safetensors", "rb")
data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
size = int.from_bytes(data[:8], "little")
header = json.loads(data[8 : 8 + size])
header.pop("__metadata__", None)
writer = gguf.GGUFWriter(target, "llama")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
writer.add_tokenizer_model("llama")
words = config["vocab_size"]
writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [("t%d" % n).encode() for n in range(words - 3)])
writer.add_token_scores([0.0] * words)
writer.add_token_types([2, 3, 3] + [1] * (words - 3))
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
def name_of(name):
    parts = name.removesuffix(".weight").split(".")
    if parts[1:2] == ["layers"]:
        return "blk.%s.%s.weight" % (parts[2], NAMES[".".join(parts[3:])])
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[".".join(parts)] + ".weight"
for name, entry in header.items():
    begin, end = entry["data_offsets"]
    bits = np.frombuffer(data, dtype=np.uint16, count=(end - begin) // 2, offset=8 + size + begin).reshape(entry["shape"])
    if bits.ndim == 1:
        writer.add_tensor(name_of(name), (bits.astype(np.uint32) << 16).view(np.float32))
        continue
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads:  # rotary pairs stand side by side there
        count = config[heads]
        bits = bits.reshape(count, 2, bits.shape[0] // count // 2, bits.shape[1]).swapaxes(1, 2).reshape(bits.shape)
    raw = np.ascontiguousarray(bits).view(np.uint8)
    writer.add_tensor(name_of(name), raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""

SETTINGS = {
    "modelrig, dynamic": (OURS, "dynamic", "sdpa"),
    "modelrig, static": (OURS, "static", "sdpa"),
    "modelrig, static, inductor": (OURS, "static compiler=inductor", "sdpa"),
    "transformers sdpa, dynamic": (THEIRS, "dynamic", "sdpa"),
    "transformers sdpa, static": (THEIRS, "static", "sdpa"),
    "transformers sdpa, static, compiled": (THEIRS, "compiled", "sdpa"),
    "transformers eager, dynamic": (THEIRS, "dynamic", "eager"),
}
LLAMA_CPP = "llama.cpp, BF16"


def gguf_file(shape: str, python: str) -> Path:
    target = storage() / f"llama-{shape}.gguf"
    if not target.exists():
        subprocess.run([python, "-c", TO_GGUF, str(llama_checkpoint(shape)), str(target)], check=True, stdout=subprocess.DEVNULL)
    return target


def measure(shape: str, repeats: int, tokens: int, llama: str | None) -> dict[str, dict[str, float]]:
    path = str(llama_checkpoint(shape))
    settings = {name: (code, path, cache, attention, {}) for name, (code, cache, attention) in SETTINGS.items()}
    if llama is not None:
        settings[LLAMA_CPP] = (LLAMA, str(gguf_file(shape, llama)), "", "", {"python": llama})
    rows: dict[str, list[dict]] = {name: [] for name in settings}
    for repeat in range(repeats + 1):
        for name, (code, model, cache, attention, how) in settings.items():
            row = child(code, model, cache, str(tokens), attention, **how)
            row["first_token_seconds"] = row["first"] - row["started"]
            if repeat:  # the first round fills the page cache
                rows[name].append(row)
    return {
        name: {
            "first_token_seconds": round(median(found, "first_token_seconds"), 3),
            "first_tokens_per_second": round(median(found, "cold"), 2),
            "tokens_per_second": round(median(found, "steady"), 2),
            "prompt_tokens_per_second": round(median(found, "prompt"), 1),
            "peak_mib": round(median(found, "peak") / 2**20),
        }
        for name, found in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python, gguf and numpy")
    arguments = parser.parse_args()
    figures = {}
    for shape in arguments.shape or ("1.1B", "135M"):
        measured = measure(shape, arguments.repeats, arguments.tokens, arguments.llama_python)
        theirs = [row for name, row in measured.items() if name.startswith("transformers")]
        best_rate = max(row["tokens_per_second"] for row in theirs)
        best_start = min(row["first_token_seconds"] for row in theirs)
        best_prompt = max(row["prompt_tokens_per_second"] for row in theirs)
        for row in measured.values():
            row["prompt_ratio"] = round(row["prompt_tokens_per_second"] / best_prompt, 2)
            row["start_ratio"] = round(best_start / row["first_token_seconds"], 2)
            row["decode_ratio"] = round(row["tokens_per_second"] / best_rate, 2)
        figures[shape] = measured
        print(f"\n{shape}, bf16, ratios against transformers' best\n")
        header = ["setting", "start to first token, s", "×", "first decode, tokens/s", "steady decode, tokens/s", "×"]
        header += ["prompt of 512, tokens/s", "×", "peak, MiB"]
        columns = ["first_token_seconds", "start_ratio", "first_tokens_per_second", "tokens_per_second", "decode_ratio"]
        columns += ["prompt_tokens_per_second", "prompt_ratio", "peak_mib"]
        print(table(header, [[name, *(row[column] for column in columns)] for name, row in measured.items()]), flush=True)
    write("generation", {"repeats": arguments.repeats, "tokens": arguments.tokens, "shapes": figures})


if __name__ == "__main__":
    main()
