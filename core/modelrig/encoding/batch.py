"""What `model(...)` and `model.encode` take, checked, and as one batch whose padding is on the left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelrig.components import ModelFacts
from modelrig.errors import GenerateError, quoted
from modelrig.generation.inputs import as_batch
from modelrig.modules.padding import PaddedBatch
from modelrig.modules.slots import Slots, uncached_slots


class Batch:
    """The inputs of one forward.

    Attributes:
        ids: int64 [batch, tokens], padding on the left.
        token_types: of the same shape, or None where none were given.
        padding: pad tokens on the left, for each row; None without an attention mask.

    Raises:
        GenerateError: GN-INPUT for inputs that do not fit the model or each other, GN-CONTEXT for more tokens than positions.
    """

    def __init__(self, facts: ModelFacts, device: torch.device, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> None:
        self.facts, self.device = facts, device
        self.ids = as_batch(input_ids, facts.vocab_size).to(device)
        self.token_types = None if token_type_ids is None else self._types(token_type_ids)
        self.padding: list[int] | None = None
        self._padded: PaddedBatch | None = None
        if attention_mask is not None:
            self._padded = PaddedBatch(self.ids, attention_mask)
            self.ids, self.padding = self._padded.ids, self._padded.padding
            if self.token_types is not None:
                self.token_types = self._padded.roll(self.token_types)
        longest, limit = self.ids.shape[1] - min(self.padding or (0,)), facts.position_limit
        if limit is not None and longest > limit:
            reason = f"{longest:,} tokens in a row, but the model has positions for {limit:,}"
            raise GenerateError("GN-CONTEXT", reason, locus="input_ids", hint="cut the text, or take it in parts")

    def slots(self) -> Slots:
        """Their place where nothing is cached."""
        starts = torch.tensor(self.padding, device=self.device) if self.padding is not None and any(self.padding) else None
        rows, count = self.ids.shape
        return uncached_slots(rows, count, len(self.facts.layers), starts, self.device)

    def restore(self, values: Tensor) -> Tensor:
        """values [batch, tokens, n] in the order of the input; [batch, n], which have no tokens, as they are."""
        return values if self._padded is None or values.dim() < 3 else self._padded.restore(values)

    def _types(self, given: Any) -> Tensor:
        kinds = self.facts.token_types
        if not kinds:
            raise GenerateError("GN-INPUT", f"a {self.facts.architecture} model has no token types", locus="token_type_ids")
        shape = list(self.ids.shape)
        try:
            types = torch.as_tensor(given, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise GenerateError(
                "GN-INPUT", f"whole numbers of the input's shape {shape} are needed", locus="token_type_ids"
            ) from error
        if types.shape != self.ids.shape or types.is_floating_point() or types.is_complex() or types.dtype == torch.bool:
            reason = f"whole numbers of the input's shape {shape} are needed, not {types.dtype} {list(types.shape)}"
            raise GenerateError("GN-INPUT", reason, locus="token_type_ids")
        wrong = types[(types < 0) | (types >= kinds)]
        if wrong.numel():
            reason = f"{quoted(int(wrong[0]))} is no token type: accepted is 0 to {kinds - 1}"
            raise GenerateError("GN-INPUT", reason, locus="token_type_ids")
        return types.long()
