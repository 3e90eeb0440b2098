"""What acts: the executor on each node, its kernel side, its API and the `pointcall` command.

The door is `daemon.Executor`. Everything below it is internal to this room.
"""

from typing import Final

VERSION: Final = "0.1.0"
