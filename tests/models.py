"""Small models of many sorts, ours and transformers', for what loads into any module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations


class Parts(nn.Module):
    """Everything a state dict can hold: bare parameters, buffers of all sorts, a shared module, a tie, parametrised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = nn.Parameter(torch.randn(5))
        self.scalar = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.absent = nn.Parameter(torch.zeros(0, 4))
        self.register_parameter("none", None)
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))
        self.register_buffer("computed", torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), persistent=False)
        self.register_buffer("missing", None)
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm1d(2)  # with a counter of no dimensions
        self.shared = nn.Linear(5, 5)
        self.again = self.shared
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.shared.weight
        self.weighted = parametrizations.weight_norm(nn.Linear(5, 5))
        self.list = nn.ParameterList([torch.randn(5), torch.randn(5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)) * self.bare + self.scalar * self.computed
        x = torch.where(self.mask, self.shared(x), self.again(self.tied(x)) + self.list[0] * self.list[1])
        return self.weighted(x) @ self.frozen.T + self.counts.sum()


class Attention(nn.Module):
    """torch's own blocks, whose fast paths use the weights of modules without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True, kdim=8, vdim=8)
        self.rnn = nn.LSTM(16, 8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)
        half = self.rnn(x)[0]
        return self.attend(x, half, half)[0]


HEADS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = HEADS | {"vocab_size": 61, "num_hidden_layers": 3}
VISION = HEADS | {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}


def transformers_models() -> dict[str, Callable[[], Any]]:
    """Name → what builds it; random, on the device and in the dtype of the moment."""
    import transformers as hf

    llama = TEXT | NO_ENDS | {"num_key_value_heads": 2}
    gpt2 = NO_ENDS | {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
    clip = TEXT | {"max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2}
    mixtral = llama | {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama)),
        "llama, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama, tie_word_embeddings=True)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT, max_position_embeddings=40)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=5)),
        "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=clip, vision_config=VISION, projection_dim=16)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**mixtral)),
    }


HUGGING_FACE = ("llama", "llama, tied", "bert", "gpt2", "vit", "clip", "mixtral")


def build(name: str) -> Any:
    """A model in eval mode whose every parameter is random."""
    torch.manual_seed(0)
    model = {"parts": Parts, "attention": Attention}.get(name) or transformers_models()[name]
    made = model().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5 if parameter.dim() < 2 else 1.5 * parameter.shape[-1] ** -0.5)
    return made


def skeleton(name: str) -> Any:
    """The same without memory for its weights."""
    import modelrig

    with modelrig.empty_weights():
        return ({"parts": Parts, "attention": Attention}.get(name) or transformers_models()[name])()


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Arguments of a forward."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 61, (2, 9), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return {
        "parts": {"x": torch.randn(3, 2, 5, generator=generator)},
        "attention": {"x": torch.randn(2, 6, 16, generator=generator)},
        "vit": {"pixel_values": pixels},
        "clip": {"input_ids": ids, "pixel_values": pixels},
    }.get(name, {"input_ids": ids})


@torch.no_grad()
def result(name: str, module: nn.Module) -> torch.Tensor:
    """What a forward gives, as one tensor."""
    output = module(**inputs(name))
    if isinstance(output, torch.Tensor):
        return output
    return output.logits_per_image if name == "clip" else output.logits
