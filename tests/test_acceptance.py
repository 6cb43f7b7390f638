"""The list of what it must show (ux.md 4.6, issue 5), and the tests of what no other file shows.

stdout is the answer         here; test_cli, test_chat_terminal, test_bench (the table)
nothing waits for a terminal here, every command; test_chat_terminal (chat)
Ctrl-C                       prompt: here; answer: test_cli, test_chat_terminal; download:
                             test_pull; prepare, both stages: test_prepare, here; comparison:
                             test_cli; bench: test_bench; eval: test_cli_eval; serve: test_serve
/v1/models while it answers  test_serve; that the answer stays the same: test_acceptance_serve
a patient prompt, 10 s client  test_acceptance_serve
openai's client, 8 of them   test_serve
LangChain, LlamaIndex        scripts/test-ecosystem; test_patch
jetson-containers' benchmark here: its calls, not its file, which is not at hand
llama-bench's keys           here
exit codes                   test_cli, test_cli_quality, test_prepare, test_pull, test_doctor
--help is quick              here; test_cli (what it imports)
NO_COLOR, 40 and 80 columns  here (run, plan); test_chat_terminal
a cgroup below the machine   here (a real one); test_memory, test_doctor (files)
a full disk                  here (prepare, --record, state); test_pull, test_prepare, test_cli
a read-only cache            here (all but pull); test_pull
an unknown argument raises   test_llama
a replay is the same         test_cli_quality
plan refuses, parts add up   test_cli_plan, test_plan_parts, test_render, test_cli
llama.cpp's flags            here
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import terminal
import tiny
from test_pull import in_namespace

import hobbit
from hobbit.cgroup import MemoryGroup
from hobbit.errors import CapUnavailable
from hobbit.options import MAX_CONTEXT

SMALL = ("-c", "256", "-t", "1", "-s", "1", "--memory", "1G")
PYTHON = (sys.executable, "-m", "hobbit")
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("accept") / "m.gguf")


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """An environment with a cache and a home of its own."""
    return {**os.environ, "HOBBIT_CACHE": str(tmp_path / "cache"), "HOBBIT_WARM_START": "1"}


def run(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 120}
    command = [*PYTHON, *map(str, arguments)]
    return subprocess.run(command, text=True, check=False, **settings | more)


# stdout


def test_the_same_bytes_reach_a_pipe_a_file_and_a_terminal(model: Path, tmp_path: Path) -> None:
    command = [*PYTHON, "run", str(model), "one two", "-n", "24", *SMALL]

    def shell(script: str) -> bytes:
        done = subprocess.run(
            ["sh", "-ec", script, "sh", *command], stdin=subprocess.DEVNULL, capture_output=True,
            check=True,
        )  # fmt: skip
        return done.stdout

    answer = shell('"$@" 2>/dev/null')
    assert len(answer.split()) > 4
    assert shell('"$@" | cat') == answer
    assert shell(f'"$@" >{tmp_path}/file; cat {tmp_path}/file') == answer
    assert shell(f'"$@" 2>{tmp_path}/err') == answer
    assert answer.strip() not in (tmp_path / "err").read_bytes()
    with terminal.on_terminal(["sh", "-c", '"$@" 2>/dev/null', "sh", *command], 200, 24) as screen:
        assert screen.exit_code() == 0
    assert screen.raw.replace(b"\r\n", b"\n") == answer


# Without a terminal

EVERY_COMMAND: list[tuple[str, ...]] = [
    ("plan", "{m}"),
    ("plan", "{m}", "--json"),
    ("why",),
    ("doctor", "--quick"),
    ("verify", "{m}", "-t", "1"),
    ("prepare", "{m}", "--imatrix", "none", "--no-calibrate", "-t", "1", "-o", "{d}/low.gguf"),
    ("pull", "{m}"),
    ("ls",),
    ("ls", "--known"),
    ("show", "{m}"),
    ("rm", "{m}"),
    ("rm", "demo"),
    ("eval", "{m}", "--tokens", "128", "--window", "64", "-t", "1", "--memory", "1G"),
    ("trace", "{m}", "-o", "{d}/t.trace", "--tokens", "64", "-t", "1", "--memory", "1G"),
    ("bench", "{m}", "-p", "8", "-n", "2", "-r", "1", "-t", "1", "--no-roofline"),
    ("simulate", "{d}/none.trace"),
    ("plot", "{d}/none.trace"),
    ("config",),
    ("ps",),
    ("top", "http://127.0.0.1:9"),
    ("serve", "{d}/none.gguf"),
]


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_no_command_waits_for_stdin(
    words: tuple[str, ...], model: Path, tmp_path: Path, own: dict[str, str]
) -> None:
    """stdin is a pipe that says nothing and stays open: who reads it hangs.

    All but run and chat, which put it before the prompt, and say that they wait for its end.
    """
    command = [word.format(m=model, d=tmp_path) for word in words]
    reader, writer = os.pipe()
    try:
        done = run(*command, stdin=reader, env=own, timeout=60)
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode in (0, 1, 2, 3), done.stderr
    assert "Traceback" not in done.stderr
    # Of nothing to list the two say so on stderr, and prepare makes a file.
    answers = done.returncode == 0 and words[0] != "prepare" and words not in (("ls",), ("ps",))
    assert bool(done.stdout) == answers
    if done.returncode:
        assert sum(line.startswith("hobbit: error: ") for line in done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [("ls", "--known"), ("config",), ("plan", "{m}"), ("show", "{m}"), ("run", "--help")],
    ids=" ".join,
)
def test_a_reader_that_goes_ends_a_command_quietly(
    words: tuple[str, ...], model: Path, own: dict[str, str]
) -> None:
    """As `| true` does; nobody reads, so that the first write fails."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*PYTHON, *(word.format(m=model) for word in words)], stdin=subprocess.DEVNULL,
            stdout=writer, stderr=subprocess.PIPE, env=own, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert "Broken pipe" not in done.stderr


# Ctrl-C


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_while_the_prompt_is_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("the " * 5000)  # some 30000 tokens
    command = [*PYTHON, "run", str(model), "-f", f"{tmp_path}/long.txt", "-c", "40000", "-t", "1"]
    more: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "-ub", "64"], stdin=subprocess.DEVNULL, **more) as process:
        for line in process.stderr:
            if line.startswith("io: "):
                break
        # What follows is the prompt, once its words are tokens.
        loaded = cpu_seconds(process.pid)
        while cpu_seconds(process.pid) < loaded + 0.5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == "\n"
    last = err.splitlines()[-1]
    assert last.startswith("[0 tok, ") and "no token" in last and last.endswith("| cancelled]")
    assert "Traceback" not in err


def test_ctrl_c_while_prepare_calibrates(model: Path, tmp_path: Path) -> None:
    """The copy that is made stays, and the next run only calibrates."""
    path = tmp_path / "m.gguf"
    path.write_bytes(model.read_bytes())
    command = [*PYTHON, "prepare", str(path), "--imatrix", "none", "-t", "1", "--memory", "1G"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line.decode())
            if said[-1] == "exact\n":  # the first mode that is measured
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130, (said, err)
    assert err.decode().splitlines()[-1] == "hobbit: error: interrupted"
    assert (tmp_path / "m.hobbit-low.gguf").exists()
    assert not (tmp_path / "m.hobbit-low.gguf.calibration.json").exists()
    again = run("prepare", path, "--no-calibrate", "-t", "1", "--imatrix", "none")
    assert again.returncode == 0 and "is made already" in again.stderr


# Terminals


@pytest.mark.parametrize("columns", [40, 80])
def test_an_answer_on_a_narrow_terminal(model: Path, columns: int) -> None:
    """Nothing is cut or overwritten: the terminal alone breaks the lines."""
    command = ("run", model, "one two", "-n", "24", *SMALL)
    plain = run(*command)
    with terminal.started(*command, columns=columns) as screen:
        assert screen.exit_code() == 0
    shown = " ".join(" ".join(screen.lines).split())
    assert plain.stdout.strip() in "".join(line.ljust(columns) for line in screen.lines)
    assert plain.stderr.splitlines()[0] in shown
    assert all(len(line) <= columns for line in screen.lines)
    assert re.search(r"\[24 tok, .* \| exact \| hit \d+ % \| \d+ MiB/tok \| stall \d+ %\]$", shown)


@pytest.mark.parametrize("columns", [40, 80])
def test_progress_on_a_narrow_terminal_is_one_line(
    model: Path, tmp_path: Path, columns: int
) -> None:
    low = tmp_path / "low.gguf"
    flags = ("--imatrix", "none", "--no-calibrate", "-t", "1", "-o", low)
    with terminal.started("prepare", model, *flags, columns=columns) as screen:
        assert screen.exit_code() == 0
    # A bar that is wider than the terminal would leave a line at each step.
    assert sum("making the low" in line for line in screen.lines) <= 1
    assert len(screen.lines) < 12


@pytest.mark.parametrize("words", [("run", "{m}", "x", "-n", "4", *SMALL), ("run", "no.gguf")])
def test_no_color(words: tuple[str, ...], model: Path) -> None:
    command = [word.format(m=model) for word in words]
    seen = {}
    for name, env in (("plain", {"NO_COLOR": "1"}), ("usual", {})):
        with terminal.started(*command, **env) as screen:
            screen.exit_code()
        seen[name] = screen.raw
    assert COLOUR.search(seen["usual"]) and not COLOUR.search(seen["plain"])


def test_help_is_quick() -> None:
    """Processor time, which other programs do not stretch much; the best of several."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*PYTHON, "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    best = 9.0
    for _ in range(10):
        best = min(best, seconds())
        if best < 0.2:
            break
    assert best < 0.2


# Limits of the machine


@pytest.mark.skipif(os.geteuid() != 0, reason="a memory cgroup needs root")
def test_auto_keeps_to_the_cgroup(model: Path) -> None:
    limit = 500 << 20
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(MemoryGroup(limit))
        except CapUnavailable as exc:
            pytest.skip(str(exc))
        command = [*PYTHON, "run", str(model), "x", "-n", "4", "-t", "1", "-c", "256", "--json"]

        def in_group(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                group.command([*command, *more]), stdin=subprocess.DEVNULL, capture_output=True,
                text=True, check=False,
            )  # fmt: skip

        done = in_group()
        assert done.returncode == 0, done.stderr
        cap = json.loads(done.stdout)["plan"]["cap_bytes"]
        assert 100 << 20 < cap < limit
        # A cap above what there is is brought down, and said.
        asked = in_group("--memory", "4G")
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout)["plan"]["cap_bytes"] <= limit
        assert "memory cap: " in asked.stderr
        # What cannot fit is refused; nothing is killed for its memory.
        refused = in_group("-c", str(1 << 20))
        assert refused.returncode == 4, refused.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system of its own")
def test_a_full_disk(model: Path, tmp_path: Path, own: dict[str, str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    hobbit_ = f"{sys.executable} -m hobbit"
    script = f"""
        mount -t tmpfs -o size=64k none {disk}
        head -c 1000000 /dev/zero >{disk}/fill 2>/dev/null || true
        try() {{ code=0; "$@" </dev/null >{tmp_path}/out 2>{tmp_path}/err || code=$?
                echo "$code $(tail -n 1 {tmp_path}/err)"; }}
        try {hobbit_} prepare {model} --imatrix none --no-calibrate -t 1 -o {disk}/low.gguf
        try {hobbit_} run {model} x -n 8 {" ".join(SMALL)} -q --record {disk}/s
        try {hobbit_} trace {model} -o {disk}/t --tokens 64 -t 1 --memory 1G
        try {hobbit_} run {model} x -n 8 {" ".join(SMALL)} -q -o {disk}/fill
        test $(wc -c <{disk}/fill) -ge 50000 && ls -A {disk} | grep -c ^.hobbit || true
        export HOBBIT_CACHE={disk}/cache XDG_STATE_HOME={disk}/state
        try {hobbit_} run {model} x -n 8 {" ".join(SMALL)} -q
        try {hobbit_} plan {model} --memory 1G
    """
    done = in_namespace(script, own)
    prepare, record, trace, answer, parts, cached, plan = done.stdout.splitlines()
    assert prepare.startswith("5 hobbit: error: "), done.stdout
    assert record.startswith("5 hobbit: error: "), done.stdout
    assert trace.startswith("5 hobbit: error: "), done.stdout
    # What is there stays, and nothing beside it.
    assert answer == f"5 hobbit: error: cannot write {disk}/fill: No space left on device"
    assert parts == "0"
    assert cached.strip() == "0", done.stdout
    assert plan.strip() == "0", done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system of its own")
def test_a_read_only_home(model: Path, tmp_path: Path, own: dict[str, str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    hobbit_ = f"{sys.executable} -m hobbit"
    script = f"""
        mount -t tmpfs none {disk}
        cp {model} {disk}/m.gguf
        mount -o remount,ro {disk}
        export HOBBIT_CACHE={disk}/cache HOME={disk}/home
        try() {{ code=0; "$@" </dev/null >{tmp_path}/out 2>{tmp_path}/err || code=$?
                echo "$code $(tail -n 1 {tmp_path}/err)"; }}
        try {hobbit_} run {disk}/m.gguf x -n 8 {" ".join(SMALL)} -q
        try {hobbit_} plan {disk}/m.gguf --memory 1G
        try {hobbit_} ls
        try {hobbit_} show {disk}/m.gguf
        try {hobbit_} why
        try {hobbit_} prepare {disk}/m.gguf --imatrix none --no-calibrate -t 1
        try {hobbit_} run -p x
        try {hobbit_} doctor
    """
    done = in_namespace(script, own)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "0", "0", "0", "1", "1", "3", "6"], lines
    assert "nothing to explain" in lines[4]
    assert "Read-only file system" in lines[5]
    assert "Traceback" not in done.stdout + done.stderr


# llama.cpp's tools

# In table 1.1 of the specification, with a value where one is needed: what is taken, and, with what
# is said instead, what is refused.
TAKEN = (
    "-m {m}", "--model {m}", "-p x", "--prompt x", "-f {t}", "--file {t}", "-n 2", "--predict 2",
    "--n-predict 2", "-c 256", "--ctx-size 256", "-t 1", "--threads 1", "-tb 1", "-ngl auto",
    "-ngl 99", "--gpu-layers all", "-b 64", "-ub 64", "-ctk q8_0", "-ctv q8_0", "-fa on",
    "-fa auto", "-lm auto", "--load-mode mmap", "-lm mlock", "--mmap", "--no-mmap", "--mlock",
    "--temp 0", "--top-k 5", "--top-p 0.5", "--min-p 0.1", "-s 1", "--seed 1",
    "--repeat-penalty 1.1", "-sys x", "-sysf {t}", "-j {{}}", "--json-schema {{}}", "-jf {j}",
    "--grammar root::=\"a\"", "--show-timings", "--no-perf", "--perf", "-rea auto",
    "--reasoning-budget -1", "--reasoning-format auto", "-v", "-lv 3", "--log-colors auto",
    "--offline", "-st", "--single-turn", "-cnv", "-no-cnv", "-e", "--no-warmup", "--jinja",
)  # fmt: skip
REFUSED = {
    "-cmoe": "--memory",
    "--cpu-moe": "--memory",
    "-ncmoe 3": "--memory",
    "--n-cpu-moe 3": "--memory",
    "-ot exps=CPU": "--memory",
    "-otd exps=CPU": "draft",
    "-mu http://x/y.gguf": "user/name",
    "-dr x": "user/name",
    "-lm dio": "--io",
    "--dio": "--io direct",
    "--samplers top_k": "--top-k",
    "-rea off": "--no-think",
    "--reasoning-budget 0": "--no-think",
    "-lv 5": "-vv",
    "--log-file x": "2>FILE",
    "--log-jsonl": "--json",
    "--log-colors on": "--color",
    "--fit off": "--memory",
    "-fitt 100": "--memory",
    "-cram 100": "--memory",
    "-np 4": "--queue",
}
ONLY_RUN = {"-p", "--prompt", "-f", "--file", "--temp", "--top-k", "--top-p", "--min-p", "-s",
            "--seed", "--repeat-penalty", "-sys", "-sysf", "-j", "--json-schema", "-jf",
            "--grammar", "-e", "--offline"}  # fmt: skip


def parsed(command: str, words: list[str]) -> None:
    """Let the command's own parser read a command line; it raises what it would print."""
    import typer.main

    from hobbit.cli.app import app

    group: Any = typer.main.get_command(app)
    group.commands[command].make_context(command, [*words])


@pytest.mark.parametrize("flag", TAKEN)
def test_flags_of_llama_cli_are_taken(
    flag: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # --offline sets it
    (tmp_path / "t").write_text("text")
    (tmp_path / "j").write_text("{}")
    words = [w.format(m=model, t=tmp_path / "t", j=tmp_path / "j") for w in flag.split(" ")]
    parsed("run", words)
    if words[0] not in ONLY_RUN:
        parsed("serve", words)


@pytest.mark.parametrize("command", ["run", "chat", "serve"])
@pytest.mark.parametrize("flag", REFUSED)
def test_flags_of_llama_cli_that_are_refused_say_what_to_use(command: str, flag: str) -> None:
    with pytest.raises(hobbit.HobbitError) as refused:
        parsed(command, flag.split(" "))
    assert refused.value.exit_code == 2
    assert REFUSED[flag] in str(refused.value)
    assert str(refused.value).startswith(("-", "--"))


@pytest.mark.parametrize("flag", ["-ngl 99", "-mmp 1", "-fa 1", "-oe md", "-ncmoe 3"])
def test_flags_of_llama_bench_that_are_refused(flag: str) -> None:
    with pytest.raises(hobbit.HobbitError, match=flag):
        parsed("bench", flag.split(" "))


LLAMA_BENCH = """
build_commit build_number cpu_info gpu_info backends model_filename model_type model_size
model_n_params n_batch n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers
n_cpu_moe split_mode main_gpu no_kv_offload flash_attn devices tensor_split tensor_buft_overrides
use_mmap use_direct_io embeddings no_op_offload no_host repack fit_target fit_min_ctx n_prompt n_gen
n_depth test_time avg_ns stddev_ns avg_ts stddev_ts samples_ns samples_ts
"""


def test_bench_has_llama_benchs_keys(model: Path) -> None:
    flags = ("-p", "8", "-n", "2", "-r", "1", "-t", "1", "--no-roofline", "-q", "-o", "json")
    rows = json.loads(run("bench", model, *flags).stdout)
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(8, 0), (0, 2)]
    assert [key for key in LLAMA_BENCH.split() if key not in rows[0]] == []
    assert (rows[0]["n_threads"], rows[0]["type_k"], rows[0]["flash_attn"]) == (1, "f16", False)
    assert rows[0]["use_direct_io"] is (rows[0]["samples"][0]["io"] == "direct")


# jetson-containers' benchmark.py, as far as it uses the model


@pytest.fixture
def jetson(model: Path) -> Iterator[hobbit.Llama]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        llm = hobbit.Llama(
            model_path=str(model), n_gpu_layers=99, n_threads=1, n_batch=64, n_ctx=256, n_gqa=8,
            verbose=False, memory="1G",
        )  # fmt: skip
    assert any("n_gqa" in str(warning.message) for warning in told)
    yield llm
    llm.close()


def test_the_calls_of_jetsons_benchmark(jetson: hobbit.Llama) -> None:
    tokens = jetson.tokenize(b"one two")
    jetson.reset()
    made = []
    for token in jetson.generate(tokens, top_k=1):
        made.append(token)
        if len(made) == 8:
            break
    assert len(jetson.detokenize(made).split()) > 2


# Files that something else has written, and settings that mean nothing


@pytest.mark.parametrize(
    ("key", "value"), [("predicted_low", "x"), ("share", None), ("hit", []), ("measured", 1e999)]
)
def test_a_history_with_strange_values_is_left_out(
    key: str, value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hobbit.planning import history

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    good = history.Run(1.0, 2.0, 3.0, measured=2.0, share=0.5, hit=0.5, exact=True)
    assert history.keep("m", good)
    (file,) = tmp_path.rglob(history.FILE)
    found = json.loads(file.read_text())
    (runs,) = found.values()
    runs.append(runs[0] | {key: value})
    file.write_text(json.dumps(found))
    assert len(history.runs_of("m")) == 1
    assert history.exponents(history.runs_of("m"))


def test_why_of_a_record_that_makes_no_sense(model: Path, own: dict[str, str]) -> None:
    state = Path(own["HOME"]) / ".local" / "state" / "hobbit" / "last-run.json"
    assert run("run", model, "x", "-n", "4", *SMALL, "-q", env=own).returncode == 0
    assert run("why", env=own).returncode == 0
    record = json.loads(state.read_text())
    state.write_text(json.dumps(record | {"n_ubatch": 0}))
    done = run("why", env=own)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is nothing to explain" in done.stderr and "Division" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("-c", "999999999"), f"-c 999999999: must be at most {MAX_CONTEXT}"),
        (("-b", "99999999999"), "-b 99999999999: must be at most"),
        (("-ub", "99999999999"), "-ub 99999999999: must be at most"),
        (("--io-threads", "9999"), "--io-threads 9999: must be at most 256"),
        (("--top-p", "nan"), "--top-p nan: must be a number"),
        (("--repeat-penalty", "inf"), "--repeat-penalty inf: must be a number"),
        (("-r", ""), "an empty text would stop at once"),
        (("-hff", "x.gguf"), "name the repository that it is in with -hf"),
        (("-fa", "off", "-ctv", "q4_0"), "-ctv q4_0 needs flash attention"),
    ],
)
def test_settings_that_mean_nothing(flags: tuple[str, ...], said: str) -> None:
    done = run("run", "no-such.gguf", "x", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_context_beyond_the_machine_is_refused_at_once(model: Path) -> None:
    done = run("run", model, "x", "-c", str(MAX_CONTEXT), "-t", "1")
    assert (done.returncode, done.stdout) == (4, "")
    assert "the smallest cap that works is --memory" in done.stderr
    planned = run("plan", model, "-c", str(MAX_CONTEXT), "--memory", "4G")
    assert planned.returncode == 4 and "WON'T FIT" in planned.stdout


def test_the_demo_is_not_fetched_offline(own: dict[str, str]) -> None:
    for words in (("pull", "demo", "--offline"), ("run", "-p", "x", "--offline")):
        done = run(*words, env=own)
        assert (done.returncode, done.stdout) == (3, "")
        assert "--offline forbids to fetch it" in done.stderr


def test_a_home_that_is_no_folder(model: Path, own: dict[str, str]) -> None:
    done = run("run", model, "x", "-n", "2", *SMALL, "-q", env=own | {"HOME": "/dev/null"})
    assert (done.returncode, done.stderr) == (0, "")


def test_escapes_in_a_prompt(model: Path) -> None:
    def text(*words: str) -> str:
        return run("run", model, *words, "-n", "8", *SMALL, "-q").stdout

    assert text("-e", r"one\ntwo\x21") == text("one\ntwo!") != text(r"one\ntwo\x21")
