"""After ``import infini_bench`` the Auto classes of transformers know our models; nothing is loaded before
one is asked for.

transformers looks a folder's ``model_type`` up in ``CONFIG_MAPPING``. There stands, from the moment the
mapping exists, a stand-in that imports the decoder when it is used; the decoder then registers itself.
Standard library only.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MODEL_TYPE = "infini_llama"
AUTO = "transformers.models.auto.configuration_auto"


class MemoryLlamaConfig:
    """Stands in for the class of this name in `infini_bench.decoder`, which is imported when it is used."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        from infini_bench.decoder import MemoryLlamaConfig as Real

        return Real.from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        from infini_bench.decoder import MemoryLlamaConfig as Real

        return Real.from_pretrained(*args, **kwargs)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from infini_bench.decoder import MemoryLlamaConfig as Real

        return Real(*args, **kwargs)


class _WhenLoaded(MetaPathFinder):
    """Finds AUTO as everybody else does, once, and puts the stand-in there when it has been loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader)
        return spec


class _Announcing(Loader):
    """A loader that does what another one does, and then `announce`."""

    def __init__(self, inner: Loader):
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        announce(module)

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.inner, name)


def announce(auto: ModuleType) -> None:
    if MODEL_TYPE not in auto.CONFIG_MAPPING:
        auto.CONFIG_MAPPING.register(MODEL_TYPE, MemoryLlamaConfig)


def register() -> None:
    """Announces our models to transformers, now or as soon as its Auto classes are loaded."""
    if AUTO in sys.modules:
        announce(sys.modules[AUTO])
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())
