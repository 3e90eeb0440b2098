"""The full-screen view of one node. `picture` says what to show (pure), `view` shows it (textual)."""
