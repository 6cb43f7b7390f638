"""lm-eval over `hobbit serve`, and the same log-likelihoods from stock llama-cpp-python.

The task is made of hobbit's built-in text: which of four words ends a sentence. lm-eval asks the
server for tokens and scores, as it asks any; then a process that never loads hobbit computes each
score again from its own logits, in batches of the same size. Called by scripts/lm-eval.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hobbit.stock
from hobbit import demo
from hobbit.render import Screen
from hobbit.texts import SAMPLE, built_in

TASK = "last_word"
CONTEXT = 512
TOLERANCE = 1e-4

_TASK_FILE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{words}}}}"
doc_to_target: right
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""

# One request a line: the tokens, and how many of them are the context. One reply a line.
_STOCK = """
import json, runpy, sys
plain_llama = runpy.run_path(sys.argv[1])["plain_llama"]  # without importing hobbit
n_ctx, n_ubatch = int(sys.argv[3]), int(sys.argv[4])
arguments = dict(n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ubatch, n_threads=1, n_threads_batch=1,
                 logits_all=True, use_mmap=False, verbose=False)
with plain_llama(sys.argv[2], arguments) as llm:
    for line in sys.stdin:
        tokens, start = json.loads(line)
        llm.reset()
        llm.eval(tokens)
        rows = llm.logits_to_logprobs(llm.scores[start - 1 : len(tokens) - 1])
        print(sum(float(row[token]) for row, token in zip(rows, tokens[start:])), flush=True)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every score is stock's within the tolerance, else 1."""
    options, flags = parse_args(arguments)
    with Screen().progress() as report:
        path = options.model or demo.ensure(report)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, options.questions)
        with served(path, flags) as url:
            samples = lm_eval(options.lm_eval, folder, url)
            asked = [tokens_of(url, *request) for request in requests(samples)]
    told = [float(reply[0][0]) for sample in samples for reply in sample["resps"]]
    right = stock(path, asked)
    worst = max(abs(a - b) for a, b in zip(told, right, strict=True))
    accuracies = [accuracy(samples, scores) for scores in (told, right)]
    print(f"{path.name}: {len(samples)} questions, {len(told)} scores")
    print(f"accuracy over hobbit serve {accuracies[0]:.4f}, stock {accuracies[1]:.4f}, chance 0.25")
    print(f"largest difference of a score: {worst:.3g} nats")
    return 0 if worst <= TOLERANCE and accuracies[0] == accuracies[1] else 1


def parse_args(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return our own options and the flags of `hobbit serve`; a first word is the model."""
    parser = argparse.ArgumentParser(prog="scripts/lm-eval", description=__doc__)
    parser.usage = "%(prog)s [MODEL.gguf] [--questions N] [FLAG OF hobbit serve]..."
    parser.add_argument("--questions", type=int, default=60, metavar="N")
    parser.add_argument("--lm-eval", type=Path, required=True, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args(arguments)
    named = bool(flags) and not flags[0].startswith("-")
    options.model = Path(flags.pop(0)) if named else None
    return options, flags


def questions(count: int) -> list[dict[str, Any]]:
    """Make questions of the built-in text: a sentence without its last word, and four words."""
    text = " ".join(built_in(SAMPLE).split())
    found = re.findall(r"(?<=[.!?] )([A-Z][a-z,;'\"A-Z -]{20,200}) ([a-z]{3,})(?=[.!?])", text)
    rng = random.Random(0)
    made = []
    for start, word in found[:count]:
        others = sorted({w for _, w in found} - {word})
        words = [word, *rng.sample(others, 3)]
        rng.shuffle(words)
        made.append({"start": start, "words": words, "right": words.index(word)})
    return made


def write_task(folder: Path, count: int) -> None:
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions(count)), encoding="utf-8")
    task = _TASK_FILE.format(name=TASK, data=data)
    (folder / f"{TASK}.yaml").write_text(task, encoding="utf-8")


@contextmanager
def served(path: Path, flags: Sequence[str]) -> Iterator[str]:
    """Serve the model with one thread on a free port."""
    command = [sys.executable, "-m", "hobbit", "serve", str(path), "--port", "0", "-t", "1"]
    process = subprocess.Popen(
        [*command, "-c", str(CONTEXT), *flags], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    url = ""
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            if line.startswith("listening on "):
                url = line.split()[2]
            if line == "ready\n":
                break
        if not url:
            raise SystemExit(process.wait())
        subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield url
    finally:
        process.terminate()
        process.wait()


def lm_eval(program: Path, folder: Path, url: str) -> list[dict[str, Any]]:
    """Run the task; return its questions with what the model answered."""
    model = f"model=hobbit,base_url={url}/v1/completions,tokenizer_backend=remote"
    command = [
        *(str(program), "run", "--model", "local-completions"),
        *("--model_args", f"{model},max_length={CONTEXT}", "--tasks", TASK),
        *("--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, env=os.environ | offline, stdout=sys.stderr)
    (file,) = (folder / "out").rglob(f"samples_{TASK}_*.jsonl")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def requests(samples: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the context and the continuation of every score, in the order of the answers."""
    for sample in samples:
        arguments = sample["arguments"]
        for i in range(len(sample["resps"])):
            pair = arguments[f"gen_args_{i}"]
            yield pair["arg_0"], pair["arg_1"]


def tokens_of(url: str, context: str, continuation: str) -> tuple[list[int], int]:
    """Return all tokens and the number of the context's, as lm-eval divides them."""
    whole, start = (tokenize(url, text) for text in (context + continuation, context))
    return whole, len(start)


def tokenize(url: str, text: str) -> list[int]:
    import urllib.request

    body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
    with urllib.request.urlopen(f"{url}/tokenize", body) as reply:
        tokens: list[int] = json.load(reply)["tokens"]
    return tokens


def stock(path: Path, asked: Sequence[tuple[list[int], int]]) -> list[float]:
    """Return the same scores from stock llama-cpp-python, in a process of its own."""
    lines = "".join(json.dumps(request) + "\n" for request in asked)
    here = Path(hobbit.stock.__file__).resolve()
    command = [sys.executable, "-c", _STOCK, str(here), str(path), str(CONTEXT), "512"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.splitlines()]


def accuracy(samples: Sequence[dict[str, Any]], scores: Sequence[float]) -> float:
    right, at = 0, 0
    for sample in samples:
        n = len(sample["resps"])
        own = scores[at : at + n]
        right += own.index(max(own)) == int(sample["doc"]["right"])
        at += n
    return right / len(samples)


if __name__ == "__main__":
    sys.exit(main())
