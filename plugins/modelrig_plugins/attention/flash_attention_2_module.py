"""Attention by the package flash-attn: the symbolic mask as its functions' arguments.

* a first prompt without padding: `flash_attn_func`;
* what follows, or is padded on the left: `flash_attn_with_kvcache`, a row's keys being `[cache_leftpad, cache_seqlens)`. Causal
  masks are aligned to the last key, which is the last query's own;
* padded rows of an encoder: `flash_attn_varlen_func` over twice as many sequences, each row's padding being one of its own;
* a ring: its slots are first put in the order of their tokens.

Nothing is copied to the host and back. A query of padding that sees nothing gives zeros.

Shapes: b batch, h query heads, g key/value heads, t queries, s slots, d head_dim. The package has heads after tokens, [b, s, g, d];
a transposed view of ours will do, since only its last axis must be dense.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.errors import PluginError
from modelrig.modules.slots import Visibility
from modelrig_plugins.attention.flash_attention_2 import INSTALL, PACKAGE
from modelrig_plugins.attention.widths import equal_widths


class Functions(NamedTuple):
    """What is used of the package."""

    plain: Callable[..., Tensor]  # flash_attn_func
    varlen: Callable[..., Tensor]  # flash_attn_varlen_func
    with_kvcache: Callable[..., Tensor]  # flash_attn_with_kvcache


class Lowered(NamedTuple):
    """One step's mask as arguments. `how` are those of every function."""

    how: dict[str, Any]
    is_first: bool = False
    ends: Tensor | None = None  # int32 [2 b + 1], where padding and text of each row begin, for varlen
    order: Tensor | None = None  # int64 [s], slots in the order of their tokens
    lengths: Tensor | None = None  # int32 [b or 1], keys of each row, padding included
    padding: Tensor | None = None  # int32 [b]


class FlashAttention2:
    """Raises `PluginError` (PL-IMPORT) if the package cannot be imported.

    Args:
        functions: to be used instead of the package's, for tests.
    """

    def __init__(self, options: Any = None, functions: Functions | None = None) -> None:  # noqa: ARG002 - protocol
        self.functions = functions or load_functions()

    def prepare(self, spec: AttentionSpec, visible: Visibility) -> Lowered:
        if visible.seen_from is not None or visible.seen_until is not None:
            raise PluginError("PL-KERNEL", "cannot hide keys from single queries, as this cache asks for", plugin=PACKAGE)
        left = -1 if visible.window is None else visible.window - 1
        how = {
            "softmax_scale": spec.scale,
            "causal": visible.causal,
            "window_size": (left, 0 if left >= 0 and visible.causal else -1),
            "softcap": spec.softcap or 0.0,
        }
        if visible.past is None:
            return _in_order(how, visible)
        count, starts = visible.query_index.shape[0], visible.starts
        if starts is None:
            return Lowered(how, is_first=visible.past == 0)
        if not visible.causal:
            return Lowered(how, ends=_ends(starts, count))
        lengths = torch.full_like(starts, visible.past + count, dtype=torch.int32)
        return Lowered(how, lengths=lengths, padding=torch.minimum(starts.to(torch.int32), lengths))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Lowered, spec: AttentionSpec) -> Tensor:
        if spec.value_dim != spec.head_dim:
            q, k, v = equal_widths(q, k, v)
        if mask.order is not None:
            k, v = k.index_select(2, mask.order), v.index_select(2, mask.order)
        b, _, t, _ = q.shape
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [b, t or s, heads, d]
        if mask.is_first:
            y = self.functions.plain(q, k, v, **mask.how)
        elif mask.ends is not None:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # [b * t, heads, d]
            y = self.functions.varlen(q, k, v, mask.ends, mask.ends, t, t, **mask.how)
        else:
            lengths = mask.lengths if mask.lengths is None else mask.lengths.expand(b).contiguous()
            y = self.functions.with_kvcache(q, k, v, cache_seqlens=lengths, cache_leftpad=mask.padding, **mask.how)
        if spec.value_dim < spec.head_dim:
            y = y[..., : spec.value_dim]
        return y.reshape(b, t, spec.num_heads * spec.value_dim)


def _in_order(how: dict[str, Any], visible: Visibility) -> Lowered:
    """Slots in any order: empty ones hold a token later than any query, so they come last and are not counted."""
    index, starts = visible.key_index, visible.starts
    lengths = (index <= visible.query_index[-1:]).sum(dtype=torch.int32).view(1)
    padding = None if starts is None else (index[None] < starts[:, None]).sum(1, dtype=torch.int32)
    if padding is not None:
        padding = torch.minimum(padding, lengths)  # a row whose text has not begun
    return Lowered(how, order=torch.argsort(index), lengths=lengths, padding=padding)


def _ends(starts: Tensor, count: int) -> Tensor:
    """int32 [2 b + 1]: of rows one after the other, where the padding and the text of each begin, and where the last ends."""
    rows = torch.arange(starts.shape[0] + 1, device=starts.device) * count
    pairs = torch.stack((rows[:-1], rows[:-1] + starts), dim=1).flatten()
    return torch.cat((pairs, rows[-1:])).to(torch.int32)


def load_functions() -> Functions:
    """The package's. Raises `PluginError` (PL-IMPORT) naming the versions."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    except Exception as error:  # ImportError for another ABI, and what its extension raises
        try:
            found = version(PACKAGE)
        except PackageNotFoundError:
            found = "(not installed)"
        text = f"{PACKAGE} {found} cannot be imported beside torch {torch.__version__}: {type(error).__name__}: {error}"
        raise PluginError("PL-IMPORT", text, plugin=PACKAGE, hint=INSTALL) from error
    return Functions(flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
