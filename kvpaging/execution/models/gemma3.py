"""Gemma 3, text (Gemma Team 2025): Gemma 2 with head norms instead of soft caps on attention.

Layers with a window and layers without have rotary embeddings of their own, which the configuration
assigns.
"""

from __future__ import annotations

from typing import ClassVar

from kvpaging.execution.model_config import ModelConfig
from kvpaging.execution.models.gemma2 import Gemma2ForCausalLM, Gemma2Layer
from kvpaging.execution.weights import Parameters


class Gemma3Layer(Gemma2Layer):
    """Gemma 2's, with an RMS norm on each head of queries and keys."""

    has_head_norms: ClassVar[bool] = True


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3, text."""

    make_layer = Gemma3Layer


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text model of a Gemma 3 that also sees: images are not served."""

    ignored: ClassVar[tuple[str, ...]] = (
        # What turns images into embeddings.
        r"vision_tower\..*",
        r"multi_modal_projector\..*",
        # The embedding a second time, as some tied checkpoints carry it.
        r"language_model\.lm_head\.weight",
    )

    def __init__(self, config: ModelConfig, parameters: Parameters, max_model_len: int) -> None:
        super().__init__(config, parameters.at("language_model."), max_model_len)
