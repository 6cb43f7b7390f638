"""hobbit pull and its kin as processes, against a server that speaks the hub's protocol."""

from __future__ import annotations

import errno
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fakehub import COMMIT, FakeHub, serving, sha256
from moefile import write_moe
from tiny import make_text_model

from hobbit.errors import NoSpace
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout
from hobbit.models.catalogue import known_models
from hobbit.models.hub import HubError, RemoteFile, Repository, remote_header
from hobbit.models.pulling import check_space

Run = Callable[..., subprocess.CompletedProcess[str]]
ONE, SPLIT = "m-Q4_K_M.gguf", "m-Q8_0-0000{}-of-00004.gguf"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    source = tmp_path / "source"
    source.mkdir()
    write_moe(source / ONE)
    write_moe(source / "m-Q8_0.gguf", tensors_per_part=6, seed=1)
    with serving() as hub:
        hub.files["some/tiny"] = {"README.md": b"# tiny"} | {
            path.name: path.read_bytes() for path in sorted(source.glob("*.gguf"))
        }
        yield hub


@pytest.fixture
def environment_of(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    home = str(tmp_path / "home")
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{home}/hf", "HOBBIT_CACHE": f"{home}/hobbit"}
    return dict(os.environ) | mine


@pytest.fixture
def run(environment_of: dict[str, str]) -> Run:
    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hobbit", *args]
        return subprocess.run(
            command, env=environment_of | env, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def cache(environment_of: dict[str, str]) -> Path:
    return Path(environment_of["HF_HOME"]) / "hub" / "models--some--tiny"


def test_pull(hub: FakeHub, run: Run, cache: Path) -> None:
    done = run("pull", "some/tiny")
    path = cache / "snapshots" / COMMIT / ONE
    assert (done.returncode, done.stdout) == (0, f"{path}\n")
    assert path.read_bytes() == hub.files["some/tiny"][ONE]
    assert path.resolve().name == sha256(path.read_bytes())
    assert (cache / "refs" / "main").read_text() == COMMIT
    size = len(hub.files["some/tiny"][ONE]) >> 10
    assert f"some/tiny: Q4_K_M, {size}" in done.stderr
    assert "it also has Q8_0 (" in done.stderr
    sent = hub.sent
    again = run("pull", "hf.co/some/tiny:q4_k_m", "--json")
    told = json.loads(again.stdout)
    assert (told["path"], told["fetched"]) == (str(path), False)
    assert "is here already" in again.stderr
    assert hub.sent == sent


def test_split_models(hub: FakeHub, run: Run, cache: Path) -> None:
    done = run("pull", "some/tiny:Q8_0")
    first = cache / "snapshots" / COMMIT / SPLIT.format(1)
    assert done.stdout == f"{first}\n"
    assert len(open_gguf(first).parts) == 4
    assert "fetching part 4 of 4" in done.stderr
    listed = json.loads(run("ls", "--json").stdout)["models"]
    assert [(row["name"], row["experts"], row["source"]) for row in listed] == [
        ("some/tiny:Q8_0", "4 x 2", "hf")
    ]
    assert listed[0]["size"] == sum(
        len(data) for name, data in hub.files["some/tiny"].items() if "Q8_0" in name
    )


def test_a_cut_connection_is_resumed(hub: FakeHub, run: Run) -> None:
    hub.cut = [100_000, 50_000]
    assert run("pull", "some/tiny").returncode == 0
    starts = [int(asked.split("=")[1].split("-")[0]) for asked in hub.ranges]
    assert starts == [0, 100_000, 150_000]


def test_an_interrupted_pull_goes_on(
    hub: FakeHub, run: Run, cache: Path, environment_of: dict[str, str]
) -> None:
    hub.hold = 300_000
    command = [sys.executable, "-m", "hobbit", "pull", "some/tiny"]
    child = subprocess.Popen(command, env=environment_of, stderr=subprocess.PIPE, text=True)
    assert hub.waiting.wait(60)
    blob = cache / "blobs" / f"{sha256(hub.files['some/tiny'][ONE])}.incomplete"
    while not blob.exists() or blob.stat().st_size < 200_000:
        assert child.poll() is None
        # What was sent is on its way through the socket and the file's buffer.
        if blob.exists():
            os.sched_yield()
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "the same command goes on where this stopped" in said
    kept = blob.stat().st_size
    assert kept >= 200_000
    hub.go_on.set()
    done = run("pull", "some/tiny")
    assert done.returncode == 0
    assert "of it still to come" in done.stderr
    assert hub.ranges[-1].startswith(f"bytes={kept}-")
    assert not blob.exists()


def test_a_wrong_checksum(hub: FakeHub, run: Run, cache: Path) -> None:
    hub.corrupt = {ONE}
    done = run("pull", "some/tiny")
    assert (done.returncode, done.stdout) == (3, "")
    assert "what came is not what the hub says it is" in done.stderr
    assert [*(cache / "blobs").iterdir()] == []
    hub.corrupt = set()
    assert run("pull", "some/tiny").returncode == 0


def test_gated(hub: FakeHub, run: Run) -> None:
    hub.gated = {"some/tiny"}
    done = run("pull", "some/tiny")
    assert done.returncode == 3
    assert "accept their terms on its page" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert run("pull", "some/tiny", HF_TOKEN="hf_mine").returncode == 0
    assert "Bearer hf_mine" in hub.tokens


def test_the_token_stays_with_the_hub(hub: FakeHub, run: Run) -> None:
    with serving() as cdn:
        cdn.files, hub.cdn = hub.files, cdn.url
        done = run("pull", "some/tiny", HF_TOKEN="hf_mine")
        assert done.returncode == 0, done.stderr
        assert hub.tokens == {"Bearer hf_mine"}
        assert cdn.tokens == {None}
        assert run("show", "some/tiny:Q8_0", HF_TOKEN="hf_mine").returncode == 0
        assert cdn.tokens == {None}
    assert hub.sent < 10_000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such", "there is no such repository, or it is private"),
        ("some/tiny:Q2_K", "has no Q2_K; it has Q4_K_M, Q8_0"),
        ("some/empty", "the repository has no GGUF file"),
        ("nonsense", "no model is called 'nonsense'"),
    ],
)
def test_what_is_not_there(hub: FakeHub, run: Run, name: str, words: str) -> None:
    hub.files["some/empty"] = {"README.md": b""}
    done = run("pull", name)
    assert (done.returncode, done.stdout) == (3, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_offline(hub: FakeHub, run: Run) -> None:
    for how in ({}, {"HF_HUB_OFFLINE": "1"}, {"HOBBIT_OFFLINE": "1"}):
        flag = () if how else ("--offline",)
        done = run("pull", "some/tiny", *flag, **how)
        assert done.returncode == 3
        assert "forbids to fetch it" in done.stderr
    assert hub.tokens == set()
    run("pull", "some/tiny")
    hub.tokens.clear()
    assert run("show", "some/tiny", "--offline").returncode == 0
    assert hub.tokens == set()


def test_no_server(run: Run) -> None:
    done = run("pull", "some/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 3
    assert "the hub cannot be reached" in done.stderr
    known = run("show", "gpt-oss-20b", HF_ENDPOINT="http://127.0.0.1:9")
    assert "estimated from its shape" in known.stdout


def test_run_fetches_what_is_not_here(hub: FakeHub, run: Run, cache: Path) -> None:
    """The model has no vocabulary, so a plan that is refused ends the run after the fetch."""
    done = run("run", "some/tiny:Q8_0", "hello", "--memory", "20M")
    assert done.returncode == 4
    assert (cache / "snapshots" / COMMIT / SPLIT.format(1)).exists()
    assert run("run", "-hf", "some/tiny", "-hff", ONE, "x", "--memory", "20M").returncode == 4
    assert (cache / "snapshots" / COMMIT / ONE).exists()


def test_the_commands_of_the_docs(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    name = known_models()["granite-3.1-1b-a400m"].source
    path = make_text_model(tmp_path / "granite-Q4_K_M.gguf", arch="granitemoe")
    hub.files[name] = {path.name: path.read_bytes()}
    block = text.split("```sh\n")[1].split("```")[0]
    quiet = {"HOBBIT_YES": "1", "HOBBIT_PREDICT": "4", "HOBBIT_THREADS": "1"}
    lines = [shlex.split(line) for line in block.splitlines()]
    assert [words[1] for words in lines] == ["ls", "pull", "ls", "show", "run", "rm"]
    for words in lines:
        done = run(*words[1:], **quiet)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout


def test_rm(hub: FakeHub, run: Run, cache: Path) -> None:
    run("pull", "some/tiny")
    run("pull", "some/tiny:Q8_0")
    refused = run("rm", "some/tiny:Q8_0")
    assert refused.returncode == 2
    assert "give -y" in refused.stderr
    assert run("rm", "some/tiny:Q8_0", "-y").returncode == 0
    assert [m["name"] for m in json.loads(run("ls", "--json").stdout)["models"]] == [
        "some/tiny:Q4_K_M"
    ]
    assert len([*(cache / "blobs").iterdir()]) == 1
    assert "removed some/tiny:Q4_K_M" in run("rm", "some/tiny", "-y").stdout
    assert json.loads(run("ls", "--json").stdout)["models"] == []
    assert not [*cache.parent.rglob("*.gguf")]
    assert run("rm", "some/tiny", "-y").returncode == 3


def test_rm_leaves_what_a_link_in_the_cache_leads_to(
    hub: FakeHub, run: Run, cache: Path, tmp_path: Path
) -> None:
    run("pull", "some/tiny")
    (pulled,) = cache.rglob("*Q4_K_M.gguf")
    theirs = write_moe(tmp_path / "theirs.gguf")
    link = pulled.with_name("tiny-Q6_K.gguf")
    link.symlink_to(theirs)
    done = run("rm", "some/tiny:Q6_K", "-y")
    assert done.returncode == 0, done.stderr
    assert not link.is_symlink()
    assert theirs.is_file() and pulled.is_file()


@pytest.mark.parametrize(("answer", "left"), [("n", 1), ("", 1), ("y", 0)])
def test_rm_asks_on_a_terminal(
    hub: FakeHub, run: Run, environment_of: dict[str, str], answer: str, left: int
) -> None:
    run("pull", "some/tiny")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "hobbit", "rm", "some/tiny"]
    child = subprocess.Popen(
        command, env=environment_of, stdin=theirs, stdout=theirs, stderr=theirs, text=True
    )
    said = b""
    while b"[y/N]" not in said:
        said += os.read(ours, 1024)
    assert b"remove some/tiny:Q4_K_M (773.2 KiB)?" in said
    os.write(ours, f"{answer}\n".encode())
    assert child.wait(60) == (0 if answer == "y" else 1)
    os.close(theirs)
    os.close(ours)
    assert len(json.loads(run("ls", "--json").stdout)["models"]) == left


def test_known_models_are_listed(run: Run) -> None:
    known = json.loads(run("ls", "--known", "--json").stdout)["models"]
    assert {"demo", "gpt-oss-20b"} < {model["name"] for model in known}
    table = run("ls", "--known").stdout.splitlines()
    assert len(table) == len(known) + 1
    assert any(line.startswith("gpt-oss-20b ") and "11.3 GiB" in line for line in table)


def test_rm_leaves_other_tools_alone(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".cache" / "llama.cpp"
    folder.mkdir(parents=True)
    path = write_moe(folder / "theirs.gguf")
    own = write_moe(tmp_path / "own.gguf")
    done = run("rm", "theirs", "-y")
    assert (done.returncode, path.exists()) == (3, True)
    assert "is in llama.cpp's cache" in done.stderr
    done = run("rm", str(own), "-y")
    assert (done.returncode, own.exists()) == (3, True)
    assert "is your own file" in done.stderr


def test_rm_low(run: Run, tmp_path: Path) -> None:
    model = write_moe(tmp_path / "m.gguf", kind="Q8_0")
    assert run("rm", "--low", str(model), "-y").returncode == 3
    made = run("prepare", str(model), "--no-calibrate", "--imatrix", "none", "-t", "1")
    assert made.returncode == 0, made.stderr
    low = tmp_path / "m.hobbit-low.gguf"
    shown = json.loads(run("show", str(model), "--json").stdout)
    assert shown["low"]["path"] == str(low)
    assert run("rm", "--low", str(model), "-y").returncode == 0
    assert (model.exists(), low.exists()) == (True, False)


def big_header(path: Path) -> list[Path]:
    """Write a model in two parts whose vocabulary takes 6 MB, and its tensors 8 MB more."""
    paths = [path / f"big-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    for index, name in enumerate(paths):
        writer = gguf.GGUFWriter(name, "llama")
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 2)
        if index == 0:
            writer.add_token_list([f"token number {i:>20}" for i in range(150_000)])
            writer.add_token_scores([0.0] * 150_000)
        writer.add_tensor(f"blk.{index}.x.weight", np.zeros((1024, 1024), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_the_header_of_a_split_model_takes_little(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    paths = big_header(tmp_path)
    hub.files["some/big"] = {path.name: path.read_bytes() for path in paths}
    done = run("show", "some/big", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["parts"], told["shape"]["parameters"]) == (2, 2 << 20)
    assert told["size"] == sum(path.stat().st_size for path in paths) > 14 << 20
    assert hub.sent < 8_000_000
    assert len(hub.ranges) < 12


class Faulty:
    """Files of a repository in memory, for reading headers without a server."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.repo = Repository(
            "a/b", COMMIT, tuple(RemoteFile(n, len(d), sha256(d)) for n, d in files.items())
        )
        self.files = files

    def read(self, url: str, offset: int, length: int) -> bytes:
        return self.files[url.rsplit("/", 1)[-1]][offset : offset + length]


def test_remote_header_is_the_local_one(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = Faulty(hub.files["some/tiny"])
    monkeypatch.setattr("hobbit.models.hub.read_range", faulty.read)
    names = [SPLIT.format(i) for i in (1, 2, 3, 4)]
    remote = remote_header(faulty.repo, names)
    local = open_gguf(tmp_path / "source" / names[0])
    assert remote.tensors == local.tensors
    assert remote.entries == local.entries
    assert [part.size for part in remote.parts] == [part.size for part in local.parts]
    assert build_layout(remote).groups == build_layout(local).groups
    with pytest.raises(HubError, match="part 2 of this model is missing"):
        remote_header(faulty.repo, names[:1])


def test_no_space_is_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10 << 30, 9 << 30, 1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    files = (RemoteFile("a.gguf", 900 << 20, "a" * 64), RemoteFile("b.gguf", 900 << 20, "b" * 64))
    repo = Repository("some/large", COMMIT, files)
    check_space(repo, ("a.gguf",)[:0])
    with pytest.raises(NoSpace, match=r"1\.8 GiB are to be fetched, and 1\.0 GiB are free"):
        check_space(repo, ("a.gguf", "b.gguf"))


def in_namespace(script: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount what nobody else sees."""
    who = [] if os.geteuid() == 0 else ["--map-root-user"]
    return subprocess.run(
        ["unshare", "--mount", *who, "sh", "-ec", script],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


# A disk that says it has room, and has none.
LYING = (
    "import shutil, sys; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9e12, 0, 9e12); "
    "from hobbit.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system of its own")
def test_a_disk_that_fills_up(environment_of: dict[str, str], hub: FakeHub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    env = environment_of | {"HF_HUB_CACHE": f"{disk}/hub", "LYING": LYING}
    script = f"""
        mount -t tmpfs -o size=512k none {disk}
        code=0; {sys.executable} -c "$LYING" pull some/tiny || code=$?
        echo "code $code, kept $(stat -c %s {disk}/hub/models--some--tiny/blobs/*.incomplete)"
        code=0; {sys.executable} -m hobbit pull some/tiny || code=$?
        echo "code $code"
        mount -o remount,size=8m {disk}
        {sys.executable} -c "$LYING" pull some/tiny
    """
    done = in_namespace(script, env)
    full, kept, code, path = done.stdout.replace(", kept ", "\n").splitlines()
    assert (full, code) == ("code 5", "code 5"), done.stderr
    assert int(kept) > 100_000
    assert "is full; what came is kept" in done.stderr
    assert "are to be fetched, and" in done.stderr
    assert path.endswith(ONE)
    assert hub.ranges[-1].startswith(f"bytes={kept}-")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system of its own")
def test_a_read_only_cache(environment_of: dict[str, str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    env = environment_of | {"HF_HUB_CACHE": f"{disk}/hub", "HOBBIT_CACHE": f"{disk}/hobbit"}
    script = f"""
        mount -t tmpfs none {disk}
        {sys.executable} -m hobbit pull some/tiny
        mount -o remount,ro {disk}
        {sys.executable} -m hobbit pull some/tiny:Q8_0 || echo "code $?"
        {sys.executable} -m hobbit ls
        {sys.executable} -m hobbit show some/tiny:Q4_K_M --json
        {sys.executable} -m hobbit rm some/tiny:Q4_K_M -y || echo "code $?"
    """
    done = in_namespace(script, env)
    lines = done.stdout.splitlines()
    assert lines[0].endswith(ONE), done.stderr
    assert lines[1] == "code 1"
    assert f"cannot write to {disk}/hub" in done.stderr
    assert os.strerror(errno.EROFS) in done.stderr
    assert lines[3].startswith("some/tiny:Q4_K_M")
    shown: dict[str, Any] = json.loads(lines[4])
    assert shown["shape"]["experts"] == 4
    assert lines[5] == "code 1"
    assert "Traceback" not in done.stderr
