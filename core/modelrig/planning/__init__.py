"""From a reference and a request to a plan, without torch and without reading a weight.

    plan = make_plan("tiny", attention="eager")
    print(plan.explain())

`environment` and `request` gather what is known, `identify` what the checkpoint is; `needs`, `rules`, `solver` and `negotiation`
choose the parts; `placement`, `ledger` and `memory` the place and the bytes; `plan` holds the result and `pipeline` is the whole
way on one page.
"""
