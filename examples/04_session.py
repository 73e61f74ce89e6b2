"""Go on where the last turn ended: a session prefills only what its cache does not hold yet.

Shows: session.generate, session.send, chat templates, stats · Needs: torch · Seconds: 3
"""

import modelrig

model = modelrig.load("tiny")

session = model.session()
for text in ("import os\n\ndef main(", "):\n    return ", "\n\nclass "):
    turn = session.generate(text, max_new_tokens=16)
    print(f"{turn.stats.prompt_tokens:>3} tokens read, {len(session.tokens):>3} in the conversation: {turn.text!r}")

# Messages go through the model's chat template. (tiny was trained on code only, so do not expect an answer.)
chat = model.session()
for question in ("Write a stack.", "Now a queue."):
    answer = chat.send(question, max_new_tokens=16)
    print(f"{answer.stats.prompt_tokens:>3} tokens read: {answer.text!r}")
print([message["role"] for message in chat.messages])
