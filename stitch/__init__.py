"""stitch: compile ONNX models for the machine in front of you.

    import stitch
    model = stitch.optimize("model.onnx")      # path | bytes | onnx.ModelProto
    y, = model.run(None, {"x": x})
    print(model.explain())

Importing this package is cheap: the compiler, and the libraries it needs, are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stitch import errors

__version__ = "0.1.0"
__all__ = ["CompiledModel", "__version__", "errors", "optimize"]

_FROM_API = frozenset({"CompiledModel", "optimize"})


def __getattr__(name: str) -> Any:
    if name in _FROM_API:
        return getattr(import_module("stitch.api"), name)
    if name == "errors":
        return import_module("stitch.errors")
    raise AttributeError(f"module 'stitch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
