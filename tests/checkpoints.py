"""Real tiny checkpoints, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5  # of the logits' scale
TINY_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}


def write_llama(folder: Path, **options: Any) -> Any:
    """`write_decoder` of a Llama."""
    return write_decoder(folder, "Llama", **options)


def write_decoder(
    folder: Path, family: str, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **config: Any
) -> Any:
    """A small random model of transformers, saved by it into `folder`; returns the model, in float32 and eval mode."""
    import torch

    values = {**TINY_LLAMA, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **config}
    if family == "GPT2":  # which has other names for these
        values["n_inner"] = values.pop("intermediate_size")
        del values["num_key_value_heads"]
    model = random_decoder(family, seed=seed, **values)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def random_decoder(family: str, *, seed: int = 0, **values: Any) -> Any:
    """A random model of transformers; `family` is what its classes begin with, and fixes what `values` does not say.

    Weights are larger than an initialisation's so that every part moves the logits.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    settings = getattr(transformers, f"{family}Config")(**values)
    if family == "Gemma2":  # by torch's kernel it would leave its cap out
        settings._attn_implementation = "eager"
    settings._experts_implementation = "eager"  # takes any size and dtype
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, kind)(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                is_looked_up = "embed" in name or ".wte." in name or ".wpe." in name
                parameter.normal_(std=1.0 if is_looked_up else 1.5 * parameter.shape[-1] ** -0.5)
            elif "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    """Ids [batch, count] of the vocabulary that small models have."""
    import torch

    return torch.randint(0, TINY_LLAMA["vocab_size"], (batch, count), generator=torch.Generator().manual_seed(seed))


def assert_close(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Returns the largest difference, as a part of the largest value."""
    assert expected.shape == actual.shape
    difference, scale = (expected - actual).abs().max().item(), expected.abs().max().item()
    assert difference <= TOLERANCE * scale
    return difference / scale


TINY_BERT = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}


def write_bert(folder: Path, kind: str = "BertModel", *, seed: int = 0, max_shard_size: str = "5GB", **config: Any) -> Any:
    """A random BERT of the class `kind` of transformers, as `write_decoder` makes decoders."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.BertConfig(**{**TINY_BERT, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.0 if "embeddings" in name else 1.5 * parameter.shape[1] ** -0.5)
            elif name.endswith("LayerNorm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
