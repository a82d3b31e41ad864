"""Preparation of a run's data at the papers' sizes: rows/s, seconds of the next start, memory.

    python benchmarks/data.py [--tokenizer FOLDER|FILE.gguf|tiny] [--rows N ...] [--folder DIR]

Synthetic rows of about 110 tokens in one JSON Lines file. Each line of the table comes from a
process of its own: cold writes the cache, warm finds it. Private are the bytes that no other
process can share (anonymous memory), resident those and the mapped pages, all of them touched; both
without what the process held before, divided by the examples. Peak is the most that was resident at
any time, what it held before included, of one process (each worker of a cold start has its own).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import shared

import data
import prepare

TOKENS = 110
WORDS = 4000  # different ones


def random_words(rng: np.random.Generator) -> list[str]:
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    sizes = rng.integers(2, 9, WORDS)
    return ["".join(rng.choice(letters, size)) for size in sizes]


def random_row(words: list[str], count: int, rng: np.random.Generator) -> dict[str, str]:
    """A third of the words is the prompt."""
    chosen = [words[i] for i in rng.integers(0, WORDS, count)]
    return {"prompt": " ".join(chosen[: count // 3]), "completion": " ".join(chosen[count // 3 :])}


def words_a_row(words: list[str], tokenizer, rng: np.random.Generator) -> float:
    """So many make TOKENS tokens on average, those of the template included."""
    means = []
    for count in (12, 36):
        rows = [random_row(words, count, rng) for _ in range(200)]
        rows = [data.rows_from_record(row)[0] for row in rows]
        examples = data.encode(rows, tokenizer, 2048)[0]
        means.append(np.mean([len(example.ids) for example in examples]))
    return 12 + (TOKENS - means[0]) * 24 / (means[1] - means[0])


def write_rows(path: Path, rows: int, tokenizer) -> None:
    rng = data.data_rng(0, "benchmark")
    words = random_words(rng)
    mean = words_a_row(words, tokenizer, rng)
    with open(path, "w", encoding="utf-8") as stream:
        for count in rng.integers(max(6, mean / 2), mean * 1.5, rows):
            stream.write(json.dumps(random_row(words, int(count), rng)) + "\n")


def memory() -> np.ndarray:
    """Bytes of this process: private (anonymous), resident."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines}
    return np.array([sizes["Anonymous:"], sizes["Rss:"]])


def measure(file: str, args: argparse.Namespace) -> dict:
    """One start, in this process."""
    cache = Path(args.folder) / "cache"
    tokenizer = data.with_template(shared.load_tokenizer(args.tokenizer), args.template)
    data.encode([data.rows_from_record({"text": "a"})[0]], tokenizer, 8)  # all is imported
    before, started = memory(), time.perf_counter()
    (prepared,) = prepare.load([file], prepare.Recipe(tokenizer, 2048, 0, cache=cache), quiet=True)
    data.fingerprint([prepared])
    prepared.examples.fingerprint()  # touches every token, as a run does at its start
    seconds, examples = time.perf_counter() - started, len(prepared.examples)
    private, resident = (memory() - before) / examples
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"examples": examples, "seconds": seconds, "private": private, "resident": resident}
    tokens = float(prepared.examples.lengths.mean())
    return found | {"tokens": tokens, "peak": peak}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = shared.argument_parser(__doc__)
    add = parser.add_argument
    add("--tokenizer", default="tiny")
    add("--template", default="plain")
    add("--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    add("--folder", help="of files and cache; default a temporary one")
    add("--mode", choices=["cold", "warm"], help=argparse.SUPPRESS)
    add("--file", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.mode:
        print(json.dumps(measure(args.file, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(args.folder or folder)
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        cores = f"{prepare.processes()} processes where there are enough rows"
        print(f"tokenizer {args.tokenizer}, template {args.template}, {cores}\n")
        rows = []
        for count in args.rows:
            file = folder / f"{count}.jsonl"
            tokenizer = data.with_template(shared.load_tokenizer(args.tokenizer), args.template)
            write_rows(file, count, tokenizer)
            for mode in ("cold", "warm"):
                own = ["--tokenizer", args.tokenizer, "--template", args.template]
                own += ["--folder", str(folder), "--mode", mode, "--file", str(file)]
                command = [sys.executable, os.path.abspath(__file__), *own]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                found = json.loads(output.splitlines()[-1])
                rate = f"{found['examples'] / found['seconds']:,.0f}"
                times = [f"{found['examples']:,}", f"{found['tokens']:.0f}", mode, rate]
                sizes = [f"{found[name]:,.0f}" for name in ("private", "resident")]
                seconds, peak = f"{found['seconds']:.1f}", f"{found['peak'] / 1e9:.2f}"
                rows.append([*times, seconds, *sizes, peak])
        header = ["examples", "tokens", "start", "rows/s", "seconds", "private B/example"]
        shared.print_table([*header, "resident B/example", "peak GB"], rows)


if __name__ == "__main__":
    main()
