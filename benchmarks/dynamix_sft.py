"""DynamixSFT on the toy tasks: the tables of docs/dynamix_sft.md.

    python benchmarks/dynamix_sft.py mixtures     # proportional, uniform, DynamixSFT: held-out loss
    python benchmarks/dynamix_sft.py noise        # a dataset of random responses: what it is given
    python benchmarks/dynamix_sft.py batch        # the mixture's dependence on reward mini-batches
    python benchmarks/dynamix_sft.py first_order  # rewards from the same states: correlation, cost
    python benchmarks/dynamix_sft.py overhead     # an update and a step in turn: K = 16, batch 128
    python benchmarks/dynamix_sft.py baselines    # all samplers: loss, overhead, distance
    python benchmarks/dynamix_sft.py baselines --data FILE --source_column NAME   # ... of your rows
    python benchmarks/dynamix_sft.py reach        # how far an actor can get in a TÜLU-2 run

Runs that are missing are made under runs/bench-dynamix, then the table is printed; --report only
prints. The seed changes the model's initial weights, the data order and the draws. Further flags go
to every run. Model: a GPT-2 of 2 layers of 64 (0.15M parameters), random.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from unittest import mock

import numpy as np
import shared
import torch
import transformers
from scipy.stats import spearmanr
from shared import mean_error, print_table

import common
import dynamix_sft
from data import Examples

RECIPE = (
    "--eval_data toy --template plain --batch_size 32 --micro_batch_size 16 --lr 3e-3 --epochs 3 "
    "--update_every 8 --save_every 0"
)
TOY = "--data toy"
NOISE = "--data toy toy/noise"
MIXTURES = {
    "proportional": "--sampling proportional",
    "uniform": "--sampling uniform",
    "DynamixSFT": "",
}
REWARDS = {
    "same batch (default)": "",
    "fresh batch": "--reward_on fresh",
    "first order": "--lookahead first_order",
    "first order, fresh batch": "--lookahead first_order --reward_on fresh",
    "entropy": "--reward entropy",
    "proportional sampling": "--sampling proportional",
}
SAMPLERS = {
    **MIXTURES,
    "MultiDDS": "--sampling multidds",
    "MultiUAT": "--sampling multiuat",
    "HBO": "--sampling hbo",
}
# of baselines --data FILE, beside RECIPE
FILE_RECIPE = "--max_length 512 --epochs 0.35 --batch_size 16 --reward_batch_size 8"
DEFAULT_BATCH = 16  # --reward_batch_size

# --lookahead and --reward_on of the first-order study; the first is what the others are held to.
KINDS = [
    ("virtual", "same"),
    ("virtual", "fresh"),
    ("first_order", "same"),
    ("first_order", "fresh"),
]
OVERHEAD_TASKS = ["describe", "copy", "compare", "add", "sort", "reverse", "count", "noise"]


# ---- runs


def small_model(root: Path, seed: int) -> Path:
    """A GPT-2 of 2 layers of 64 with random weights, saved once -> its folder."""
    folder = root / f"model-{seed}"
    if (folder / "config.json").exists():
        return folder
    sizes = {"vocab_size": 259, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
    config = transformers.GPT2Config(**sizes, **no_dropout, **tokens)
    torch.manual_seed(seed)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    common.tiny_tokenizer().save_pretrained(folder)
    return folder


def run(args: argparse.Namespace, name: str, seed: int, flags: str) -> Path | None:
    """One run of dynamix_sft.py, unless it is there -> its folder, or None with --report."""
    root = Path(args.output_dir)
    folder = root / f"{shared.slug(name.lower())}-{seed}"
    if shared.finished(folder):
        return folder
    if args.report:
        return None
    own = ["--model", small_model(root, seed), "--seed", seed]
    return shared.run(dynamix_sft, folder, *own, *f"{RECIPE} {flags}".split(), *args.flags)


def run_seeds(args: argparse.Namespace, name: str, flags: str) -> dict[int, Path]:
    """-> seed -> its run folder; with --report those that are there."""
    folders = {seed: run(args, name, seed, flags) for seed in args.seeds}
    return {seed: folder for seed, folder in folders.items() if folder}


# ---- tables


def mixtures(args: argparse.Namespace) -> None:
    """Held-out loss and share of the examples under three mixtures."""
    folders = {}
    for name, flags in MIXTURES.items():
        folders[name] = list(run_seeds(args, name, f"{TOY} {flags}").values())
    losses = {name: shared.eval_losses(found) for name, found in folders.items()}
    tasks = list(shared.summary(folders["DynamixSFT"][0])["eval"])
    shared.print_losses(losses, tasks, len(folders["DynamixSFT"]))
    for name in ("proportional", "uniform"):
        percent = 100 * (losses["DynamixSFT"].mean() / losses[name].mean() - 1)
        print(f"\n{shared.paired(losses, 'DynamixSFT', name)} ({percent:+.1f} %)")
    print("\nshare of the examples drawn, mean over seeds\n")
    rows = []
    for name, found in folders.items():
        drawn = [shared.summary(folder)["mixture"] for folder in found]
        row = [name]
        for task in tasks:
            row.append(f"{np.mean([mixture[task]['share'] for mixture in drawn]):.3f}")
        rows.append(row)
    print_table(["", *tasks], rows)


def noise(args: argparse.Namespace) -> None:
    """What each reward gives to a dataset of random responses."""
    rows = []
    for name, flags in REWARDS.items():
        folders = list(run_seeds(args, f"noise {name}", f"{NOISE} {flags}").values())
        if not folders:
            continue
        summaries = [shared.summary(folder) for folder in folders]
        row = [name, str(len(folders))]
        for key in ("share", "probability", "value"):
            row.append(mean_error([summary["mixture"]["noise"][key] for summary in summaries]))
        row.append(mean_error(shared.eval_losses(folders).mean(1)))
        rows.append([*row, mean_error([summary["cost"]["total"] for summary in summaries], 2)])
    print(
        "a dataset of random responses (13.8 % of the examples): mean ± standard error over seeds; "
        "loss: macro average of the other 7 tasks\n"
    )
    header = ["reward", "seeds", "share drawn", "p at the end", "Q at the end"]
    print_table([*header, "held-out loss", "time / static"], rows)


def mixtures_over_time(folder: Path) -> np.ndarray:
    """-> probabilities in force from one update to the next (updates, K)."""
    path = []
    for record in shared.records(folder):
        if any(key.startswith("value/") for key in record):
            path.append([record[key] for key in record if key.startswith("mixture/")])
    return np.array(path)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation 1/2 Σ|p - p'|, averaged over the updates."""
    return 0.5 * np.abs(one - other).sum(1).mean()


def batch(args: argparse.Namespace) -> None:
    """How far the mixture depends on the reward mini-batch, beside the seed."""
    paths = {}
    for size in args.sizes:
        name = "DynamixSFT" if size == DEFAULT_BATCH else f"batch {size}"
        folders = run_seeds(args, name, f"{TOY} --reward_batch_size {size}")
        paths[size] = {seed: mixtures_over_time(folder) for seed, folder in folders.items()}
    largest = max(args.sizes)
    rows = []
    for size, found in paths.items():
        to_largest, between = [], []
        for seed, path in found.items():
            between += [distance(path, other) for s, other in found.items() if s < seed]
            if size != largest and seed in paths[largest]:
                to_largest.append(distance(path, paths[largest][seed]))
        own = [mean_error(to_largest) if to_largest else "-"]
        own.append(f"{np.mean(between):.3f}" if between else "-")
        rows.append([str(size), str(len(found)), *own])
    print("total variation between mixtures, averaged over the run\n")
    header = ["reward batch", "seeds", f"to batch {largest}, same seed"]
    print_table([*header, "between two seeds, same batch"], rows)


# ---- all samplers


def split_file(args: argparse.Namespace) -> str:
    """--data FILE: every tenth row of a source is held out, at most 40 -> flags for training on the
    others and evaluating by source."""
    root = Path(args.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    lines = {}
    for line in Path(args.data[0]).read_text(encoding="utf-8").split("\n"):
        if line:
            lines.setdefault(json.loads(line)[args.source_column], []).append(line + "\n")
    trained, evaluated = [], []
    for source, own in lines.items():
        held_out = own[::10][:40]
        trained += [line for line in own if line not in set(held_out)]
        path = root / f"held-out-{shared.slug(source)}.jsonl"
        common.write_text(path, "".join(held_out))
        evaluated.append(f"{source}={path}")
    common.write_text(root / "train.jsonl", "".join(trained))
    flags = f"--data {root / 'train.jsonl'} --source_column {args.source_column}"
    return f"{FILE_RECIPE} {flags} --eval_data {' '.join(evaluated)}"


def baselines(args: argparse.Namespace) -> None:
    """Held-out loss, overhead and distance from the prior of every sampler."""
    start = split_file(args) if args.data else TOY
    found = {name: {} for name in SAMPLERS}
    for seed in args.seeds:  # a table can be printed before all seeds are there
        for name, flags in SAMPLERS.items():
            folder = run(args, name, seed, f"{start} {flags}")
            found[name] |= {seed: folder} if folder else {}
    seeds = sorted(set.intersection(*map(set, found.values())))
    folders = {name: [own[seed] for seed in seeds] for name, own in found.items()}
    losses = {name: shared.eval_losses(own) for name, own in folders.items()}
    shared.print_losses(losses, list(shared.summary(folders["HBO"][0])["eval"]), len(seeds))
    print("\nbeside proportional sampling, mean ± standard error over seeds\n")
    rows = []
    for name, own in folders.items():
        summaries = [shared.summary(folder) for folder in own]
        difference = (losses[name] - losses["proportional"]).mean(1)
        row = [name, mean_error(difference, 4, "+"), str(summaries[0]["updates"])]
        row.append(f"{np.mean([each['tokens'] for each in summaries]) / 1000:.0f}K")
        row.append(mean_error([each["cost"]["total"] for each in summaries], 2))
        for level in ("datasets", "groups"):
            distances = [each["distance"].get(level) for each in summaries]
            row.append("-" if None in distances else mean_error(distances, 4))
        rows.append(row)
    header = ["", "macro average, paired by seed", "updates", "tokens", "time / static"]
    print_table([*header, "distance from the prior", "of the groups"], rows)


def reach(args: argparse.Namespace) -> None:
    """How far an actor can get from a uniform start when one dataset has all the reward."""
    steps, rows = 5000, []  # 320K examples, 2 epochs of batches of 128
    for name, count, every in (("MultiDDS, MultiUAT", 16, 1000), ("HBO", 16, 200)):
        start = dynamix_sft.baselines.actor_start(np.ones(count))
        rewards, updates, actor = np.eye(count)[0], len(common.every(every, steps)), start
        for _ in range(updates):
            actor = dynamix_sft.baselines.actor_update(actor, rewards)
        p = dynamix_sft.baselines.softmax(actor[0])
        distance = dynamix_sft.baselines.total_variation(p, np.ones(count))
        rows.append([name, str(updates), f"{1 / count:.4f}", f"{p[0]:.4f}", f"{distance:.4f}"])
    print(f"{steps:,} steps, 16 datasets of one size, all the reward on one of them\n")
    header = ["actor", "updates", "its p at the start", "at the end", "distance from the prior"]
    print_table(header, rows)


# ---- first-order rewards


def changed(flags: argparse.Namespace, **values: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(flags), **values})


class RewardStudy:
    """In place of dynamix_sft.arm_rewards: takes all KINDS of rewards, hands back the first.

    They leave no trace, so all are of the same state.
    """

    def __init__(self):
        self.arm_rewards = dynamix_sft.arm_rewards
        self.log = {kind: {"rewards": [], "seconds": []} for kind in KINDS}

    def __call__(self, *arguments):
        *state, flags = arguments
        for kind, log in self.log.items():
            own = changed(flags, lookahead=kind[0], reward_on=kind[1])
            started = time.perf_counter()
            log["rewards"].append(self.arm_rewards(*state, own).tolist())
            log["seconds"].append(time.perf_counter() - started)
        return np.array(self.log[KINDS[0]]["rewards"][-1])


def study_seeds(args: argparse.Namespace) -> list[dict]:
    """-> per seed: {"virtual/same": {"rewards": (updates, K), "seconds": (updates,)}, ...}.

    Kept in first_order.json, because the run folders have only one kind of reward.
    """
    path = Path(args.output_dir) / "first_order.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for seed in args.seeds:
        if args.report or str(seed) in found:
            continue
        study = RewardStudy()
        with mock.patch.object(dynamix_sft, "arm_rewards", study):
            run(args, "first order study", seed, TOY)
        found[str(seed)] = {"/".join(kind): log for kind, log in study.log.items()}
        common.write_text(path, json.dumps(found))
    return list(found.values())


def compare_rewards(base: dict, other: dict) -> tuple[float, float, float, float]:
    """Two kinds of one seed -> Spearman over the arms (mean over updates), Spearman of all min-max
    rewards, how often the best arm is the same, ratio of the seconds."""
    pairs = list(zip(base["rewards"], other["rewards"]))
    per_update = np.mean([spearmanr(one, two).statistic for one, two in pairs])
    scaled = []
    for kind in (base, other):
        scaled.append(np.ravel([dynamix_sft.min_max(rewards) for rewards in kind["rewards"]]))
    pooled = spearmanr(*scaled).statistic
    same_best = np.mean([np.argmax(one) == np.argmax(two) for one, two in pairs])
    return per_update, pooled, same_best, np.median(other["seconds"]) / np.median(base["seconds"])


def first_order(args: argparse.Namespace) -> None:
    """Rank correlation with the default reward, and cost, of the other kinds."""
    found = study_seeds(args)
    base, *others = ["/".join(kind) for kind in KINDS]
    rows = []
    for name in others:
        numbers = [compare_rewards(entry[base], entry[name]) for entry in found]  # (seeds, 4)
        cells = [mean_error(column, digits) for column, digits in zip(zip(*numbers), (3, 3, 2, 2))]
        rows.append([name.replace("/", ", "), *cells])
    updates = len(found[0][base]["rewards"])
    print(
        "against the virtual step measured on the same batch, from the same states: "
        f"{updates} updates of 7 datasets, {len(found)} seeds\n"
    )
    header = ["reward", "Spearman over the arms, mean over updates"]
    header += ["Spearman of min-max rewards, pooled", "same best arm", "seconds / virtual"]
    print_table(header, rows)


# ---- overhead


class OverheadRun:
    """A run of dynamix_sft.py without its loop: `train` is one step, `update` one set of rewards.

    16 datasets; of fewer some take part twice.
    """

    def __init__(self, flags: argparse.Namespace):
        self.flags = flags
        with contextlib.redirect_stdout(io.StringIO()):
            datasets, _ = common.load_datasets(flags, common.setup(flags))
            self.model = common.load_start(flags)
        parts = [dataset.examples for dataset in datasets]
        self.arms = {str(k): parts[k % len(parts)] for k in range(16)}
        self.pool = Examples.join([*self.arms.values()])
        self.optimizer = common.make_optimizer(self.model, flags)
        sizes = np.array([len(arm) for arm in self.arms.values()])
        self.sampler = common.MixtureSampler(sizes, flags.batch_size, 0)
        start = np.zeros(16), sizes / sizes.sum(), flags.beta, flags.gamma
        self.probabilities = dynamix_sft.sampling_probabilities(*start)
        self.model.train()

    def train(self, step: int) -> None:
        batch = self.sampler.batch(self.probabilities, step)
        common.backward(self.model, [self.pool[i] for i in batch], self.flags)
        lr, max_grad_norm = self.flags.lr, self.flags.max_grad_norm
        common.optimizer_step(self.model, self.optimizer, lr, max_grad_norm)

    def update(self, step: int, lookahead: str, reward_batch_size: int) -> None:
        own = changed(self.flags, lookahead=lookahead, reward_batch_size=reward_batch_size)
        state = self.model, self.optimizer, self.arms, step, self.flags.lr
        dynamix_sft.arm_rewards(*state, own)


def overhead_flags(args: argparse.Namespace) -> argparse.Namespace:
    toy = [f"part{k}=toy/{task}" for k, task in enumerate(OVERHEAD_TASKS * 2)]
    given = ["--model", args.model, "--data", *(args.data or toy)]
    given += ["--max_steps", "1000", "--micro_batch_size", "32"]
    if args.source_column:
        given += ["--source_column", args.source_column]
    return dynamix_sft.parse_args([*given, *args.flags])


def overhead(args: argparse.Namespace) -> None:
    """Steps and updates in turn, in one process, so that both see the same machine; medians."""
    training = OverheadRun(overhead_flags(args))
    device = training.model.device
    kinds = [("virtual", size) for size in args.batches] + [("first_order", 16)]
    steps, updates = [], {kind: [] for kind in kinds}
    training.train(0)  # warm-up
    for turn, kind in enumerate(kinds * args.repeats):
        steps.append(shared.timed(device, training.train, turn))
        updates[kind].append(shared.timed(device, training.update, turn + 1, *kind))

    median = np.median(steps)
    parameters = sum(p.numel() for p in training.model.parameters())
    machine = f"{training.flags.dtype}, {shared.device_name(device)}"
    print(
        f"K = 16, T_update = 50, batch {training.flags.batch_size}; {args.model}, "
        f"{parameters:,} parameters, {machine}; "
        f"{np.mean(training.pool.lengths):.0f} tokens an example; median step {median:.2f} s "
        f"({min(steps):.2f} to {max(steps):.2f}, {len(steps)} steps, {args.repeats} updates each)\n"
    )
    rows = []
    for (lookahead, size), seconds in updates.items():
        update = np.median(seconds)
        in_steps = update / median
        numbers = [f"{update:.2f}", f"{in_steps:.2f}", f"{1 + in_steps / 50:.3f}"]
        rows.append([lookahead, str(size), *numbers])
    print_table(["reward", "reward batch", "median update (s)", "in steps", "time / static"], rows)


TABLES = {
    "mixtures": mixtures,
    "noise": noise,
    "batch": batch,
    "first_order": first_order,
    "overhead": overhead,
    "baselines": baselines,
    "reach": reach,
}


def main(argv: list[str] | None = None) -> None:
    parser = shared.argument_parser(__doc__)
    add = parser.add_argument
    add("table", choices=list(TABLES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--output_dir", default="runs/bench-dynamix")
    add("--report", action="store_true", help="print the table of the runs that are there")
    add("--sizes", type=int, nargs="+", default=[4, 16, 64], help="of batch: reward mini-batches")
    add("--model", default="tiny", help="of overhead")
    add("--data", nargs="+", help="of overhead and baselines; default toy")
    add("--source_column", help="of overhead and baselines")
    add("--batches", type=int, nargs="+", default=[8, 16, 32], help="of overhead: reward batches")
    add("--repeats", type=int, default=3, help="of overhead")
    args, args.flags = parser.parse_known_args(argv)
    TABLES[args.table](args)


if __name__ == "__main__":
    main()
