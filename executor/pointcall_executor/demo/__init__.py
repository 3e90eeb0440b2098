"""The demo: one real incident through the whole loop on loopback, told as a timeline. `pointcall demo`.

story.py acts, narration.py prints; service.py and client.py are the programs whose dependency fails. Nothing here is
a mock: the story drives the same executor, kernel programs, verifier and log as a production node. Without root or BPF
it runs on recorded events (recorded.py) and says so in every step.
"""
