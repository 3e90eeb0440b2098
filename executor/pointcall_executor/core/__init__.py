"""The pure core: (state, input) -> (state, effects). No clock, no file, no thread, no logger.

event.py reads kernel records, trigger.py turns them into vocabulary events with facts, guard.py permits or refuses,
step.py is the life of a run. The shell around it is runs.py.
"""
