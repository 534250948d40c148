"""Fine-tune, run and score Qwen-VL: a native network, a Lightning module and Hydra configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenvl_lit.api import QwenVL

__version__ = "0.2.0"
__all__ = ["QwenVL", "__version__"]


def __getattr__(name: str) -> type[QwenVL]:
    """Imports `QwenVL` when it is first used: the package alone imports no torch."""
    if name == "QwenVL":
        from qwenvl_lit.libraries import import_libraries

        import_libraries()
        from qwenvl_lit.api import QwenVL

        return QwenVL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
