"""What lets SGLang's own server run on a machine without a GPU: inert stand-ins for absent CUDA packages.

For a plain dense model on its CPU path SGLang computes with PyTorch alone, but its modules import by name packages that
such a machine lacks (`sgl_kernel`, `triton`) or cannot load (`torchvision`, whose registry build wants CUDA).  Nothing of
what they import is called.  `install_stand_ins` makes those imports succeed; no file of SGLang is touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STAND_INS = {"sgl_kernel": "0.0.0", "triton": "3.0.0", "torchvision": "0.28.0"}
"""Package name -> version that its stand-in claims."""


def install_stand_ins() -> list[str]:
    """Puts stand-ins in place of those packages that cannot be imported here; returns their names. Idempotent."""
    if any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        return []
    missing = [name for name in STAND_INS if not _importable(name)]
    sys.meta_path.insert(0, StandInFinder(missing))
    if "triton" in missing:
        _give_triton_its_arithmetic()
    return missing


class StandInFinder(MetaPathFinder, Loader):
    """Finds every module below the packages in `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """A package spec for a stand-in, None for everything else."""
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty `StandIn`."""
        return StandIn(spec.name, STAND_INS[spec.name.partition(".")[0]])

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _InertClass(type):
    """A class of which every public attribute exists."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class StandIn(ModuleType):
    """A module in which every public name exists: a class if capitalised, else a submodule.

    Called with a function, as a bare decorator is, it gives that function back; called otherwise it gives such a decorator.
    """

    def __init__(self, name: str, version: str) -> None:
        super().__init__(name)
        self.__version__ = version
        self.__file__ = __file__
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[:1].isupper():
            value = _InertClass(name, (Exception,), {"__module__": self.__name__, "__init__": lambda self, *a, **k: None})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bare = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if bare else lambda function: function


def _importable(name: str) -> bool:
    """Whether a package is there; one whose build may not fit this machine is really imported."""
    if importlib.util.find_spec(name) is None:
        return False
    if name != "torchvision":
        return True
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # a CUDA build beside a CPU torch fails in any of these ways
        for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[loaded]
        return False
    return True


def _give_triton_its_arithmetic() -> None:
    """The two functions of triton that SGLang calls outside of kernels."""
    triton: Any = importlib.import_module("triton")
    triton.cdiv = lambda a, b: -(a // -b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length() if n > 0 else 1
