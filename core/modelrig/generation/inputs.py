"""What `generate` takes, as lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelrig.errors import GenerateError, quoted
from modelrig.planning.tokenizer_files import OtherForm, no_text

if TYPE_CHECKING:
    from modelrig.generation.tokenizer import Tokenizer

BYTES = (bytes, bytearray)  # sequences of whole numbers, but text nobody decoded rather than ids
ACCEPTED = "a str, a list of token ids, a list of either, or an integer tensor [batch, tokens]"


def as_prompts(
    prompt: Any,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    add_special_tokens: bool = True,
    other_form: OtherForm | None = None,
) -> tuple[list[list[int]], bool]:
    """(ids of each prompt, whether it was a single one). Texts get the tokenizer's special tokens only if asked for.

    Raises:
        GenerateError: GN-INPUT for anything else, an empty prompt, or ids outside the vocabulary; GN-TOKENIZER for text without
            a tokenizer.
        TokenizerError: TK-MISSING for text where the tokenizer is there in `other_form`.
    """

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            raise no_text(other_form, "read text", hint="give token ids")
        return _checked(tokenizer.encode(text, add_special_tokens), vocab_size)

    if isinstance(prompt, str):
        return [encode(prompt)], True
    if isinstance(prompt, Tensor):
        return _rows_of(prompt, vocab_size), False
    if not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
        raise GenerateError("GN-INPUT", f"a prompt is {ACCEPTED}, not {type(prompt).__name__}")
    if not prompt:
        raise GenerateError("GN-INPUT", f"the prompt is empty; it is {ACCEPTED}")
    if _is_id(prompt[0]):
        return [_checked(prompt, vocab_size)], True
    return [encode(item) if isinstance(item, str) else _checked(item, vocab_size) for item in prompt], False


def as_batch(ids: Any, vocab_size: int) -> Tensor:
    """Ids for `model(ids)`: an integer tensor [batch, tokens], or the same as nested lists."""
    if isinstance(ids, str) or (isinstance(ids, Sequence) and any(isinstance(row, str) for row in ids)):
        raise GenerateError("GN-INPUT", "the model itself takes token ids, not text", hint="model.tokenizer.encode(text) gives ids")
    rows = _rows_of(ids, vocab_size) if isinstance(ids, Tensor) else as_prompts(ids, None, vocab_size)[0]
    if len({len(row) for row in rows}) != 1:
        raise GenerateError("GN-INPUT", "rows of different lengths: pad them and give an attention_mask")
    return torch.tensor(rows)


def _rows_of(ids: Tensor, vocab_size: int) -> list[list[int]]:
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool or ids.dim() != 2 or 0 in ids.shape:
        raise GenerateError("GN-INPUT", f"ids are an integer tensor [batch, tokens], not {ids.dtype} {list(ids.shape)}")
    return [_checked(row, vocab_size) for row in ids.tolist()]


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked(ids: Any, vocab_size: int) -> list[int]:
    if isinstance(ids, Tensor) and ids.dim() == 1:
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or isinstance(ids, (str, *BYTES)):
        raise GenerateError("GN-INPUT", f"a prompt is {ACCEPTED}; one of its rows is {type(ids).__name__}")
    if not ids:
        raise GenerateError("GN-INPUT", "an empty prompt: there is nothing to continue", hint="give at least one token")
    for position, token in enumerate(ids):
        if not _is_id(token) or not 0 <= token < vocab_size:
            raise GenerateError(
                "GN-INPUT", f"{quoted(token)} at position {position} is no token id: accepted is 0 to {vocab_size - 1}"
            )
    return [int(token) for token in ids]
