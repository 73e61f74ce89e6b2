"""Prompts of different lengths in one batch, greedy and sampled; a row gets what it would get alone.

Shows: lists of prompts, temperature, top_p, seeds, num_return_sequences · Needs: torch · Seconds: 3
"""

import modelrig

model = modelrig.load("tiny", dtype="float32", batch=3)
prompts = ["def add(a, b):", "class Queue:\n    def __init__(self):", "import os"]

together = model.generate(prompts, max_new_tokens=16)
alone = [model.generate(prompt, max_new_tokens=16) for prompt in prompts]
assert [one.tokens for one in alone] == [one.tokens for one in together]

# One seed per prompt: each row draws the same tokens in any company.
options = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 16}
drawn = model.generate(prompts, seed=[1, 2, 3], **options)
assert drawn[2].tokens == model.generate(prompts[2], seed=3, **options).tokens

for number, out in enumerate(model.generate("for ", num_return_sequences=3, seed=0, **options)):
    print(number, repr(out.text))
