"""Conditional networks: exits for easy images, convolutions where there is something to see,
updates where a video changed, as many frames as a clip needs.

What belongs to one method only, such as its cascade of files or the training of its gates,
is imported from the method's module: `from mep.conditional.frame_exit import train_gates`."""

from .early_exit import (
    Cascade,
    EarlyExit,
    Exits,
    Guarantee,
    MSDNet,
    Outcome,
    budgeted_thresholds,
    calibrate,
    evaluate,
    exit_table,
    export_cascade,
    fit_exits,
    guaranteed_thresholds,
    image_latencies,
    joint_thresholds,
    load_exits,
    save_exits,
)
from .dynamic_conv import DynamicBlock, DynamicConv2d, MaskUnit, dynamic, sparse_conv
from .skip_conv import GumbelGate, NormGate, SkipConv2d, SkipNet, scene_cut, skip_convert, tune
from .frame_exit import FrameExit, frame_order

__all__ = [
    "Cascade",
    "DynamicBlock",
    "DynamicConv2d",
    "EarlyExit",
    "Exits",
    "FrameExit",
    "Guarantee",
    "GumbelGate",
    "MSDNet",
    "MaskUnit",
    "NormGate",
    "Outcome",
    "SkipConv2d",
    "SkipNet",
    "budgeted_thresholds",
    "calibrate",
    "dynamic",
    "evaluate",
    "exit_table",
    "export_cascade",
    "fit_exits",
    "frame_order",
    "guaranteed_thresholds",
    "image_latencies",
    "joint_thresholds",
    "load_exits",
    "save_exits",
    "scene_cut",
    "skip_convert",
    "sparse_conv",
    "tune",
]
