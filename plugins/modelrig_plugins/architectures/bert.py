"""BERT: a base model, or one with a head for masked tokens, for a class of the text, or for a class of each token. No torch.

What transformers wrote over the years is read: names with and without `bert.`, norms that call their weights gamma and beta, heads
of a pretraining that the model at hand does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.checkpoint.activations import ACTIVATIONS
from modelrig.checkpoint.config import ConfigReader
from modelrig.components import AttentionSpec, Catalog, ModelFacts, Parameter
from modelrig.errors import quoted
from modelrig_plugins.architectures.reading import LIMIT, parse, read_layers, require_head_dim

BASE, MASKED, SEQUENCE, TOKENS = "base", "masked_lm", "sequence_classification", "token_classification"
#: class in `architectures` → head
HEADS = {
    "BertModel": BASE,
    "BertForMaskedLM": MASKED,
    "BertForPreTraining": MASKED,
    "BertForSequenceClassification": SEQUENCE,
    "BertForTokenClassification": TOKENS,
}
#: names with which stored heads begin, outside of the base model
HEAD_NAMES = ("cls.", "classifier.", "qa_outputs.")
SHOWN = 10  # names in a note
DECODER, WORDS, BIAS = "cls.predictions.decoder", "embeddings.word_embeddings.weight", "cls.predictions.bias"


@frozen(kw_only=True)
class BertConfig:
    """What a config and the names of the tensors say.

    Attributes:
        prefix: what the module puts before the base model's names.
        has_pooler: the pooler is stored.
        labels: classes of a classifier; 0 without one.
        ties: module name → module name of the parameter it shares.
    """

    head: str
    prefix: str
    has_pooler: bool
    labels: int
    ties: Mapping[str, str]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    max_positions: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    layer: AttentionSpec


class BertPlanner:
    @staticmethod
    def describe(config: Mapping[str, Any], catalog: Catalog, path: Path) -> ModelFacts:
        parsed, dtype = parse(config, path, lambda reader: read_config(reader, catalog))
        parameters = tuple(list_parameters(parsed, stored_names(parsed, catalog)))
        ignored, notes = left_out(parsed, parameters, catalog)
        return ModelFacts(
            architecture="bert",
            config=parsed,
            parameters=parameters,
            blocks=tuple(f"{parsed.prefix}encoder.layer.{i}" for i in range(parsed.num_hidden_layers)),
            layers=(parsed.layer,) * parsed.num_hidden_layers,
            ties=parsed.ties,
            hidden_size=parsed.hidden_size,
            intermediate_size=parsed.intermediate_size,
            vocab_size=parsed.vocab_size,
            context_length=parsed.max_positions,
            dtype=dtype,
            generates=False,
            token_types=parsed.type_vocab_size,
            position_limit=parsed.max_positions,
            ignored=ignored,
            notes=notes,
        )


PLANNER = BertPlanner()


# ------------------------------------------------------------------------------------------------ config


def read_config(reader: ConfigReader, catalog: Catalog) -> BertConfig:
    hidden = reader.integer("hidden_size", 1, LIMIT)
    heads = reader.integer("num_attention_heads", 1, LIMIT)
    require_head_dim(reader, hidden, heads, "hidden_size", "num_attention_heads")
    layers = read_layers(reader, "num_hidden_layers", catalog, "encoder.layer.", ("", "bert."))
    for key in ("is_decoder", "add_cross_attention"):
        is_set = reader.boolean(key, default=False)
        reader.require(not is_set, "CF-ENUM", key, "true, which makes a decoder of it; only encoders are served")
    reader.choice("position_embedding_type", ("absolute",), default="absolute")
    head_dim = max(1, hidden // heads)
    head = read_head(reader, catalog)
    prefix = "" if head == BASE else "bert."
    return BertConfig(
        head=head,
        prefix=prefix,
        has_pooler=head == SEQUENCE or any(f"{start}pooler.dense.weight" in catalog.entries for start in ("", "bert.")),
        labels=read_labels(reader, catalog) if head in (SEQUENCE, TOKENS) else 0,
        ties=dict(list_ties(reader, catalog)) if head == MASKED else {},
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 1, LIMIT),
        num_hidden_layers=layers,
        vocab_size=reader.integer("vocab_size", 1, LIMIT),
        max_positions=reader.integer("max_position_embeddings", 1, LIMIT, default=512),
        type_vocab_size=reader.integer("type_vocab_size", 1, LIMIT, default=2),
        layer_norm_eps=reader.number("layer_norm_eps", 0.0, 1.0, default=1e-12, exclusive=True),
        hidden_act=reader.choice("hidden_act", ACTIVATIONS, default="gelu"),
        layer=AttentionSpec(
            num_heads=heads,
            num_key_value_heads=heads,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=head_dim**-0.5,
            causal=False,
        ),
    )


def read_head(reader: ConfigReader, catalog: Catalog) -> str:
    """What `architectures` says; where it says nothing, what the stored tensors are."""
    names = reader.strings("architectures", default=None)
    name = names[0] if names else stored_class(catalog)
    said = quoted(name) if names else f"none, and the stored tensors are those of {name}"
    reader.require(name in HEADS, "CF-ENUM", "architectures", f"{said}; served are {', '.join(HEADS)}")
    return HEADS.get(name, BASE)


def stored_class(catalog: Catalog) -> str:
    """The class whose tensors are stored."""
    entries = catalog.entries
    if "cls.predictions.transform.dense.weight" in entries:
        return "BertForMaskedLM"
    if "cls.seq_relationship.weight" in entries:
        return "BertForNextSentencePrediction"
    if "qa_outputs.weight" in entries:
        return "BertForQuestionAnswering"
    if "classifier.weight" in entries:
        return f"BertFor{'Sequence' if 'bert.pooler.dense.weight' in entries else 'Token'}Classification"
    return "BertModel"


def read_labels(reader: ConfigReader, catalog: Catalog) -> int:
    """Classes by `num_labels` or `id2label`, which must agree with each other and with what is stored; 2 where neither is there."""
    named = reader.child("id2label")
    key, other = ("id2label", "num_labels") if named is not None else ("num_labels", "id2label")
    count = reader.integer("num_labels", 1, LIMIT, default=2 if named is None else len(named.values))
    if named is not None:
        text = f"{len(named.values)} names for num_labels ({count})"
        reader.require(len(named.values) == count, "CF-REL", "id2label", text, uses=("num_labels",))
    entry = catalog.entries.get("classifier.weight")
    if entry is not None and entry.shape:
        text = f"says {count} classes, but classifier.weight is stored for {entry.shape[0]}"
        reader.require(count == entry.shape[0], "CF-REL", key, text, uses=(other,))
    return count


def list_ties(reader: ConfigReader, catalog: Catalog) -> Iterator[tuple[str, str]]:
    """What of the head for masked tokens has no storage of its own. A tensor that is stored apart is used as stored."""
    entries = catalog.entries
    is_tied = reader.boolean("tie_word_embeddings", default=True)
    weight, words = entries.get(f"{DECODER}.weight"), next((entries[name] for name in spelt(WORDS) if name in entries), None)
    if is_tied if weight is None else words is not None and (weight.file, weight.offset) == (words.file, words.offset):
        yield f"{DECODER}.weight", f"bert.{WORDS}"
    bias, own = entries.get(BIAS), entries.get(f"{DECODER}.bias")
    if bias is None or own is None or (bias.file, bias.offset) == (own.file, own.offset):
        yield f"{DECODER}.bias", BIAS


# ------------------------------------------------------------------------------------------------ names


def spelt(name: str) -> Iterator[str]:
    """What a tensor of the base model may be called."""
    for start in ("bert.", ""):
        yield start + name


def stored_names(config: BertConfig, catalog: Catalog) -> Callable[[str], str]:
    """A function from a module's name of a parameter to the stored one."""
    entries = catalog.entries
    prefix = next((name.removesuffix(WORDS) for name in spelt(WORDS) if name in entries), config.prefix)

    def stored(name: str) -> str:
        is_head = name.startswith(HEAD_NAMES)
        name = name if is_head else prefix + name.removeprefix(config.prefix)
        for usual, legacy in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            old = name.removesuffix(usual) + legacy
            if name.endswith(usual) and name not in entries and old in entries:
                return old
        if name == BIAS and name not in entries and f"{DECODER}.bias" in entries:
            return f"{DECODER}.bias"
        return name

    return stored


def list_parameters(config: BertConfig, stored: Callable[[str], str]) -> Iterator[Parameter]:
    """Every parameter in execution order."""
    hidden, wide = config.hidden_size, config.intermediate_size

    def norm(name: str) -> list[tuple[str, tuple[int, ...], str]]:
        return [(f"{name}.weight", (hidden,), "norm"), (f"{name}.bias", (hidden,), "norm")]

    def linear(name: str, rows: int, columns: int, role: str = "linear") -> list[tuple[str, tuple[int, ...], str]]:
        return [(f"{name}.weight", (rows, columns), role), (f"{name}.bias", (rows,), "bias")]

    before = [
        ("embeddings.word_embeddings.weight", (config.vocab_size, hidden), "embedding"),
        ("embeddings.position_embeddings.weight", (config.max_positions, hidden), "embedding"),
        ("embeddings.token_type_embeddings.weight", (config.type_vocab_size, hidden), "embedding"),
        *norm("embeddings.LayerNorm"),
    ]
    block = [
        *linear("attention.self.query", hidden, hidden),
        *linear("attention.self.key", hidden, hidden),
        *linear("attention.self.value", hidden, hidden),
        *linear("attention.output.dense", hidden, hidden),
        *norm("attention.output.LayerNorm"),
        *linear("intermediate.dense", wide, hidden),
        *linear("output.dense", hidden, wide),
        *norm("output.LayerNorm"),
    ]
    after = linear("pooler.dense", hidden, hidden) if config.has_pooler else []
    base: list[tuple[str, tuple[int, ...], str, int | None]] = [(name, shape, role, None) for name, shape, role in before]
    for i in range(config.num_hidden_layers):
        base += [(f"encoder.layer.{i}.{name}", shape, role, i) for name, shape, role in block]
    base += [(name, shape, role, None) for name, shape, role in after]
    for name, shape, role, number in base:
        yield Parameter(config.prefix + name, shape, role, stored(config.prefix + name), number)
    head: list[tuple[str, tuple[int, ...], str]] = []
    if config.head == MASKED:
        head = [(BIAS, (config.vocab_size,), "bias"), *linear("cls.predictions.transform.dense", hidden, hidden)]
        head += [*norm("cls.predictions.transform.LayerNorm"), *linear(DECODER, config.vocab_size, hidden, "head")]
    elif config.labels:
        head = linear("classifier", config.labels, hidden, "head")
    for name, shape, role in head:
        yield Parameter(name, shape, role, None if name in config.ties else stored(name))


def left_out(config: BertConfig, parameters: tuple[Parameter, ...], catalog: Catalog) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(stored tensors that this model does not use, what is to be said of them)."""
    used = {one.stored_as for one in parameters}
    heads = [name for name in catalog.entries if name.startswith(HEAD_NAMES) and name not in used and name not in config.ties]
    numbers = [name for name in spelt("embeddings.position_ids") if name in catalog.entries]
    shown = ", ".join(map(quoted, heads[:SHOWN])) + (f" and {len(heads) - SHOWN} more" if len(heads) > SHOWN else "")
    note = f"heads that this model ({config.head.replace('_', ' ')}) does not use are stored too: {shown}"
    return (*numbers, *heads, *(name for name in config.ties if name in catalog.entries)), (note,) if heads else ()
