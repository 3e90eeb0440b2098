"""What an agent can do: read runs, and propose runbooks. Nothing here can act.

The import contract in pyproject.toml holds that no path leads from this room to actions, kernel, the Wasm runner or
the daemon. A proposal is data: it is compiled and simulated in a short-lived child process (check.py), stored in an
inbox (inbox.py) and leaves as a patch for people to review (patch.py).

Trust: nothing that arrives here is trusted, and nothing that is stored here is ever armed. Who can write to the inbox
can make a person read a text; the person's merge and the signer's identity decide what runs.
"""
