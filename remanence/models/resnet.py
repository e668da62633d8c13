"""ResNet-18, any width, with a stem for small or for large images; it ends in a linear `head`, which may start with no rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.models.shape import image_shape
from remanence.nn.heads import empty_linear


class Residual(nn.Module):
    """``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))``; the shortcut is x itself where its shape fits, else a 1x1 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.shortcut = (
            nn.Sequential()
            if same
            else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet18(nn.Module):
    """A stem, four stages of two residual blocks with `width` times 1, 2, 4, 8 channels, the mean over the image, a linear head.

    Takes images (B, C, H, W) or the same as rows (B, C H W). Weights are drawn as torch draws those of each layer. In train mode
    batch norm needs two values per channel: an 8x8 image ends as 1x1, so a batch of one is refused there.
    He et al. 2016, arXiv 1512.03385; the stem for small images (3x3, no pooling) and width 20 as in Lopez-Paz & Ranzato 2017,
    arXiv 1706.08840.
    """

    def __init__(self, inputs: int | Sequence[int], width: int, outputs: int, stem: str) -> None:
        super().__init__()
        if width < 1:
            raise BadInput(f"a resnet18 needs a width of at least 1, not {width}")
        if stem not in ("small", "large"):
            raise BadInput(f"a resnet18's stem is 'small' or 'large', not {stem!r}")
        self.shape = image_shape(inputs, "resnet18")
        large = stem == "large"
        first = nn.Conv2d(self.shape[0], width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        pool = [nn.MaxPool2d(3, 2, padding=1)] if large else []
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), *pool)
        stages: list[nn.Module] = []
        before = width
        for stage in range(4):
            size = width * 2**stage
            stages.append(nn.Sequential(Residual(before, size, 1 if stage == 0 else 2), Residual(size, size, 1)))
            before = size
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, outputs) if outputs else empty_linear(before, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x.reshape(len(x), *self.shape)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]
