"""What tokenizer_config.json adds to tokenizer.json: tokens, and which of them are special.

As transformers does it: entries of `added_tokens_decoder` that the tokenizer does not have are added; tokens with a name
(`eos_token`) and extra ones are special, so that text is never split within them. What is put around a text is for tokenizer.json
alone to say. Other than there, a token gets no id that nobody gave it: one that is neither in the vocabulary nor in
`added_tokens_decoder` under the next free id has no row in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelrig.errors import TokenizerError, quoted

if TYPE_CHECKING:
    import tokenizers

    from modelrig.generation.special_tokens import SpecialTokens

SWITCHES = ("lstrip", "rstrip", "normalized", "single_word")


def complete(rust: tokenizers.Tokenizer, special: SpecialTokens, vocab_size: int, path: Path) -> None:
    """Change `rust`, read from `path`, as tokenizer_config.json says, for a model with `vocab_size` logits.

    Raises:
        TokenizerError: TK-VOCAB where a token would get another id than it is to have.
    """
    from tokenizers import AddedToken

    free = rust.get_vocab_size(with_added_tokens=True)
    tokens: dict[str, tuple[int, AddedToken]] = {}
    for number, entry in sorted(special.added.items()):
        content, is_special = entry["content"], entry.get("special") is True
        found = rust.token_to_id(content)
        is_next = found is None and number == free < vocab_size
        if content not in tokens and (is_next or found == number):  # else the files disagree, and tokenizer.json is right
            switches = {"normalized": not is_special, **dict(_switches(entry))}
            tokens[content] = number, AddedToken(content, special=is_special, **switches)
            free += is_next
    rust.add_tokens([token for _, token in tokens.values()])
    for content, (number, _) in tokens.items():
        if (found := rust.token_to_id(content)) != number:
            reason = f"{quoted(content)} of added_tokens_decoder is to have id {number}, but would get {found}: ids have gaps here"
            raise TokenizerError("TK-VOCAB", reason, path=path)
    known = {token.content for token in rust.get_added_tokens_decoder().values() if token.special}
    named = [text for text in dict.fromkeys((*special.tokens.values(), *special.extra)) if text and text not in known]
    made = [AddedToken(text, special=True, normalized=False) for text in named if rust.token_to_id(text) is not None]
    rust.add_special_tokens(made)


def _switches(entry: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    for name in SWITCHES:
        if isinstance(entry.get(name), bool):
            yield name, entry[name]
