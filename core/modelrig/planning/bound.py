"""What one step of decoding reads from memory: what its speed is bound by, since every weight is read once."""

from __future__ import annotations

import math

from attrs import frozen

from modelrig.components import dtype_bytes
from modelrig.planning.ledger import LOOKED_UP, weigh_each
from modelrig.planning.plan import RigPlan

STACKED = "experts"


@frozen(kw_only=True)
class StepBytes:
    """Bytes that one step reads: weights once, however many sequences there are, and the keys and values of all of them."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def step_bytes(plan: RigPlan, tokens: int) -> StepBytes:
    """What a step of `plan.batch` single tokens reads when each sequence has `tokens`.

    Weights are everything but embedding tables, a head that is tied to one included. Of experts as many count as that many tokens
    choose, if all are chosen equally often. Keys and values are what the planned cache holds for so many tokens.
    """
    quantizer = plan.choices["quantizers"]
    weights = 0.0
    for one in weigh_each(plan.facts, plan.catalog, quantizer.registered.planner(), quantizer.options, plan.dtype):
        parameter = one.parameter
        if parameter.role == LOOKED_UP:
            continue
        size = one.size + one.beside if parameter.sources else dtype_bytes(plan.dtype, math.prod(parameter.shape))
        weights += size * (_chosen(plan, parameter.shape[0]) if parameter.role == STACKED else 1.0)
    cache = plan.choices["caches"]
    held = cache.registered.planner().nbytes(plan.facts.cached_layers, plan.batch, tokens, plan.dtype, cache.options)
    return StepBytes(weights=round(weights), cache=int(held))


def _chosen(plan: RigPlan, experts: int) -> float:
    """The share of `experts` that a step of one token for each sequence uses."""
    share = min(1.0, plan.facts.experts_per_token / experts) if plan.facts.experts_per_token else 1.0
    return 1.0 - (1.0 - share) ** plan.batch
