"""DynaMiCS against fixed mixtures and gradient alignment where the constraints bite.

    python benchmarks/dynamics.py --seeds 5          # the tables of docs/dynamics.md

Runs that are missing are made under runs/bench-dynamics, then the tables are printed. A base model
(the tiny one) is trained on 2,000 rows of each of four toy tasks, then a little on all six, so that
it is weak at add and sort. Fine-tuning is to lower the loss on these two while copy, compare and
describe keep the loss they had. Seeds change the order and the draws of the data, not the base
model. Flags that the script does not know go to every run of dynamics.py: --lr 5e-4, ...
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import shared

import common
import data
import dynamics
import sftmix

TARGETS = ["add", "sort"]
CONSTRAINTS = ["copy", "compare", "describe"]
TASKS = TARGETS + CONSTRAINTS  # fine-tuned and evaluated
ALL_TASKS = [*TASKS, "count"]  # of the base model

# Rows of each task; in this order no prompt is in two parts.
ROWS = {"eval": 256, "train": 400, "base_data": 2000}
SECOND_STAGE_ROWS = 100  # of each task

BASE = "--mu 0 --ntp_on full --template plain"
FIRST_STAGE = "--lr 2e-3 --epochs 1.5 --batch_size 32"
SECOND_STAGE = "--lr 5e-4 --epochs 1 --batch_size 8"
RECIPE = (
    "--lora_rank 0 --template plain --max_steps 96 --batch_size 8 --micro_batch_size 32 --lr 2e-4 "
    "--warmup_ratio 0.1 --updates 0,12,36,66 --probe_steps 8 --eval_limit 32"
)
VARIANTS = {
    "DynaMiCS": "",
    "DynaMiCS, damping 0.5": "--damping 0.5",
    "gradient alignment": "--mixture gradient",
    "fixed, target mass 0": "--mixture uniform --target_mass 0",
    "fixed, target mass 0.2": "--mixture uniform --target_mass 0.2",
    "fixed, target mass 0.5": "--mixture uniform --target_mass 0.5",
    "fixed, target mass 0.8": "--mixture uniform --target_mass 0.8",
    "fixed, target mass 1": "--mixture uniform --target_mass 1",
}

HEADER = [
    "",
    "feasible on validation rows",
    "and on test rows",
    "reduction",
    "reduction of final/",
    "largest violation on test rows",
    "cost of one run",
]
CAPTION = (
    "reduction: geometric mean of the targets' test perplexity against the base model, %, 0 for an "
    "infeasible run; reduction of final/: the same, feasible or not"
)


# ---- data and runs


def files(folder: Path, part: str, tasks: list[str]) -> list[Path]:
    return [folder / part / f"{task}.jsonl" for task in tasks]


def distinct_rows(task: str, count: int) -> list[str]:
    """Rows of a toy task, as JSON lines; toy itself has fewer. No two have the same prompt."""
    rng = np.random.default_rng([1, ALL_TASKS.index(task)])
    seen = {}
    while len(seen) < count:
        instruction, extra, response = data.toy_example(task, rng)
        seen[instruction, extra] = response
    rows = []
    for (instruction, extra), response in seen.items():
        row = {"instruction": instruction, "input": extra, "output": response}
        rows.append(json.dumps(row))
    return rows


def write_data(folder: Path) -> None:
    """eval/, train/ and base_data/<task>.jsonl."""
    if files(folder, "base_data", ALL_TASKS)[-1].exists():  # the last one written
        return
    for task in ALL_TASKS:
        rows = distinct_rows(task, sum(ROWS.values()))
        for part, size in ROWS.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            own, rows = rows[:size], rows[size:]
            common.write_text(folder / part / f"{task}.jsonl", "\n".join(own) + "\n")


def base_model(folder: Path) -> Path:
    """Train the base model in two stages -> its folder."""
    base = [*BASE.split(), "--eval_data", *files(folder, "eval", ALL_TASKS)]
    known = files(folder, "base_data", ALL_TASKS[len(TARGETS) :])
    some = [f"{file}#{SECOND_STAGE_ROWS}" for file in files(folder, "base_data", ALL_TASKS)]
    first = ["--model", "tiny", "--data", *known, *FIRST_STAGE.split()]
    first_folder = shared.run(sftmix, folder / "base-1", *first, *base)
    second = ["--model", first_folder / "final", "--data", *some, *SECOND_STAGE.split()]
    return shared.run(sftmix, folder / "base", *second, *base) / "final"


def run_folder(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{shared.slug(variant)}-{seed}"


def fine_tune(folder: Path, model: Path, variant: str, seed: int, flags: list[str]) -> dict:
    """One run of a variant -> summary."""
    sets = ["--data", *files(folder, "train", TASKS), "--eval_data", *files(folder, "eval", TASKS)]
    domains = ["--targets", *TARGETS, "--constraints", *CONSTRAINTS]
    own = ["--model", model, "--seed", seed, *f"{RECIPE} {VARIANTS[variant]}".split(), *flags]
    target = run_folder(folder, variant, seed)
    return shared.summary(shared.run(dynamics, target, *sets, *domains, *own))


def main(argv: list[str] | None = None) -> None:
    names = list(VARIANTS)
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--output_dir", default="runs/bench-dynamics")
    args, flags = parser.parse_known_args(argv)

    folder = Path(args.output_dir)
    write_data(folder)
    model = base_model(folder)
    results = {variant: [] for variant in args.variants}
    for seed in range(args.seeds):
        for variant in args.variants:
            results[variant].append(fine_tune(folder, model, variant, seed, flags))

    print(f"seeds: {args.seeds}; mean ± standard error; {CAPTION}\n")
    rows = [shared.constrained_row(variant, runs) for variant, runs in results.items()]
    shared.print_table(HEADER, rows)
    probed = []
    for variant in args.variants:
        if variant.startswith("DynaMiCS"):
            probed += [run_folder(folder, variant, seed) for seed in range(args.seeds)]
    if probed:
        print(f"\nlinear model, targets: {shared.linear_model(probed, TARGETS)}")
        print(f"\nlinear model, constraints: {shared.linear_model(probed, CONSTRAINTS)}")


if __name__ == "__main__":
    main()
