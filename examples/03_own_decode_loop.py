"""Decode with a loop of your own: positions and masks are the cache's business.

Shows: new_cache, model(ids, cache), rewind, reset · Needs: torch · Seconds: 3
"""

import torch

import modelrig

model = modelrig.load("tiny", cache="static", dtype="float32")
cache = model.new_cache(batch=1, max_len=64)
prompt = torch.tensor([model.tokenizer.encode("def add(a, b):")])


def decode(ids: torch.Tensor, count: int) -> list[int]:
    """The most likely continuation of what the cache holds and `ids`."""
    tokens = []
    for _ in range(count):
        ids = model(ids, cache=cache)[:, -1:].argmax(-1)  # logits [1, tokens, vocab] → [1, 1]
        tokens.append(int(ids))
    return tokens


first = decode(prompt, 24)
print(model.tokenizer.decode(first))

# Take the last twelve tokens back, and let it say them again.
cache.rewind(cache.length - 12)
again = decode(torch.tensor([first[-13:-12]]), 12)
assert first[-12:] == again

cache.reset()
assert first == decode(prompt, 24)
print(f"{cache.length} of {cache.capacity} slots used, {cache.nbytes:,} bytes")
