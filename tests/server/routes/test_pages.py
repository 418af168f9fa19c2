from __future__ import annotations

import asyncio

import httpx
from fake_engine import FakeEngineClient
from http_app import Caller, make_app

from kvpaging.engine.messages import PagePicture, PageState


class Pictured(FakeEngineClient):
    async def pages(self) -> PagePicture:
        states = (
            PageState(1, "free", 0, 0),
            PageState(2, "held", 2, 4),
            PageState(3, "held", 1, 3),
            PageState(4, "cached", 0, 4),
            PageState(5, "quarantined", 0, 0),
        )
        return PagePicture(1, 4, states)


def test_each_page_is_one_letter_and_what_is_special_is_named() -> None:
    answer = Caller(make_app(Pictured())).get("/pages")
    assert answer.json() == {
        "page_size": 4,
        "states": "fhhcq",
        "shared": {"2": 2},
        "partial": {"3": 3},
    }


def test_many_who_look_cost_the_engine_one_picture() -> None:
    class Counting(Pictured):
        num_pictures = 0

        async def pages(self) -> PagePicture:
            self.num_pictures += 1
            await asyncio.sleep(0.02)
            return await super().pages()

    engine = Counting()
    app = make_app(engine)

    async def look(times: int) -> list[int]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as http:
            answers = await asyncio.gather(*(http.get("/pages") for _ in range(times)))
        return [answer.status_code for answer in answers]

    assert asyncio.run(look(20)) == [200] * 20
    assert engine.num_pictures == 1
    app.state.service._pages_until = 0.0  # a while later
    assert asyncio.run(look(1)) == [200]
    assert engine.num_pictures == 2


def test_the_picture_is_a_page_that_asks_for_the_key_itself() -> None:
    http = Caller(make_app(Pictured(), api_keys=("secret",)))
    answer = http.get("/pages/view")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert 'fetch("../pages"' in answer.text
    assert http.get("/pages").status_code == 401
