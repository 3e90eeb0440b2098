"""The demo's dependency: accepts on loopback and answers "ok". Deliberately ordinary; started from its declaration.

On SIGUSR1 it takes memory until the kernel's out-of-memory killer ends it: the demo's second incident.
usage: python -I -S service.py PORT
"""

import signal
import socket
import sys

CHUNK_BYTES = 4 << 20


def take_memory(_signal: int, _frame: object) -> None:
    held = []
    while True:
        held.append(bytearray(b"\1") * CHUNK_BYTES)


def main() -> None:
    signal.signal(signal.SIGUSR1, take_memory)
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=128)
    while True:
        connection, _peer = listener.accept()
        with connection:
            connection.sendall(b"ok\n")


if __name__ == "__main__":
    main()
