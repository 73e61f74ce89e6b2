"""A cache in your own hands: one conversation over several calls, begun anew, and not harmed by a call that does not fit.

Shows: new_cache, generate(cache=), rewind, reset, errors that leave the cache usable · Needs: torch · Seconds: 3
"""

import modelrig
from modelrig import errors

model = modelrig.load("tiny", cache="static", dtype="float32")
encode = model.tokenizer.encode
turns = ["class Stack:\n    def push(", "\n    def pop(", "\n    def __len__("]

cache = model.new_cache(batch=1, max_len=80)
said: list[int] = []  # everything so far, to compare with
for text in turns:
    # What follows a text begins without special tokens; `generate` knows that from the cache.
    said += encode(text, add_special_tokens=not said)
    out = model.generate(text, cache=cache, max_new_tokens=8)
    assert out.tokens == model.generate(said, max_new_tokens=8).tokens  # as if all were read anew
    said += out.tokens
    assert cache.length == len(said)  # the answer is in it too, its last token included
    print(f"{out.stats.prompt_tokens:>2} tokens read, {cache.length} held: {out.text!r}")

# More than it has room for is an error that says so, and changes nothing.
held = cache.length
for attempt in (
    lambda: model.generate("x", cache=cache, max_new_tokens=500),
    lambda: model([said + said], cache=cache),
):
    try:
        attempt()
    except (errors.GenerateError, errors.CacheError) as error:
        print(f"{error.code}: {error.reason}")
    else:
        raise AssertionError("it did not fit")
    assert cache.length == held
cache.rewind(held - 4)
assert model.generate(said[-4:], cache=cache, max_new_tokens=4).tokens == model.generate(said, max_new_tokens=4).tokens

cache.reset()
first = model.generate(turns[0], cache=cache, max_new_tokens=8)
assert first.tokens == model.generate(turns[0], max_new_tokens=8).tokens
