"""Every attention kernel with every cache and decoder, on models whose layers see all, a window, both, and experts.

The tokens are those of `eager` with `dynamic` and plain decoding; for a cache that is lossy, those of forwards without a cache in
which each query sees keys and values as that cache must show them. What fits is never refused: a refusal fails here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import modelrig
from checkpoints import tokens, write_decoder
from dequantised import Form, reference
from modelrig.registry import current

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {}),
    "sliding": ("Mistral", {"sliding_window": 6}),
    "hybrid": (
        "Gemma3Text",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "experts": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}
ATTENTION = [one.name for one in current().components("attention") if one.is_ours and "cpu" in one.descriptor.capabilities.devices]
CACHES = [one.name for one in current().components("caches") if one.is_ours]
DECODERS = ("auto", "beam", "prompt_lookup", "draft_model")
PROMPTS = [[*ids[:5], *ids[:5], *ids] for ids in (tokens(1, count, seed=count)[0].tolist() for count in (7, 12))]
NEW_TOKENS = 24
#: what compiles each form of step: in every run with these only, with the others by `make test-long`
COMPILED, SHORT = "flex", {("sliding", "hybrid")}
CELLS = [
    pytest.param(attention, cache, kind, marks=[pytest.mark.long] if attention == COMPILED and (cache, kind) not in SHORT else [])
    for attention in ATTENTION
    for cache in CACHES
    for kind in KINDS
]
FORM = Form(bits=4, group=4, residual=6)  # of what is lossy, so that much of these texts is packed


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, (family, more) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        write_decoder(made[kind], family, eos_token_id=[11, 12], **more)
    return made


def load(folder: Path, decoder: str = "auto", cache: str = "auto", attention: str = "auto", **request: Any) -> modelrig.Model:
    options = {
        "beam": {"num_beams": 3},
        "prompt_lookup": {"least_gain": 0.0},
        "draft_model": {"model": str(folder), "least_gain": 0.0},
    }.get(decoder)
    wish = decoder if options is None else {"name": decoder, **options}
    kept = {"name": cache, **FORM._asdict()} if is_lossy(cache) else cache
    # What is rounded to codes may be rounded otherwise after another order of sums, which in float64 nearly never happens.
    takes_float64 = attention == "auto" or "float64" in capabilities("attention", attention).dtypes
    dtype = "float64" if is_lossy(cache) and takes_float64 else "float32"
    return modelrig.load(folder, dtype=dtype, context=80, decoder=wish, cache=kept, attention=attention, **request)


def capabilities(kind: str, name: str) -> Any:
    descriptor: Any = current().find(kind, name).descriptor
    return descriptor.capabilities


def generated(model: modelrig.Model) -> list[tuple[int, ...]]:
    return [one.tokens for one in model.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]


def is_lossy(cache: str) -> bool:
    return cache != "auto" and bool(capabilities("caches", cache).lossy)


def without_cache(model: modelrig.Model) -> list[tuple[int, ...]]:
    """Greedy tokens of each prompt by forwards over all of its text."""
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] not in model.plan.eos_ids):
            ids.append(int(reference(model, torch.tensor([ids]), FORM)[0, -1].argmax()))
        found.append(tuple(ids[len(prompt) :]))
    return found


@pytest.fixture(scope="session")
def references(folders: dict[str, Path]) -> Iterator[Any]:
    known: dict[tuple[str, str, str], Any] = {}

    def find(kind: str, cache: str, decoder: str) -> Any:
        cache = cache if is_lossy(cache) else "dynamic"
        decoder = "beam" if decoder == "beam" else "auto"  # drafts change nothing
        if (kind, cache, decoder) not in known:
            with load(folders[kind], decoder, attention="eager", cache=cache) as model:
                if is_lossy(cache) and decoder == "auto":
                    known[kind, cache, decoder] = without_cache(model)
                else:  # each prompt alone, so that rows of a padded batch are compared with what they are alone
                    known[kind, cache, decoder] = [model.generate(ids, max_new_tokens=NEW_TOKENS).tokens for ids in PROMPTS]
        return known[kind, cache, decoder]

    yield find


@pytest.mark.parametrize(("attention", "cache", "kind"), CELLS)
def test_the_same_tokens_whatever_the_parts(
    folders: dict[str, Path], references: Any, attention: str, cache: str, kind: str
) -> None:
    for decoder in DECODERS:
        with load(folders[kind], decoder, attention=attention, cache=cache) as model:
            assert references(kind, cache, decoder) == generated(model), decoder


@pytest.mark.parametrize(("attention", "cache", "kind"), [cell for cell in CELLS if not is_lossy(str(cell.values[1]))])
def test_the_same_logits_whatever_the_parts(folders: dict[str, Path], attention: str, cache: str, kind: str) -> None:
    """Prompt in two parts, then token by token, against one forward without a cache."""
    ids = tokens(2, 40, seed=5)
    with load(folders[kind], attention="eager") as model:
        expected = model(ids)
    with load(folders[kind], attention=attention, cache=cache) as model:
        held = model.new_cache(batch=2, max_len=64)
        parts = [
            model(ids[:, start:stop], cache=held) for start, stop in ((0, 9), (9, 26), *((at, at + 1) for at in range(26, 40)))
        ]
    torch.testing.assert_close(expected, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["static", "sliding"])
def test_compiled_steps_give_the_same_tokens_with_every_decoder(
    folders: dict[str, Path], references: Any, cache: str, kind: str
) -> None:
    for decoder in DECODERS:
        with load(folders[kind], decoder, cache=cache, compiler="inductor") as model:
            assert references(kind, cache, decoder) == generated(model), decoder
            made = model.step.compiled + model.step.loaded
            assert made > 0
            assert references(kind, cache, decoder) == generated(model), decoder
            assert model.step.compiled + model.step.loaded == made  # a second call needs nothing new
