"""Where a name leads: on this machine, in the stores of several tools, or without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants
from moefile import write_moe

from hobbit.errors import ModelError
from hobbit.layout import build_layout
from hobbit.models import is_estimate, locate
from hobbit.models.catalogue import known_models
from hobbit.models.hub import Unreachable
from hobbit.models.inventory import facts, row
from hobbit.models.location import check, locate_here
from hobbit.models.stores import stored_models


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    return tmp_path


def put(path: Path, **more: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_moe(path, **more)


def cached(machine: Path, repo: str, file: str, commit: str = "abc", **more: int) -> Path:
    folder = machine / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return put(folder / "snapshots" / commit / file, **more)


def ollama(
    machine: Path, name: str = "olmoe", tag: str = "latest", digest: str = "sha256:ab"
) -> Path:
    root = machine / "home" / ".ollama" / "models"
    manifest = root / "manifests" / "registry.example" / "library" / name / tag
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:cd"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest},
    ]
    manifest.write_text(json.dumps({"layers": layers}))
    blob = put(root / "blobs" / "x.gguf")
    return blob.rename(blob.with_name("sha256-ab"))


def test_paths(machine: Path) -> None:
    path = put(machine / "m-Q8_0.gguf")
    located = locate(str(path))
    assert (located.kind, located.path, located.quant) == ("local", path, "Q8_0")
    assert located.size == path.stat().st_size
    assert not is_estimate(located.header())
    with pytest.raises(ModelError, match="no such file"):
        locate(str(machine / "none.gguf")).header()


@pytest.mark.parametrize("name", ["a " * 300, f"{'a' * 300}.gguf", "~nobody-of-that-name/m.gguf"])
def test_what_can_be_no_path_is_no_model(machine: Path, name: str) -> None:
    for ask in (locate, locate_here):
        with pytest.raises(ModelError):
            found = ask(name)
            assert found.path is None or found.header()
    if not name.endswith(".gguf"):
        with pytest.raises(ModelError):
            check(name)


def test_a_folder_with_one_model(machine: Path) -> None:
    first = put(machine / "one" / "m.gguf", tensors_per_part=6)
    assert locate(str(machine / "one")).path == first
    put(machine / "one" / "other.gguf")
    with pytest.raises(ModelError, match=r"2 models, as m-00001.*: name one file"):
        locate(str(machine / "one"))
    (machine / "none").mkdir()
    with pytest.raises(ModelError, match=r"no \.gguf file"):
        locate(str(machine / "none"))


def test_the_hub_cache(machine: Path) -> None:
    path = cached(machine, "some/repo", "m-Q8_0.gguf")
    for name in ("some/repo", "Some/Repo:q8_0", "hf.co/some/repo@Q8_0", "some/repo:m-Q8_0.gguf"):
        located = locate(name)
        assert (located.path, located.store, located.quant) == (path, "hf", "Q8_0"), name
    best = cached(machine, "some/repo", "Q/m-Q4_K_M.gguf")
    assert locate("some/repo").path == best
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE or --offline"):
        locate("some/repo:Q2_K")


def test_the_main_branch_comes_first(machine: Path) -> None:
    cached(machine, "some/repo", "m.gguf", commit="old")
    new = cached(machine, "some/repo", "m.gguf", commit="new")
    os.utime(new.parent, (1, 1))
    assert [m.path for m in stored_models()] == [new]


def test_a_file_that_the_cache_lost_is_not_here(machine: Path) -> None:
    path = cached(machine, "some/repo", "m.gguf")
    path.unlink()
    path.symlink_to("../../blobs/gone")
    assert stored_models() == []


def test_other_tools(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = machine / "home"
    llama = put(home / ".cache" / "llama.cpp" / "ggml-org_x-Q4_0.gguf")
    studio = put(home / ".lmstudio" / "models" / "user" / "repo" / "m-Q6_K.gguf")
    blob = ollama(machine)
    stores = {model.name: (model.path, model.store) for model in stored_models()}
    assert stores == {
        "ggml-org_x-Q4_0": (llama, "llama.cpp"),
        "user/repo:Q6_K": (studio, "lmstudio"),
        "olmoe:latest": (blob, "ollama"),
    }
    assert locate("user/repo").path == studio
    assert locate("olmoe").path == locate("olmoe:latest").path == blob
    assert locate("olmoe").quant == ""
    assert row(stored_models()[-1]).quant == "F32"
    monkeypatch.setenv("LLAMA_CACHE", str(machine / "elsewhere"))
    other = put(machine / "elsewhere" / "y.gguf")
    assert other in [model.path for model in stored_models()]
    assert llama not in [model.path for model in stored_models()]


@pytest.mark.parametrize("digest", ["sha256:../../../secret", "md5:ab", "sha256:none"])
def test_a_manifest_names_only_blobs(machine: Path, digest: str) -> None:
    ollama(machine, digest=digest)
    assert stored_models() == []


def test_what_is_no_model_is_found_out(machine: Path) -> None:
    folder = machine / "home" / ".cache" / "llama.cpp"
    folder.mkdir(parents=True)
    (folder / "x.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(ModelError):
        row(stored_models()[0])


def test_a_part_of_a_name(machine: Path) -> None:
    path = cached(machine, "some/OLMoE-GGUF", "m-Q8_0.gguf")
    assert locate("olmoe").path == path
    cached(machine, "other/olmoe-2-GGUF", "m.gguf")
    with pytest.raises(ModelError, match=r"a part of several models' names: .*name one"):
        locate("olmoe")
    with pytest.raises(ModelError, match=r"no model is called 'qwen3-30b'.*qwen3-30b-a3b"):
        locate("qwen3-30b")


@pytest.mark.parametrize(
    "known", [k for k in known_models().values() if k.shape], ids=lambda k: k.name
)
def test_known_models_have_a_header_without_network(known: object) -> None:
    located = locate(known.name)  # type: ignore[attr-defined]
    assert located.kind == "known"
    header = located.header()
    assert is_estimate(header)
    assert build_layout(header).groups
    assert located.size == header.parts[0].size


def test_known_models_by_repository_and_quantisation() -> None:
    by_name, by_repository = locate("qwen3-30b-a3b:q8_0"), locate("Qwen/Qwen3-30B-A3B-GGUF:Q8_0")
    assert by_name.quant == by_repository.quant == "Q8_0"
    assert by_name.header().nbytes == by_repository.header().nbytes
    with pytest.raises(ModelError, match="of IQ1_S nothing is known without the network"):
        locate("qwen3-30b-a3b:IQ1_S")


def test_a_known_model_that_is_here(machine: Path) -> None:
    path = cached(machine, "Qwen/Qwen3-30B-A3B-GGUF", "Qwen3-30B-A3B-Q4_K_M.gguf")
    located = locate("qwen3-30b-a3b")
    assert (located.kind, located.path) == ("local", path)
    assert located.known is not None
    assert facts(located)["licence"] == "Apache-2.0"


def test_locate_here_asks_nobody() -> None:
    assert locate_here("some/repo").path is None
    assert locate_here("qwen3-30b-a3b").path is None
    with pytest.raises(ModelError, match="no model is called"):
        locate_here("nonsense")


def test_check(machine: Path) -> None:
    cached(machine, "some/repo", "m.gguf")
    for name in ("some/repo", "other/repo:Q8_0", "gpt-oss-20b", "x.gguf", "repo"):
        check(name)
    with pytest.raises(ModelError, match="a prompt for it is given with -p"):
        check("Why is the sky blue?")


def test_the_demo_before_it_is_made() -> None:
    located = locate("demo")
    assert (located.kind, located.path) == ("known", None)
    layout = build_layout(located.header())
    assert (len(layout.groups), layout.n_expert_used) == (30, 2)
    assert located.size == pytest.approx(416_323_904, rel=0.04)
