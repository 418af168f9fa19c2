from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngineClient
from http_app import Caller, make_app

from kvpaging.base.evictions import EvictionCause
from kvpaging.cache.explanation import MissReason
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
    assert all(f'get("{path}")' in answer.text for path in ("../pages", "../cache/stats"))
    assert http.get("/pages").status_code == 401


BROWSER = """
const answers = JSON.parse(require("fs").readFileSync(0, "utf8")), elements = {};
let round = 0, again = null;
const make = () => ({textContent: "…", innerHTML: "", addEventListener() {},
  getContext: () => ({fillRect() {}})});
globalThis.document = {body: {clientWidth: 800}, getElementById: id => elements[id] ??= make()};
globalThis.innerHeight = 600;
globalThis.sessionStorage = {getItem: () => null, setItem() {}};
globalThis.performance = {now: () => round * answers.pause_s * 1000};
globalThis.addEventListener = () => {};
globalThis.setTimeout = f => { again = f; };
globalThis.fetch = async path => ({ok: true, json: async () => answers[path][round]});
eval(require("fs").readFileSync(process.argv[1], "utf8"));
(async () => {
  for (;;) {
    await new Promise(setImmediate);
    if (++round === answers["../pages"].length) break;
    await again();
  }
  console.log(JSON.stringify(elements));
})();
"""


def shown(tmp_path: Any, pause_s: float, *caches: dict[str, Any]) -> dict[str, str]:
    """What the page shows after these answers of `/cache/stats`, one after the other."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("runs the page's script in node, which is not installed")
    http = Caller(make_app(Pictured()))
    script = http.get("/pages/view").text.split("<script>")[1].split("</script>")[0]
    (tmp_path / "page.js").write_text(script.replace('"use strict";', ""), "utf-8")
    answers = {
        "pause_s": pause_s,
        "../pages": [http.get("/pages").json()] * len(caches),
        "../cache/stats": caches,
    }
    done = subprocess.run(
        [node, "-e", BROWSER, str(tmp_path / "page.js")],
        input=json.dumps(answers),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    elements = json.loads(done.stdout)
    assert elements["note"]["textContent"] == "Point at a page."
    return {name: element["innerHTML"] for name, element in elements.items()}


def cells(row: str) -> list[str]:
    """The texts of a table's row."""
    row = re.sub(r"<i .*?</i>|</?div.*?>", "", row)
    return re.split(r"<t[hd].*?>", row)[1:]


def cache_stats() -> dict[str, Any]:
    stats: dict[str, Any] = Caller(make_app(FakeEngineClient())).get("/cache/stats").json()
    return stats


def test_each_level_shows_its_pages_and_bytes(tmp_path: Any) -> None:
    rows = shown(tmp_path, 1, cache_stats())["levels"].split("</tr>")
    assert cells(rows[0]) == [
        "device",
        "",
        "320 B of 384 B",
        "3 held, 2 cached, 1 free",
        "-",
        "40.0 %",
    ]
    assert cells(rows[1]) == [
        "disk",
        "",
        "700 B of 1000 B",
        "7 kept, 8 evicted, 2 late, 1 refused, 3 corrupt",
        "-",
        "10.0 %",
    ]
    assert cells(rows[2])[::2] == ["on the way down", "128 B", ""]
    assert 'title="held: 3"' in rows[0]
    assert "width:50%" in rows[0]
    assert "width:70%" in rows[1]


def test_lately_is_what_was_added_since_a_minute_ago(tmp_path: Any) -> None:
    before, then, now = cache_stats(), cache_stats(), cache_stats()
    then["device"]["hit_pages"] += 3
    now["device"]["hit_pages"] += 6
    now["missed_pages"]["never_seen"] += 1
    soon = shown(tmp_path, 20, before, then, now)
    late = shown(tmp_path, 50, before, then, now)
    assert cells(soon["reuse"])[0] == "last 40 s"
    assert cells(soon["reuse"])[2].startswith("7 pages, 85.7 % reused")
    assert cells(late["reuse"])[0] == "last 50 s"
    assert cells(late["reuse"])[2].startswith("4 pages, 75.0 % reused")
    assert cells(late["reuse"])[5].startswith("107 pages, 52.3 % reused")
    assert "3 of device" in late["reasons"]
    assert "1 never seen" in late["reasons"]
    assert "0 evicted: no room" in late["reasons"]
    assert "75.0 %" in late["levels"].split("</tr>")[0]


def test_an_engine_that_began_anew_is_counted_anew(tmp_path: Any) -> None:
    old, new = cache_stats(), cache_stats()
    new["device"]["hit_pages"], new["missed_pages"] = 2, {}
    told = shown(tmp_path, 1, old, new)
    assert cells(told["reuse"])[0] == "last 0 s"
    assert cells(told["reuse"])[2].startswith("none<")


def test_the_page_knows_every_reason_and_every_field() -> None:
    text = Caller(make_app(Pictured())).get("/pages/view").text
    table = text.split("const MISSED = {")[1].split("};")[0]
    reasons = {str(reason) for reason in MissReason}
    # No page; with its cause; of one level only, or of explanations only.
    reasons -= {MissReason.BELOW_PAGE, MissReason.EVICTED}
    reasons -= {MissReason.NOT_THERE, MissReason.NOT_ASKED, MissReason.OTHER_SETTINGS}
    reasons |= {f"evicted_{cause}" for cause in EvictionCause}
    assert set(re.findall(r"(\w+): \[", table)) == reasons
    stats = cache_stats()
    for of, fields in (
        (stats, set(re.findall(r"\bcache\.(\w+)", text))),
        (stats["device"], set(re.findall(r"\bcache\.device\.(\w+)", text))),
        (stats["levels"][0], set(re.findall(r"\blevel\.(\w+)", text))),
    ):
        assert fields
        assert fields <= of.keys()
