"""What was asked for and cannot be is an error with a code, reasons and a way out; nothing is swapped silently.

Shows: error classes, codes, hints, refused parts · Needs: nothing · Seconds: 1
"""

import modelrig
from modelrig import errors

requests = {
    "a misspelt component": {"cache": "statc"},
    "a misspelt key": {"cahce": "static"},
    "a device that is not there": {"device_map": "cuda:99"},
    "too little memory": {"max_memory": "5MB"},
}

for what, request in requests.items():
    try:
        modelrig.plan("tiny", **request)
    except errors.ModelrigError as error:
        print(f"{what}: {type(error).__name__} {error.code}, exit code {error.exit_code}\n  {error.reason}")
        if error.hint:
            print(f"  {error.hint}")

# A program can ask, instead of catching: every part that was not chosen keeps all its reasons.
plan = modelrig.plan("tiny")
print({row.component: [reason.code for reason in row.reasons] for row in plan.refused})
