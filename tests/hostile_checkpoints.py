"""A small llama checkpoint written byte by byte, right in everything that a test does not break on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorfiles import write_valid

WORDS = tuple("abcdefgh")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": 15,
}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(["?", *WORDS])}, "unk_token": "?"},
}
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def tensors(layers: int = 2, *, head: bool = True, biases: tuple[str, ...] = ()) -> dict[str, tuple[str, list[int]]]:
    """Name → (dtype, shape) of every tensor that `CONFIG` asks for; `biases` are names of projections."""
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [16, 32], "model.norm.weight": [32]}
    if head:
        shapes["lm_head.weight"] = [16, 32]
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", [32, 32]),
            ("self_attn.k_proj", [16, 32]),
            ("self_attn.v_proj", [16, 32]),
            ("self_attn.o_proj", [32, 32]),
            ("mlp.gate_proj", [48, 32]),
            ("mlp.up_proj", [48, 32]),
            ("mlp.down_proj", [32, 48]),
            ("input_layernorm", [32]),
            ("post_attention_layernorm", [32]),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if name.rpartition(".")[2] in biases:
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    return {name: ("F32", shape) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | str | bytes | None = None,
    stored: Mapping[str, tuple[str, list[int]]] | None = None,
    **changes: Any,
) -> Path:
    """A folder with config, tokenizer, template and zeros for weights.

    `config` is the whole file; `changes` edit the usual one, where `...` takes a key away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    write(folder / "config.json", config)
    write(folder / "tokenizer.json", TOKENIZER)
    write(folder / "tokenizer_config.json", {"model_max_length": 64})
    write(folder / "generation_config.json", {"eos_token_id": 15})
    write(folder / "chat_template.jinja", TEMPLATE)
    write_valid(folder / "model.safetensors", **(tensors() if stored is None else stored))
    return folder


def write(path: Path, content: Any) -> None:
    """JSON, unless it is text or bytes already."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
