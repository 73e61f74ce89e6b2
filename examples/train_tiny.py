"""Train the bundled model `tiny` from nothing: the Python standard library on this machine, two cores, about half an hour.

    python examples/train_tiny.py --out build/tiny          # train, evaluate, write the checkpoint folder
    python examples/train_tiny.py --evaluate core/modelrig/...   # held-out bits per byte of a written folder

The text itself is read from the running interpreter's standard library and never stored; `HELD_OUT` lists the modules the
model does not see. The model below is a plain torch llama, written here on purpose: it shares no code with Modelrig, so the
numbers it prints are an independent reference for the checkpoint that Modelrig loads.
Shapes in comments: b batch, t tokens, h heads, d head_dim.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path

# A second OpenMP thread helps little at this size and collapses when another process holds its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

HELD_OUT = (
    "argparse.py", "asyncio/queues.py", "bisect.py", "calendar.py", "cmd.py", "concurrent/futures/thread.py", "contextlib.py",
    "csv.py", "dataclasses.py", "email/message.py", "fractions.py", "functools.py", "gzip.py", "heapq.py", "http/cookies.py",
    "importlib/metadata/__init__.py", "json/decoder.py", "logging/handlers.py", "multiprocessing/pool.py", "queue.py",
    "shlex.py", "statistics.py", "textwrap.py", "unittest/case.py", "urllib/parse.py", "zipfile.py",
)  # fmt: skip
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "__pycache__",
}

END_OF_TEXT = "<|endoftext|>"
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 2048, 256, 3, 4, 1, 64, 384
CONTEXT, ROPE_THETA, EPSILON = 1024, 10_000.0, 1e-5
# Four epochs of short windows, then one of long ones, so that positions up to CONTEXT are all trained.
STAGES = ((256, 12), (1024, 3))  # (tokens, batch) per step of each stage
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}\n\n"
    "{% else %}{% for line in message['content'].splitlines() %}# {{ line }}\n{% endfor %}{% endif %}{% endfor %}"
)


def read_library() -> tuple[list[str], dict[str, str]]:
    """Training texts, and held-out texts by module path, from the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if relative.as_posix() in HELD_OUT:
            held_out[relative.as_posix()] = text
        elif text.strip():
            train.append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: [b, h, t, d]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = (nn.RMSNorm(HIDDEN, eps=EPSILON) for _ in range(2))
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate, self.up = (nn.Linear(HIDDEN, FFN, bias=False) for _ in range(2))
        self.down = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: [b, t, hidden]
        b, t, _ = x.shape
        y = self.norm_attention(x)
        q, k, v = (project(y).view(b, t, -1, HEAD_DIM).transpose(1, 2) for project in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        y = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=EPSILON)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            for weight in (block.o.weight, block.down.weight):
                nn.init.zeros_(weight)
        angles = torch.outer(torch.arange(CONTEXT), ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:  # ids: [b, t] -> logits [b, t, vocab]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return F.linear(self.norm(x), self.embedding.weight)


def batches(stream: Tensor, tokens: int, batch: int, generator: torch.Generator):
    """Endless [batch, tokens + 1] windows: each epoch cuts the stream at a new offset and shuffles the pieces."""
    while True:
        offset = int(torch.randint(tokens, (), generator=generator))
        pieces = (len(stream) - offset - 1) // tokens
        for chunk in torch.randperm(pieces, generator=generator).split(batch):
            if len(chunk) == batch:
                yield torch.stack([stream[offset + i * tokens : offset + (i + 1) * tokens + 1] for i in chunk.tolist()])


def train(model: nn.Module, stream: Tensor, epochs: tuple[float, ...], seed: int, do_compile: bool) -> tuple[int, int]:
    """Train in place; returns (optimizer steps, tokens seen)."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embedding" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    plan = [(tokens, batch, int(e * len(stream) / tokens / batch)) for (tokens, batch), e in zip(STAGES, epochs, strict=True)]
    total, step, seen, started = sum(steps for *_, steps in plan), 0, 0, time.monotonic()
    forward = torch.compile(model, dynamic=False) if do_compile else model
    for tokens, batch, steps in plan:
        source = batches(stream, tokens, batch, generator)
        for _ in range(steps):
            window = next(source)
            scale = min(1.0, (step + 1) / 50) * (1 - step / total)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * scale
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = forward(window[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + window[:, 1:].numel()
            if step % 50 == 0:
                elapsed = time.monotonic() - started
                print(f"step {step}/{total} loss {loss.item():.3f} {seen / elapsed:,.0f} tokens/s", file=sys.stderr, flush=True)
    return step, seen


@torch.inference_mode()
def evaluate(model: nn.Module, tokenizer: Tokenizer, texts: dict[str, str]) -> dict[str, float]:
    """Held-out loss over each file alone: windows of CONTEXT tokens, none of them overlapping, nothing carried over."""
    nats, tokens, size = 0.0, 0, 0
    for text in texts.values():
        ids = torch.tensor([tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(text).ids])
        size += len(text.encode())
        for start in range(0, len(ids) - 1, CONTEXT):
            window = ids[start : start + CONTEXT + 1]
            logits = model(window[None, :-1]).float()
            nats += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
            tokens += len(window) - 1
    return {
        "held_out_bytes": size,
        "held_out_tokens": tokens,
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size,
    }


def names_on_disk(model: nn.Module) -> dict[str, Tensor]:
    """This file's parameter names as Hugging Face's llama spells them, in bfloat16."""
    spelling = {
        "norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }  # fmt: skip
    renamed = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            _, index, part, leaf = name.split(".")
            name = f"layers.{index}.{spelling[part]}.{leaf}"
        elif name == "embedding.weight":
            name = "embed_tokens.weight"
        renamed[f"model.{name}"] = parameter.detach().to(torch.bfloat16)
    return renamed


def write(out: Path, model: nn.Module, tokenizer: Tokenizer, card: dict) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    save_file(names_on_disk(model), out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": EPSILON, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": None, "eos_token_id": 0, "dtype": "bfloat16",
    }  # fmt: skip
    dump = lambda name, value: (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")  # noqa: E731
    dump("config.json", config)
    dump("generation_config.json", {"eos_token_id": 0})
    dump(
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": CONTEXT},
    )
    (out / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in card.items())
    (out / "README.md").write_text(
        f"""---
library_name: modelrig
license: apache-2.0
---
# tiny

A small llama-architecture model that completes Python-looking code. It exists so that Modelrig can be tried, tested and
judged offline: quantizers and caches are compared by its held-out perplexity. It writes plausible code, not correct code.

Written by `examples/train_tiny.py`; the same command and seed train it again (equal up to the rounding of the machine).
The text is the standard library of the Python that ran the script; the script's `HELD_OUT` modules were not seen.

| fact | value |
| --- | --- |
{rows}
""",
        encoding="utf-8",
    )


def read_folder(folder: Path) -> tuple[Llama, Tokenizer]:
    from safetensors.torch import load_file

    model = Llama()
    stored, wanted = load_file(folder / "model.safetensors"), names_on_disk(model)
    for parameter, name in zip(model.parameters(), wanted, strict=True):
        parameter.data.copy_(stored[name])
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder to write the checkpoint to")
    parser.add_argument("--epochs", type=float, nargs=2, default=(4.0, 1.5), metavar=("SHORT", "LONG"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile (slower, needs no C++ compiler)")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only evaluate a folder written before")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    texts, held_out = read_library()
    if arguments.evaluate:
        print(json.dumps(evaluate(*read_folder(arguments.evaluate), held_out), indent=2))
        return
    tokenizer = train_tokenizer(texts)
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = torch.tensor([token for text in texts for token in (end, *tokenizer.encode(text).ids)])
    model = Llama()
    started = time.monotonic()
    steps, seen = train(model, stream, tuple(arguments.epochs), arguments.seed, not arguments.no_compile)
    seconds = time.monotonic() - started
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))  # judge what is written
    figures = evaluate(model, tokenizer, held_out)
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": f"CPython {platform.python_version()} standard library, {len(texts)} files, "
        f"{sum(len(t.encode()) for t in texts):,} bytes",
        "held_out_modules": len(held_out),
        "training_tokens_per_epoch": len(stream),
        "epochs": f"{arguments.epochs[0]} of {STAGES[0][0]} tokens, {arguments.epochs[1]} of {STAGES[1][0]} tokens",
        "steps": steps,
        "tokens_seen": seen,
        "training_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "optimizer": "Muon 0.02 on matrices, AdamW 5e-3 on the rest, linear decay to zero, clip 1",
        "seed": arguments.seed,
        **{key: round(value, 4) for key, value in figures.items()},
    }
    write(arguments.out, model, tokenizer, card)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
