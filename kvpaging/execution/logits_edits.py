"""What changes one sequence's logits before a token is drawn.

`LogitsEdit` is the seam: bias, penalties and a minimum length are edits, and a grammar's mask is
one more. An edit sees its own sequence's row only, so a row's result depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch

from kvpaging.execution.transfer import to_device
from kvpaging.scheduling.request import SamplingParams


class LogitsEdit(Protocol):
    """One sequence's change to its logits, with whatever it has to remember."""

    def apply(self, logits: torch.Tensor) -> None:
        """Change the row `[V]` float32 in place."""

    def append(self, token_id: torch.Tensor) -> None:
        """A token of the output was decided: `[1]` int64 on the device, unseen by the host."""


def edits_for(
    sampling: SamplingParams,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    eos_token_ids: Collection[int],
    vocab_size: int,
    device: torch.device,
) -> tuple[LogitsEdit, ...]:
    """The edits that a sequence asks for, in the order of `SamplingParams`; mostly none."""
    prompt, output = token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:]
    edits: list[LogitsEdit] = []
    if sampling.logit_bias:
        edits.append(LogitBias(sampling.logit_bias, device))
    if (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    ):
        edits.append(Penalties(sampling, prompt, output, vocab_size, device))
    if sampling.min_new_tokens > len(output):
        ends = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends.update(eos_token_ids)
        edits.append(MinLength(ends, sampling.min_new_tokens - len(output), device))
    return tuple(edits)


class LogitBias:
    """Adds a constant to some tokens' logits."""

    def __init__(self, bias: Sequence[tuple[int, float]], device: torch.device) -> None:
        ids, values = zip(*bias, strict=True)
        self._ids = to_device(np.array(ids, dtype=np.int64), device)
        self._values = to_device(np.array(values, dtype=np.float32), device)

    def apply(self, logits: torch.Tensor) -> None:
        """Add the constants; those of a token that is named twice add up."""
        logits.index_add_(0, self._ids, self._values)

    def append(self, token_id: torch.Tensor) -> None:
        """Changes nothing."""


class Penalties:
    """Repetition (Keskar et al. 2019, section 4.1), presence and frequency.

    Repetition looks at prompt and output, the other two at the output only. Keeps five bytes for
    each token of the vocabulary.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        output: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._repetition = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        counts = np.bincount(np.array(output, dtype=np.int64), minlength=vocab_size)
        seen = counts > 0
        seen[np.array(prompt, dtype=np.int64)] = True
        self._counts = to_device(counts.astype(np.int32), device)
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        self._seen = to_device(seen, device)

    def apply(self, logits: torch.Tensor) -> None:
        """Lower what was there already."""
        if self._repetition != 1.0:
            lowered = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits.copy_(torch.where(self._seen, lowered, logits))
        logits -= self._frequency * self._counts + self._presence * (self._counts > 0)

    def append(self, token_id: torch.Tensor) -> None:
        """Count the token."""
        self._counts.index_add_(0, token_id, self._one)
        self._seen.index_fill_(0, token_id, True)


class MinLength:
    """Forbids every token that would end the output, for its first tokens."""

    def __init__(self, end_ids: Collection[int], num_tokens: int, device: torch.device) -> None:
        self._ids = to_device(np.array(sorted(end_ids), dtype=np.int64), device)
        self._num_left = num_tokens

    def apply(self, logits: torch.Tensor) -> None:
        """Make the ends impossible while tokens are owed."""
        if self._num_left > 0:
            logits[self._ids] = -torch.inf

    def append(self, token_id: torch.Tensor) -> None:
        """One less is owed."""
        self._num_left -= 1
