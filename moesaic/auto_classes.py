"""Adds exported models to the Auto classes of transformers, when that library loads them: neither imports the other."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _add_configuration(auto: ModuleType) -> None:
    from moesaic.nas.exports.huggingface.configuration import MoesaicConfig

    auto.AutoConfig.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)


def _add_model(auto: ModuleType) -> None:
    from moesaic.nas.exports.huggingface.configuration import MoesaicConfig
    from moesaic.nas.exports.huggingface.model import MoesaicForCausalLM

    auto.AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)


_WHEN_LOADED: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _add_configuration,
    "transformers.models.auto.modeling_auto": _add_model,
}


class _Finder(MetaPathFinder):
    """Finds these two modules as usual, and adds ours once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WHEN_LOADED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _after(spec.loader, _WHEN_LOADED[fullname])
        return spec


def _try(add: Callable[[ModuleType], None], auto: ModuleType) -> None:
    """An older transformers must still load."""
    try:
        add(auto)
    except ImportError as error:
        warnings.warn(f"moesaic adds no models to this transformers; version 5 is needed: {error}", stacklevel=2)


def _after(loader: Loader, add: Callable[[ModuleType], None]) -> None:
    load = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        load(module)
        _try(add, module)

    loader.exec_module = exec_module


def add_when_loaded() -> None:
    """From now on, or at once where they are loaded already."""
    for name, add in _WHEN_LOADED.items():
        if name in sys.modules:
            _try(add, sys.modules[name])
    sys.meta_path.insert(0, _Finder())
