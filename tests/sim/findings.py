"""What the simulation has found in the executor and what is not yet repaired: counted in a run instead of failing it.

`python -m tests.sim --strict` fails on them. An entry leaves this list together with its `xfail` in test_findings.py.
"""

from __future__ import annotations

FINDINGS = {
    "begins-after-disarm": "an action whose intent was on its way to the disk begins although disarm() has returned",
    "begins-after-pause": "an action that was decided before a pause begins after pause() has returned",
    "acts-after-journal-failure": "a failed journal that only a caller saw does not stop the loop at once",
    "loss-uncounted": "what sensors lost since the last tick is not counted when they are taken off",
    "loss-counted-twice": "what a pinned breaker lost is counted again when it is taken up again",
    "flap-forgets": "recreations older than an hour no longer count, although the service never recovered",
    "undo-outside-quiet": "what a failed arming puts back is put back while runbooks decide again",
    "close-cuts-off": "close() gives up on an action of more than two minutes, and its run has no receipt",
    "arm-during-close": "an arming that waits for another one goes on while the executor closes",
    "guard-forgets": "limits, flapping and a pause are forgotten when the executor starts again",
    "radius-forgets": "circuits that a pinned breaker holds open are not counted after a restart",
    "reconcile-window": "an intent is not closed at the next start if its name or its like is older than 4096 entries",
    "lease-unrecorded": "a kernel lease whose entry a crash prevented is in no log",
    "cut-off-unreported": "a run without intents that a crash cut off is in no log",
}
KNOWN = frozenset(FINDINGS)
