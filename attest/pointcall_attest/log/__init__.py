"""The transparency log of one node: tree, tiles, checkpoints, proofs. Pure: bytes in, bytes out.

Spec: RFC 6962, RFC 9162 section 2.1; C2SP tlog-tiles, tlog-checkpoint, signed-note, tlog-proof; docs/spec/log.md.
"""
