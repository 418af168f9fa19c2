"""From logits to samples: the edits of each sequence, the draw, and log-probabilities.

Log-probabilities are of the raw logits, before bias, penalties and temperature. A row's result
depends on its own inputs alone. Knows rows, not sequences; drawing itself is `kernels.ops.sample`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from kernels.ops import Ops
from kvpaging.execution.logits_edits import LogitsEdit, edits_for
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

    def append(self, row: int, token_id: int) -> None:
        """The token that `row` goes on with was decided."""
        for edit in self._edits.get(row, ()):
            edit.append(token_id)

    def draw(self, logits: torch.Tensor, draws: Draws) -> list[Sample | None]:
        """One sample for each of `draws`; `None` where the row's logits aren't all finite.

        `logits` is `[S, V]` float32 and is used up.
        """
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
        token_ids, are_finite = torch.stack((tokens, finite.long())).tolist()  # one transfer
        samples: list[Sample | None] = [
            Sample(token_id) if is_finite else None
            for token_id, is_finite in zip(token_ids, are_finite, strict=True)
        ]
        if logprobs is not None:
            counts = parameters["logprobs"][wants_logprobs].tolist()
            for draw, count, row in zip(wants_logprobs.tolist(), counts, logprobs, strict=True):
                if samples[draw] is not None:
                    samples[draw] = _with_logprobs(token_ids[draw], row, count)
        return samples

    def score(
        self,
        logits: torch.Tensor,
        token_ids: npt.NDArray[np.int64],
        num_top: int,
    ) -> list[Sample | None]:
        """The log-probability of row i's `token_ids[i]`, and the `num_top` largest of each row.

        `logits` is `[S, V]` float32, and stays. `None` where the row's logits aren't all finite.
        """
        logprobs = self._ops.log_softmax(logits)
        chosen = logprobs.gather(1, self._send(token_ids)[:, None]).squeeze(1).tolist()
        finite = torch.isfinite(logits.sum(dim=1)).tolist()
        rows = zip(token_ids.tolist(), chosen, logprobs, finite, strict=True)
        return [
            Sample(token_id, logprob, _top(row, num_top)) if is_finite else None
            for token_id, logprob, row, is_finite in rows
        ]

    def _column(self, parameters: npt.NDArray[np.void], name: str) -> torch.Tensor:
        return self._send(parameters[name].copy())

    def _send(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _with_logprobs(token_id: int, logprobs: torch.Tensor, count: int) -> Sample:
    """The sample with its own log-probability and the `count` largest, of the row `[V]`."""
    return Sample(token_id, float(logprobs[token_id]), _top(logprobs, count))


def _top(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """(token id, value) of the `count` largest, largest first, the lower id first on a tie."""
    count = min(count, len(logprobs))
    if not count:
        return ()
    # topk leaves open which of equal values it takes: it gives the bound, and ids decide.
    bound = logprobs.topk(count).values[-1]
    ids = (logprobs >= bound).nonzero().squeeze(1)
    values, order = logprobs[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order][:count].tolist(), values[:count].tolist(), strict=True))
