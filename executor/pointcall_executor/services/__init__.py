"""Declared services of kind `process`: the embedded supervisor.

spawner.py is a tiny single-threaded process that forks and executes; process.py verifies a declaration, starts, stops
and destroys a service through it; listening.py asks the kernel whether somebody accepts on a port.
Trust: the declaration's digest is in the signed manifest; the files it names are checked by digest before every start.
"""
