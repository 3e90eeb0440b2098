"""The kernel side of the executor: load blobs, read rings, command circuits. No decision is made here.

The doors: `blob.Blob`, `breaker.BreakerSensor`, `lifecycle.LifecycleSensor`, `storage.StorageSensor`,
`transport.TransportSensor`, `syscalls.SyscallSensor`, `pressure.PressureTrigger`, `connections.ConnectionKiller`,
`drill.DrillInjector`, `cgroup.Cgroup`, `probe.probe`. Everything else is imported inside the room only.
Spec: docs/spec/kernel-abi.md.
"""
