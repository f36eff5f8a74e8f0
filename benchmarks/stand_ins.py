"""A stand-in for pydantic, for machines that have PyTorch and nothing else.

The encoders, heads, optimizers, views and methods of a run are described by pydantic sections. With this in pydantic's
place they can be imported and built from their defaults and from keyword arguments; nothing is validated, so it is for
benchmarks alone, whose settings are in the code.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REQUIRED = object()


class _Model:
    """Class attributes are the defaults; keyword arguments replace them."""

    model_config: Any = None

    def __init__(self, **values: Any) -> None:
        known = {name for kind in type(self).__mro__ for name in getattr(kind, "__annotations__", {})}
        if unknown := values.keys() - known:
            raise ValueError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        self.__dict__.update(values)
        if missing := [name for name in known if getattr(self, name, _REQUIRED) is _REQUIRED]:
            raise ValueError(f"{type(self).__name__} needs {', '.join(sorted(missing))}")

    def model_copy(self, *, update: dict[str, Any]) -> Any:
        return type(self)(**(self.__dict__ | update))


def _field(default: Any = _REQUIRED, **_: Any) -> Any:
    return default


def _decorator(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function


def pydantic_or_stand_in() -> str:
    """Make ``import pydantic`` work; returns "pydantic" or "stand-in", whichever it is from now on."""
    if "pydantic" not in sys.modules and importlib.util.find_spec("pydantic") is not None:
        return "pydantic"
    if sys.modules.get("pydantic") is not None:
        return "stand-in" if hasattr(sys.modules["pydantic"], "stand_in") else "pydantic"
    module: Any = ModuleType("pydantic")
    module.stand_in, module.__spec__ = True, ModuleSpec("pydantic", None)  # a library may ask for it
    module.BaseModel, module.ConfigDict, module.Field = _Model, dict, _field
    module.ValidationError = ValueError
    module.field_validator = module.model_validator = _decorator
    sys.modules["pydantic"] = module
    return "stand-in"
