"""What drafts that are looked up bring, by how much a text copies from its prompt.

    python -m benchmarks.drafting [--shape 1.1B] [--repeats 5] [--tokens 192]

The weights are random, so the text is prescribed: of the logits that a step gave, the largest is put where a text of our choice has
it. Every step costs what it costs, and drafts are right where the text repeats itself. Texts: `copy` is a part of the prompt again;
`edit` the prompt with every twelfth token another; `code` is a file of Python's library after the beginning of the same file;
`random` has random tokens, which nothing foretells. Plain decoding has the same prescription.
"""

from __future__ import annotations

import argparse

from benchmarks.common import child, llama_checkpoint, median, table, write

CODE = """
import sys, json, random, inspect, argparse as source
path, decoder, kind, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
import modelrig
model = modelrig.load(path, cache="static", context=1024, decoder=decoder)
tiny = modelrig.load("tiny")
code = tiny.tokenizer.encode(inspect.getsource(source))[1000:]
choose = random.Random(1)
noise = [choose.randrange(3, 4000) for _ in range(4096)]
prompt, text = {
    "copy": (code[:256], code[64 : 64 + tokens]),
    "edit": (code[:256], [choose.randrange(3, 4000) if place % 12 == 11 else token for place, token in enumerate(code[:tokens])]),
    "code": (code[:256], code[256 : 256 + tokens]),
    "random": (noise[:256], noise[256 : 256 + tokens]),
}[kind]
whole, step = prompt + text, model.step
def prescribed(ids, slots, last_only=False):
    logits = step(ids, slots, last_only)
    following = [whole[min(place + 1, len(whole) - 1)] for place in slots.index.tolist()][-logits.shape[1] :]
    for place, token in enumerate(following):
        logits[:, place, token] = 1e4
    return logits
model._step = prescribed
def run(): return model.generate(prompt, max_new_tokens=tokens, ignore_eos=True)
run()
found = [run() for _ in range(2)]
assert list(found[0].tokens) == text[:tokens]
stats = max((one.stats for one in found), key=lambda stats: stats.tokens_per_second)
print(json.dumps({"rate": stats.tokens_per_second, "steps": stats.steps, "accepted": stats.accepted_tokens,
                  "drafted": stats.drafted_tokens}))
"""
KINDS = ("copy", "edit", "code", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1.1B", "135M"), action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=192)
    arguments = parser.parse_args()
    figures = {}
    for shape in arguments.shape or ("1.1B", "135M"):
        path = str(llama_checkpoint(shape))
        rows: dict[str, dict[str, list[dict]]] = {kind: {"greedy": [], "prompt_lookup": []} for kind in KINDS}
        for _ in range(arguments.repeats):
            for kind, of_decoder in rows.items():
                for decoder, found in of_decoder.items():
                    found.append(child(CODE, path, decoder, kind, str(arguments.tokens)))
        figures[shape] = {
            kind: {
                "plain": round(median(row["greedy"], "rate"), 2),
                "drafting": round(median(row["prompt_lookup"], "rate"), 2),
                "ratio": round(median(row["prompt_lookup"], "rate") / median(row["greedy"], "rate"), 2),
                "steps": median(row["prompt_lookup"], "steps"),
                "accepted": median(row["prompt_lookup"], "accepted"),
                "drafted": median(row["prompt_lookup"], "drafted"),
            }
            for kind, row in rows.items()
        }
        print(f"\n{shape}, bf16, {arguments.tokens} tokens\n")
        columns = ["plain", "drafting", "ratio", "steps", "accepted", "drafted"]
        header = ["text", "plain, tokens/s", "prompt_lookup, tokens/s", "×", "steps", "drafts accepted", "of"]
        print(table(header, [[kind, *(row[column] for column in columns)] for kind, row in figures[shape].items()]), flush=True)
    write("drafting", {"repeats": arguments.repeats, "tokens": arguments.tokens, "shapes": figures})


if __name__ == "__main__":
    main()
