"""Gemma 3, text (Gemma Team 2025): Gemma 2 with head norms instead of soft caps on attention.

Layers with a window and layers without have rotary embeddings of their own, which the configuration
assigns.
"""

from __future__ import annotations

from typing import ClassVar

from kvpaging.execution.models.gemma2 import Gemma2ForCausalLM, Gemma2Layer


class Gemma3Layer(Gemma2Layer):
    """Gemma 2's, with an RMS norm on each head of queries and keys."""

    has_head_norms: ClassVar[bool] = True


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3, text."""

    make_layer = Gemma3Layer
