"""What the benchmarks share: runs that are missing, reading run folders, tables, clocks.

Import it before the project's modules. It puts the repository in front of this folder on
sys.path, because dynamics.py, dynamix_sft.py and sftmix.py are also names of files here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402 (the path comes first)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the description as it stands in the file. No abbreviations: a
    flag that it does not know goes on to a script's, and real.py has --references."""
    own = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(description=description, **own)


# ---- runs


def slug(name: str) -> str:
    """A name for a folder: letters, digits and dots, one hyphen in place of anything else."""
    return re.sub("[^A-Za-z0-9.]+", "-", name).strip("-")


def finished(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def run(script: ModuleType, folder: Path, *flags: object) -> Path:
    """Run a script unless its folder is finished; resume it if it was interrupted -> folder.

    What the script prints goes to <folder>.log. A SystemExit of the script is passed on.
    """
    if finished(folder):
        return folder
    resume = ["--resume"] if (folder / "config.json").exists() else []
    arguments = [str(flag) for flag in ["--output_dir", folder, *flags, *resume]]
    command = shlex.join([f"{script.__name__}.py", *arguments])
    print(f"+ python {command}  > {folder}.log", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                script.main(arguments)
        except SystemExit:
            print(f"error: {script.__name__}.py stopped, see {log.name}", file=sys.stderr)
            raise
    return folder


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ---- tables


def mean_error(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± standard error as text; one value alone. sign "+" shows a positive mean's too."""
    mean = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |")
    print("|" + "---|" * len(header))
    for row in rows:
        print(f"| {' | '.join(row)} |")


def eval_losses(folders: Iterable[Path]) -> np.ndarray:
    """Held-out loss of runs, nats per response token -> (runs, tasks)."""
    losses = []
    for folder in folders:
        losses.append([task["nll"] for task in summary(folder)["eval"].values()])
    return np.array(losses)


def print_losses(losses: dict[str, np.ndarray], tasks: Sequence[str], seeds: int) -> None:
    """A row a variant. losses: variant -> (seeds, tasks)."""
    title = "held-out loss (nats per response token), mean ± standard error over"
    print(f"{title} {seeds} seed{'s' * (seeds > 1)}\n")
    rows = []
    for variant, values in losses.items():
        columns = [*values.T, values.mean(1)]
        rows.append([variant, *map(mean_error, columns)])
    print_table(["", *tasks, "macro average"], rows)


def paired(losses: dict[str, np.ndarray], one: str, other: str, sign: str = "") -> str:
    """The macro averages' difference between two variants with the same seeds, as text."""
    difference = (losses[one] - losses[other]).mean(1)  # (seeds,)
    numbers = mean_error(difference, 4, sign)
    return f"{one} - {other}, macro average, paired by seed: {numbers}"


# ---- runs of dynamics.py


def constrained_row(variant: str, summaries: list[dict]) -> list[str]:
    """Of runs of dynamics.py: feasibility, reductions, largest violation, cost."""
    reports = [summary["report"] for summary in summaries]
    row = [variant]
    for key in ("feasible_on_validation", "feasible"):
        row.append(f"{sum(report[key] for report in reports)}/{len(reports)}")
    for key in ("reduction_percent", "unconstrained_reduction_percent"):
        row.append(mean_error([report[key] for report in reports], 1))
    largest = []
    for report in reports:
        largest.append(max(domain["violation"] for domain in report["constraints"].values()))
    costs = [summary["cost"]["total"] for summary in summaries]
    return [*row, mean_error(largest, 4), mean_error(costs, 2)]


def interval_changes(folders: list[Path], labels: list[str], key: str) -> np.ndarray:
    """ "predicted" or "observed" changes of these domains' loss over all intervals of some runs."""
    changes = []
    for folder in folders:
        lines = records(folder)
        for label in labels:
            name = f"update/{label}/{key}"
            changes += [line[name] for line in lines if name in line]
    return np.array(changes)


def linear_model(folders: list[Path], labels: list[str]) -> str:
    """How well the changes of these domains' loss were predicted, in one line."""
    predicted = interval_changes(folders, labels, "predicted")
    observed = interval_changes(folders, labels, "observed")
    right = np.mean(np.sign(predicted) == np.sign(observed))
    correlation = np.corrcoef(predicted, observed)[0, 1]
    sizes = [np.median(np.abs(changes)) for changes in (predicted, observed)]
    return (
        f"{len(predicted)} predictions, right sign {right:.0%}, correlation {correlation:.2f}, "
        f"median size {sizes[0]:.4f} predicted, {sizes[1]:.4f} observed"
    )


# ---- tokenizers


def load_tokenizer(name: str) -> Any:
    """tiny, a folder or hub id, or that of a .gguf file (pip install gguf)."""
    if name == "tiny":
        return common.tiny_tokenizer()
    if name.endswith(".gguf"):
        path = Path(name)
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return transformers.AutoTokenizer.from_pretrained(name)


# ---- clocks


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} thread(s)"


def timed(device: torch.device, function: Callable, *arguments: object) -> float:
    """Seconds of one call, with all of its work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
