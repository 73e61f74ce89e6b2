"""Decode with a compiled step of your own on a cache of a fixed size: compiled once, then token by token.

The prompts are padded on the left, so the last column is every row's last token. Where a token lies and what position it has is the
cache's business: there is no `cache_position` to count, and so none to be off by one.

Shows: model.step, begin, commit, torch.compile(fullgraph=True), padding · Needs: torch · Seconds: 20
"""

import torch

import modelrig

PROMPTS = ["def add(a, b):", "class Queue:\n    def __init__(self):"]
NEW = 24
BACKEND = "aot_eager"  # what traces like "inductor"; that one also makes faster code, and needs a C++ compiler

model = modelrig.load("tiny", cache="static", dtype="float32", batch=2)
rows = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
longest = max(map(len, rows))
padding = [longest - len(row) for row in rows]
ids = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])

graphs = 0


def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
    """BACKEND, counting what it is asked to compile."""
    global graphs
    graphs += 1
    return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


step = torch.compile(model.step, backend=backend, fullgraph=True)
cache = model.new_cache(batch=2, max_len=longest + NEW, padding=padding)


def feed(step: object, ids: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row after `ids` [2, n], which the cache then holds: [2, 1]."""
    logits = step(ids, cache.begin(ids.shape[1]))  # [2, n, vocab]
    cache.commit(ids.shape[1])
    return logits[:, -1:].argmax(-1)


with torch.no_grad():
    token = feed(model.step, ids)  # the prompt, whose length changes from call to call, is not worth a graph
    answer = [token]
    while len(answer) < NEW:
        token = feed(step, token)  # lands in the slot right after the last one: no slot stays empty
        answer.append(token)

tokens = torch.cat(answer, dim=1).tolist()
expected = [one.tokens for one in model.generate(PROMPTS, max_new_tokens=NEW, ignore_eos=True)]
assert expected == [tuple(row) for row in tokens]
assert cache.length == longest + NEW - 1 and graphs == 1
print(f"{graphs} graph for {NEW - 1} steps: {model.tokenizer.decode(tokens[0])!r}")
