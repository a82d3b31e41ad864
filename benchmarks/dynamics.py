"""DynaMiCS against every fixed mixture and gradient alignment where the constraints bite: the tables of docs/dynamics.md.

    python benchmarks/dynamics.py --seeds 5          # runs what is missing under runs/bench-dynamics, then prints the table

A base model (the tiny one) is trained on 2,000 rows of four toy tasks, then a little on all six, so that it is weak at add and sort. Fine-tuning is
to lower the loss on these two while copy, compare and describe keep the loss they had. Seeds change the order and the draws of the data, not the base model. Flags that
the script does not know go to every run of dynamics.py: --lr 5e-4, --updates dense, ...
"""
from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose dynamics.py is this file
import common  # noqa: E402
import dynamics  # noqa: E402
import sftmix  # noqa: E402

TARGETS, CONSTRAINTS = ["add", "sort"], ["copy", "compare", "describe"]
ORDER = TARGETS + CONSTRAINTS + ["count"]
BASE_ROWS, TRAIN_ROWS, EVAL_ROWS = 2000, 400, 256  # per task: of the base model's training, of fine-tuning, of evaluation
BASE_FLAGS = ["--mu", "0", "--ntp_on", "full", "--template", "plain"]
FIRST_STAGE, SECOND_STAGE = ["--lr", "2e-3", "--epochs", "1.5", "--batch_size", "32"], ["--lr", "5e-4", "--epochs", "1", "--batch_size", "8"]
SECOND_STAGE_ROWS = 100  # of each task
FLAGS = ["--template", "plain", "--max_steps", "96", "--batch_size", "8", "--micro_batch_size", "32", "--lr", "2e-4", "--warmup_ratio", "0.1",
         "--updates", "0,12,36,66", "--probe_steps", "8", "--eval_limit", "32"]
MASSES = ["0", "0.2", "0.5", "0.8", "1"]
VARIANTS = {"DynaMiCS": [], "DynaMiCS, damping 0.5": ["--damping", "0.5"], "gradient alignment": ["--mixture", "gradient"],
            **{f"fixed, target mass {mass}": ["--mixture", "uniform", "--target_mass", mass] for mass in MASSES}}


def write_data(folder):
    """The toy tasks with more rows than `toy` has, as files: base_data/, train/ and eval/<task>.jsonl; no prompt in two of them."""
    if (folder / "base_data" / f"{ORDER[-1]}.jsonl").exists():  # the last one written
        return
    for task in ORDER:
        generate = common.TOY_TASKS[task][0]
        rng, seen = np.random.default_rng([1, ORDER.index(task)]), {}
        while len(seen) < BASE_ROWS + TRAIN_ROWS + EVAL_ROWS:
            instruction, extra, response = generate(rng)
            seen[instruction, extra] = response
        rows = [json.dumps({"instruction": instruction, "input": extra, "output": response}) for (instruction, extra), response in seen.items()]
        at = 0
        for part, size in (("eval", EVAL_ROWS), ("train", TRAIN_ROWS), ("base_data", BASE_ROWS)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            common.write_text(folder / part / f"{task}.jsonl", "\n".join(rows[at:at + size]) + "\n")
            at += size


def run(script, folder, *flags):
    """Run a script (its module) unless its folder is finished -> summary. Its output goes to <folder>.log."""
    if not (folder / "summary.json").exists():
        resume = ["--resume"] if (folder / "config.json").exists() else []
        print(f"{folder} ...", file=sys.stderr, flush=True)
        with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            script.main(["--output_dir", str(folder), *map(str, flags), *resume])
    return json.loads((folder / "summary.json").read_text())


def name(variant):
    return variant.replace(",", "").replace(" ", "-")


def mean_error(values, digits):
    values = np.array(values, dtype=float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def linear_model(folders, labels):
    """Predicted and observed changes of these domains over all intervals of some runs -> one line."""
    records = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    predicted, observed = (np.array([record[f"update/{label}/{key}"] for run in records for label in labels for record in run
                                     if f"update/{label}/{key}" in record]) for key in ("predicted", "observed"))
    return (f"{len(predicted)} predictions, right sign {np.mean(np.sign(predicted) == np.sign(observed)):.0%}, correlation "
            f"{np.corrcoef(predicted, observed)[0, 1]:.2f}, median size {np.median(np.abs(predicted)):.4f} predicted, {np.median(np.abs(observed)):.4f} observed")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--output_dir", default="runs/bench-dynamics")
    args, flags = parser.parse_known_args(argv)
    folder, results = Path(args.output_dir), {}
    write_data(folder)
    tasks = TARGETS + CONSTRAINTS
    evaluate = ["--eval_data", *(folder / "eval" / f"{task}.jsonl" for task in ORDER)]
    run(sftmix, folder / "base-1", "--model", "tiny", "--data", *(folder / "base_data" / f"{task}.jsonl" for task in ORDER[2:]), *evaluate,
        *BASE_FLAGS, *FIRST_STAGE)
    run(sftmix, folder / "base", "--model", folder / "base-1" / "final", "--data",
        *(f"{folder}/base_data/{task}.jsonl#{SECOND_STAGE_ROWS}" for task in ORDER), *evaluate, *BASE_FLAGS, *SECOND_STAGE)
    for seed in range(args.seeds):
        for variant in args.variants:
            results.setdefault(variant, []).append(run(
                dynamics, folder / f"{name(variant)}-{seed}", "--model", folder / "base" / "final", "--lora_rank", 0,
                "--data", *(folder / "train" / f"{task}.jsonl" for task in tasks), "--eval_data", *(folder / "eval" / f"{task}.jsonl" for task in tasks),
                "--targets", *TARGETS, "--constraints", *CONSTRAINTS, "--seed", seed, *FLAGS, *VARIANTS[variant], *flags))
    print(f"{args.seeds} seeds, mean ± standard error; reduction: geometric mean of the targets' test perplexity against the base model, %, 0 for an "
          "infeasible run; reduction of final/: the same, feasible or not\n")
    print("| | feasible on validation rows | and on test rows | reduction | reduction of final/ | largest violation on test rows | cost of one run |")
    print("|---|---|---|---|---|---|---|")
    for variant, runs in results.items():
        reports = [summary["report"] for summary in runs]
        columns = [mean_error([report[key] for report in reports], 1) for key in ("reduction_percent", "unconstrained_reduction_percent")]
        columns += [mean_error([max(row["violation"] for row in report["constraints"].values()) for report in reports], 4),
                    mean_error([summary["cost"]["total"] for summary in runs], 2)]
        rates = [f"{sum(report[key] for report in reports)}/{len(reports)}" for key in ("feasible_on_validation", "feasible")]
        print(f"| {variant} | {' | '.join(rates + columns)} |")
    probed = [folder / f"{name(variant)}-{seed}" for variant in args.variants if variant.startswith("DynaMiCS") for seed in range(args.seeds)]
    for role, labels in (("targets", TARGETS), ("constraints", CONSTRAINTS)) if probed else ():
        print(f"\nlinear model, {role}: {linear_model(probed, labels)}")


if __name__ == "__main__":
    main()
