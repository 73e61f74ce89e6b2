"""Hidden states and what each head gives equal transformers' at the same weights, however those are named and stored."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelrig
import rigs
from checkpoints import assert_close, tokens, write_bert, write_decoder
from modelrig.errors import CacheError, ConfigError, GenerateError, LoadError, PlanError
from modelrig.planning.pipeline import make_plan

#: name → class of transformers, what its config says besides checkpoints.TINY_BERT
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("BertModel", {}),
    "base, one head, one token type": (
        "BertModel",
        {"num_attention_heads": 1, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    ),
    "base, heads of one": ("BertModel", {"hidden_size": 5, "num_attention_heads": 5, "num_hidden_layers": 1}),
    "masked tokens": ("BertForMaskedLM", {}),
    "masked tokens, odd sizes": (
        "BertForMaskedLM",
        {"hidden_size": 42, "num_attention_heads": 3, "intermediate_size": 37, "layer_norm_eps": 1e-3, "hidden_act": "relu"},
    ),
    "masked tokens, not tied": ("BertForMaskedLM", {"tie_word_embeddings": False, "type_vocab_size": 3, "hidden_act": "silu"}),
    "pretraining": ("BertForPreTraining", {"num_attention_heads": 12, "type_vocab_size": 3}),
    "classes of texts": ("BertForSequenceClassification", {"num_labels": 5}),
    "one class of texts, tanh": ("BertForSequenceClassification", {"num_labels": 1, "hidden_act": "tanh", "layer_norm_eps": 0.1}),
    "two classes of texts": ("BertForSequenceClassification", {"num_hidden_layers": 1}),
    "classes of tokens": ("BertForTokenClassification", {"num_labels": 7, "hidden_act": "gelu_pytorch_tanh"}),
}  # fmt: skip
LENGTHS = (19, 5, 12)


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The reference, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("pair")
    kind, config = CONFIGS[request.param]
    yield write_bert(folder, kind, seed=3, **config), folder


def types_for(model: Any, batch: int, count: int) -> torch.Tensor:
    """For a model of transformers, or the facts of ours."""
    return tokens(batch, count, seed=9) % model.config.type_vocab_size


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """(ids, attention mask, where the tokens of each row are)"""
    longest = max(LENGTHS)
    ids, mask = torch.zeros(3, longest, dtype=torch.int64), torch.zeros(3, longest, dtype=torch.int64)
    places = [slice(longest - n, longest) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, place in enumerate(places):
        ids[row, place], mask[row, place] = tokens(1, LENGTHS[row], seed=LENGTHS[row])[0], 1
    return ids, mask, places


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_what_the_head_gives(pair: tuple[Any, Path], attention: str) -> None:
    reference, folder = pair
    ids, types = tokens(2, 41), types_for(reference, 2, 41)
    model = modelrig.load(folder, attention=attention)
    assert_close(reference(ids)[0], model(ids))
    assert_close(reference(ids, token_type_ids=types)[0], model(ids, token_type_ids=types))
    assert_close(reference(ids[:, :1])[0], model(ids[:, :1]))


@torch.no_grad()
def test_hidden_states_of_all_layers_and_the_pooler(pair: tuple[Any, Path]) -> None:
    reference, folder = pair
    ids, types = tokens(2, 64), types_for(reference, 2, 64)
    expected = getattr(reference, "bert", reference)(ids, token_type_ids=types, output_hidden_states=True)
    found = modelrig.load(folder).encode(ids, token_type_ids=types, all_layers=True)
    for theirs, ours in zip(expected.hidden_states, found.layers, strict=True):
        assert_close(theirs, ours)
    assert found.hidden is found.layers[-1]
    if expected.pooler_output is None:
        assert found.pooled is None
    else:
        assert_close(expected.pooler_output, found.pooled)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(pair: tuple[Any, Path], side: str, attention: str) -> None:
    reference, folder = pair
    ids, mask, places = padded(side)
    types = types_for(reference, *ids.shape)
    model = modelrig.load(folder, attention=attention)
    found, encoded = model(ids, attention_mask=mask, token_type_ids=types), model.encode(ids, mask, types, all_layers=True)
    base = getattr(reference, "bert", reference)
    for row, place in enumerate(places):
        alone: dict[str, torch.Tensor] = {"input_ids": ids[row : row + 1, place], "token_type_ids": types[row : row + 1, place]}
        expected = reference(**alone)[0][0]
        assert_close(expected, found[row] if found.dim() == 2 else found[row, place])
        states = base(**alone, output_hidden_states=True)
        for theirs, ours in zip(states.hidden_states, encoded.layers, strict=True):
            assert_close(theirs[0], ours[row, place])
        if encoded.pooled is not None:
            assert_close(states.pooler_output[0], encoded.pooled[row])
    if side == "right":
        theirs = reference(ids, attention_mask=mask, token_type_ids=types)[0]
        for row, place in enumerate(places):
            assert_close(
                theirs[row] if theirs.dim() == 2 else theirs[row, place], found[row] if found.dim() == 2 else found[row, place]
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision_is_within_the_references_own_error(pair: tuple[Any, Path], dtype: str) -> None:
    reference, folder = pair
    ids = tokens(8, 33)
    exact = copy.deepcopy(reference).double()(ids)[0]
    theirs = copy.deepcopy(reference).to(getattr(torch, dtype))(ids)[0].double()
    ours = modelrig.load(folder, dtype=dtype)(ids).double()
    error = lambda values: ((values - exact) ** 2).mean().sqrt().item()  # noqa: E731
    assert error(ours) <= 1.2 * error(theirs)


@torch.no_grad()
def test_float64_agrees_to_its_own_precision(tmp_path: Path) -> None:
    reference, ids = write_bert(tmp_path, "BertForMaskedLM").double(), tokens(1, 29)
    expected = reference(ids).logits
    assert (expected - modelrig.load(tmp_path, dtype="float64")(ids)).abs().max().item() <= 1e-12 * expected.abs().max().item()


# ------------------------------------------------------------------------------------------------ storage


@pytest.mark.parametrize("written", ["safetensors", "pytorch_bin"])
@torch.no_grad()
def test_it_is_saved_as_transformers_reads_it(pair: tuple[Any, Path], tmp_path: Path, written: str) -> None:
    reference, folder = pair
    ids = tokens(2, 30)
    modelrig.load(folder).save(tmp_path / "saved", format=written)
    again, info = type(reference).from_pretrained(tmp_path / "saved", dtype=torch.float32, output_loading_info=True)
    left = {name for name in info["missing_keys"] if not name.startswith("cls.seq_relationship")}
    assert set() == left
    assert_close(reference(ids)[0], again.eval()(ids)[0])
    assert_close(reference(ids)[0], modelrig.load(tmp_path / "saved")(ids))
    flag = "tie_word_embeddings"
    assert json.loads((folder / "config.json").read_text())[flag] == json.loads((tmp_path / "saved/config.json").read_text())[flag]


def test_the_planned_bytes_are_those_of_the_module(pair: tuple[Any, Path]) -> None:
    _, folder = pair
    plan = modelrig.plan(folder, dtype="bfloat16", context=50)
    held = {id(one): one.nbytes for one in plan.load().module.parameters()}
    assert sum(held.values()) == sum(line.bytes for line in plan.ledger if line.moment == "steady" and "weights" in line.what)


def test_parameters_have_the_names_that_transformers_gives_them(pair: tuple[Any, Path]) -> None:
    reference, folder = pair
    theirs = {name: list(one.shape) for name, one in reference.named_parameters() if not name.startswith("cls.seq_relationship")}
    assert theirs == {name: list(one.shape) for name, one in modelrig.load(folder).module.named_parameters()}


@torch.no_grad()
def test_shards_pickles_and_16_bits_are_read(pair: tuple[Any, Path], tmp_path: Path) -> None:
    reference, folder = pair
    ids, config = tokens(2, 23), (folder / "config.json").read_text()
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert reference.config.hidden_size < 40 or 1 < len(list((tmp_path / "shards").glob("*.safetensors")))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text(config)
    torch.save(reference.state_dict(), tmp_path / "bin/pytorch_model.bin")
    for stored in ("shards", "bin"):
        assert_close(reference(ids)[0], modelrig.load(tmp_path / stored)(ids))
    half = copy.deepcopy(reference).bfloat16()
    half.save_pretrained(tmp_path / "half")
    assert_close(half.float()(ids)[0], modelrig.load(tmp_path / "half", dtype="float32")(ids))


def test_what_a_pickle_holds_under_two_names_counts_once(tmp_path: Path) -> None:
    reference = write_bert(tmp_path, "BertForMaskedLM")
    (tmp_path / "model.safetensors").unlink()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    facts = modelrig.plan(tmp_path).facts
    ties = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    assert {**ties, "cls.predictions.decoder.bias": "cls.predictions.bias"} == facts.ties


Renamed = Callable[[str], str]


def without_prefix(name: str) -> str:
    return name.removeprefix("bert.")


def with_prefix(name: str) -> str:
    return name if name.startswith(("bert.", "cls.", "classifier.")) else f"bert.{name}"


def legacy(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize("renamed", [without_prefix, with_prefix, legacy], ids=lambda one: one.__name__)
@torch.no_grad()
def test_names_of_all_times_are_read(pair: tuple[Any, Path], tmp_path: Path, renamed: Renamed) -> None:
    reference, folder = pair
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = {renamed(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    start = "" if "embeddings.word_embeddings.weight" in tensors else "bert."
    tensors[f"{start}embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = tokens(2, 30)
    model = modelrig.load(tmp_path)
    assert_close(reference(ids)[0], model(ids))
    model.save(tmp_path / "saved")
    assert_close(reference(ids)[0], type(reference).from_pretrained(tmp_path / "saved").eval()(ids)[0])


def rewritten(folder: Path, into: Path, config: dict[str, Any], change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy with keys of the config and tensors changed; a key whose value is ... is left out."""
    values = json.loads((folder / "config.json").read_text()) | config
    (into / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.mark.parametrize(
    "names",
    [
        ("cls.predictions.decoder.weight",),
        ("cls.predictions.decoder.bias",),
        ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    ],
)
@torch.no_grad()
def test_what_is_stored_apart_is_used_as_stored(tmp_path: Path, names: tuple[str, ...]) -> None:
    import transformers

    write_bert(tmp_path / "tied", "BertForMaskedLM")
    apart = {"cls.predictions.decoder.weight": torch.randn(97, 48), "cls.predictions.decoder.bias": torch.randn(97)}
    folder = rewritten(tmp_path / "tied", tmp_path, {}, lambda stored: stored.update({name: apart[name] for name in names}))
    ids = tokens(2, 9)
    model, reference = modelrig.load(folder), transformers.BertForMaskedLM.from_pretrained(folder).eval()
    assert_close(reference(ids).logits, model(ids))
    model.save(tmp_path / "saved")
    assert_close(reference(ids).logits, transformers.BertForMaskedLM.from_pretrained(tmp_path / "saved").eval()(ids).logits)


@torch.no_grad()
def test_a_bias_may_be_stored_under_its_other_name_only(tmp_path: Path) -> None:
    def rename(stored: dict[str, torch.Tensor]) -> None:
        stored["cls.predictions.decoder.bias"] = stored.pop("cls.predictions.bias")

    reference = write_bert(tmp_path / "first", "BertForMaskedLM")
    folder = rewritten(tmp_path / "first", tmp_path, {}, rename)
    assert_close(reference(tokens(2, 9)).logits, modelrig.load(folder)(tokens(2, 9)))


# ------------------------------------------------------------------------------------------------ heads


@torch.no_grad()
def test_a_pretrained_checkpoint_serves_as_its_base_and_says_what_is_left_out(tmp_path: Path) -> None:
    import transformers

    reference, ids = write_bert(tmp_path / "first", "BertForPreTraining"), tokens(2, 9)
    folder = rewritten(tmp_path / "first", tmp_path, {"architectures": ["BertModel"]}, lambda stored: None)
    model = modelrig.load(folder)
    assert_close(transformers.BertModel.from_pretrained(folder).eval()(ids)[0], model(ids))
    assert_close(reference.bert(ids)[1], model.encode(ids).pooled)
    note = next(note for note in model.plan.notes if "heads" in note)
    assert all(name in note for name in ("cls.predictions.bias", "cls.seq_relationship.weight"))
    assert {"cls.predictions.bias", "cls.seq_relationship.weight"} <= {*model.plan.facts.ignored}
    assert any("cls.seq_relationship.bias" in note for note in modelrig.plan(tmp_path / "first").notes)


@torch.no_grad()
def test_without_architectures_the_stored_tensors_decide(pair: tuple[Any, Path], tmp_path: Path) -> None:
    reference, folder = pair
    ids = tokens(2, 9)
    assert_close(reference(ids)[0], modelrig.load(rewritten(folder, tmp_path, {"architectures": ...}, lambda stored: None))(ids))


@torch.no_grad()
def test_a_base_model_may_be_stored_without_its_pooler(tmp_path: Path) -> None:
    def drop(stored: dict[str, torch.Tensor]) -> None:
        for name in ("pooler.dense.weight", "pooler.dense.bias"):
            del stored[name]

    reference = write_bert(tmp_path / "first")
    found = modelrig.load(rewritten(tmp_path / "first", tmp_path, {}, drop)).encode(tokens(1, 9))
    assert found.pooled is None
    assert_close(reference(tokens(1, 9))[0], found.hidden)


def test_a_classifier_of_texts_needs_its_pooler(tmp_path: Path) -> None:
    write_bert(tmp_path / "first", "BertForSequenceClassification")
    folder = rewritten(tmp_path / "first", tmp_path, {}, lambda stored: stored.pop("bert.pooler.dense.weight"))
    with pytest.raises(LoadError) as caught:
        modelrig.plan(folder)
    assert ("bert.pooler.dense.weight",) == caught.value.missing


# ------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_blocks_and_embeddings_may_stay_on_disk(tmp_path: Path, dtype: str) -> None:
    write_bert(tmp_path, "BertForMaskedLM")
    ids = tokens(2, 20)
    inside = modelrig.load(tmp_path, dtype=dtype)
    with modelrig.load(tmp_path, dtype=dtype, device_map="disk") as outside:
        for _ in range(2):
            assert torch.equal(inside(ids), outside(ids))
            assert torch.equal(inside.encode(ids).hidden, outside.encode(ids).hidden)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_step_is_one_graph(tmp_path: Path, kind: str, attention: str) -> None:
    write_bert(tmp_path, kind)
    model = modelrig.load(tmp_path, attention=attention)
    torch._dynamo.reset()
    compiled = torch.compile(model.step, fullgraph=True, backend="eager")
    for side in (None, "left"):
        ids, mask, _ = padded("left")
        batch = model._batch(ids, None if side is None else mask, types_for(model.plan.facts, *ids.shape))
        given = batch.ids, batch.slots(), False, batch.token_types
        torch.testing.assert_close(model.step(*given), compiled(*given), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ an encoder generates nothing


def test_a_plan_has_neither_cache_nor_decoder_and_says_why(tmp_path: Path) -> None:
    write_bert(tmp_path)
    plan = modelrig.plan(tmp_path)
    assert {"sources", "formats", "architectures", "quantizers", "attention", "compilers"} == {*plan.choices}
    assert {*plan.choices} == {*json.loads(json.dumps(plan.to_json()))["choices"]}
    assert not any("cache" in line.what for line in plan.ledger)
    assert not {row.kind for row in plan.refused} & {"caches", "decoders"}
    assert "has no cache and no decoder" in plan.explain()
    assert plan.summary().startswith(f"{tmp_path}: bert · none · sdpa · none · float32 on cpu")
    assert plan.hash == modelrig.plan(tmp_path, cache=None, decoder="none").hash
    assert plan.hash == modelrig.plan(tmp_path, cache=["static", "auto"], decoder="!sampling").hash


def test_several_gpus_are_planned_for_without_a_cache(tmp_path: Path) -> None:
    write_bert(tmp_path)
    machine = rigs.machine(8 << 30, rigs.gpu(0), rigs.gpu(1))
    plan = make_plan(tmp_path, environment=machine, device_map="balanced")
    assert {"cuda:0", "cuda:1"} == {*plan.device_map.values()}
    assert not any("cache" in line.what for line in plan.ledger)


@pytest.mark.parametrize(
    ("request_", "kinds"),
    [
        ({"cache": "static"}, {"caches"}),
        ({"decoder": "greedy"}, {"decoders"}),
        ({"cache": ["static", "dynamic"], "decoder": "sampling"}, {"caches", "decoders"}),
        ({"set": {"cache.size": 1}}, {"caches"}),
    ],
)
def test_a_cache_or_decoder_that_is_asked_for_is_refused(tmp_path: Path, request_: dict[str, Any], kinds: set[str]) -> None:
    write_bert(tmp_path)
    with pytest.raises(PlanError, match="it generates no text") as caught:
        modelrig.plan(tmp_path, **request_)
    assert ("PN-REFUSED", kinds) == (caught.value.code, {*caught.value.refused})
    assert {"model.generates"} >= {one.code for rows in caught.value.refused.values() for why in rows.values() for one in why}


def test_everything_that_generates_says_that_it_is_an_encoder(tmp_path: Path) -> None:
    write_bert(tmp_path, "BertForMaskedLM")
    model = modelrig.load(tmp_path)
    held = modelrig.load("tiny").new_cache()
    for call in (
        lambda: model.generate([1, 2]),
        lambda: model.generate(messages=[{"role": "user", "content": "x"}]),
        lambda: list(model.stream([1, 2])),
        lambda: model.session(),
        lambda: model.new_cache(),
        lambda: model([[1, 2]], cache=held),
    ):
        with pytest.raises(GenerateError, match="is an encoder: it does not generate text") as caught:
            call()
        assert "GN-MODEL" == caught.value.code


@pytest.mark.parametrize("command", [["run", "{}", "a text"], ["chat", "{}"]])
def test_the_command_line_ends_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    from modelrig.cli import main

    write_bert(tmp_path)
    assert 2 == main([part.format(tmp_path) for part in command])
    out, err = capsys.readouterr()
    assert "" == out
    assert "is an encoder: it does not generate text" in err and "Traceback" not in err
    assert 3 == main(["plan", str(tmp_path), "--cache", "static"])


def test_a_decoder_encodes_nothing() -> None:
    model = modelrig.load("tiny")
    for call in (lambda: model.encode([[1, 2]]), lambda: model.embed("a text")):
        with pytest.raises(GenerateError, match="it is no encoder") as caught:
            call()
        assert "GN-MODEL" == caught.value.code


# ------------------------------------------------------------------------------------------------ positions


def test_no_sequence_is_longer_than_the_table_of_positions(tmp_path: Path) -> None:
    reference = write_bert(tmp_path)
    assert 64 == modelrig.plan(tmp_path).context
    with pytest.raises(PlanError, match="positions for 64") as refused:
        modelrig.plan(tmp_path, context=65)
    assert "PN-CONTEXT" == refused.value.code
    model = modelrig.load(tmp_path, context=10)
    with pytest.raises(GenerateError, match="positions for 64") as caught:
        model(tokens(1, 65))
    assert "GN-CONTEXT" == caught.value.code
    ids, mask = torch.cat((torch.zeros(1, 6, dtype=torch.int64), tokens(1, 64)), dim=1), torch.ones(1, 70, dtype=torch.int64)
    mask[:, :6] = 0
    with torch.no_grad():  # padding takes no position
        assert_close(reference(ids[:, 6:])[0], model(ids, attention_mask=mask)[:, 6:])


def test_a_cache_is_no_longer_than_the_table_of_positions(tmp_path: Path) -> None:
    write_decoder(tmp_path, "GPT2")
    with pytest.raises(PlanError, match="positions for 160"):
        modelrig.plan(tmp_path, context=161)
    model = modelrig.load(tmp_path, context=20)
    assert 160 == model.new_cache(max_len=160).capacity
    for call in (lambda: model.new_cache(max_len=161), lambda: model.session(max_len=161)):
        with pytest.raises(CacheError, match="positions for 160") as caught:
            call()
        assert ("CA-ARGS", "max_len") == (caught.value.code, caught.value.locus)
    with pytest.raises(GenerateError, match="positions for 160"):
        model(tokens(1, 161))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("types", "says"),
    [
        ([[0, 1]], r"shape \[1, 3\]"),
        ([[0, 1, 2]], "2 is no token type: accepted is 0 to 1"),
        ([[0, -1, 0]], "-1 is no token type"),
        ([[0.0, 1.0, 1.0]], "whole numbers"),
        ([[True, False, True]], "whole numbers"),
        ([[0, 1], [0]], "whole numbers"),
        ("types", "whole numbers"),
        ([[1 << 70, 0, 0]], "whole numbers"),
    ],
)
def test_token_types_that_do_not_fit_are_refused(tmp_path: Path, types: Any, says: str) -> None:
    write_bert(tmp_path)
    model = modelrig.load(tmp_path)
    for call in (model, model.encode):
        with pytest.raises(GenerateError, match=says) as caught:
            call([[1, 2, 3]], token_type_ids=types)
        assert ("GN-INPUT", "token_type_ids") == (caught.value.code, caught.value.locus)


@pytest.mark.parametrize(
    ("kind", "changes", "code", "locus"),
    [
        ("BertModel", {"architectures": ["BertForQuestionAnswering"]}, "CF-ENUM", "architectures"),
        ("BertModel", {"architectures": ["BertLMHeadModel"]}, "CF-ENUM", "architectures"),
        ("BertModel", {"architectures": "BertModel"}, "CF-TYPE", "architectures"),
        ("BertModel", {"is_decoder": True}, "CF-ENUM", "is_decoder"),
        ("BertModel", {"add_cross_attention": True}, "CF-ENUM", "add_cross_attention"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "CF-ENUM", "position_embedding_type"),
        ("BertModel", {"num_attention_heads": 7}, "CF-REL", "hidden_size"),
        ("BertModel", {"num_hidden_layers": 2}, "CF-REL", "num_hidden_layers"),
        ("BertModel", {"hidden_act": "gelu_python_code"}, "CF-ENUM", "hidden_act"),
        ("BertModel", {"type_vocab_size": 0}, "CF-RANGE", "type_vocab_size"),
        ("BertForSequenceClassification", {"num_labels": 3}, "CF-REL", "num_labels"),
        ("BertForTokenClassification", {"id2label": {"0": "a", "1": "b", "2": "c"}}, "CF-REL", "id2label"),
        ("BertForTokenClassification", {"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "CF-REL", "id2label"),
        ("BertForQuestionAnswering", {"architectures": None}, "CF-ENUM", "architectures"),
    ],
)
def test_a_config_that_is_not_served_or_contradicts_itself_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], code: str, locus: str
) -> None:
    write_bert(tmp_path, kind)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
        modelrig.plan(tmp_path)
    assert (code, locus) == (caught.value.code, caught.value.locus)


def test_a_config_without_optional_keys_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    import transformers

    usual = transformers.BertConfig()
    write_bert(tmp_path, max_position_embeddings=usual.max_position_embeddings)
    file = tmp_path / "config.json"
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type")
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: stored[key] for key in needed}))
    facts = modelrig.plan(tmp_path).facts
    assert (usual.max_position_embeddings, usual.type_vocab_size) == (facts.position_limit, facts.token_types)
    assert (usual.layer_norm_eps, usual.hidden_act) == (facts.config.layer_norm_eps, facts.config.hidden_act)


def test_names_of_heads_that_are_left_out_are_quoted_and_few(tmp_path: Path) -> None:
    write_bert(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored |= {f"cls.{number}\n  all is well": torch.zeros(1) for number in range(200)}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    [note] = [note for note in modelrig.plan(tmp_path).notes if "heads" in note]
    assert "\n" not in note and "and 190 more" in note
