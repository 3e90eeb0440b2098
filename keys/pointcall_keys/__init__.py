"""Who may sign, and how: Sigstore signing, long-lived keys, epoch keys, the private instance, assembling a manifest.

Import from the modules: `assemble`, `signer`, `long_lived`, `node`, `private_sigstore`. Nothing here verifies; that is
the room `attest`. The sigstore library is imported only when something is signed.
"""
