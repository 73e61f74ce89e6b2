"""How much longer a tokenizer.json may make a text. Told from the file, because the library only finds out by doing it.

A chain of forty replacements of "a" by "aa" is a valid normalizer of a few hundred bytes. The Rust library would run it, and when
no memory is left it ends the process: there is no exception to catch. So the factors are multiplied before the library sees them.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelrig.checkpoint.strict_json import DuplicateKeyError, NestingError, parse
from modelrig.errors import TokenizerError, quoted

MAX_GROWTH = 1000  # characters out of one; tokenizers in use stay below 100
MAX_TEMPLATE_TOKENS = 1000  # that a post-processor adds to a text
MAX_ADDED_CHARACTERS = 10_000_000  # of all added tokens together, after normalisation
MAX_DEPTH = 128  # the library's own limit
MAX_CONTAINERS = 4_000_000  # merges are pairs: half a million are in use

_MODEL = re.compile(rb'"model"\s*:\s*\{')
#: the parts that can make texts longer; as words of a vocabulary they have numbers for values. Or a letter written as an escape.
_PARTS = re.compile(rb'"(?:added_tokens|normalizer|pre_tokenizer|post_processor|decoder)"\s*:\s*[{\[]|\\u00[4-7]')


def require_bounded(data: bytes, path: Path) -> None:
    """Refuse a tokenizer.json that would make texts grow beyond measure.

    Raises:
        TokenizerError: TK-LIMIT with the key; TK-JSON for a file that leaves open what the library would read.
    """
    document = _without_model(data, path)
    growth = {key: _growth(document.get(key)) for key in ("normalizer", "pre_tokenizer", "decoder")}
    for key, before in (("normalizer", 1), ("pre_tokenizer", growth["normalizer"]), ("decoder", 1)):
        if (factor := before * growth[key]) > MAX_GROWTH:
            reason = f"makes a text up to {_number(factor)} times as long; at most {MAX_GROWTH:,} times is accepted"
            raise TokenizerError("TK-LIMIT", reason, path=path, locus=key)
    added = document.get("added_tokens")
    characters = sum(len(content) for token in _objects(added) if isinstance(content := token.get("content"), str))
    characters *= growth["normalizer"]
    if characters > MAX_ADDED_CHARACTERS:
        reason = f"tokens of up to {_number(characters)} characters together; at most {MAX_ADDED_CHARACTERS:,} are accepted"
        raise TokenizerError("TK-LIMIT", reason, path=path, locus="added_tokens")
    tokens = _template_tokens(document.get("post_processor"))
    if tokens > MAX_TEMPLATE_TOKENS:
        reason = f"adds {tokens:,} tokens to a text; at most {MAX_TEMPLATE_TOKENS:,} are accepted"
        raise TokenizerError("TK-LIMIT", reason, path=path, locus="post_processor")


def _without_model(data: bytes, path: Path) -> Mapping[str, Any]:
    """The document; without the model, which is nearly all of it, where nothing after the model's beginning could matter."""
    found = _MODEL.search(data)
    if found is not None and not _PARTS.search(data, found.start()):
        try:
            document = parse(data[: found.start()] + b'"model":null}', max_depth=MAX_DEPTH)
        except ValueError:
            pass  # that was not the model of the document itself, or the file is broken
        else:
            return document if isinstance(document, dict) else {}
    try:
        document = parse(data, max_depth=MAX_DEPTH, max_containers=MAX_CONTAINERS)
    except DuplicateKeyError as problem:
        raise TokenizerError("TK-JSON", str(problem), path=path, locus=problem.key) from problem
    except NestingError as problem:
        raise TokenizerError("TK-JSON", str(problem), path=path) from problem
    except json.JSONDecodeError as problem:
        reason = f"not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}"
        raise TokenizerError("TK-JSON", reason, path=path) from problem
    except ValueError as problem:
        raise TokenizerError("TK-JSON", f"not JSON: {quoted(str(problem))[1:-1]}", path=path) from problem
    except MemoryError as problem:
        raise TokenizerError("TK-LIMIT", f"there is not enough memory to read its {len(data):,} bytes", path=path) from problem
    if not isinstance(document, dict):
        raise TokenizerError("TK-JSON", f"a JSON object is needed, this is {quoted(document)}", path=path)
    return document


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in `value`, itself included. Nesting was limited when it was parsed."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(item)


def _growth(component: Any) -> int:
    """At most how many characters a component makes of one: the product over all its parts."""
    return math.prod(_part_growth(part) for part in _objects(component))


def _part_growth(part: Mapping[str, Any]) -> int:
    content, prepended, charsmap = (part.get(key) for key in ("content", "prepend", "precompiled_charsmap"))
    factor = 1
    if isinstance(content, str) and "pattern" in part:
        pattern = part["pattern"].get("String") if isinstance(part["pattern"], dict) else part["pattern"]
        never_empty = isinstance(pattern, str) and bool(pattern)  # what may match between two characters only adds
        factor *= max(1, len(content)) if never_empty else 1 + len(content)
    if isinstance(prepended, str):
        factor *= 1 + len(prepended)
    if isinstance(charsmap, str):
        factor *= _longest_replacement(charsmap)
    if part.get("type") == "ByteLevel" or "add_prefix_space" in part:
        factor *= 4  # the bytes of a character become characters
    return factor


def _longest_replacement(charsmap: str) -> int:
    """The longest text in SentencePiece's compiled map: base64 of the size of a trie, the trie, and texts that end in NUL."""
    try:
        raw = base64.b64decode(charsmap)
    except ValueError:
        return 1  # the library says what is wrong with it
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(1, *map(len, texts.split(b"\0")))


def _template_tokens(processor: Any) -> int:
    """How many tokens all templates of a post-processor add to a text or a pair of texts."""
    total = 0
    for part in _objects(processor):
        special = part.get("special_tokens")
        if not isinstance(special, dict):
            continue
        counts = {name: len(ids) for name, token in special.items() if isinstance(token, dict) and (ids := token.get("ids"))}
        for piece in _objects([part.get("single"), part.get("pair")]):
            total += counts.get(str(piece.get("id")), 0)
    return total


def _number(value: int) -> str:
    return f"{value:,}" if value < 10**15 else f"10^{len(str(value)) - 1}" if value.bit_length() < 10_000 else "countless"
