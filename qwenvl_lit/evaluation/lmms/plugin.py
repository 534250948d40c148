"""Registers the model `qwenvl_lit` with lmms-eval.

lmms-eval calls `manifest` whenever it starts, whatever model it evaluates. The class is registered
by name: importing it here would load torch and the model's code for other models, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "qwenvl_lit"
PACKAGE = __name__.rpartition(".")[0]


def manifest() -> ModelManifest:
    """Returns the entry of lmms-eval's list of models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path=f"{PACKAGE}.model.EvaluatedModel")
