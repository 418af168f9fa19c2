"""The native sources under AddressSanitizer and UBSan, over random shapes and all paths."""

import concurrent.futures
import os
import pathlib
import subprocess

import pytest
from native_builds import SOURCES, find_compiler

DRIVER = pathlib.Path(__file__).parent / "sanitize_driver.cpp"
# Of UBSan, what raw loops get wrong; the rest triples the time to compile.
SANITIZE = [
    "-fsanitize=address",
    "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero,unreachable,return",
    "-fno-sanitize-recover=all",
]
ROUNDS = 6


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    found = find_compiler()
    trial = tmp_path_factory.mktemp("trial") / "trial.cpp"
    trial.write_text("int main() { return 0; }\n")
    linked = subprocess.run(
        [found, *SANITIZE, str(trial), "-o", str(trial.with_suffix(""))], capture_output=True
    )
    if linked.returncode:
        pytest.skip("the compiler has no sanitizer libraries")
    return found


@pytest.mark.slow
def test_no_byte_too_far_on_any_path(compiler, seed, tmp_path):
    options = [
        *SANITIZE,
        "-I",
        str(SOURCES),
        "-std=c++17",
        "-O1",
        "-g1",
        "-w",
        "-pthread",
        "-ffp-contract=off",
    ]
    sources = [*sorted(SOURCES.glob("*.cpp")), DRIVER]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]

    def build(pair):
        source, target = pair
        return subprocess.run(
            [compiler, *options, "-c", str(source), "-o", str(target)],
            capture_output=True,
            text=True,
        )

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in pool.map(build, zip(sources, objects, strict=True)):
            assert done.returncode == 0, done.stderr
    driver = tmp_path / "driver"
    subprocess.run([compiler, *options, *map(str, objects), "-o", str(driver)], check=True)
    # Leaks need ptrace, which containers often forbid.
    ran = subprocess.run(
        [str(driver), str(seed), str(ROUNDS)],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "portable ok" in ran.stdout
