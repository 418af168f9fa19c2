"""From logits to samples: the edits of each sequence, the draw, and log-probabilities.

What is drawn stays on the device, where the next step reads it; `Drawn` and `Scored` say which
tensors the host wants and make samples of them when they are there, so nothing here waits.

Log-probabilities are of the raw logits, before bias, penalties and temperature. A row's result
depends on its own inputs alone. Knows rows, not sequences; drawing itself is `kernels.ops.sample`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from kernels.ops import Ops
from kvpaging.execution.logits_edits import LogitsEdit, edits_for
from kvpaging.execution.transfer import to_device
from kvpaging.scheduling.plan import AddedSequence, Sample

_PARAMETERS: Final = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed", np.int64),
        ("logprobs", np.int32),
        ("is_edited", np.bool_),
    ]
)
_NO_LOGPROBS: Final = -1


@dataclass(frozen=True, slots=True)
class Draws:
    """R tokens to draw. Several may share one row of logits, where a request forks."""

    rows: npt.NDArray[np.int64]
    """[R], whose parameters to use."""
    logit_rows: npt.NDArray[np.int64]
    """[R], which row of the logits to draw from."""
    output_indices: npt.NDArray[np.int32]
    """[R]"""
    positions: npt.NDArray[np.int32]
    """[R], absolute positions of the tokens to draw."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-probabilities of S tokens, and the largest of their rows, on the device.

    A row's own count of largest ones may be less than K. Holds no whole rows: they are long.
    """

    chosen: torch.Tensor  # [S] float32
    values: torch.Tensor  # [S, K] float32, largest first
    ids: torch.Tensor  # [S, K] int64; which of equal values are taken, and their order, is open
    last_ids: torch.Tensor
    """[S, K] the lowest ids whose value is that of the last that the row wants, lowest first; then
    anything."""
    counts: npt.NDArray[np.int32]
    """[S], how many of the largest each row wants."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the host wants to see."""
        return self.chosen, self.values, self.ids, self.last_ids

    def samples(self, token_ids: Sequence[int], host: Sequence[torch.Tensor]) -> list[Sample]:
        """Samples of these tokens, with `tensors` as they came to the host."""
        chosen, *rows = (tensor.tolist() for tensor in host)
        return [
            Sample(token_ids[i], chosen[i], _top(count, *(row[i] for row in rows)))
            for i, count in enumerate(self.counts.tolist())
        ]


@dataclass(frozen=True, slots=True)
class Drawn:
    """R tokens that were drawn, on the device."""

    tokens: torch.Tensor
    """[R] int64; 0 where the row's logits aren't all finite."""
    finite: torch.Tensor
    """[R] bool."""
    scored: Scored | None
    """Log-probabilities of those that want them, ..."""
    scored_draws: npt.NDArray[np.intp]
    """... which are these."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the host wants to see."""
        return self.tokens, self.finite, *(() if self.scored is None else self.scored.tensors)

    def samples(self, host: Sequence[torch.Tensor]) -> list[Sample | None]:
        """One for each draw, with `tensors` as they came to the host; `None` if not finite."""
        token_ids, finite = host[0].tolist(), host[1].tolist()
        samples: list[Sample | None] = [Sample(token_id) for token_id in token_ids]
        if self.scored is not None:
            which = self.scored_draws.tolist()
            scored = self.scored.samples([token_ids[draw] for draw in which], host[2:])
            for draw, sample in zip(which, scored, strict=True):
                samples[draw] = sample
        return [
            sample if is_finite else None for sample, is_finite in zip(samples, finite, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of S given tokens, on the device."""

    token_ids: npt.NDArray[np.int64]
    scored: Scored
    finite: torch.Tensor  # [S] bool

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the host wants to see."""
        return self.finite, *self.scored.tensors

    def samples(self, host: Sequence[torch.Tensor]) -> list[Sample | None]:
        """One for each token, with `tensors` as they came to the host; `None` if not finite."""
        samples = self.scored.samples(self.token_ids.tolist(), host[1:])
        return [
            sample if is_finite else None
            for sample, is_finite in zip(samples, host[0].tolist(), strict=True)
        ]


class Sampler:
    """Sampling parameters of all rows, and what draws with them."""

    def __init__(
        self, ops: Ops, vocab_size: int, eos_token_ids: Collection[int], device: torch.device
    ) -> None:
        self._ops = ops
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._device = device
        self._parameters = np.zeros(16, dtype=_PARAMETERS)
        self._edits: dict[int, tuple[LogitsEdit, ...]] = {}

    def add(self, row: int, sequence: AddedSequence) -> None:
        """Remember how `sequence`, which now has `row`, is sampled."""
        if row >= len(self._parameters):
            grown = np.zeros(max(row + 1, 2 * len(self._parameters)), dtype=_PARAMETERS)
            grown[: len(self._parameters)] = self._parameters
            self._parameters = grown
        sampling = sequence.sampling
        edits = edits_for(
            sampling,
            sequence.token_ids,
            sequence.num_prompt_tokens,
            self._eos_token_ids,
            self._vocab_size,
            self._device,
        )
        if edits:
            self._edits[row] = edits
        self._parameters[row] = (
            sampling.temperature,
            min(sampling.top_k, self._vocab_size),
            sampling.top_p,
            sampling.min_p,
            np.uint64(sampling.seed).astype(np.int64),
            _NO_LOGPROBS if sampling.logprobs is None else sampling.logprobs,
            bool(edits),
        )

    def remove(self, row: int) -> None:
        """Forget the row."""
        self._edits.pop(row, None)

    def append(self, rows: npt.NDArray[np.int64], token_ids: torch.Tensor) -> None:
        """`rows[i]` goes on with `token_ids[i]`, int64 on the device."""
        for i in np.flatnonzero(self._parameters["is_edited"][rows]).tolist():
            for edit in self._edits[int(rows[i])]:
                edit.append(token_ids[i : i + 1])

    def draw(self, logits: torch.Tensor, draws: Draws) -> Drawn:
        """One token for each of `draws`. `logits` is `[S, V]` float32 and is used up."""
        parameters = self._parameters[draws.rows]
        # One pass over the logits: a sum is finite only if all of its terms are.
        finite = torch.isfinite(logits.sum(dim=1))
        if len(draws.rows) != len(logits):
            which = self._send(draws.logit_rows)
            logits, finite = logits.index_select(0, which), finite.index_select(0, which)

        wants_logprobs = np.flatnonzero(parameters["logprobs"] != _NO_LOGPROBS)
        logprobs = None
        if len(wants_logprobs):
            logprobs = self._ops.log_softmax(logits.index_select(0, self._send(wants_logprobs)))
        for draw in np.flatnonzero(parameters["is_edited"]).tolist():
            for edit in self._edits[int(draws.rows[draw])]:
                edit.apply(logits[draw])

        tokens = self._ops.sample(
            logits,
            self._column(parameters, "temperature"),
            self._column(parameters, "top_k"),
            self._column(parameters, "top_p"),
            self._column(parameters, "min_p"),
            self._column(parameters, "seed"),
            self._send(draws.output_indices),
            self._send(draws.positions),
        )
        tokens = torch.where(finite, tokens, 0)
        scored = None
        if logprobs is not None:
            chosen = tokens.index_select(0, self._send(wants_logprobs))
            scored = _scored(logprobs, chosen, parameters["logprobs"][wants_logprobs])
        return Drawn(tokens, finite, scored, wants_logprobs)

    def score(self, logits: torch.Tensor, token_ids: npt.NDArray[np.int64], num_top: int) -> Scores:
        """The log-probability of row i's `token_ids[i]`, and the `num_top` largest of each row.

        `logits` is `[S, V]` float32, and stays.
        """
        counts = np.full(len(token_ids), num_top, dtype=np.int32)
        logprobs = self._ops.log_softmax(logits)
        scored = _scored(logprobs, self._send(token_ids), counts)
        return Scores(token_ids, scored, torch.isfinite(logits.sum(dim=1)))

    def _column(self, parameters: npt.NDArray[np.void], name: str) -> torch.Tensor:
        return self._send(parameters[name].copy())

    def _send(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._device)


def _scored(
    logprobs: torch.Tensor, token_ids: torch.Tensor, counts: npt.NDArray[np.int32]
) -> Scored:
    """Of `logprobs [S, V]` those of `token_ids [S]`, and the `counts [S]` largest of each row."""
    counts = np.minimum(counts, logprobs.shape[1])
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
    most = int(counts.max())
    if not most:
        none = torch.empty(len(counts), 0, device=logprobs.device)
        return Scored(chosen, none, none, none, counts)
    values, ids = logprobs.topk(most)
    # topk leaves open which of equal values it takes, which matters for the last one only.
    last = to_device(np.maximum(counts - 1, 0).astype(np.int64)[:, None], logprobs.device)
    backwards = -torch.arange(logprobs.shape[1], dtype=torch.int32, device=logprobs.device)
    is_last = logprobs == values.gather(1, last)
    last_ids = torch.where(is_last, backwards, -(2**31)).topk(most).indices
    return Scored(chosen, values, ids, last_ids, counts)


def _top(
    count: int, values: Sequence[float], ids: Sequence[int], last_ids: Sequence[int]
) -> tuple[tuple[int, float], ...]:
    """(token id, value) of a row's `count` largest, largest first, the lower id first on a tie."""
    if not count:
        return ()
    last = values[count - 1]
    above = [pair for pair in zip(ids, values, strict=True) if pair[1] > last]
    above.sort(key=lambda pair: (-pair[1], pair[0]))
    return *above, *((token_id, last) for token_id in last_ids[: count - len(above)])
