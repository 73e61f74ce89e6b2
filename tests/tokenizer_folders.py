"""Small tokenizers of every family, as checkpoint folders."""

import json
import string
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "for name in sorted(names):\n    print(f'{name!r}: {len(name)}')\n",
    "The quick brown fox — über señor 漢字 😀 jumps; over the lazy dog's back.",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(corpus: list[str] = CORPUS) -> tokenizers.Tokenizer:
    """GPT-2's family: a trained byte-level BPE with special tokens and one added token that is not special."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(corpus, trainer)
    made.add_tokens(["<tool call>", "漢x"])
    made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[(SPECIAL[0], 0)])
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama 2's family: spaces as ▁, bytes for characters outside the vocabulary, a leading space dropped."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁▁",
        *string.ascii_lowercase,
        "▁a",
        "ab",
        "é",
    ]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("a", "b"), ("▁", "▁")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def metaspace() -> tokenizers.Tokenizer:
    """T5's family: unigrams with ▁ at the beginning of words."""
    pieces = ["<unk>", "</s>", "▁", "▁the", "▁a", "the", "▁▁x", *string.ascii_lowercase, "é", ""]
    made = tokenizers.Tokenizer(
        models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0, byte_fallback=False)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    return made


def word_piece() -> tokenizers.Tokenizer:
    """BERT's family: pieces within a word begin with ##, punctuation is drawn to the word before."""
    pieces = ["[UNK]", "[CLS]", "the", "##s", "##", "a", ".", ",", "'", "do", "n't", "not", "##'m", "é"]
    made = tokenizers.Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    made.add_special_tokens(["[CLS]"])
    return made


def word_ends() -> tokenizers.Tokenizer:
    """GPT-1's family: the end of a word is marked."""
    pieces = ["<unk>", "a", "b", "a</w>", "b</w>", "ab</w>", "</w>", ".</w>", "é"]
    made = tokenizers.Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", end_of_word_suffix="</w>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    return made


def plain_words() -> tokenizers.Tokenizer:
    """No decoder at all: words with spaces between them."""
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def across_tokens() -> tokenizers.Tokenizer:
    """A decoder that cannot be followed token by token: it replaces text that spans tokens."""
    made = plain_words()
    made.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "!")])
    return made


FAMILIES = {
    made.__name__: made for made in (byte_level, byte_fallback, metaspace, word_piece, word_ends, plain_words, across_tokens)
}


def write(root: Path, tokenizer: tokenizers.Tokenizer | str, **files: dict | str) -> Path:
    """A folder with `tokenizer.json` and further files; `_` in a keyword stands for itself, `__` for a dot."""
    (root / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str(), encoding="utf-8")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return root
