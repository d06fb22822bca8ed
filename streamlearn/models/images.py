"""Networks for images (B, channels, height, width) of 4 x 4 pixels and up: a small one and two from papers.

All end with global average pooling and a linear layer. Input noise is not a layer here: the learner adds it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from streamlearn.models.norm import make_norm

SLOPE = 0.1
"""Of LeakyReLU."""


class _ImageNetwork(nn.Module):
    """What the networks for images share."""

    features: nn.Module
    head: nn.Module

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 4:
            raise ValueError(f"expected images (channels, height, width) of 4 x 4 and up, got {shape}")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, height, width)."""
        logits_BC: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits_BC


class ConvNet(_ImageNetwork):
    """3 x 3 convolutions with 2 x 2 max pooling after each but the last."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, *, widths: Sequence[int] = (24, 48, 96), norm: str = "batch"
    ) -> None:
        super().__init__(shape)
        if not widths:
            raise ValueError("widths: expected at least one, got none")
        layers: list[nn.Module] = []
        width_before, size = shape[0], min(shape[1:])
        for i, width in enumerate(widths):
            # A norm layer has its own bias.
            layers.append(nn.Conv2d(width_before, width, 3, padding=1, bias=norm == "none"))
            layers.append(make_norm(norm, width, images=True))
            if i < len(widths) - 1 and size >= 2:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            layers.append(nn.ReLU())  # last: the same numbers as before pooling, from a quarter of the values
            width_before = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width_before, classes)


class Conv13(_ImageNetwork):
    """The 13-layer network of Tarvainen and Valpola (2017), appendix B.

    Three blocks of three convolutions, 128, 256 and 512-256-128 wide at `width=1`. Weight normalisation with full batch
    normalisation, as in the PyTorch ports; the paper has mean-only batch normalisation.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, *, width: float = 1.0, dropout: float = 0.5, norm: str = "batch"
    ) -> None:
        super().__init__(shape)
        w128, w256, w512 = (max(1, round(base * width)) for base in (128, 256, 512))
        # The paper's seventh layer has no padding, which needs images of 12 x 12 and up.
        padding = 0 if min(shape[1:]) // 4 >= 3 else 1

        def conv(width_in: int, width_out: int, size: int, padding: int) -> list[nn.Module]:
            layer = weight_norm(nn.Conv2d(width_in, width_out, size, padding=padding, bias=norm == "none"))
            return [layer, make_norm(norm, width_out, images=True), nn.LeakyReLU(SLOPE)]

        self.features = nn.Sequential(
            *conv(shape[0], w128, 3, 1),
            *conv(w128, w128, 3, 1),
            *conv(w128, w128, 3, 1),
            nn.MaxPool2d(2),
            nn.Dropout(dropout),
            *conv(w128, w256, 3, 1),
            *conv(w256, w256, 3, 1),
            *conv(w256, w256, 3, 1),
            nn.MaxPool2d(2),
            nn.Dropout(dropout),
            *conv(w256, w512, 3, padding),
            *conv(w512, w256, 1, 0),
            *conv(w256, w128, 1, 0),
        )
        self.head = weight_norm(nn.Linear(w128, classes))


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


class WideResNet(_ImageNetwork):
    """Wide residual network (Zagoruyko and Komodakis, 2016), the network of most later work on consistency.

    Three groups of (depth - 4) / 6 blocks, 16, 32 and 64 times `width` wide, the last two at half the size. WRN-28-2 by
    default, with LeakyReLU of slope 0.1, as in the comparison of Oliver et al. (2018).
    """

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
        super().__init__(shape)
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
