"""Devices that are lost, or hang, with layers of llama.cpp's on them (-ngl) and without.

All is tried in processes of their own, which lose threads.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from gates import Bench
from servers import in_a_process, running

ALL = 99


def said(code: str, *arguments: object) -> list[str]:
    """Return the lines that Python code prints, which ends well and complains of nothing."""
    done = in_a_process(code, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


BEGIN = """
import os, signal, sys, threading
import hobbit
from hobbit.errors import DeviceError
from servers import running

def told(call):
    try:
        call()
    except DeviceError as error:
        print(error)

def evaluate():
    llm.reset()
    llm.eval([*range(1, 21)])

with running() as server:
    arguments = dict(device=server.device, vram="8M", upload="1G", cache_bytes="floor", n_threads=1,
                     n_ctx=64, dispatch=sys.argv[2], n_gpu_layers=int(sys.argv[3]))
    llm = hobbit.Llama(sys.argv[1], **arguments)
    evaluate()
"""
END = """
    llm.close()
print("closed")
with hobbit.Llama(sys.argv[1], n_threads=1, n_ctx=64) as llm:
    evaluate()
print("another model")
"""


@pytest.mark.parametrize(("dispatch", "n_gpu_layers"), [("split", ALL), ("cpu", ALL), ("split", 2)])
def test_a_server_that_dies(dispatch: str, n_gpu_layers: int, bench: Bench) -> None:
    """One error of each evaluation, as the layers are gone; and the process goes on."""
    code = BEGIN + "    server.kill()\n    told(evaluate)\n    told(evaluate)\n" + END
    first, second, *rest = said(code, bench.arch("qwen3moe"), dispatch, n_gpu_layers)
    assert first == second
    assert first.startswith("device RPC0 (127.0.0.1:")
    assert "was lost: Remote RPC server crashed" in first
    assert first.endswith("the model had layers there (-ngl): load it again")
    assert rest == ["closed", "another model"]


def test_a_server_that_dies_between_evaluations(bench: Bench) -> None:
    """What is asked of the model next may also be to begin anew, its state, or its end."""
    code = BEGIN + "    server.kill()\n    told(llm.save_state)\n    told(llm.reset)\n" + END
    lines = said(code, bench.arch("qwen3next"), "split", ALL)  # recurrent: reset clears
    first, second, *rest = lines
    assert "was lost" in first and "was lost" in second
    assert rest == ["closed", "another model"]
    lines = said(BEGIN + "    server.kill()\n" + END, bench.arch("qwen3moe"), "split", ALL)
    assert lines == ["closed", "another model"]


def test_a_server_that_dies_while_a_model_loads(bench: Bench) -> None:
    """At no point of it is there anything but one error."""
    code = (
        BEGIN
        + """
    llm.close()
    threading.Timer(0.3, server.kill).start()
    def load():
        while True:
            hobbit.Llama(sys.argv[1], **arguments).close()
    told(load)
"""
        + END
    )
    error, *rest = said(code, bench.arch("qwen3moe"), "split", ALL)
    assert "RPC" in error
    assert rest == ["closed", "another model"]


@pytest.mark.parametrize("n_gpu_layers", [0, ALL])
def test_a_lost_server_that_is_there_again(n_gpu_layers: int, bench: Bench) -> None:
    """What ggml keeps of a connection that failed answers nobody, whoever asks next."""
    code = (
        BEGIN
        + """
    for _ in range(2):
        expected = np.array(llm.scores[:20])
        server.kill()
        told(evaluate)
        server.start_again()
        told(lambda: Device("RPC0"))
        llm.close()
        arguments.update(rpc=server.endpoint)  # and the device by its old name
        llm = hobbit.Llama(sys.argv[1], **arguments)
        evaluate()
        print((llm.scores[:20] == expected).all(), llm.stats.device_pairs > 0)
"""
        + END
    )
    code = "import numpy as np\nfrom hobbit.devices import Device\n" + code.replace(
        "n_ctx=64,", "n_ctx=64, logits_all=True,"
    )
    lines = said(code, bench.arch("qwen3moe"), "device", n_gpu_layers)
    for i, name in enumerate(("RPC0", "RPC1")):
        lost, refused, same = lines[3 * i : 3 * i + 3]
        assert lost.startswith(f"device {name} (127.0.0.1:")
        assert "was lost: Remote RPC server crashed" in lost
        known = "device RPC0 was lost in this process: connect to its server again (--rpc)"
        assert refused == known
        assert same == "True True"
    assert lines[6:] == ["closed", "another model"]


def test_a_server_that_hangs_before_a_model_loads(bench: Bench) -> None:
    """It is found out before ggml connects, which would wait holding what other servers need."""
    code = (
        BEGIN
        + """
    llm.close()
    os.kill(server.process.pid, signal.SIGSTOP)
    told(lambda: hobbit.Llama(sys.argv[1], **arguments))
    told(lambda: hobbit.Llama(sys.argv[1], **arguments, rpc=server.endpoint))
    with running() as second:
        hobbit.Llama(sys.argv[1], **arguments | {"device": second.device}).close()
    os.kill(server.process.pid, signal.SIGCONT)
    for _ in range(4):
        llm = hobbit.Llama(sys.argv[1], **arguments, rpc=server.endpoint)
        evaluate()
        llm.close()
    with subprocess.Popen([sys.executable, "-c", OTHER, server.endpoint]) as other:
        assert other.wait(60) == 0  # its one client may be another process again
"""
        + END
    )
    other = "import sys; from hobbit.devices import Device, connect; Device(connect(sys.argv[1]))"
    code = f"import subprocess\nOTHER = {other!r}\n" + code
    error, again, *rest = said(code, bench.arch("qwen3moe"), "split", 0)
    assert error.startswith("no RPC server answers at 127.0.0.1:")
    assert error.endswith(": it serves somebody else, or hangs")
    assert again == error
    assert rest == ["closed", "another model"]


def test_a_server_that_hangs_while_a_device_is_opened(bench: Bench) -> None:
    """Whoever opened it comes back when the server goes on, and meets nobody who connects anew."""
    code = (
        BEGIN
        + """
    os.kill(server.process.pid, signal.SIGSTOP)
    told(lambda: hobbit.devices.Device(server.device))  # a server that is ours already is not tried
    os.kill(server.process.pid, signal.SIGCONT)
    llm.close()
    for _ in range(4):
        llm = hobbit.Llama(sys.argv[1], **arguments, rpc=server.endpoint)
        evaluate()
        llm.close()
"""
        + END
    )
    error, *rest = said(code, bench.arch("qwen3moe"), "split", 0)
    assert error == "device RPC0 cannot be used: it does not answer"
    assert rest == ["closed", "another model"]


def test_a_server_that_hangs_while_layers_are_loaded(bench: Bench) -> None:
    """Nobody could cancel that: the device is lost when nothing goes on any more."""
    code = (
        BEGIN
        + """
    import hobbit.guarded
    from hobbit.streamed import StreamedModel
    llm.close()
    hobbit.guarded._PATIENCE_S = 0.5
    before = StreamedModel.set_prediction
    def stop(self, prediction):  # the last before llama.cpp loads
        before(self, prediction)
        os.kill(server.process.pid, signal.SIGSTOP)
    StreamedModel.set_prediction = stop
    told(lambda: hobbit.Llama(sys.argv[1], **arguments))
    StreamedModel.set_prediction = before
"""
        + END
    )
    error, *rest = said(code, bench.arch("qwen3moe"), "split", ALL)
    assert "was lost: it does not answer" in error
    assert rest == ["closed", "another model"]


def test_a_device_that_is_opened_many_times(bench: Bench) -> None:
    """A server has one client, and a queue of one: who tries it again and again fills that."""
    code = BEGIN + "    for _ in range(6):\n        hobbit.devices.Device('RPC0').close()\n" + END
    lines = said(code, bench.arch("qwen3moe"), "split", 0)
    assert lines == ["closed", "another model"]


def test_a_server_that_hung_and_goes_on(bench: Bench) -> None:
    """The thread that was lost comes back, when its model is closed, and finds what it uses."""
    code = (
        BEGIN
        + """
    os.kill(server.process.pid, signal.SIGSTOP)
    threading.Timer(0.2, llm.cancel).start()
    told(evaluate)
    llm.close()
    told(evaluate)
    os.kill(server.process.pid, signal.SIGCONT)
    threading.Event().wait(1)
    llm = hobbit.Llama(sys.argv[1], **arguments)
    evaluate()
"""
        + END
    )
    first, second, *rest = said(code, bench.arch("qwen3moe"), "split", ALL)
    assert first == second and "was lost: it does not answer" in first
    assert rest == ["closed", "another model"]


def test_a_chat_goes_on_with_the_server(tmp_path: Path) -> None:
    """The model is loaded anew for the next message, as soon as it can be."""
    code = (
        BEGIN
        + """
    from hobbit.chat.session import Session
    from hobbit.generate import Sampling
    arguments.update(rpc=server.endpoint)
    load = lambda *_: hobbit.Llama(sys.argv[1], **arguments)
    session = Session(llm, Sampling(max_tokens=4), load=load)
    ask = lambda: session.ask("one two", lambda text: None)
    print(ask().kept)
    server.kill()
    told(ask)
    told(ask)
    server.start_again()
    print(ask().kept, len(session.messages))
    llm = session.llm
"""
        + END
    )
    model = tiny.make_text_model(tmp_path / "m.gguf", arch="qwen3moe", chat=True)
    first, lost, refused, last, *rest = said(code, model, "split", ALL)
    assert (first, last) == ("True", "True 4")
    assert "was lost: " in lost
    assert "no RPC server answers at " in refused
    assert rest == ["closed", "another model"]


def test_a_server_that_hangs(bench: Bench) -> None:
    """It is waited for until the evaluation is cancelled, and then some seconds."""
    code = (
        BEGIN
        + """
    os.kill(server.process.pid, signal.SIGSTOP)
    threading.Timer(0.2, llm.cancel).start()
    told(evaluate)
"""
        + END
    )
    error, *rest = said(code, bench.arch("qwen3moe"), "cpu", ALL)
    assert "was lost: it does not answer" in error
    assert rest == ["closed", "another model"]


def test_a_server_that_hangs_in_an_expert_layer(bench: Bench) -> None:
    """Nothing waits for its thread, which has the model's lock: neither uses nor the end."""
    code = (
        BEGIN
        + """
    llm.close()
    arguments.update(warm_start=True, n_gpu_layers=1)
    llm = hobbit.Llama(sys.argv[1], **arguments)
    def on_and_on():
        while True:
            evaluate()
    def stop():
        os.kill(server.process.pid, signal.SIGSTOP)
        threading.Timer(0.2, llm.cancel).start()  # nothing ends any more
    threading.Timer(0.5, stop).start()
    told(on_and_on)
    assert llm.is_lost
"""
        + END
    )
    error, *rest = said(code, bench.arch("qwen3moe"), "device", ALL)
    assert "was lost: it does not answer" in error
    assert rest == ["closed", "another model"]


def test_a_server_that_dies_before_a_token_is_chosen(bench: Bench) -> None:
    """The logits are asked for once more then, which waits for what is on its way there."""
    code = BEGIN + "    server.kill()\n    told(llm.sample)\n    told(llm.sample)\n" + END
    lines = said(code, bench.arch("qwen3moe"), "split", ALL)
    assert lines[-2:] == ["closed", "another model"]


@pytest.mark.parametrize("end", ["", "raise ValueError('of the script')"])
def test_a_script_that_does_not_close(end: str, bench: Bench) -> None:
    """Python that ends has no thread but one."""
    done = in_a_process(BEGIN + f"    {end or 'pass'}\n", bench.arch("qwen3moe"), "split", ALL)
    assert done.returncode == (1 if end else 0)
    assert done.stdout == ""
    assert done.stderr == "" or done.stderr.splitlines()[-1] == "ValueError: of the script"


@pytest.mark.parametrize("n_gpu_layers", [0, ALL])
def test_a_forked_process(n_gpu_layers: int, bench: Bench) -> None:
    """It has none of the threads; it is told so, and its end is none of the model's."""
    code = (
        BEGIN
        + """
    child = os.fork()
    if child == 0:
        told(evaluate)
        llm.close()
        sys.stdout.flush()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    evaluate()
"""
        + END
    )
    code = code.replace("n_threads=1,", "n_threads=1, n_threads_batch=1, warm_start=False,")
    told, *rest = said(code, bench.arch("qwen3moe"), "device", n_gpu_layers)
    assert "the process was forked after the model was loaded" in told
    assert rest == ["closed", "another model"]


def test_ctrl_c(bench: Bench) -> None:
    """It ends the evaluation within a layer; the model can be used on."""
    code = (
        BEGIN
        + """
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        while True:
            evaluate()
    except KeyboardInterrupt:
        print("interrupted")
    evaluate()
"""
        + END
    )
    lines = said(code, bench.arch("qwen3moe"), "split", ALL)
    assert lines == ["interrupted", "closed", "another model"]


def test_ctrl_c_at_any_moment(bench: Bench) -> None:
    """The evaluation has ended when it is told, wherever the signal found this thread."""
    code = (
        BEGIN
        + """
    import hobbit.guarded
    running_now, runs = [], hobbit.guarded._Call.run
    def counted(call):
        running_now.append(call)
        try:
            runs(call)
        finally:
            running_now.remove(call)
    hobbit.guarded._Call.run = counted
    over = threading.Event()
    def interrupt():
        while not over.wait(0.007):
            os.kill(os.getpid(), signal.SIGINT)
    armed, early = False, 0
    def heard(*_):  # once, lest another comes while it is handled
        global armed
        if armed:
            armed = False
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, heard)
    threading.Thread(target=interrupt, daemon=True).start()
    for _ in range(200):
        try:
            armed = True
            while True:
                evaluate()
        except KeyboardInterrupt:
            early += len(running_now)
    over.set()
    print(early)
    evaluate()
"""
        + END
    )
    assert said(code, bench.arch("qwen3moe"), "split", ALL) == ["0", "closed", "another model"]


def test_run(tmp_path: Path) -> None:
    """The command's text is the same with -ngl; a server that dies ends it with one line."""
    model = tiny.make_text_model(tmp_path / "m.gguf", arch="qwen3moe")
    fixed = ["run", str(model), "-q", "-c", "8192", "-t", "1", "-s", "1", "--memory", "2G"]
    fixed = [sys.executable, "-m", "hobbit", *fixed, "-p", "hello"]
    plain = subprocess.run([*fixed, "-n", "12"], capture_output=True, timeout=120, check=True)
    with running(connects=False) as server:
        where = ["--rpc", server.endpoint, "--vram", "16M", "-ngl", "all", "--dispatch", "split"]
        done = subprocess.run(
            [*fixed, *where, "-n", "12"], capture_output=True, timeout=120, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, b"")
    with running(connects=False) as server, contextlib.ExitStack() as stack:
        where[1] = server.endpoint
        child = stack.enter_context(
            subprocess.Popen(
                [*fixed, *where, "-n", "8000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
        stack.callback(child.kill)
        assert child.stdout is not None and child.stdout.read(8)
        server.kill()
        _, told = child.communicate(timeout=120)
    (line,) = told.decode().splitlines()
    assert child.returncode == 1
    assert "was lost: Remote RPC server crashed" in line
