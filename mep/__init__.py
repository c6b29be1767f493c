"""The Model-Efficiency Pipeline: search, compression, quantization, conditional networks, one
chapter a module."""

__version__ = "0.1.0"

_MODULES = (
    "data",
    "train",
    "cost",
    "deploy",
    "store",
    "plot",
    "ops",
    "capture",
    "graph",
    "moments",
    "pareto",
    "registry",
    "onnx_in",
    "networks",
    "nas",
    "compress",
    "quant",
    "conditional",
    "pipeline",
)

_FUNCTIONS = {"load_onnx": "onnx_in"}


def __getattr__(name):
    "Import a module on first use, so that `import mep` is instant and `mep.data.load(...)` just works."
    if name in _FUNCTIONS:
        return getattr(__getattr__(_FUNCTIONS[name]), name)
    if name in _MODULES:
        import importlib

        try:
            return importlib.import_module(f"mep.{name}")
        except ModuleNotFoundError as e:
            if e.name != f"mep.{name}":
                raise
    raise AttributeError(
        f"module 'mep' has no attribute {name!r}; its modules are {', '.join(_MODULES)}"
    )


def __dir__():
    return sorted([*globals(), *_MODULES, *_FUNCTIONS])
