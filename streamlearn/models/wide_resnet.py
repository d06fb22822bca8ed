"""Wide residual network (Zagoruyko and Komodakis, 2016), the network of most later work on consistency.

WRN-28-2 by default, with LeakyReLU of slope 0.1, as in the comparison of Oliver et al. (2018).
"""

from __future__ import annotations

from torch import Tensor, nn

from streamlearn.models.norm import make_norm

SLOPE = 0.1
"""Of LeakyReLU."""


class _Block(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))). If the shape changes, x is a 1 x 1 convolution of act(norm(x))."""

    def __init__(self, width_in: int, width_out: int, stride: int, *, dropout: float, norm: str) -> None:
        super().__init__()
        self.before = nn.Sequential(make_norm(norm, width_in, images=True), nn.LeakyReLU(SLOPE))
        self.residual = nn.Sequential(
            nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False),
            make_norm(norm, width_out, images=True),
            nn.LeakyReLU(SLOPE),
            nn.Dropout(dropout),
            nn.Conv2d(width_out, width_out, 3, padding=1, bias=False),
        )
        same = width_in == width_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.before(x)
        kept: Tensor = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = kept + self.residual(activated)
        return out


class WideResNet(nn.Module):
    """Three groups of (depth - 4) / 6 blocks, 16, 32 and 64 times `width` wide, the last two at half the size."""

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        *,
        depth: int = 28,
        width: int = 2,
        dropout: float = 0.0,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 4:
            raise ValueError(f"expected images (channels, height, width) of 4 x 4 and up, got {shape}")
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth: expected 10, 16, 22, 28, ..., got {depth}")
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)]
        width_in = 16
        for group, base in enumerate((16, 32, 64)):
            for block in range((depth - 4) // 6):
                stride = 2 if group > 0 and block == 0 else 1
                layers.append(_Block(width_in, base * width, stride, dropout=dropout, norm=norm))
                width_in = base * width
        layers += [make_norm(norm, width_in, images=True), nn.LeakyReLU(SLOPE)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, height, width)."""
        logits_BC: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits_BC
