"""Everything that may be a prompt, and one typed error for everything that may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modelrig.errors import GenerateError
from modelrig.generation.inputs import as_batch, as_prompts

VOCAB = 50


class Letters:
    """a is 1, b is 2, ...; 0 begins a text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(letter) - 96 for letter in text]


@pytest.mark.parametrize(
    ("prompt", "ids", "is_single"),
    [
        ("abc", [[0, 1, 2, 3]], True),
        ([4, 5], [[4, 5]], True),
        ((4, 5), [[4, 5]], True),
        (range(3), [[0, 1, 2]], True),
        ([np.int64(4), np.int32(5)], [[4, 5]], True),
        (["ab", "c"], [[0, 1, 2], [0, 3]], False),
        (["ab"], [[0, 1, 2]], False),
        ([[4, 5], [6]], [[4, 5], [6]], False),
        (["ab", [7]], [[0, 1, 2], [7]], False),
        ([(4, 5), torch.tensor([6, 7])], [[4, 5], [6, 7]], False),
        (torch.tensor([[4, 5], [6, 7]]), [[4, 5], [6, 7]], False),
        (torch.tensor([[4]], dtype=torch.int32), [[4]], False),
        (torch.tensor([[4, 49]], dtype=torch.uint8), [[4, 49]], False),
    ],
)
def test_prompts_become_lists_of_ids(prompt: Any, ids: list[list[int]], is_single: bool) -> None:
    found = as_prompts(prompt, Letters(), VOCAB)
    assert (ids, is_single) == found
    assert {int} == {type(token) for row in found[0] for token in row}


def test_a_text_that_follows_another_gets_no_special_tokens() -> None:
    assert ([[1, 2]], True) == as_prompts("ab", Letters(), VOCAB, add_special_tokens=False)
    assert ([[1], [5]], False) == as_prompts(["a", [5]], Letters(), VOCAB, add_special_tokens=False)


WRONG = [
    (None, "not NoneType"),
    (5, "not int"),
    (1.5, "not float"),
    (True, "not bool"),
    (b"abc", "not bytes"),
    (bytearray(b"abc"), "not bytearray"),
    ({"a": 1}, "not dict"),
    ({1, 2}, "not set"),
    (np.array([1, 2]), "not ndarray"),
    (iter([1, 2]), "not list_iterator"),
    ([], "prompt is empty"),
    ((), "prompt is empty"),
    ([[]], "an empty prompt"),
    ([[1], []], "an empty prompt"),
    ([1.0], "one of its rows is float"),
    ([None], "one of its rows is NoneType"),
    ([True], "one of its rows is bool"),
    ([b"a"], "one of its rows is bytes"),
    (["a", 5], "one of its rows is int"),
    ([[1], None], "one of its rows is NoneType"),
    ([{1}], "one of its rows is set"),
    ([5, "a"], "'a' at position 1"),
    ([5, None], "None at position 1"),
    ([5, True], "True at position 1"),
    ([5, 6.0], "6.0 at position 1"),
    ([1, [2]], r"\[2\] at position 1"),
    ([[1, [2]]], r"\[2\] at position 1"),
    ([VOCAB], "50 at position 0 is no token id: accepted is 0 to 49"),
    ([-1], "-1 at position 0"),
    ([[1, 2], [3, 10**400]], "an integer of 1329 bits at position 1"),
    (torch.tensor([1, 2]), r"not torch.int64 \[2\]"),
    (torch.tensor([[[1]]]), r"not torch.int64 \[1, 1, 1\]"),
    (torch.tensor([[1.0]]), "not torch.float32"),
    (torch.tensor([[1j]]), "not torch.complex64"),
    (torch.tensor([[True]]), "not torch.bool"),
    (torch.empty(0, 3, dtype=torch.int64), r"\[0, 3\]"),
    (torch.empty(3, 0, dtype=torch.int64), r"\[3, 0\]"),
    (torch.tensor([[1, 50]]), "50 at position 1"),
    ([torch.tensor([1.5])], "1.5 at position 0"),
    ([torch.tensor(1)], "one of its rows is Tensor"),
]


@pytest.mark.parametrize(("prompt", "reason"), WRONG, ids=range(len(WRONG)))
def test_anything_else_is_refused_and_named(prompt: Any, reason: str) -> None:
    with pytest.raises(GenerateError, match=reason) as caught:
        as_prompts(prompt, Letters(), VOCAB)
    assert "GN-INPUT" == caught.value.code


def test_a_text_of_no_tokens_is_an_empty_prompt() -> None:
    with pytest.raises(GenerateError, match="an empty prompt"):
        as_prompts("", Letters(), VOCAB, add_special_tokens=False)


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [[1], "abc"]])
def test_text_without_a_tokenizer_is_refused(prompt: Any) -> None:
    with pytest.raises(GenerateError, match="GN-TOKENIZER"):
        as_prompts(prompt, None, VOCAB)


# ------------------------------------------------------------------------------------------------ for the model itself


@pytest.mark.parametrize("ids", [[[1, 2], [3, 4]], ((1, 2), (3, 4)), torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)])
def test_a_batch_is_an_int64_tensor(ids: Any) -> None:
    batch = as_batch(ids, VOCAB)
    assert torch.equal(torch.tensor([[1, 2], [3, 4]]), batch)
    assert torch.int64 == batch.dtype


def test_one_row_of_ids_is_a_batch_of_one() -> None:
    assert [[1, 2, 3]] == as_batch([1, 2, 3], VOCAB).tolist()


@pytest.mark.parametrize("ids", ["abc", ["abc"], [[1], "a"]])
def test_the_model_itself_takes_no_text(ids: Any) -> None:
    with pytest.raises(GenerateError, match=r"GN-INPUT.* takes token ids, not text"):
        as_batch(ids, VOCAB)


@pytest.mark.parametrize(("ids", "reason"), [([[1, 2], [3]], "attention_mask"), ([[1, 50]], "50 at position 1"), (7, "not int")])
def test_a_batch_that_is_none_is_refused(ids: Any, reason: str) -> None:
    with pytest.raises(GenerateError, match=reason):
        as_batch(ids, VOCAB)
