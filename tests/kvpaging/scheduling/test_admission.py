from __future__ import annotations

import msgspec
import pytest

from kvpaging.base.config import SchedulerConfig
from kvpaging.base.errors import BadRequest, NeverFits, PromptTooLong
from kvpaging.base.ids import RequestId
from kvpaging.scheduling import admission
from kvpaging.scheduling.request import Request, SamplingParams

CONFIG = SchedulerConfig(
    num_pages=4,
    page_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=8,
    max_model_len=32,
    max_num_waiting=4,
)
GOOD = Request(RequestId("r"), (1, 2, 3), SamplingParams(max_new_tokens=4, seed=0))


def check(**changes: object) -> None:
    names = set(Request.__struct_fields__)
    sampling = {k: v for k, v in changes.items() if k not in names}
    request = {k: v for k, v in changes.items() if k in names}
    changed = msgspec.structs.replace(
        GOOD, sampling=msgspec.structs.replace(GOOD.sampling, **sampling), **request
    )
    admission.check(changed, CONFIG, vocab_size=10)


def test_a_good_request_passes() -> None:
    check()
    check(temperature=0.0, top_k=3, logit_bias=((9, -1.0),), stop_token_ids=(0,), logprobs=20)


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("prompt", {"prompt_token_ids": ()}),
        ("prompt", {"prompt_token_ids": (1, 10)}),
        ("prompt", {"prompt_token_ids": (-1, 3)}),
        ("n", {"n": 0}),
        ("n", {"n": 5}),
        ("priority", {"priority": 101}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("min_new_tokens", {"min_new_tokens": 5}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**64}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": float("inf")}),
        ("temperature", {"temperature": 10**400}),
        ("top_k", {"top_k": -1}),
        ("top_k", {"top_k": 2**31}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": float("nan")}),
        ("min_p", {"min_p": 1.5}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("repetition_penalty", {"repetition_penalty": 1e-45}),
        ("presence_penalty", {"presence_penalty": 1e39}),
        ("presence_penalty", {"presence_penalty": float("inf")}),
        ("frequency_penalty", {"frequency_penalty": float("nan")}),
        ("logit_bias", {"logit_bias": ((10, 1.0),)}),
        ("logit_bias", {"logit_bias": ((1, float("inf")),)}),
        ("stop_token_ids", {"stop_token_ids": (10,)}),
        ("logprobs", {"logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
    ],
)
def test_each_limit_names_its_field(param: str, changes: dict[str, object]) -> None:
    with pytest.raises(BadRequest) as caught:
        check(**changes)
    assert caught.value.param == param


def test_lengths_say_their_numbers() -> None:
    with pytest.raises(PromptTooLong, match=r"33.*32"):
        check(prompt_token_ids=(1,) * 29)
    with pytest.raises(NeverFits, match="5 KV pages and the pool has 4"):
        check(prompt_token_ids=(1,) * 14)


@pytest.mark.parametrize("num_prompt", range(1, 20))
def test_what_is_said_to_fit_fits_and_one_more_does_not(num_prompt: int) -> None:
    most = admission.max_new_tokens_that_fit(num_prompt, CONFIG)
    if most >= 1:
        check(prompt_token_ids=(1,) * num_prompt, max_new_tokens=most)
    with pytest.raises(BadRequest):
        check(prompt_token_ids=(1,) * num_prompt, max_new_tokens=max(most, 0) + 1)
