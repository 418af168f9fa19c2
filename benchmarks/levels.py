"""The levels below the device beside what bounds them: codecs, disk against plain files, opening.

Pages come from the bundled demo model (trained weights, its own prose as the prompt) and from one
of the same shape with random weights. Plain files are written and read in the same run, turn by
turn with the disk level, in pieces of the same size; the best of the turns counts for both, for the
machine may do other things. "cold" reads follow after the system was told to forget the files.

    python benchmarks/levels.py [--pages 2000] [--turns 3] [--directory DIR] [--json]

With blosc2, lz4, lmdb and rocksdict installed (none is needed to serve) they are measured too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvpaging.base.ids import PageKey
from kvpaging.levels.codec import PageCodec
from kvpaging.levels.disk import DiskLevel
from kvpaging.levels.level import StoredPage

ROOT = hashlib.sha256(b"benchmark").digest()
MB = 1e6
PROMPT_TOKENS = 2000
INDEX_ROWS = 100_000

Row = dict[str, Any]


def demo_model() -> Path:
    """The bundled checkpoint."""
    spec = importlib.util.find_spec("kvpaging")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "demo_model"


def randomized(checkpoint: Path, to: Path) -> Path:
    """A checkpoint of the same shape with random weights."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, to)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.ones_like(tensor)
        if tensor.ndim == 1
        else (0.02 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def model_pages(checkpoint: Path) -> list[bytes]:
    """Pages as they lie in the pool after prompts of Python source were computed."""
    import torch
    from tokenizers import Tokenizer

    from kvpaging.base.config import EngineOptions
    from kvpaging.engine.engine import Engine
    from kvpaging.execution.loading import load_executor
    from kvpaging.scheduling.request import SamplingParams

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(Path(argparse.__file__).read_text()).ids
    config, executor = load_executor(
        EngineOptions(model=str(checkpoint), device="cpu", kv_cache_memory_bytes=64 << 20)
    )
    engine = Engine(config, executor)
    prompts = [
        ids[first : first + PROMPT_TOKENS] for first in (0, PROMPT_TOKENS, 2 * PROMPT_TOKENS)
    ]
    engine.generate(prompts, SamplingParams(max_new_tokens=1, seed=1))
    pool = executor._pool.pages  # a benchmark may look inside
    used = [page.page_id for page in engine.pages() if page.state == "cached"]
    return [pool[page].contiguous().view(torch.uint8).numpy().tobytes() for page in used]


# Codecs.


def ours() -> tuple[Callable[[bytes], object], Callable[[Any], object]]:
    """The value of a page, header, check and digest included."""
    codec = PageCodec(ROOT, 2)
    key = PageKey(ROOT)
    return (
        lambda payload: codec.encode(StoredPage(key, key, b"", payload)),
        lambda value: codec.decode(value, key).payload,
    )


def codecs() -> dict[str, tuple[Callable[[bytes], object], Callable[[Any], object]]]:
    """Ours, and those libraries that are installed."""
    found = {"planes + zstd (ours, checked)": ours()}
    if importlib.util.find_spec("zstandard"):
        import zstandard

        shrink, grow = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
        found["zstd -1, no shuffle"] = (shrink.compress, grow.decompress)
    if importlib.util.find_spec("lz4"):
        import lz4.block

        def planes(payload: bytes) -> list[bytes]:
            items = np.frombuffer(payload, np.uint8).reshape(-1, 2)
            return [lz4.block.compress(items[:, i].copy()) for i in range(2)]

        def joined(parts: list[bytes]) -> bytes:
            halves = [np.frombuffer(lz4.block.decompress(part), np.uint8) for part in parts]
            return np.stack(halves, axis=1).tobytes()

        found["planes + lz4"] = (planes, joined)
    if importlib.util.find_spec("blosc2"):
        import blosc2

        blosc2.set_nthreads(1)
        for codec, filters in itertools.product(
            (blosc2.Codec.LZ4, blosc2.Codec.ZSTD), (blosc2.Filter.SHUFFLE, blosc2.Filter.BITSHUFFLE)
        ):

            def shrink2(payload: bytes, codec: Any = codec, filters: Any = filters) -> object:
                return blosc2.compress2(
                    payload, typesize=2, codec=codec, clevel=1, filters=[filters]
                )

            found[f"blosc2 {codec.name} {filters.name}".lower()] = (shrink2, blosc2.decompress2)
    return found


def measure_codecs(payloads: Sequence[bytes], source: str) -> Iterator[Row]:
    """Ratio, and rates in bytes of payload a second of one core."""
    raw = sum(map(len, payloads))
    for name, (shrink, grow) in codecs().items():
        shrink_s = grow_s = float("inf")
        for _ in range(3):
            started = time.process_time()
            values = [shrink(payload) for payload in payloads]
            between = time.process_time()
            back = [grow(value) for value in values]
            shrink_s = min(shrink_s, between - started)
            grow_s = min(grow_s, time.process_time() - between)
        assert all(bytes(b) == p for b, p in zip(back, payloads, strict=True))
        size = sum(
            sum(map(len, value)) if isinstance(value, list) else len(value)  # type: ignore[arg-type]
            for value in values
        )
        yield {
            "pages of": source,
            "codec": name,
            "ratio": round(raw / size, 3),
            "shrink MB/s": round(raw / MB / shrink_s),
            "grow MB/s": round(raw / MB / grow_s),
        }


# The disk.


def pages_of(payloads: Sequence[bytes], count: int) -> list[StoredPage]:
    """`count` pages, one chain, their payloads taken in turn."""
    keys = [PageKey(hashlib.sha256(b"%d" % n).digest()) for n in range(count)]
    return [
        StoredPage(
            key, PageKey(ROOT) if not n else keys[n - 1], bytes(64), payloads[n % len(payloads)]
        )
        for n, key in enumerate(keys)
    ]


def forget(directory: Path) -> None:
    """Ask the system to drop what it holds of these files in memory."""
    for path in directory.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def plain_write(path: Path, pages: Sequence[StoredPage]) -> float:
    """Seconds to write the payloads one behind the other, and to have the medium hold them."""
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for page in pages:
            file.write(page.payload)
        os.fdatasync(file.fileno())
    return time.perf_counter() - started


def plain_read(path: Path, pages: Sequence[StoredPage]) -> float:
    """Seconds to read them into memory that is kept, as pages are."""
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        kept = [file.read(len(page.payload)) for page in pages]
    elapsed_s = time.perf_counter() - started
    assert kept[-1] == pages[-1].payload
    return elapsed_s


def level_write(directory: Path, pages: Sequence[StoredPage], compress: bool) -> float:
    """Seconds to store the pages, and to have the medium hold them."""
    level = DiskLevel(directory, 1 << 34, root=ROOT, item_bytes=2, compress=compress)
    started = time.perf_counter()
    assert level.store(pages, 1e9) == len(pages)
    level.close()
    for path in directory.glob("*.pages"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


def level_read(directory: Path, pages: Sequence[StoredPage]) -> float:
    """Seconds to load them, checked and expanded."""
    level = DiskLevel(directory, 1 << 34, root=ROOT, item_bytes=2)
    keys = [page.key for page in pages]
    started = time.perf_counter()
    found = level.load(keys, 1e9)
    elapsed_s = time.perf_counter() - started
    assert found[0] == pages[0]
    assert found[-1] == pages[-1]
    assert None not in found
    level.close()
    return elapsed_s


def measure_disk(base: Path, pages: Sequence[StoredPage], turns: int) -> Iterator[Row]:
    """Rates in bytes of payload a second, and the level's part of the plain file's rate.

    "MB/cpu s" is what one core does: what a machine that has nothing else to do multiplies.
    """
    times: dict[tuple[str, str], float] = {}
    cpu_times: dict[tuple[str, str], float] = {}

    def note(what: str, who: str, measure: Callable[[], float]) -> None:
        started = time.process_time()
        elapsed_s = measure()
        cpu_s = time.process_time() - started
        times[what, who] = min(elapsed_s, times.get((what, who), elapsed_s))
        cpu_times[what, who] = min(cpu_s, cpu_times.get((what, who), cpu_s))

    for turn in range(turns):
        directory = base / f"turn{turn}"
        directory.mkdir()
        plain = directory / "plain"
        levels = {"raw": directory / "raw", "compressed": directory / "compressed"}
        note("write", "plain", partial(plain_write, plain, pages))
        for name, path in levels.items():
            note("write", name, partial(level_write, path, pages, name == "compressed"))
        for what in ("cold read", "warm read"):
            if what == "cold read":
                for path in levels.values():
                    forget(path)
                file = os.open(plain, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)
            note(what, "plain", partial(plain_read, plain, pages))
            for name, path in levels.items():
                note(what, name, partial(level_read, path, pages))
        shutil.rmtree(directory)
    total = sum(len(page.payload) for page in pages)
    for what in ("write", "cold read", "warm read"):
        row: Row = {"": what, "plain MB/s": round(total / MB / times[what, "plain"])}
        for name in ("raw", "compressed"):
            row[f"{name} MB/s"] = round(total / MB / times[what, name])
            row[f"{name} / plain"] = round(times[what, "plain"] / times[what, name], 2)
            row[f"{name} MB/cpu s"] = round(total / MB / cpu_times[what, name])
        yield row


def measure_opening(base: Path) -> Iterator[Row]:
    """Opening a store of 100,000 pages, with its index and without."""
    directory = base / "opening"
    level = DiskLevel(directory, 1 << 34, root=ROOT, item_bytes=2)
    pages = pages_of([os.urandom(512)], INDEX_ROWS)
    level.store(pages, 1e9)
    level.close()
    for what in ("with its index", "index lost, scanned"):
        if what != "with its index":
            (directory / "index.sqlite").unlink()
        started = time.perf_counter()
        level = DiskLevel(directory, 1 << 34, root=ROOT, item_bytes=2)
        opened_s = time.perf_counter() - started
        keys = [page.key for page in pages]
        started = time.perf_counter()
        assert all(level.contains(keys))
        contains_s = time.perf_counter() - started
        yield {
            "opening 100,000 pages": what,
            "seconds": round(opened_s, 3),
            "contains ns/page": round(contains_s / len(keys) * 1e9),
            "index bytes/page": round((directory / "index.sqlite").stat().st_size / len(keys), 1),
        }
        level.close()


# What could hold the index, one row a page.


def measure_indexes(base: Path) -> Iterator[Row]:
    """100,000 rows of (key, segment, offset, length) in batches of 1,024, and looking them up."""
    keys = [hashlib.sha256(b"%d" % n).digest() for n in range(INDEX_ROWS)]
    batches = [
        [(key, n // 1024, j * 50_000, 50_000) for j, key in enumerate(keys[n : n + 1024])]
        for n in range(0, INDEX_ROWS, 1024)
    ]
    probes = keys[:: INDEX_ROWS // 5000]
    packed = struct.Struct("<QQI")
    for name, make in (("sqlite", _sqlite), ("lmdb", _lmdb), ("rocksdict", _rocksdict)):
        if name != "sqlite" and not importlib.util.find_spec(name):
            continue
        directory = base / name
        directory.mkdir()
        put, get, close = make(directory, packed)
        started = time.perf_counter()
        for batch in batches:
            put(batch)
        put_s = time.perf_counter() - started
        started = time.perf_counter()
        assert all(get(key) is not None for key in probes)
        get_s = time.perf_counter() - started
        close()
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        yield {
            "index": name,
            "put us/row": round(put_s / INDEX_ROWS * 1e6, 2),
            "get us/row": round(get_s / len(probes) * 1e6, 2),
            "bytes/row": round(size / INDEX_ROWS),
        }


def _sqlite(directory: Path, packed: struct.Struct) -> Any:
    db = sqlite3.connect(directory / "index", isolation_level=None)
    db.execute("PRAGMA journal_mode = TRUNCATE")
    db.execute("PRAGMA synchronous = OFF")
    db.execute("CREATE TABLE pages (key BLOB PRIMARY KEY, a, b, c) WITHOUT ROWID")

    def put(rows: list[Any]) -> None:
        db.execute("BEGIN")
        db.executemany("INSERT INTO pages VALUES (?, ?, ?, ?)", rows)
        db.execute("COMMIT")

    return (
        put,
        lambda key: db.execute("SELECT * FROM pages WHERE key = ?", (key,)).fetchone(),
        db.close,
    )


def _lmdb(directory: Path, packed: struct.Struct) -> Any:
    import lmdb

    env = lmdb.open(str(directory), map_size=1 << 30, sync=False)

    def put(rows: list[Any]) -> None:
        with env.begin(write=True) as transaction:
            for key, *place in rows:
                transaction.put(key, packed.pack(*place))

    def get(key: bytes) -> object:
        with env.begin() as transaction:
            return transaction.get(key)

    return put, get, env.close


def _rocksdict(directory: Path, packed: struct.Struct) -> Any:
    import rocksdict

    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    store = rocksdict.Rdict(str(directory), options=options)

    def put(rows: list[Any]) -> None:
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, *place in rows:
            batch.put(key, packed.pack(*place))
        store.write(batch)

    return put, store.get, store.close


def show(rows: Sequence[Row]) -> None:
    """One table."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print()


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=2000, help="pages in the disk's turns")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="where the files go")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        base = Path(name)
        trained = model_pages(demo_model())
        random = model_pages(randomized(demo_model(), base / "random"))
        tables = {
            "codecs": [
                *measure_codecs(trained[:200], "demo model"),
                *measure_codecs(random[:200], "random weights"),
            ],
            "disk": list(measure_disk(base, pages_of(trained, arguments.pages), arguments.turns)),
            "opening": list(measure_opening(base)),
            "indexes": list(measure_indexes(base)),
        }
    if arguments.json:
        print(json.dumps(tables))
        return
    for rows in tables.values():
        show(rows)


if __name__ == "__main__":
    main()
