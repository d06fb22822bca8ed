"""The training loop (`loop`), its parts, and its settings. Imports nothing itself: `settings` must not load torch."""
