"""Load a model and print its text as it is made.

Shows: load, stream, generate, statistics · Needs: torch · Seconds: 3
"""

import modelrig

with modelrig.load("tiny", progress=True) as model:
    for piece in model.stream("class Queue:\n", max_new_tokens=48):
        print(piece.text, end="", flush=True)
    print()

    out = model.generate("def add(a, b):", max_new_tokens=32, stop=["\n\n"])
    print(f"{out.text!r} ended by {out.finish_reason}")
    speed, weights = out.stats.tokens_per_second, model.memory()["weights"]
    print(f"{out.stats.new_tokens} tokens, {speed:.0f} per second, {weights:,} bytes of weights")
