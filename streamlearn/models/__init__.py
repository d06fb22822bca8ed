"""Networks from raw samples to logits: the built-in ones, and any other by import path."""
