"""What was installed, as the package's metadata and files tell it."""

from __future__ import annotations

import json
import re
from importlib import import_module, metadata, resources
from pathlib import Path

import pytest
import torch

CLONE = Path(__file__).parents[1]
OURS = ("server", "kvpaging", "kernels")


def is_editable() -> bool:
    text = metadata.distribution("kvpaging").read_text("direct_url.json") or "{}"
    return bool(json.loads(text).get("dir_info", {}).get("editable"))


@pytest.mark.parametrize("name", OURS)
def test_each_of_our_names_has_one_owner(name: str) -> None:
    # A package on the hub is named "kernels" as well.
    assert set(metadata.packages_distributions()[name]) == {"kvpaging"}


@pytest.mark.parametrize("name", OURS)
def test_the_tests_run_what_was_installed(name: str) -> None:
    path = import_module(name).__file__
    assert path is not None
    assert (CLONE in Path(path).parents) == is_editable()


def test_neither_triton_nor_cuda_comes_without_an_extra() -> None:
    requirements = metadata.requires("kvpaging") or []
    unwanted = [r for r in requirements if re.match(r"triton|nvidia|cuda", r)]
    assert unwanted
    assert all("extra ==" in requirement for requirement in unwanted)


@pytest.mark.skipif("+cpu" not in torch.__version__, reason="torch is not the CPU build")
def test_the_cpu_build_of_torch_brings_no_cuda_packages() -> None:
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    assert not [name for name in installed if name.startswith(("nvidia", "cuda"))]


def test_the_package_carries_its_data() -> None:
    demo = resources.files("kvpaging") / "demo_model"
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {
        entry.name for entry in demo.iterdir()
    }
    assert all((resources.files(name) / "py.typed").is_file() for name in OURS)


def test_the_command_is_installed() -> None:
    (command,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "kvpaging"]
    assert callable(command.load())
