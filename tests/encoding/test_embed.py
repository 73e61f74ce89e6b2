"""`model.embed` gives what the same folder gives by transformers: its tokenizer, the states' mean, their length made 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import modelrig
from checkpoints import assert_close, write_bert
from modelrig.encoding import encoder
from modelrig.errors import ConfigError, GenerateError, TokenizerError

TOPICS = {
    "the {} {} the {} on the street": (("quick", "old", "red"), ("bus", "tram", "car"), ("passes", "overtakes")),
    "a {} {} eats {} in the garden": (("small", "grey", "young"), ("cat", "bird", "dog"), ("seeds", "fish", "bread")),
    "she {} the {} on her {}": (("plays", "hears", "writes"), ("song", "tune"), ("piano", "violin", "guitar")),
    "we {} the {} with {} today": (("cook", "bake", "boil"), ("soup", "cake", "rice"), ("salt", "sugar", "butter")),
}
TEXTS = ["The red tram passes the old car!", "a grey bird eats bread", "", "she plays", "ünknown wörds, 漢字 and " + "salt " * 40]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
STEPS = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def sentences() -> list[list[str]]:
    """Of each topic."""
    found = []
    for pattern, words in TOPICS.items():
        found.append([pattern])
        for choices in words:
            found[-1] = [text.replace("{}", word, 1) for text in found[-1] for word in choices]
    return found


def write_tokenizer(folder: Path, texts: list[str]) -> int:
    """A WordPiece tokenizer of these texts, as BERT's; returns the number of its tokens."""
    import tokenizers
    import transformers
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    rust = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    rust.normalizer, rust.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    rust.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=160, special_tokens=special))
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, model_max_length=48, **names)
    wrapped.save_pretrained(folder)
    return rust.get_vocab_size()


def train(model: Any, tokenizer: Any) -> None:
    """Texts of one topic come together, those of others apart."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    topics = sentences()
    for _ in range(40):
        pairs = [[texts[place] for place in torch.randint(len(texts), (2,), generator=generator).tolist()] for texts in topics]
        first, second = (reference_embed(model, tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
        loss = F.cross_entropy(first @ second.T * 10, torch.arange(len(topics)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def reference_embed(model: Any, tokenizer: Any, texts: list[str], max_length: int = 24, *, normalize: bool = True) -> Tensor:
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return F.normalize(mean, dim=1) if normalize else mean


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(the folder, transformers' model and tokenizer)"""
    import transformers

    folder = tmp_path_factory.mktemp("sentences")
    vocabulary = write_tokenizer(folder, [text for texts in sentences() for text in texts])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=vocabulary, max_position_embeddings=48, **sizes)
    model = transformers.BertModel(config).eval()
    train(model, tokenizer)
    model.save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(STEPS))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(POOLING))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    return folder, model, tokenizer


Edited = Callable[..., Path]


@pytest.fixture
def edited(trained: tuple[Path, Any, Any], tmp_path: Path) -> Edited:
    """`edited(("1_Pooling/config.json", {...}))`: a copy with files replaced, or without those whose content is None."""

    def edit(*files: tuple[str, Any]) -> Path:
        shutil.copytree(trained[0], tmp_path / "edited")
        for name, content in files:
            if content is None:
                (tmp_path / "edited" / name).unlink()
            else:
                (tmp_path / "edited" / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "edited"

    return edit


# ------------------------------------------------------------------------------------------------ numbers


@torch.no_grad()
def test_it_is_the_pipeline_of_transformers(trained: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reference, tokenizer = trained
    model = modelrig.load(folder)
    expected = reference_embed(reference, tokenizer, TEXTS)
    assert_close(expected, model.embed(TEXTS))
    monkeypatch.setattr(encoder, "TOKENS_AT_ONCE", 30)  # batches of one or two
    assert_close(expected, model.embed(tuple(TEXTS)))
    assert_close(expected[:1], model.embed(TEXTS[0]))
    assert ((0, 32), torch.float32) == ((empty := model.embed([])).shape, empty.dtype)


@torch.no_grad()
def test_what_was_learned_is_found_again(trained: tuple[Path, Any, Any]) -> None:
    topics = sentences()
    found = modelrig.load(trained[0]).embed([text for texts in topics for text in texts[:5]])
    alike = found @ found.T
    same = torch.block_diag(*[torch.ones(5, 5, dtype=torch.bool)] * len(topics)).bool()
    assert alike[same].min() > alike[~same].max()


@torch.no_grad()
def test_arguments_come_before_the_files(trained: tuple[Path, Any, Any]) -> None:
    folder, reference, tokenizer = trained
    model = modelrig.load(folder)
    plain = reference_embed(reference, tokenizer, TEXTS, normalize=False)
    assert_close(plain, model.embed(TEXTS, normalize=False))
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
    hidden, mask = reference(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
    assert_close(hidden[:, 0], model.embed(TEXTS, normalize=False, pooling="cls"))
    largest = hidden.masked_fill(mask == 0, -1e9).amax(1)
    assert_close(largest, model.embed(TEXTS, normalize=False, pooling="max"))
    assert_close(F.normalize(largest, dim=1), model.embed(TEXTS, pooling="max"))


@torch.no_grad()
def test_without_files_the_mean_of_as_many_tokens_as_the_tokenizer_says(trained: tuple[Path, Any, Any], edited: Edited) -> None:
    _, reference, tokenizer = trained
    folder = edited(("modules.json", None))
    assert_close(reference_embed(reference, tokenizer, TEXTS, 48, normalize=False), modelrig.load(folder).embed(TEXTS))
    assert_close(reference_embed(reference, tokenizer, TEXTS, 7, normalize=False), modelrig.load(folder, context=7).embed(TEXTS))


@torch.no_grad()
@pytest.mark.parametrize("asked", ["mean", "cls", "max", ["max", "mean"]])
def test_the_newer_spelling_of_poolings_is_read(edited: Edited, asked: Any) -> None:
    newer = {"embedding_dimension": 32, "pooling_mode": asked, "include_prompt": True}
    model = modelrig.load(edited(("1_Pooling/config.json", newer), ("modules.json", STEPS[:2])))
    parts = [model.embed(TEXTS, pooling=name) for name in ([asked] if isinstance(asked, str) else asked)]
    assert torch.equal(torch.cat(parts, dim=1), model.embed(TEXTS))


def test_several_poolings_stand_side_by_side(edited: Edited) -> None:
    both = POOLING | {"pooling_mode_cls_token": True, "include_prompt": True}
    model = modelrig.load(edited(("1_Pooling/config.json", both), ("modules.json", STEPS[:2])))
    parts = [model.embed(TEXTS, pooling=pooling) for pooling in ("cls", "mean")]
    assert_close(torch.cat(parts, dim=1), model.embed(TEXTS))


@torch.no_grad()
def test_a_prompt_and_small_letters(trained: tuple[Path, Any, Any], edited: Edited) -> None:
    _, reference, tokenizer = trained
    prompts = {"prompts": {"query": "she plays: ", "document": ""}, "default_prompt_name": "query"}
    lengths = {"max_seq_length": None, "do_lower_case": True}
    folder = edited(("config_sentence_transformers.json", prompts), ("sentence_bert_config.json", lengths))
    texts = [f"she plays: {text.lower()}" for text in TEXTS]
    assert_close(reference_embed(reference, tokenizer, texts, 48), modelrig.load(folder).embed(TEXTS))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("file", "content", "code", "locus"),
    [
        ("modules.json", {"a": 1}, "CF-TYPE", None),
        ("modules.json", ["Transformer"], "CF-TYPE", None),
        ("modules.json", "[{]", "CF-JSON", None),
        ("modules.json", [{"type": "Transformer"}], "CF-MISSING", "[0].path"),
        ("modules.json", STEPS[:1], "CF-ENUM", "type"),
        ("modules.json", [*STEPS[:2], {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}], "CF-ENUM", "type"),
        ("modules.json", [STEPS[0] | {"path": "0_Transformer"}, *STEPS[1:]], "CF-ENUM", "[0].path"),
        ("modules.json", [STEPS[0], STEPS[1] | {"path": "../1_Pooling"}], "CF-ENUM", "[1].path"),
        ("modules.json", [STEPS[0], STEPS[1] | {"path": "3_Pooling"}], "CF-MISSING", None),
        ("1_Pooling/config.json", {}, "CF-MISSING", "pooling_mode_mean_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "CF-ENUM", "pooling_mode"),
        ("1_Pooling/config.json", {"pooling_mode": []}, "CF-MISSING", "pooling_mode"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "embedding_dimension": 31}, "CF-REL", "embedding_dimension"),
        ("1_Pooling/config.json", POOLING | {"pooling_mode_lasttoken": True}, "CF-ENUM", "pooling_mode_lasttoken"),
        ("1_Pooling/config.json", POOLING | {"pooling_mode_mean_tokens": 1}, "CF-TYPE", "pooling_mode_mean_tokens"),
        ("1_Pooling/config.json", POOLING | {"word_embedding_dimension": 64}, "CF-REL", "word_embedding_dimension"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "CF-RANGE", "max_seq_length"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x", "prompts": {}}, "CF-REL", "default_prompt_name"),
    ],
)
def test_files_that_are_wrong_or_not_served_are_refused(
    edited: Edited, file: str, content: Any, code: str, locus: str | None
) -> None:
    model = modelrig.load(edited((file, content)))
    with pytest.raises(ConfigError) as caught:
        model.embed("a text")
    assert (code, locus) == (caught.value.code, caught.value.locus)
    assert "3_Pooling" in caught.value.path or caught.value.path.endswith(file)


def test_a_prompt_that_is_left_out_of_the_mean_is_refused(edited: Edited) -> None:
    prompts = {"default_prompt_name": "x", "prompts": {"x": "she "}}
    folder = edited(("config_sentence_transformers.json", prompts), ("1_Pooling/config.json", POOLING | {"include_prompt": False}))
    with pytest.raises(ConfigError, match="include_prompt"):
        modelrig.load(folder).embed("plays")


@pytest.mark.parametrize(
    ("texts", "given", "code"),
    [
        (3, {}, "GN-INPUT"),
        (["a", 3], {}, "GN-INPUT"),
        ({"a": 1}, {}, "GN-INPUT"),
        (b"a", {}, "GN-INPUT"),
        ("a", {"pooling": "median"}, "GN-ARGS"),
        ("a", {"normalize": 1}, "GN-ARGS"),
    ],
)
def test_arguments_that_are_none_are_refused(trained: tuple[Path, Any, Any], texts: Any, given: dict[str, Any], code: str) -> None:
    with pytest.raises(GenerateError) as caught:
        modelrig.load(trained[0]).embed(texts, **given)
    assert code == caught.value.code


def test_a_text_without_tokens_is_refused(edited: Edited) -> None:
    folder = edited()
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    with pytest.raises(GenerateError, match="text 1 has no tokens"):
        modelrig.load(folder).embed(["she", ""])


def test_a_text_needs_a_tokenizer_and_room_for_special_tokens(trained: tuple[Path, Any, Any], tmp_path: Path) -> None:
    write_bert(tmp_path)
    with pytest.raises(GenerateError) as without:
        modelrig.load(tmp_path).embed("a text")
    assert "GN-TOKENIZER" == without.value.code
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    with pytest.raises(TokenizerError, match="WordPiece") as other:
        modelrig.load(tmp_path).embed("a text")
    assert "TK-MISSING" == other.value.code
    with pytest.raises(TokenizerError) as no_room:
        modelrig.load(trained[0], context=1).embed("a text")
    assert "TK-LIMIT" == no_room.value.code
    with pytest.raises(TokenizerError, match="surrogate"):
        modelrig.load(trained[0]).embed("\ud800")
