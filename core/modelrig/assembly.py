"""The parts of a plan put together: fetch → tokenizer → build on meta → read and place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attrs import frozen

from modelrig.generation.tokenizer import Tokenizer
from modelrig.loading.fetch import fetch
from modelrig.loading.materialise import Filled, materialise
from modelrig.loading.paging import MainMemory
from modelrig.modules.network import BuildContext
from modelrig.planning.ledger import ACTIVATIONS, CACHE, ENCODING
from modelrig.planning.memory import asked_limit
from modelrig.planning.placement_maps import resolve
from modelrig.planning.plan import RigPlan
from modelrig.planning.tokenizer_files import OtherForm, find_other_form

if TYPE_CHECKING:
    from torch import nn


@frozen(eq=False)
class Assembled:
    """A module with its weights. `parts` are the implementations, by kind; `other_form` is what the tokenizer is where there is one
    that cannot be used."""

    module: nn.Module
    tokenizer: Tokenizer | None
    other_form: OtherForm | None
    parts: dict[str, Any]
    filled: Filled


def assemble(plan: RigPlan, progress: Callable[[int, int], None] | None) -> Assembled:
    """Read the weights and build the model. Raises what `modelrig.model.Plan.load` does."""
    import torch

    dtype, device = getattr(torch, plan.dtype), torch.device(plan.device)
    parts = {kind: choice.registered.implementation() for kind, choice in plan.choices.items()}
    snapshot, catalog = fetch(plan.snapshot, plan.catalog, parts["sources"], plan.choices["formats"].registered.planner(), progress)
    for kind in ("attention", "quantizers"):  # these two have one object per model
        parts[kind] = parts[kind](plan.choices[kind].options)
    # In another form it is noted in the plan, and ids work without it. Before the weights: it may be what is wrong.
    tokenizer, other_form = None, find_other_form(snapshot)
    if other_form is None:
        tokenizer = Tokenizer.from_folder(snapshot.root, plan.facts.vocab_size, snapshot.link_roots)
    context = BuildContext(parts["attention"], parts["quantizers"], dtype)
    with torch.inference_mode(False):  # parameters made in a caller's inference block would be of no use outside
        module = parts["architectures"].build(plan.facts, context)
        filled = materialise(
            module,
            plan.facts,
            catalog,
            parts["formats"],
            parts["quantizers"],
            dtype=dtype,
            device=device,
            places=resolve(plan.device_map, (one.name for one in plan.facts.parameters)),
            memory=MainMemory(
                is_limited=asked_limit("cpu", plan.request) is not None,
                reserved_bytes=sum(plan.ledger.bytes_of(what, "cpu", "run") for what in (CACHE, ACTIVATIONS, ENCODING)),
            ),
            progress=progress,
        )
    return Assembled(module, tokenizer, other_form, parts, filled)
