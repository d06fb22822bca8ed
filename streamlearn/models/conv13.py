"""The 13-layer convolutional network of Tarvainen and Valpola (2017), appendix B.

Weight normalisation with full batch normalisation, as in the PyTorch ports; the paper has mean-only batch
normalisation. Input noise is not a layer here: the learner adds it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from streamlearn.models.norm import make_norm

SLOPE = 0.1
"""Of LeakyReLU."""


class Conv13(nn.Module):
    """Three blocks of three convolutions, 128, 256 and 512-256-128 wide at `width=1`, then global average pooling."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, *, width: float = 1.0, dropout: float = 0.5, norm: str = "batch"
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 4:
            raise ValueError(f"expected images (channels, height, width) of 4 x 4 and up, got {shape}")
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

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, channels, height, width)."""
        logits_BC: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits_BC
