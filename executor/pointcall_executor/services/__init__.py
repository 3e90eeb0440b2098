"""Declared services, of every kind, behind one protocol: started, frozen, destroyed, adopted, never patched.

managed.py says what a service can be asked, declared.py holds those of one manifest. process.py is the embedded
supervisor; spawner.py the small process that starts its services and ends leases, spawning.py the executor's end of it.
systemd.py, container.py and kubernetes.py ask whoever runs the others.
Trust: the declaration's digest is in the signed manifest; what it names is checked by digest before every start.
Spec: docs/spec/service.md.
"""
