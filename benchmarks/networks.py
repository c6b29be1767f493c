"""The pretrained networks of our benchmarks as functions without arguments, so that the shell
command takes them, too. The weights are files of their own:

    mep quantize --model benchmarks/networks.py:resnet20 --weights
    $MEP_DATA/weights/resnet20_cifar10.safetensors \\
        --data cifar10 --mean .485,.456,.406 --std .229,.224,.225 --bits 4 -o resnet20_w4.onnx"""

import torch.nn.functional as F
from torch import nn


class Shortcut(nn.Module):
    "Every second pixel, and channels of zeros on both sides"

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class Add(nn.Module):
    def forward(self, a, b):
        return a + b


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu1, self.relu2, self.add = nn.ReLU(), nn.ReLU(), Add()
        self.shortcut = Shortcut((c_out - c_in) // 2) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.relu2(
            self.add(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))), self.shortcut(x))
        )


class ResNet20(nn.Module):
    "The CIFAR ResNet-20 of He et al. (2016) with option A shortcuts"

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.layer1, self.layer2, self.layer3 = (
            self.stage(16, 16, 1),
            self.stage(16, 32, 2),
            self.stage(32, 64, 2),
        )
        self.pool, self.flatten, self.linear = (
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    @staticmethod
    def stage(c_in, c_out, stride):
        return nn.Sequential(
            Block(c_in, c_out, stride), Block(c_out, c_out, 1), Block(c_out, c_out, 1)
        )

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.linear(self.flatten(self.pool(self.layer3(self.layer2(self.layer1(x))))))


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., 2017) of TF-slim, whose kernels are flipped: so are its
    images, here (`flip`) or by the caller"""

    strides = 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1

    def __init__(self, width=0.25, classes=1000, flip=False):
        super().__init__()
        self.flip = flip
        outs = [
            int(c * width)
            for c in (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
        ]
        c, layers = int(32 * width), {"stem": self.block(3, int(32 * width), 3, 2)}
        for i, (out, stride) in enumerate(zip(outs, self.strides), 1):
            layers |= {f"dw{i}": self.block(c, c, 3, stride, c), f"pw{i}": self.block(c, out, 1)}
            c = out
        self.features, self.pool, self.flatten, self.classifier = (
            nn.Sequential(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(c, classes),
        )
        for name, layer in layers.items():
            self.features.add_module(name, layer)

    @staticmethod
    def block(c_in, c_out, kernel, stride=1, groups=1):
        block = nn.Sequential()
        block.add_module(
            "conv", nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        )
        block.add_module("bn", nn.BatchNorm2d(c_out, eps=1e-3))
        block.add_module("relu6", nn.ReLU6())
        return block

    def forward(self, x):
        if self.flip:
            x = x.flip(2, 3)
        return self.classifier(self.flatten(self.pool(self.features(x))))


def resnet20():
    return ResNet20()


def mobilenet_v1():
    return MobileNetV1(flip=True)


def zoo(name):
    from train_zoo import build

    return build(name)


def mobilenet_cifar10():
    return zoo("mobilenet_cifar10")


def resnet_cifar10():
    return zoo("resnet_cifar10")


def mobilenet_fashion():
    return zoo("mobilenet_fashion")
