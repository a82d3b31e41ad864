"""DynamixSFT on the toy tasks: the tables of docs/dynamix_sft.md.

    python benchmarks/dynamix_sft.py mixtures       # proportional, uniform, DynamixSFT: held-out loss per task
    python benchmarks/dynamix_sft.py noise          # one more dataset, of random responses: what each reward gives to it
    python benchmarks/dynamix_sft.py batch          # how far the mixture depends on the reward mini-batch, beside the seed
    python benchmarks/dynamix_sft.py first_order    # both rewards from the same states: rank correlation and cost
    python benchmarks/dynamix_sft.py overhead       # an update and a step in turn: K = 16, T_update = 50, batch 128

Runs that are missing are made under runs/bench-dynamix, then the table is printed; --report only prints. The seed changes
the model's initial weights, the data order and the draws. Model: a GPT-2 of 2 layers of 64 (0.15M parameters), random.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import dynamix_sft  # noqa: E402

RECIPE = ["--eval_data", "toy", "--template", "plain", "--batch_size", "32", "--micro_batch_size", "16", "--lr", "3e-3", "--epochs", "3",
          "--update_every", "8", "--save_every", "0"]
TOY, NOISE = ["--data", "toy"], ["--data", "toy", "toy/noise"]
MIXTURES = {"proportional": ["--sampling", "proportional"], "uniform": ["--sampling", "uniform"], "DynamixSFT": []}
REWARDS = {"same batch (default)": [], "fresh batch": ["--reward_on", "fresh"], "first order": ["--lookahead", "first_order"],
           "first order, fresh batch": ["--lookahead", "first_order", "--reward_on", "fresh"], "entropy": ["--reward", "entropy"],
           "proportional sampling": ["--sampling", "proportional"]}


def small_model(folder, seed):
    """A GPT-2 of 2 layers of 64 with random weights, saved once -> its folder."""
    path = Path(folder) / f"model-{seed}"
    if not (path / "config.json").exists():
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=259, n_positions=512, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=257, eos_token_id=258, pad_token_id=256)).save_pretrained(path)
        common.tiny_tokenizer().save_pretrained(path)
    return str(path)


def run(args, name, seed, flags):
    """One run of dynamix_sft.py, unless it is there already -> its folder, or None with --report."""
    folder = Path(args.output_dir) / f"{name.replace(', ', '-').replace(' ', '-').replace('(', '').replace(')', '').lower()}-{seed}"
    if not (folder / "summary.json").exists():
        if args.report:
            return None
        started, resume = time.perf_counter(), ["--resume"] if (folder / "config.json").exists() else []
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dynamix_sft.main(["--model", small_model(args.output_dir, seed), "--seed", str(seed), "--output_dir", str(folder),
                              *RECIPE, *flags, *resume, *args.flags])
        print(f"{folder} after {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return folder


def summary(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def mixtures_over_time(folder):
    """-> probabilities in force from one update to the next (S, K), of equal lengths."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if any(key.startswith("value/") for key in record)]
    return np.array([[value for key, value in record.items() if key.startswith("mixture/")] for record in records])


def mean_error(values, digits=3):
    """Mean ± standard error over the first axis, as text. values (seeds,)"""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def table(header, rows):
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def mixtures(args):
    folders = {name: [f for seed in args.seeds if (f := run(args, name, seed, TOY + flags))] for name, flags in MIXTURES.items()}
    losses = {name: np.array([[row["nll"] for row in summary(f)["eval"].values()] for f in found]) for name, found in folders.items()}
    tasks = list(summary(folders["DynamixSFT"][0])["eval"])
    print(f"held-out loss (nats per response token), mean ± standard error over {len(folders['DynamixSFT'])} seeds\n")
    table(["", *tasks, "macro average"],
          [[name, *(mean_error(column) for column in values.T), mean_error(values.mean(1))] for name, values in losses.items()])
    for name in ("proportional", "uniform"):
        difference = (losses["DynamixSFT"] - losses[name]).mean(1)
        print(f"\nDynamixSFT - {name}, macro average, paired by seed: {mean_error(difference, 4)} ({100 * difference.mean() / losses[name].mean():+.1f} %)")
    print("\nshare of the examples drawn, mean over seeds\n")
    table(["", *tasks], [[name, *(f"{np.mean([summary(f)['mixture'][task]['share'] for f in found]):.3f}" for task in tasks)]
                         for name, found in folders.items()])


def noise(args):
    rows = []
    for name, flags in REWARDS.items():
        folders = [f for seed in args.seeds if (f := run(args, f"noise {name}", seed, NOISE + flags))]
        if not folders:
            continue
        last = [summary(f)["mixture"]["noise"] for f in folders]
        macro = [np.mean([row["nll"] for row in summary(f)["eval"].values()]) for f in folders]
        rows.append([name, str(len(folders)), mean_error([row["share"] for row in last]), mean_error([row["probability"] for row in last]),
                     mean_error([row["value"] for row in last]), mean_error(macro), mean_error([summary(f)["overhead"] for f in folders], 2)])
    print("a dataset of random responses (13.8 % of the examples): mean ± standard error over seeds; loss: macro average of the other 7 tasks\n")
    table(["reward", "seeds", "share drawn", "p at the end", "Q at the end", "held-out loss", "time / static"], rows)


def batch(args):
    """Distance between two mixtures: total variation 1/2 Σ|p - p'|, averaged over the run."""
    def distance(one, other):
        return 0.5 * np.abs(one - other).sum(1).mean()

    paths = {b: {seed: mixtures_over_time(f) for seed in args.seeds
                 if (f := run(args, "DynamixSFT" if b == 16 else f"batch {b}", seed, TOY + ["--reward_batch_size", str(b)]))} for b in args.sizes}
    largest, rows = max(args.sizes), []
    for b, found in paths.items():
        between = [distance(one, found[other]) for seed, one in found.items() for other in found if other < seed]
        to_large = [distance(one, paths[largest][seed]) for seed, one in found.items() if seed in paths[largest]]
        rows.append([str(b), str(len(found)), "-" if b == largest or not to_large else mean_error(to_large), f"{np.mean(between):.3f}" if between else "-"])
    print("total variation between mixtures, averaged over the run\n")
    table(["reward batch", "seeds", f"to batch {largest}, same seed", "between two seeds, same batch"], rows)


def first_order(args):
    """Runs DynamixSFT and, at each of its updates, takes the other rewards from the same state too (they leave no trace)."""
    path = Path(args.output_dir) / "first_order.json"
    found, kinds = json.loads(path.read_text()) if path.exists() else {}, [("virtual", "same"), ("virtual", "fresh"), ("first_order", "same"), ("first_order", "fresh")]
    for seed in [] if args.report else args.seeds:
        if str(seed) in found:
            continue
        rewards, seconds, original = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}, dynamix_sft.arm_rewards

        def all_rewards(model, optimizer, arms, labels, step, lr, flags):
            for kind in kinds:
                started = time.perf_counter()
                own = argparse.Namespace(**{**vars(flags), "lookahead": kind[0], "reward_on": kind[1]})
                rewards[kind].append(original(model, optimizer, arms, labels, step, lr, own).tolist())
                seconds[kind].append(time.perf_counter() - started)
            return np.array(rewards[kinds[0]][-1])

        dynamix_sft.arm_rewards = all_rewards
        try:
            run(args, "first order study", seed, TOY)
        finally:
            dynamix_sft.arm_rewards = original
        found[seed] = {"/".join(kind): {"rewards": rewards[kind], "seconds": seconds[kind]} for kind in kinds}
        common.write_text(path, json.dumps(found))
    rows = []
    for kind in kinds[1:]:
        name, base = "/".join(kind), "/".join(kinds[0])
        per_update = [np.mean([spearmanr(a, b).statistic for a, b in zip(entry[base]["rewards"], entry[name]["rewards"])]) for entry in found.values()]
        pooled = [spearmanr(*(np.ravel([dynamix_sft.min_max(r) for r in entry[key]["rewards"]]) for key in (base, name))).statistic for entry in found.values()]
        best = [np.mean([np.argmax(a) == np.argmax(b) for a, b in zip(entry[base]["rewards"], entry[name]["rewards"])]) for entry in found.values()]
        cost = [np.median(entry[name]["seconds"]) / np.median(entry[base]["seconds"]) for entry in found.values()]
        rows.append([name.replace("/", ", "), mean_error(per_update), mean_error(pooled), mean_error(best, 2), mean_error(cost, 2)])
    updates = [len(entry[base]["rewards"]) for entry in found.values()]
    print(f"against the virtual step measured on the same batch, from the same states: {updates[0]} updates of 7 datasets, {len(updates)} seeds\n")
    table(["reward", "Spearman over the arms, mean over updates", "Spearman of min-max rewards, pooled", "same best arm", "seconds / virtual"], rows)


def overhead(args):
    """Steps and updates in turn, in one process, so that both see the same machine; medians."""
    flags = dynamix_sft.parse_args(["--model", args.model, "--data", *(args.data or [f"part{k}=toy/{task}" for k, task in enumerate(
        ["describe", "copy", "compare", "add", "sort", "reverse", "count", "noise"] * 2)]), "--max_steps", "1000", "--micro_batch_size", "32",
        *(["--source_column", args.source_column] if args.source_column else []), *args.flags])
    device = common.pick_device()
    flags.dtype = common.pick_dtype(flags.dtype, device)
    model, tokenizer = common.load_model(flags.model, device, dtype=flags.dtype, gradient_checkpointing=flags.gradient_checkpointing, lora_rank=flags.lora_rank)
    with contextlib.redirect_stdout(io.StringIO()):
        datasets = common.load_data(flags.data, flags.source_column)
        arms = common.encode_datasets(datasets, tokenizer, common.pick_template(flags.template, tokenizer), min(flags.max_length or 2048, common.max_positions(model)))
    arms = (arms * 16)[:16]  # fewer than 16 datasets: some take part twice
    optimizer = common.make_optimizer(model, flags.lr, flags.weight_decay)
    pool = [example for arm in arms for example in arm]
    sampler = common.MixtureSampler([len(arm) for arm in arms], [len(e.ids) for e in pool], flags.batch_size, 0)
    prior, seconds = sampler.sizes / sampler.sizes.sum(), {"step": []}
    p, step = dynamix_sft.sampling_probabilities(np.zeros(len(arms)), prior, flags.beta, flags.gamma), 0
    model.train()

    def timed(name, function):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    def one_step():
        batch = sampler.batches(p, step, 1)[0]
        dynamix_sft.backward(model, [pool[i] for i in batch], flags)
        common.optimizer_step(model, optimizer, flags.lr, flags.max_grad_norm)

    kinds = [("virtual", b) for b in args.batches] + [("first_order", 16)]
    one_step()  # warm-up
    for _ in range(args.repeats):
        for lookahead, b in kinds:
            timed("step", one_step)
            step += 1
            own = argparse.Namespace(**{**vars(flags), "lookahead": lookahead, "reward_batch_size": b})
            timed((lookahead, b), lambda: dynamix_sft.arm_rewards(model, optimizer, arms, list(map(str, range(16))), step, flags.lr, own))
    median = np.median(seconds["step"])
    lengths = np.array([len(e.ids) for e in pool])
    print(f"K = 16, T_update = 50, batch {flags.batch_size}; {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {flags.dtype}, "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'cpu, {torch.get_num_threads()} thread(s)'}; {lengths.mean():.0f} tokens an example; "
          f"median step {median:.2f} s ({min(seconds['step']):.2f} to {max(seconds['step']):.2f}, {len(seconds['step'])} steps, {args.repeats} updates each)\n")
    table(["reward", "reward batch", "median update (s)", "in steps", "time / static"],
          [[lookahead, str(b), f"{np.median(seconds[lookahead, b]):.2f}", f"{np.median(seconds[lookahead, b]) / median:.2f}",
            f"{1 + np.median(seconds[lookahead, b]) / (50 * median):.3f}"] for lookahead, b in kinds])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["mixtures", "noise", "batch", "first_order", "overhead"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_dir", default="runs/bench-dynamix")
    parser.add_argument("--report", action="store_true", help="print the table of the runs that are there")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64], help="of batch: reward mini-batches")
    parser.add_argument("--model", default="tiny", help="of overhead")
    parser.add_argument("--data", nargs="+", help="of overhead; default 16 datasets of toy")
    parser.add_argument("--source_column", help="of overhead")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32], help="of overhead: reward batch sizes")
    parser.add_argument("--repeats", type=int, default=3, help="of overhead")
    args, args.flags = parser.parse_known_args(argv)
    {"mixtures": mixtures, "noise": noise, "batch": batch, "first_order": first_order, "overhead": overhead}[args.table](args)


if __name__ == "__main__":
    main()
