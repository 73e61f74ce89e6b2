"""Choose the whole rig in a file, and see where each value came from.

Shows: modelrig.toml, precedence, origins, ordered wishes · Needs: nothing · Seconds: 1
"""

import os
import tempfile
from pathlib import Path

import modelrig

CONFIG = """
attention = ["flash_attention_2", "eager"]   # the first that fits
cache = "static"
context = 512

[quantizer]
name = "none"
kernel = "mv"
"""

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "rig.toml")
    file.write_text(CONFIG)
    os.environ["MODELRIG_CONTEXT"] = "256"  # a variable wins over the file, an argument over both
    try:
        plan = modelrig.plan("tiny", config=file, dtype="float32")
    finally:
        del os.environ["MODELRIG_CONTEXT"]

for key, entry in plan.request.to_json().items():
    print(f"{key:<12} {entry['value']!s:<32} {Path(entry['origin']).name}")

assert plan.choices["attention"].component == "eager"
assert (plan.context, plan.dtype) == (256, "float32")
