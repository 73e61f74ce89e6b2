"""Plan before loading: which parts, why, and how many bytes, without torch and without reading a weight.

Shows: modelrig.plan, explain, choices, refused, the ledger · Needs: nothing · Seconds: 1
"""

import modelrig

plan = modelrig.plan("tiny", cache="static", context=256)
print(plan.explain(), end="\n\n")

for kind, choice in plan.choices.items():
    print(f"{kind:<14} {choice.component:<12} {choice.why}")

for row in plan.refused:
    print(f"not {row.component}: {', '.join(reason.code for reason in row.reasons)}")

print(f"{plan.ledger.total('run', plan.device):,} bytes while generating; the rig is {plan.hash[:12]}")
