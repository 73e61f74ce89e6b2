"""Hidden states of tokens, and one vector for each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from modelrig.encoding.batch import Batch
from modelrig.encoding.recipe import POOLINGS, Recipe
from modelrig.errors import GenerateError, quoted
from modelrig.generation.tokenizer import Tokenizer
from modelrig.planning.plan import RigPlan
from modelrig.planning.tokenizer_files import find_other_form, no_text

TOKENS_AT_ONCE = 1 << 13  # of a batch of texts, padding counted


@frozen(eq=False)
class Encoded:
    """What an encoder makes of tokens.

    Attributes:
        hidden: the last block's output, [batch, tokens, hidden]. Where a row is padded it means nothing.
        pooled: what the model's own pooler makes of each row, [batch, hidden]; None for a model without one.
        layers: the embeddings' output and each block's, if they were asked for.
    """

    hidden: Tensor
    pooled: Tensor | None
    layers: tuple[Tensor, ...] = ()


def encode(module: Any, batch: Batch, all_layers: bool = False) -> Encoded:
    """The states of `batch` by a module that offers `encode` (`modelrig.components.ModuleBuilder`)."""
    with torch.no_grad():
        states, pooled = module.encode(batch.ids, batch.slots(), batch.token_types, all_layers)
        states = tuple(map(batch.restore, states))
    return Encoded(states[-1], pooled, states if all_layers else ())


def embed(
    encode: Callable[[Tensor, Tensor, Tensor | None], Encoded],
    tokenizer: Tokenizer | None,
    recipe: Recipe,
    texts: Any,
    plan: RigPlan,
    *,
    normalize: bool | None,
    pooling: str | None,
) -> Tensor:
    """A vector for each text, float32 [texts, numbers]: tokenize → encode → pool → normalise.

    Args:
        encode: (ids, attention mask, token types) → states.
        normalize, pooling: instead of what the recipe says.
    """
    if pooling is not None and pooling not in POOLINGS.values():
        raise GenerateError("GN-ARGS", f"{quoted(pooling)}: accepted are {', '.join(POOLINGS.values())}", locus="pooling")
    if normalize is not None and not isinstance(normalize, bool):
        raise GenerateError("GN-ARGS", f"{quoted(normalize)}: accepted are true and false", locus="normalize")
    if tokenizer is None:
        raise no_text(find_other_form(plan.snapshot), "read text", hint="model.encode takes ids")
    poolings = recipe.poolings if pooling is None else (pooling,)
    rows = tokenizer.encode_within(_prepared(texts, recipe), min(plan.context, recipe.max_tokens or plan.context))
    if bare := [place for place, (ids, _) in enumerate(rows) if not ids]:
        raise GenerateError("GN-INPUT", f"text {bare[0]} has no tokens, and its tokenizer adds none", locus="texts")
    found = torch.empty(len(rows), plan.facts.hidden_size * len(poolings))
    for places in _batches([len(ids) for ids, _ in rows]):
        ids, types = (_padded([rows[place][part] for place in places]) for part in (0, 1))
        mask = _padded([[1] * len(rows[place][0]) for place in places])
        hidden = encode(ids, mask, types if plan.facts.token_types else None).hidden.float().cpu()
        found[places] = torch.cat([_POOL[name](hidden, mask[:, :, None]) for name in poolings], dim=1)
    return F.normalize(found, dim=1) if (recipe.normalize if normalize is None else normalize) else found


def _prepared(texts: Any, recipe: Recipe) -> list[str]:
    given = [texts] if isinstance(texts, str) else texts
    if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
        raise GenerateError("GN-INPUT", "texts are a str or a list of them", locus="texts")
    return [recipe.prompt + (text.lower() if recipe.lower else text) for text in given]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of texts that run together: those of like length, so that little is padded."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[place] > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows as int64 [rows, the longest], zeros on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, -torch.inf).amax(dim=1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001 - one of several
    return hidden[:, 0]


#: states [rows, tokens, n] padded on the right, mask [rows, tokens, 1] → [rows, n]
_POOL = {"cls": _first, "max": _max, "mean": _mean}
