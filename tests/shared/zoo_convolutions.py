"""Convolutions and what stands between them."""

from __future__ import annotations

import torch.nn.functional as F
from specimens import images, pair, specimen
from torch import nn


@specimen(pair("conv", 8, "conv1[0] norm[0] conv2.weight[1]"), inputs=images(3))
class conv_norm_conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.conv2(F.relu(self.norm(self.conv1(x))))


@specimen(pair("conv", 8, "expand[0] depthwise[0] project.weight[1]"), inputs=images(3))
class depthwise_block(nn.Module):
    """MobileNet's: each channel has a kernel of its own in the middle."""

    def __init__(self):
        super().__init__()
        self.expand, self.project = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        return self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


@specimen(pair("conv", 8, "conv[0] head.weight[1]"), inputs=images(3))
class pooled_classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).flatten(1))


@specimen(
    pair("conv", 3, "reduce[0] norm[0] grouped[0] project.weight[1]"),
    pair("conv", 2, "reduce[0] norm[0] grouped.weight[1]"),
    pair("conv", 4, "grouped[0] project.weight[1]"),
    inputs=images(5),
)
class grouped_block(nn.Module):
    """ResNeXt's: whole groups can go, or the same channels of every group, on either side of the grouped kernel."""

    def __init__(self):
        super().__init__()
        self.reduce, self.norm = nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6)
        self.grouped, self.project = nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 5, 1)

    def forward(self, x):
        return self.project(F.relu(self.grouped(F.relu(self.norm(self.reduce(x))))))


@specimen(
    pair("conv", 8, "down[0] up.weight[0]"),
    pair("conv", 6, "up.weight[1] up.bias[0] out.weight[1]"),
    inputs=images(3),
)
class upsampling(nn.Module):
    """A transposed convolution lists inputs first."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.out(F.relu(self.up(F.relu(self.down(x)))))


@specimen(
    pair("conv", 4, "conv1[0] norm[0] conv2.weight[1]"),
    pair("conv", 6, "conv1[0] norm[0] conv2.weight[1]"),
    inputs=images(3),
    zeroing="averages are over what is left of a group",
    smaller=lambda: group_norm(2, 3),
)
class group_norm(nn.Module):
    """Whole groups of the norm can go, and as many channels of one group as of another."""

    def __init__(self, groups=4, each=6):
        super().__init__()
        width = groups * each
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, width, 3), nn.GroupNorm(groups, width), nn.Conv2d(width, 5, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.conv2(F.relu(self.norm(self.conv1(x))))


@specimen(
    pair(
        "conv", 6, "conv2.bias[0] conv2.parametrizations.weight.original0[0] "
        "conv2.parametrizations.weight.original1[0] out.weight[1]",
    ),
    pair("conv", 8, "conv1[0] conv2.parametrizations.weight.original1[1]"),
    inputs=images(3),
    zeroing="a direction of zeros has no norm to be divided by",
    smaller=lambda: weight_norm(4, 3),
)  # fmt: skip
class weight_norm(nn.Module):
    """A weight made of a direction and a magnitude, which is divided by the norm of the columns that are left."""

    def __init__(self, first=8, second=6):
        super().__init__()
        self.conv1, self.out = nn.Conv2d(3, first, 1), nn.Conv2d(second, 4, 1)
        self.conv2 = nn.utils.parametrizations.weight_norm(nn.Conv2d(first, second, 3))

    def forward(self, x):
        return self.out(F.relu(self.conv2(F.relu(self.conv1(x)))))


@specimen(pair("conv", 6, "conv[0] out.weight[1]"), inputs=images(3))
class pixel_shuffled(nn.Module):
    """The rows that make four positions of one channel go as one entry."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 24, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.out(F.relu(F.pixel_shuffle(self.conv(x), 2)))


@specimen(pair("conv", 6, "conv[0] out.weight[1]"), inputs=images(3))
class unfolded(nn.Module):
    """Windows cut out and laid beside each other, channels before positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 3), nn.Linear(24, 4)

    def forward(self, x):
        return self.out(F.unfold(F.relu(self.conv(x)), 2, stride=2).transpose(1, 2))


@specimen(pair("conv", 6, "conv[0] out.weight[1]"), inputs=images(3))
class sampled(nn.Module):
    """Deformable sampling: positions come from offsets, channels stay what they are."""

    def __init__(self):
        super().__init__()
        self.conv, self.offset, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 2, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        grid = self.offset(x).permute(0, 2, 3, 1).tanh()
        return self.out(F.grid_sample(self.conv(x), grid, align_corners=False))
