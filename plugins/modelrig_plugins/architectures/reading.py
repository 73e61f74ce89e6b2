"""What the configs of all families say in the same way, and how it is checked against the tensors. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from modelrig.checkpoint.config import ConfigReader
from modelrig.components import FLOATING, Catalog

LIMIT = 1 << 24  # no width or vocabulary is larger
LAYER_LIMIT = 1 << 14
POSITION_LIMIT = 1 << 31


Parsed = TypeVar("Parsed")


def parse(config: Mapping[str, Any], path: Path, read: Callable[[ConfigReader], Parsed]) -> tuple[Parsed, str | None]:
    """What `read` makes of the config, and the dtype it says the weights have (`torch_dtype` in older ones).

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    with ConfigReader(config, path) as reader:
        return read(reader), reader.choice("dtype", FLOATING, default=None, aliases=("torch_dtype",))


def read_layers(reader: ConfigReader, key: str, catalog: Catalog, stem: str, prefixes: tuple[str, ...]) -> int:
    """How many layers there are: as many as the tensor files hold, whose names are a prefix, the stem, and a number."""
    layers = reader.integer(key, 1, LAYER_LIMIT)
    stored = stored_number(catalog, stem, prefixes)
    if stored:
        reader.require(layers == stored, "CF-REL", key, f"{layers}, but the tensor files hold layers 0 to {stored - 1}")
    return layers


def stored_number(catalog: Catalog, stem: str, prefixes: tuple[str, ...] | None = None) -> int:
    """How many numbered things the tensor files hold, by the highest number in a name of prefix, stem and number; 0 for none.

    Without `prefixes` anything may stand before the stem.
    """
    highest = -1
    for name in catalog.entries:
        head, found, rest = name.partition(stem)
        if found and (prefixes is None or head in prefixes):
            number = rest.partition(".")[0]
            if number.isascii() and number.isdigit() and len(number) < 8:
                highest = max(highest, int(number))
    return highest + 1


def read_tie(reader: ConfigReader, catalog: Catalog, *, default: bool, head: str = "lm_head.weight") -> bool:
    """Whether the head is the embedding. One that is stored is used as stored: equal tensors give equal results."""
    return reader.boolean("tie_word_embeddings", default=default) and head not in catalog.entries


def require_head_dim(reader: ConfigReader, hidden: int, heads: int, hidden_key: str, heads_key: str) -> None:
    """Note a problem unless a head is a whole number of dimensions wide."""
    text = f"{hidden} is not a multiple of {heads_key} ({heads}), and there is no head_dim"
    reader.require(hidden % heads == 0, "CF-REL", hidden_key, text, uses=(heads_key,))
