"""A cache of a fixed size, by a flag: its buffers stay where they are from call to call, as compiled steps need it.

Shows: cache="static", context, model.memory · Needs: torch · Seconds: 3
"""

import modelrig

PROMPT = "class Queue:\n"

model = modelrig.load("tiny", cache="static", context=256, dtype="float32")
out = model.generate(PROMPT, max_new_tokens=32)
print(out.text)

# The plan knew its bytes, and a second call, shorter or longer, uses the same buffers.
planned = sum(line.bytes for line in model.plan.ledger if line.what == "key/value cache")
assert planned == model.memory()["cache"]
assert out.text == model.generate(PROMPT, max_new_tokens=32).text
model.generate("import os\n", max_new_tokens=100)
assert planned == model.memory()["cache"]

# Which cache serves changes no token.
growing = modelrig.load("tiny", cache="dynamic", context=256, dtype="float32")
assert out.tokens == growing.generate(PROMPT, max_new_tokens=32).tokens
print(f"{planned:,} bytes for {model.plan.context} tokens, whatever is asked of it")
