from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hobbit.errors import ModelError
from hobbit.hub import choose, fetch

FILES = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-IQ4_K.gguf",
    "m-Q8_0-00001-of-00002.gguf",
    "m-Q8_0-00002-of-00002.gguf",
    "BF16/m-BF16.gguf",
    "mmproj-m-Q4_K_M.gguf",
]


def test_choose() -> None:
    assert choose(FILES) == ["m-Q4_K_M.gguf"]
    assert choose(FILES, "q4_k_s") == ["m-Q4_K_S.gguf"]
    assert choose(FILES, "BF16") == ["BF16/m-BF16.gguf"]
    assert choose(FILES, "Q8_0") == FILES[4:6]
    assert choose(FILES, "Q2_K") == []
    assert choose(["only.gguf"]) == ["only.gguf"]
    assert choose([]) == []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    fetched: list[str] = []

    def download(repo: str, name: str) -> str:
        if repo == "no/net":
            raise OSError("no route")
        fetched.append(name)
        return f"/cache/{name}"

    stub = SimpleNamespace(list_repo_files=lambda repo: FILES, hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    return fetched


def test_all_parts_are_fetched(hub: list[str]) -> None:
    assert fetch("user/m:Q8_0") == Path("/cache/m-Q8_0-00001-of-00002.gguf")
    assert hub == FILES[4:6]


def test_a_named_file(hub: list[str]) -> None:
    assert fetch("user/m", "other.gguf") == Path("/cache/other.gguf")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("m", "must be user/name"),
        ("user/m:Q2_K", "no GGUF file of that quantisation"),
        ("no/net", "cannot fetch no/net: no route"),
    ],
)
def test_errors(repo: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fetch(repo)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="pip install huggingface_hub"):
        fetch("user/m")
