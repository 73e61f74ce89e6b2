"""Attention by `torch.nn.functional.scaled_dot_product_attention`.

Which kernel torch takes depends on the inputs, and the one it falls back to (math) keeps every score in memory. So the choice is
looked at before it is made: on CPU once for each form of mask, on a GPU once a step for each spec, since there lengths count too.

Shapes: b batch, h query heads, g key/value heads, t queries, s slots, d head_dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modelrig.components import AttentionSpec
from modelrig.errors import PluginError
from modelrig.modules.compiling import is_compiling
from modelrig.modules.slots import Visibility
from modelrig_plugins.attention.sdpa import KERNELS_OF, SdpaOptions
from modelrig_plugins.attention.widths import equal_widths

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
NUMBERS = {int(backend.value): name for name, backend in BACKENDS.items()}


class Way(NamedTuple):
    """How torch is called so that it takes a kernel that is permitted: inside a block that forbids others (`is_restricted`), with a
    dense copy of keys and values for each query head (`repeats`)."""

    is_restricted: bool = False
    repeats: bool = False


class Lowered(NamedTuple):
    """One step's mask for one spec."""

    mask: Tensor | None  # bool [b or 1, 1, t, s]
    is_causal: bool
    way: Way


Form = tuple[AttentionSpec, bool, bool]  # what a call is like: the spec, without a mask, is_causal


class SdpaAttention:
    traced = ("kernels",)  # what a graph depends on

    def __init__(self, options: SdpaOptions | None = None) -> None:
        self.kernels: tuple[str, ...] = (options or SdpaOptions()).kernels
        self.backends = [BACKENDS[name] for name in self.kernels]
        self.taken: dict[Form, str] = {}  # the kernels that were found out
        self._ways: dict[Form, Way] = {}
        self._open: set[Form] = set()  # that have to be looked at
        self._by_form = False  # each call asks for its way: it may not be the one that is expected

    def prepare(self, spec: AttentionSpec, visible: Visibility) -> Lowered:
        """No mask where none is needed: one query that sees everything, or a first prompt that is_causal describes."""
        count, past = visible.query_index.shape[0], visible.past
        in_window = past is not None and (visible.window is None or past + count <= visible.window)
        is_plain = visible.starts is None and in_window and visible.seen_from is None and visible.seen_until is None
        is_causal = is_plain and visible.causal and count > 1
        mask = None if is_plain and (past == 0 or not is_causal) else visible.dense()
        is_causal = is_causal and mask is None
        form, on_cpu = (spec, mask is None, is_causal), visible.query_index.device.type == "cpu"
        if not is_compiling() and not (on_cpu and form in self._ways):
            self._open.add(form)
            self._by_form = self._by_form or not on_cpu
        # What is expected, and what a graph is made of: torch chooses while it traces, what is not permitted is not offered to it.
        expected = Way("flash" not in self.kernels if on_cpu else "math" not in self.kernels)
        return Lowered(mask, is_causal, self._ways.get(form, expected) if on_cpu else expected)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Lowered, spec: AttentionSpec) -> Tensor:
        if spec.value_dim != spec.head_dim:
            q, k, v = equal_widths(q, k, v)
        way = mask.way
        if (self._open or self._by_form) and not is_compiling():
            way = self._find(q, k, v, mask, spec)
        if way.is_restricted or way.repeats:
            y = self._call(q, k, v, mask, spec, way)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask.mask,
                is_causal=mask.is_causal,
                scale=spec.scale,
                enable_gqa=spec.num_heads != spec.num_key_value_heads,
            )  # [b, h, t, d]
        if spec.value_dim < spec.head_dim:
            y = y[..., : spec.value_dim]
        b, _, t, _ = q.shape
        if t > 1:
            y = y.transpose(1, 2)
        return y.reshape(b, t, spec.num_heads * spec.value_dim)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, mask: Lowered, spec: AttentionSpec, way: Way) -> Tensor:
        """A call that needs one thing more: a block that forbids kernels, or keys and values for each query head."""
        if way.repeats:
            k, v = _repeated(k, v, spec)
        grouped = spec.num_heads != spec.num_key_value_heads and not way.repeats
        given: dict[str, Any] = {"attn_mask": mask.mask, "is_causal": mask.is_causal, "scale": spec.scale, "enable_gqa": grouped}
        if not way.is_restricted:
            return F.scaled_dot_product_attention(q, k, v, **given)
        with sdpa_kernel(self.backends):
            return F.scaled_dot_product_attention(q, k, v, **given)

    def _find(self, q: Tensor, k: Tensor, v: Tensor, mask: Lowered, spec: AttentionSpec) -> Way:
        """The way of a call, looked for if that is due. On CPU it is as expected, unless a form of call says otherwise."""
        form = (spec, mask.mask is None, mask.is_causal)
        if form in self._open:
            self._ways[form] = self._look(q, k, v, mask, spec)
            self._open.discard(form)
            self._by_form = self._by_form or self._ways[form] != mask.way
        return self._ways.get(form, mask.way)

    def _look(self, q: Tensor, k: Tensor, v: Tensor, mask: Lowered, spec: AttentionSpec) -> Way:
        """A way by which torch takes a kernel that is permitted. Raises `PluginError` (PL-KERNEL) if there is none."""
        grouped = spec.num_heads != spec.num_key_value_heads
        for repeats in (False, True):
            keys, values = _repeated(k, v, spec) if repeats else (k, v)
            for is_restricted in (False, True):
                kernel = self._choice(q, keys, values, mask, spec, is_restricted, grouped and not repeats)
                if kernel in self.kernels:
                    self.taken[spec, mask.mask is None, mask.is_causal] = kernel
                    return Way(is_restricted, repeats)
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        there = [name for name in KERNELS_OF.get(q.device.type, ()) if name not in self.kernels]
        raise PluginError(
            "PL-KERNEL",
            f"none of torch's kernels {', '.join(self.kernels)} computes {shapes} in {str(q.dtype).removeprefix('torch.')} on "
            f"{q.device.type} {'without' if mask.mask is None else 'with'} a mask",
            plugin="sdpa",
            hint=f"permit more: attention.kernels={','.join((*self.kernels, *there))}, or take attention='eager'",
        )

    def _choice(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Lowered, spec: AttentionSpec, is_restricted: bool, grouped: bool
    ) -> str | None:
        """The kernel that torch would take; None where it would take none."""
        given: dict[str, Any] = {"attn_mask": mask.mask, "is_causal": mask.is_causal, "scale": spec.scale, "enable_gqa": grouped}
        with self._restricted(is_restricted):
            try:
                return NUMBERS.get(torch._fused_sdp_choice(q, k, v, **given))
            except RuntimeError:  # no kernel is left
                return None

    @contextmanager
    def _restricted(self, is_restricted: bool) -> Iterator[None]:
        if not is_restricted:
            yield
            return
        with warnings.catch_warnings(), sdpa_kernel(self.backends):
            warnings.simplefilter("ignore")  # torch tells why it does not take a kernel
            yield


def _repeated(k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Keys and values for each query head, densely, for kernels that need them so. A copy."""
    times = spec.num_heads // spec.num_key_value_heads
    return k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
