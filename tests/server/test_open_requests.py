from __future__ import annotations

from kvpaging.base.ids import RequestId
from kvpaging.scheduling.request import Request, SamplingParams
from server.open_requests import Suspects


def request(name: str, tenant: str, prompt: tuple[int, ...] = (1, 2)) -> Request:
    sampling = SamplingParams(max_new_tokens=1, seed=len(name))
    return Request(RequestId(name), prompt, sampling, tenant=tenant)


def test_a_suspicion_tells_no_tenant_what_another_sent() -> None:
    suspects = Suspects()
    for attempt in ("x", "xx"):
        suspects.accuse([request(attempt, "a"), request(attempt * 2, "b", (3,))])
    assert suspects.is_banned(request("again", "a"))
    assert suspects.is_banned(request("again", "b", (3,)))
    assert not suspects.is_banned(request("again", "b"))
    suspects.clear(request("again", "b"))
    assert suspects.is_banned(request("again", "a")), "another tenant's success clears nobody"
    suspects.clear(request("again", "a"))
    assert not suspects.is_banned(request("again", "a"))
