"""The decision, as data: chosen components, every refused one with its reasons, placement, byte ledger."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import attrs

from modelrig.components import PLANNED, AttentionSpec, Catalog, ModelFacts, Snapshot
from modelrig.errors import GenerateError
from modelrig.planning.environment import Environment
from modelrig.planning.generation_config import GenerationConfig
from modelrig.planning.ledger import Ledger
from modelrig.planning.negotiation import Choice, Refusal
from modelrig.planning.request import Request


@attrs.frozen(kw_only=True)
class LayerKind:
    """Layers that see alike: all earlier tokens ("full"), a window of the last ("sliding"), or later ones too ("bidirectional").

    `window` counts the current token; `cache_bytes` are those of all its layers.
    """

    kind: str
    window: int | None
    layers: int
    cache_bytes: int


@attrs.frozen(kw_only=True, eq=False)
class RigPlan:
    """How a checkpoint will be loaded and run.

    Attributes:
        reference: what the caller named.
        choices: kind → the component that serves it, and why; the identified kinds too. An encoder has no cache and no decoder.
        refused: every other component of the negotiated kinds, with all its reasons.
        decoder_when_sampling: the decoder of calls with a temperature; None if a pinned one cannot sample, and for an encoder.
        device, dtype, context, batch: where, in what, and for how many tokens of how many sequences.
        origins: where device, dtype, context and batch come from.
        device_map: module name → device; "" is the whole model.
        ledger: bytes per device and moment.
        generation: what the checkpoint says of how to generate, each value with its origin.
        companions: role → the plan of a further model that a part works with.
        notes: what is worth knowing and no error.
    """

    reference: str
    snapshot: Snapshot
    catalog: Catalog
    facts: ModelFacts
    environment: Environment
    request: Request
    choices: Mapping[str, Choice]
    refused: tuple[Refusal, ...]
    decoder_when_sampling: Choice | None
    device: str
    dtype: str
    context: int
    batch: int
    origins: Mapping[str, str]
    device_map: Mapping[str, str]
    ledger: Ledger
    generation: GenerationConfig = attrs.field(factory=GenerationConfig)
    companions: Mapping[str, RigPlan] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(math.prod(one.shape) for one in self.facts.parameters if one.sources)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, by the checkpoint's configs."""
        return self.generation.eos_ids

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What the layers see, kind by kind, and the cache each kind takes at the planned context and batch."""
        groups: dict[tuple[str, int | None], list[AttentionSpec]] = {}
        for spec in self.facts.layers:
            kind = "bidirectional" if not spec.causal else "full" if spec.window is None else "sliding"
            groups.setdefault((kind, spec.window), []).append(spec)
        choice = self.choices.get("caches")
        return tuple(
            LayerKind(
                kind=kind,
                window=window,
                layers=len(specs),
                cache_bytes=0
                if choice is None
                else choice.registered.planner().nbytes(specs, self.batch, self.context, self.dtype, choice.options),
            )
            for (kind, window), specs in groups.items()
        )

    @property
    def hash(self) -> str:
        """SHA-256 over choices, options, device map, dtype, context and batch: equal for equal rigs, whatever memory is free."""
        return hashlib.sha256(json.dumps(self._decision(), sort_keys=True, default=str).encode()).hexdigest()

    def _decision(self) -> dict[str, Any]:
        sampling = self.decoder_when_sampling
        return {
            "choices": {kind: [choice.id, plain_options(choice.options)] for kind, choice in self.choices.items()},
            "decoder_when_sampling": None if sampling is None else [sampling.id, plain_options(sampling.options)],
            "device_map": dict(self.device_map),
            "dtype": self.dtype,
            "context": self.context,
            "batch": self.batch,
            **({"companions": {role: one.hash for role, one in self.companions.items()}} if self.companions else {}),
        }

    def require_generation(self) -> None:
        """Raise `GenerateError` (GN-MODEL) if the model is an encoder."""
        if not self.facts.generates:
            text = f"this {self.facts.architecture} model is an encoder: it does not generate text"
            raise GenerateError("GN-MODEL", text, hint="model(ids), model.encode and model.embed say what it makes of a text")

    def require_encoding(self) -> None:
        """Raise `GenerateError` (GN-MODEL) unless the model is an encoder."""
        if self.facts.generates:
            text = f"this {self.facts.architecture} model generates text: it is no encoder"
            raise GenerateError("GN-MODEL", text, hint="model(ids) gives its logits")

    def explain(self) -> str:
        """The plan for people, as plain text."""
        from modelrig.planning.explain import explain

        return explain(self)

    def summary(self) -> str:
        """The plan in one line."""
        from modelrig.planning.explain import summary

        return summary(self)

    def to_json(self) -> dict[str, Any]:
        """The plan for machines: nothing but what JSON knows."""
        sampling = self.decoder_when_sampling
        return {
            "model": self.reference,
            "choices": {kind: _choice(self.choices[kind]) for kind in PLANNED if kind in self.choices},
            "decoder_when_sampling": None if sampling is None else _choice(sampling),
            "refused": [
                {
                    "kind": row.kind,
                    "component": row.component,
                    "reasons": [{"code": one.code, "text": one.text, "hint": one.hint} for one in row.reasons],
                }
                for row in self.refused
            ],
            "device_map": dict(self.device_map),
            "device": self.device,
            "dtype": self.dtype,
            "context": self.context,
            "batch": self.batch,
            "ledger": self.ledger.to_json(),
            "request": self.request.to_json(),
            "origins": dict(self.origins),
            "checkpoint": {
                "root": str(self.snapshot.root),
                "revision": self.snapshot.revision,
                "complete": self.snapshot.complete,
                "files": len(self.catalog.files),
                "tensors": len(self.catalog.entries),
                "bytes": self.catalog.total_bytes,
            },
            "facts": {
                "architecture": self.facts.architecture,
                "parameters": self.num_parameters,
                "layers": len(self.facts.layers),
                "layer_kinds": [attrs.asdict(kind) for kind in self.layer_kinds],
                "blocks": list(self.facts.blocks),
                "hidden_size": self.facts.hidden_size,
                "intermediate_size": self.facts.intermediate_size,
                "vocab_size": self.facts.vocab_size,
                "context_length": self.facts.context_length,
                "dtype": self.facts.dtype,
            },
            "generation": self.generation.to_json(),
            "companions": {role: one.to_json() for role, one in self.companions.items()},
            "environment": self.environment.to_json(),
            "notes": list(self.notes),
            "hash": self.hash,
        }


def plain_options(options: Any) -> Any:
    """A component's options as plain data."""
    return attrs.asdict(options) if attrs.has(type(options)) else options


def _choice(choice: Choice) -> dict[str, Any]:
    options = json.loads(json.dumps(plain_options(choice.options), default=str))
    return {"component": choice.component, "why": choice.why, "id": choice.id, "options": options}
