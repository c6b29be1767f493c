"""The whole pipeline: `mep.pipeline.run(config)`, and the shell command `mep`."""

_HOME = {
    "run": "core",
    "Config": "options",
    "Net": "core",
    "option": "options",
    "stage": "options",
    "STAGES": "core",
    "Report": "report",
    "on_workers": "workers",
}
_MODULES = ("core", "report", "cli", "convert", "options", "search", "workers")
__all__ = list(_HOME)


def __getattr__(name):
    "Import on first use, so that `mep --help` doesn't wait for PyTorch."
    import importlib

    if name in _HOME:
        return getattr(importlib.import_module(f"mep.pipeline.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"mep.pipeline.{name}")
    raise AttributeError(
        f"module 'mep.pipeline' has no attribute {name!r}; it has {', '.join([*__all__, *_MODULES])}"
    )


def __dir__():
    return sorted([*globals(), *__all__])
