"""Bytes of a cache whose older tokens are packed to 8 or 4 bits a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import fields, frozen

from modelrig.components import AttentionSpec, Reason, dtype_bytes
from modelrig.planning.needs import CacheNeed

VALUE_GROUP = 32  # numbers of a value that have a scale together, where so many divide it


@frozen
class QuantizedOptions:
    """`bits`: 8 or 4, of each number that is packed. `group`: tokens that are packed together. `residual`: the newest tokens, which
    a query sees as they are. `headroom`: tokens that can be forgotten again by a rewind."""

    bits: int = 8
    group: int = 32
    residual: int = 64
    headroom: int = 64


class QuantizedPlanner:
    Options = QuantizedOptions

    @staticmethod
    def check(need: CacheNeed, options: QuantizedOptions) -> Iterable[Reason]:  # noqa: ARG004 - protocol
        if options.bits not in (4, 8) or isinstance(options.bits, bool):
            yield Reason("cache.bits", f"bits {options.bits!r}: 4 and 8 are accepted")
        for one in fields(QuantizedOptions)[1:]:
            value, low = getattr(options, one.name), 1 if one.name == "group" else 0
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 1 << 31:
                text = f"{one.name} {value!r}: a whole number of tokens, from {low} on, is accepted"
                yield Reason(f"cache.{one.name}", text)

    @staticmethod
    def nbytes(layers: Sequence[AttentionSpec], batch: int, context: int, dtype: str, options: QuantizedOptions | None) -> int:
        options = options or QuantizedOptions()
        packed, recent = packed_tokens(context, options), recent_tokens(context, options)
        total = 0
        for spec in layers:
            both = spec.head_dim + spec.value_dim
            codes = packed * (code_bytes(spec.head_dim, options.bits) + code_bytes(spec.value_dim, options.bits))
            scales = packed // options.group * spec.head_dim + packed * (spec.value_dim // value_group(spec.value_dim))
            total += spec.num_key_value_heads * (codes + dtype_bytes(dtype, 2 * scales + recent * both))
        largest = max((spec.num_key_value_heads * (spec.head_dim + spec.value_dim) for spec in layers), default=0)
        return batch * (total + (dtype_bytes(dtype, largest * (packed + recent)) if packed else 0))


def seen_tokens(options: QuantizedOptions) -> int:
    """The most tokens that a query sees as they are, or has to pack: the residual, a block, and its own."""
    return options.residual + options.group + 1


def recent_tokens(capacity: int, options: QuantizedOptions) -> int:
    """Tokens kept as they are."""
    return min(capacity, seen_tokens(options) + options.headroom)


def packed_tokens(capacity: int, options: QuantizedOptions) -> int:
    """Tokens for which there is room in packed form: what the last query there can be sees so, in whole blocks."""
    return -(-max(0, capacity - 1 - options.residual) // options.group) * options.group


def code_bytes(size: int, bits: int) -> int:
    """Bytes of `size` packed numbers of one token."""
    return size if bits == 8 else (size + 1) // 2


def value_group(size: int) -> int:
    """Numbers of a value of `size` that have a scale together."""
    return VALUE_GROUP if size % VALUE_GROUP == 0 else size
