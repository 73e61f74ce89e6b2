"""A tokenizer.json that would make texts grow beyond measure is refused before the library runs it; those in use are not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from modelrig.errors import TokenizerError
from modelrig.generation.tokenizer_growth import MAX_GROWTH, MAX_TEMPLATE_TOKENS, require_bounded

PATH = Path("tokenizer.json")
MODEL = {"type": "WordLevel", "vocab": {"a": 0, "decoder": 1}, "unk_token": "a"}


def document(last: str = "model", **parts: Any) -> bytes:
    """A tokenizer.json whose last key is `last`."""
    values = {"version": "1.0", "added_tokens": [], "model": MODEL, **parts}
    values[last] = values.pop(last)
    return json.dumps(values).encode()


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def chain(*parts: Any, key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(parts)}


def charsmap(*texts: bytes) -> dict[str, Any]:
    raw = (4).to_bytes(4, "little") + b"trie" + b"\0".join(texts) + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


def template(pieces: int, ids: int) -> dict[str, Any]:
    special = {"X": {"id": "X", "ids": [1] * ids, "tokens": ["a"] * ids}}
    return {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X"}}] * pieces, "pair": [], "special_tokens": special}


def added(content: str) -> list[dict[str, Any]]:
    return [{"id": 2, "content": content, "normalized": True}]


DOUBLING = [replace("a", "aa")] * 10  # 1,024 times
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
TOO_MUCH = {
    "a chain of replacements": ("normalizer", {"normalizer": chain(*DOUBLING)}),
    "sequences in sequences": ("normalizer", {"normalizer": chain(chain(*DOUBLING[:5]), chain(*DOUBLING[:5]))}),
    "one long replacement": ("normalizer", {"normalizer": replace("a", "b" * 1001)}),
    "a replacement of nothing": ("normalizer", {"normalizer": chain(*[replace("", "a")] * 10)}),
    "a regular expression for nothing": ("normalizer", {"normalizer": chain(*[replace("x*", "a", "Regex")] * 10)}),
    "replacements without their type": (
        "normalizer",
        {"normalizer": chain(*[{"pattern": {"String": "a"}, "content": "aa"}] * 10)},
    ),
    "a long beginning": ("normalizer", {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}}),
    "a map to a long text": ("normalizer", {"normalizer": charsmap(b"ok", b"a" * 1001)}),
    "bytes of bytes": ("normalizer", {"normalizer": chain(*[{"type": "ByteLevel"}] * 5)}),
    "bytes of bytes, later": ("pre_tokenizer", {"pre_tokenizer": chain(*[BYTES] * 5, key="pretokenizers")}),
    "two components together": ("pre_tokenizer", {"normalizer": chain(*DOUBLING[:9]), "pre_tokenizer": BYTES}),
    "a decoder": ("decoder", {"decoder": chain(*DOUBLING, key="decoders")}),
    "added tokens that grow": ("added_tokens", {"normalizer": replace("a", "b" * 1000), "added_tokens": added("a" * 10_001)}),
    "a template of many tokens": ("post_processor", {"post_processor": template(50, 50)}),
    "templates of many tokens": ("post_processor", {"post_processor": chain(template(30, 20), template(30, 20), key="processors")}),
}


@pytest.mark.parametrize("last", ["model", "locus", "escaped"])
@pytest.mark.parametrize("name", TOO_MUCH)
def test_growth_beyond_measure_is_refused_wherever_it_stands(name: str, last: str) -> None:
    locus, parts = TOO_MUCH[name]
    data = document(locus if last == "locus" else "model", **parts)
    if last == "escaped":
        data = document(locus, **parts).replace(f'"{locus}"'.encode(), f'"\\u{ord(locus[0]):04x}{locus[1:]}"'.encode())
    with pytest.raises(TokenizerError) as caught:
        require_bounded(data, PATH)
    assert ("TK-LIMIT", locus, "tokenizer.json") == (caught.value.code, caught.value.locus, caught.value.path)


IN_USE = {
    "byte-level": {"pre_tokenizer": chain(replace("x", "y"), BYTES, key="pretokenizers"), "post_processor": template(2, 1)},
    "Llama 2": {"normalizer": chain({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")), "decoder": replace("▁", " ")},
    "T5": {"normalizer": chain(charsmap("ﷺ".encode(), b"1/4"), replace(" {2,}", " ", "Regex"))},
    "as long as may be": {"normalizer": replace("a", "b" * MAX_GROWTH), "post_processor": template(MAX_TEMPLATE_TOKENS, 1)},
    "a map that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "no base64!"}},
    "nothing": dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")),
    "other types than expected": {"normalizer": [1, "x", {"content": 5, "pattern": 3}], "post_processor": {"special_tokens": []}},
}


@pytest.mark.parametrize("last", ["model", "version"])
@pytest.mark.parametrize("name", IN_USE)
def test_what_is_in_use_passes(name: str, last: str) -> None:
    require_bounded(document(last, **IN_USE[name]), PATH)


@pytest.mark.parametrize(
    "data",
    [
        document(normalizer=None)[:-1] + b', "normalizer": {"type": "NFC"}}',
        b"[" * 200,
        b"[]",
        b'{"normalizer": NaN}',
        b'{"normalizer": "\xff"}',
        b"{",
    ],
    ids=lambda data: repr(data[-24:]),
)
def test_a_file_that_leaves_open_what_the_library_would_read_is_refused(data: bytes) -> None:
    with pytest.raises(TokenizerError) as caught:
        require_bounded(data, PATH)
    assert "TK-JSON" == caught.value.code
