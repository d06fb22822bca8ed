"""Seeds of a step: all randomness of step t is a function of (seed, t), so no random state is saved."""

from __future__ import annotations

import torch

_NOISE, _DROPOUT = 1, 2
_MASK = (1 << 64) - 1


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers by SplitMix64 (Steele, Lea and Flood, 2014).

    Torch's CPU generator keeps the low 32 bits only, so the numbers cannot be packed side by side.
    """
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return mixed


def seed_step(generator: torch.Generator, seed: int, step: int) -> None:
    """Seed input noise (`generator`) and dropout (torch's global generator of the same device) for one step.

    Each has a stream of its own; with one seed they would draw the same numbers.
    """
    generator.manual_seed(mixed_seed(seed, step, _NOISE))
    dropout_seed = mixed_seed(seed, step, _DROPOUT)
    if generator.device.type == "cuda":
        with torch.cuda.device(generator.device):
            torch.cuda.manual_seed(dropout_seed)
    torch.default_generator.manual_seed(dropout_seed)
