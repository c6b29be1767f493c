"""Compression: single weights set to zero, layers cut into smaller ones, channels removed, and
the choice of who gets how much."""

from .prune import gradual_prune, keep_zeros, magnitude_prune, sparsity, storage
from .svd import METHODS, Method, compose, factorize, left_out, spatial_svd, weight_svd
from .tensor import cp, tensor_train, tucker2
from .channel import ChannelGroup, Ranking, channel_groups, channel_prune, macs_left, rank_channels
from .methods import COMPRESSIONS, compression
from .select import (
    Compressed,
    Plan,
    apply_plan,
    compress,
    load_compressed,
    plot_report,
    save_compressed,
)

__all__ = [
    "COMPRESSIONS",
    "ChannelGroup",
    "Compressed",
    "METHODS",
    "Method",
    "Plan",
    "Ranking",
    "apply_plan",
    "channel_groups",
    "channel_prune",
    "compose",
    "compress",
    "compression",
    "cp",
    "factorize",
    "gradual_prune",
    "keep_zeros",
    "left_out",
    "load_compressed",
    "macs_left",
    "magnitude_prune",
    "plot_report",
    "rank_channels",
    "save_compressed",
    "sparsity",
    "spatial_svd",
    "storage",
    "tensor_train",
    "tucker2",
    "weight_svd",
]
