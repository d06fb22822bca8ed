"""Networks from raw samples to logits: built-in ones, and any other by import path."""
