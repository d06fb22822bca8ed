"""Seeds of a step."""

from __future__ import annotations

import torch

from streamlearn.learn.randomness import mixed_seed, seed_step


def test_mixed_seeds_differ_in_their_low_32_bits() -> None:
    """Torch's CPU generator uses no others."""
    seeds = {
        mixed_seed(seed, step, purpose) & 0xFFFFFFFF for seed in (0, 1) for step in range(500) for purpose in (1, 2)
    }

    assert len(seeds) == 2000


def test_a_step_is_seeded_by_seed_and_step() -> None:
    """Noise and dropout draw different numbers, and the same ones when the step is repeated."""
    generator, drawn = torch.Generator(), []
    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        seed_step(generator, seed, step)
        drawn.append((torch.rand(3, generator=generator), torch.rand(3)))

    assert all(torch.equal(*pair) for pair in zip(drawn[0], drawn[1], strict=True))
    different = [*drawn[0], *drawn[2], *drawn[3]]
    assert len({tuple(numbers.tolist()) for numbers in different}) == 6
