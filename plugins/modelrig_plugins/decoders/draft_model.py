"""Which model drafts, and whether its tokens mean the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.checkpoint.paths import optional
from modelrig.checkpoint.strict_json import load_json
from modelrig.components import ModelFacts, Reason, Snapshot
from modelrig.errors import TokenizerError
from modelrig.planning.needs import DecoderNeed
from modelrig.planning.plan import RigPlan
from modelrig_plugins.decoders.drafting import check_drafts

ROLE = "draft"
TOKENIZER = "tokenizer.json"
HINT = "--set decoder.model=<a small model with the same tokenizer>"


@frozen
class DraftModelOptions:
    """`model`: a path, `org/name[@rev]` or a bundled name. `num_tokens`: drafts at most. `least_gain`: drafting pauses while a
    verification gains fewer tokens than this on average."""

    model: str = ""
    num_tokens: int = 6
    least_gain: float = 1.0


class DraftModelPlanner:
    Options = DraftModelOptions

    @staticmethod
    def check(need: DecoderNeed, options: DraftModelOptions) -> Iterable[Reason]:  # noqa: ARG004 - protocol
        if not options.model:
            yield Reason("decoder.model", "no model that drafts was named", HINT)
        yield from check_drafts(options)

    @staticmethod
    def companions(options: DraftModelOptions) -> Mapping[str, str]:
        return {ROLE: options.model}

    @staticmethod
    def check_companions(facts: ModelFacts, snapshot: Snapshot, companions: Mapping[str, RigPlan]) -> Iterable[Reason]:
        draft = companions[ROLE]
        if not draft.facts.generates:
            yield Reason("decoder.model", f"{draft.reference} generates no text", HINT)
        elif (why := _difference(facts, snapshot, draft)) is not None:
            yield Reason("decoder.model", f"{draft.reference} {why}", HINT)


def _difference(facts: ModelFacts, snapshot: Snapshot, draft: RigPlan) -> str | None:
    """Why an id of the draft's is another token here."""
    ours, theirs = optional(snapshot, TOKENIZER), optional(draft.snapshot, TOKENIZER)
    if ours is None or theirs is None:
        if facts.vocab_size != draft.facts.vocab_size:
            return f"has a vocabulary of {draft.facts.vocab_size:,} ids, this model one of {facts.vocab_size:,}"
        return None
    return None if _vocabulary(ours) == _vocabulary(theirs) else "has another tokenizer"


def _vocabulary(path: Path) -> Any:
    values = load_json(path, error=TokenizerError, prefix="TK")
    model = values.get("model")
    return (model.get("vocab") if isinstance(model, dict) else None), values.get("added_tokens")
