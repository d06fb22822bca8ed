"""Small convolutional network, for images of 4 x 4 pixels and up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from streamlearn.models.norm import make_norm


class ConvNet(nn.Module):
    """3 x 3 convolutions with 2 x 2 max pooling after each but the last, then global average pooling."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, *, widths: Sequence[int] = (24, 48, 96), norm: str = "batch"
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 4 or not widths:
            raise ValueError(f"expected images (channels, height, width) of 4 x 4 and up, and a width, got {shape}")
        layers: list[nn.Module] = []
        width_before, size = shape[0], min(shape[1:])
        for i, width in enumerate(widths):
            # A norm layer has its own bias.
            layers.append(nn.Conv2d(width_before, width, 3, padding=1, bias=norm == "none"))
            layers += [make_norm(norm, width, images=True), nn.ReLU()]
            if i < len(widths) - 1 and size >= 2:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            width_before = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width_before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, height, width)."""
        logits_BC: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits_BC
