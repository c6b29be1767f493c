"""Quantization: the grid, a network simulated on integers, data-free quantization, adaptive
rounding, learned bit widths, and the INT8 file.

`mep.quant.adaround`, `dfq` and `bayesian_bits` are the methods; what else their modules
hold is imported as `from mep.quant.adaround import solve`."""

# The modules are imported here, and first, because three methods share their module's name: once
# the module is loaded, the name below stays the method's.
from .grid import Grid, fake_quant, fit_grid, make_grid, minmax_range, mse_range, percentile_range
from .sim import (
    QuantModel,
    TraceError,
    fold_bn,
    load_quantized,
    quantize,
    save_quantized,
    sensitivity,
)
from .export import Check, MismatchError, export_int8, overflows, without_vnni
from .dfq import absorb_bias, correct_bias, dfq, equalize
from .adaround import adaround
from .bayesian_bits import bayesian_bits
from .detectors import core_inputs, core_of, from_file, with_core
from .methods import ROUNDINGS, rounding
from . import words  # noqa: F401  what stays in float, in the file's words: its functions register themselves

__all__ = [
    "Check",
    "Grid",
    "MismatchError",
    "QuantModel",
    "ROUNDINGS",
    "TraceError",
    "absorb_bias",
    "adaround",
    "bayesian_bits",
    "core_inputs",
    "core_of",
    "correct_bias",
    "dfq",
    "equalize",
    "export_int8",
    "fake_quant",
    "fit_grid",
    "fold_bn",
    "from_file",
    "load_quantized",
    "make_grid",
    "minmax_range",
    "mse_range",
    "overflows",
    "percentile_range",
    "quantize",
    "rounding",
    "save_quantized",
    "sensitivity",
    "with_core",
    "without_vnni",
]
