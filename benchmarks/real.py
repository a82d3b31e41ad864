"""The methods on a real pretrained model: the tables of docs/, a command each.

    python benchmarks/real.py cut --rows FILE --train 256 --test 128 --output_dir ROWS
    python benchmarks/real.py grid --model FILE.gguf --data ROWS/train.jsonl \\
        --held_out ROWS/test.jsonl            # SFTMix and NTP: where is there an effect?
    python benchmarks/real.py arms ... --lr 1e-4 --epochs 6       # the chosen cell: all arms, μ
    python benchmarks/real.py reference ... --lr 1e-4 --epochs 6  # weaker and free references
    python benchmarks/real.py mixture --model FILE.gguf --data ROWS/train.jsonl \\
        --source_column dataset --held_out ROWS/*.jsonl           # DynamixSFT by source
    python benchmarks/real.py constraints --model FILE.gguf --data math=A code=B chat=C \\
        --held_out math=D code=E chat=F quiz=G --targets math --accuracy quiz    # DynaMiCS

A finished run is one line of --output_dir/results.jsonl; its final/ is deleted. What is missing is
run, what was cut off goes on; then the table is printed and TABLE.png drawn. Further flags go to
every run. `cut` writes rows of a JSON Lines file into a folder, which should not be committed.

The NTP arm is SFTMix's reference bit for bit: its perplexities are taken on the way
(NTP-....confidence.jsonl), once a seed. Confidence of a held-out row, for quartiles: minus its
perplexity under the NTP models of the other seeds (of one seed: the base model), none of them
compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import shared
import torch
from scipy import stats
from shared import print_table

import common
import data
import dynamics
import dynamix_sft
import prepare
import sftmix

NTP = "--mu 0 --ntp_on full"
ARMS = {
    "NTP": NTP,
    "SFTMix": "--confidence {confidence}",
    "random halves": "--partition random",
    "SFTMix's batches, no Mixup": "--mu 1e-9 --confidence {confidence}",
    "NTP, longer": NTP,  # by what the reference cost
    "SFTMix, μ 0.1": "--mu 0.1 --confidence {confidence}",
    "SFTMix, μ 0.5": "--mu 0.5 --confidence {confidence}",
    "SFTMix, μ 1": "--mu 1 --confidence {confidence}",
}
ALL_SEEDS = ("NTP", "SFTMix", "random halves")  # the others: --fewer_seeds
CHECKPOINTS = 5  # of the reference, sftmix.py's default
REFERENCE_LR = {"first layers": 1e-4, "tiny": 1e-3}  # trained here, from (nearly) nothing
MIXTURES = {"Full Coverage": "proportional", "uniform": "uniform", "DynamixSFT": "dynamix"}
CONSTRAINED = {
    "fixed, target mass 0.2": "--mixture uniform --target_mass 0.2",
    "fixed, target mass 0.5": "--mixture uniform --target_mass 0.5",
    "fixed, target mass 0.8": "--mixture uniform --target_mass 0.8",
    "DynaMiCS, c 4": "--probe_steps 4",
    "DynaMiCS, c 4, no warm-up": "--probe_steps 4 --updates none",
    "DynaMiCS, c 2": "--probe_steps 2",
    "DynaMiCS, c 8": "--probe_steps 8",
}


# ---- runs, and what is kept of them


def read_lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Results:
    """results.jsonl: a line a finished run. Lines that a table asked for are in `used`."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.used = args, {}
        self.root = Path(args.output_dir)
        self.path = self.root / "results.jsonl"
        self.known = {line["name"]: line for line in read_lines(self.path)}

    def keep(self, line: dict) -> dict:
        self.known[line["name"]] = line
        self.root.mkdir(parents=True, exist_ok=True)
        common.write_jsonl(self.path, self.known.values())
        return line

    def get(self, script: ModuleType, name: str, flags: str, rows: bool = True) -> dict:
        """The line of a run, which is made if need be. rows: with the loss of every row."""
        args, model = self.args, self.args.model
        sets = ["--data", *args.data, "--eval_data", *args.held_out]
        given = ["--model", model, *sets, *args.shared, *flags.split(), *args.flags]
        line = self.known.get(name)
        if line and line["flags"] != given:
            problem = f"{self.path}: {name} was run with other flags; name another --output_dir"
            raise data.UserError(f"{problem}, or delete its line and its folder")
        if not line:
            folder = shared.run(script, self.root / name, *given)
            line = {"name": name, "flags": given, "summary": shared.summary(folder)}
            if rows:
                line |= row_losses(args, folder / "final")
            line = self.keep(line)
        for part in ("final", "best", "checkpoint"):
            shutil.rmtree(self.root / name / part, ignore_errors=True)
        self.used[name] = line
        return line

    def base(self) -> dict:
        """The model before training: losses of all rows."""
        line = self.known.get("base")
        return line or self.keep({"name": "base", **row_losses(self.args, self.args.model)})


def row_losses(args: argparse.Namespace, model: str | Path) -> dict[str, dict]:
    """{"train", "held_out": {"nll": mean of each row's response in nats, "tokens"}}."""
    sets = ["--data", *args.data, "--eval_data", *args.held_out]
    flags = sftmix.parse_args(["--model", str(model), *sets, *args.shared, *args.flags])
    with contextlib.redirect_stdout(io.StringIO()):
        datasets = common.load_datasets(flags, common.setup(flags))
        model = common.load_start(flags)
    result = {}
    for part, found in zip(("train", "held_out"), datasets):
        examples, _ = prepare.pool(found)
        nll, tokens, _ = common.score(model, examples, 16, flags.dtype, part)
        result[part] = {"nll": (nll / tokens).tolist(), "tokens": tokens.tolist()}
    return result


class Reference:
    """Inside `taking`, sftmix.py's NTP baseline is a reference too: perplexities at C points go to
    <folder>.confidence.jsonl. And what the training batches say for free: every row's loss when
    it was trained on, to <folder>.seen.jsonl. Nothing that trains is changed."""

    def __init__(self, folder: Path):
        self.folder, self.members, self.losses = folder, [], []
        self.stage, self.train, self.loss = sftmix.target_stage, sftmix.train, sftmix.sftmix_loss
        self.cross_entropy = common.cross_entropy_

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        own = {"target_stage": self.with_points, "train": self.with_file}
        with mock.patch.multiple(sftmix, **own, sftmix_loss=self.with_losses):
            yield

    def with_points(self, examples, rows, source, perplexity, args):
        self.rows, self.source = rows, source
        stage = self.stage(examples, rows, source, perplexity, args)
        return replace(stage, points=sftmix.reference_stage(examples, args).points)

    def with_file(self, model, stage, args, run, eval_sets):
        """sftmix.train, then the file that --confidence reads."""
        seen = replace(stage, examples=Recorded(stage.examples, self.members))
        counts, perplexity = self.train(model, seen, args, run, eval_sets)
        manifest = {"fingerprint": run.config["data_fingerprint"], "rows": len(self.source)}
        manifest |= {"num_checkpoints": len(perplexity), "lines": len(self.rows)}
        lines, values = [manifest], zip(self.rows.tolist(), perplexity.T.tolist())
        lines += [{"index": i, "perplexity": own} for i, own in values]
        common.write_jsonl(f"{self.folder}.confidence.jsonl", lines)
        return counts, perplexity

    def with_losses(self, hidden, targets, lengths, *rest, **options):
        """sftmix_loss; which rows, and their mean losses, are added to the file. A step that was
        made again after a cut stands there twice."""
        self.losses.clear()
        with mock.patch.object(common, "cross_entropy_", self.recorded_losses):
            result = self.loss(hidden, targets, lengths, *rest, **options)
        sizes = [int(size) for size in lengths if size]
        parts = torch.cat(self.losses).split(sizes)
        rows = self.rows[self.members[-len(sizes) :]].tolist()
        line = {"index": rows, "nll": [part.mean().item() for part in parts]}
        with open(f"{self.folder}.seen.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.members.clear()
        return result

    def recorded_losses(self, *arguments, **options):
        result = self.cross_entropy(*arguments, **options)
        self.losses.append(result.detach().double().cpu())
        return result


class Recorded:
    """Examples that note which of them were taken."""

    def __init__(self, examples, members: list):
        self.examples, self.members = examples, members

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str):
        return getattr(self.examples, name)

    def __getitem__(self, i):
        self.members.append(int(i))
        return self.examples[i]


def cell(lr: float, epochs: float) -> str:
    return f"--lr {lr:g} --epochs {epochs:g}"


def ntp(results: Results, where: str, seed: int) -> tuple[dict, Path]:
    """The NTP arm of a cell, which is the reference -> line, its confidences' file."""
    name = f"{shared.slug(f'NTP {where}')}-{seed}"
    with Reference(results.root / name).taking():
        line = results.get(sftmix, name, f"--seed {seed} {where} {NTP}")
    return line, results.root / f"{name}.confidence.jsonl"


def arm(results: Results, variant: str, where: str, seed: int) -> dict:
    """The line of one run of an arm in the cell `where`."""
    line, confidence = ntp(results, where, seed)
    if variant == "NTP":
        return line
    own = ARMS[variant].format(confidence=confidence)
    name = f"{shared.slug(f'{variant} {where}')}-{seed}"
    if variant == "NTP, longer":  # the reference's epochs, and C forward passes, a third each
        where = cell(results.args.lr, 2 * results.args.epochs + CHECKPOINTS / 3)
    return results.get(sftmix, name, f"--seed {seed} {where} {own}")


# ---- numbers


def mean_loss(line: dict, part: str, rows: np.ndarray | slice = slice(None)) -> float:
    """Nats per response token over rows of "train" or "held_out"."""
    nll, tokens = np.array(line[part]["nll"])[rows], np.array(line[part]["tokens"])[rows]
    return float((nll * tokens).sum() / tokens.sum())


def t_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval over seeds; nan of one value -> mean, low, high."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, np.nan, np.nan
    room = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, mean - room, mean + room


def shown(values: list[float], digits: int = 4) -> str:
    mean, low, high = t_interval(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def differences(one: list[dict], other: list[dict], rows: dict | None = None) -> list[float]:
    """Held-out loss of `one` minus `other`, paired by seed; rows: by seed, default all."""
    found = []
    for seed, pair in enumerate(zip(one, other)):
        chosen = rows[seed] if rows else slice(None)
        found.append(np.subtract(*[mean_loss(line, "held_out", chosen) for line in pair]))
    return found


def quartiles(base: dict, lines: list[dict]) -> list[dict[int, np.ndarray]]:
    """Held-out rows by confidence, most confident first -> four {seed: rows}. lines: of NTP."""
    found = [{}, {}, {}, {}]
    for seed in range(len(lines)):
        others = [line for other, line in enumerate(lines) if other != seed] or [base]
        perplexity = np.exp([line["held_out"]["nll"] for line in others]).mean(0)
        for quarter, rows in zip(found, np.array_split(np.argsort(perplexity, kind="stable"), 4)):
            quarter[seed] = rows
    return found


def spread(lines: list[dict]) -> list[str]:
    """Standard deviations over the training rows of confidence (minus perplexity) and of its log,
    mean over runs; the second is not a few rows'."""
    nll = np.array([line["train"]["nll"] for line in lines])
    return [f"{np.exp(nll).std(1).mean():.3f}", f"{nll.std(1).mean():.3f}"]


def processor() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; {} where there is no such file."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    pairs = [line.partition(":")[::2] for line in text.split("\n\n")[0].splitlines()]
    return {key.strip(): value.strip() for key, value in pairs}


def hardware() -> str:
    name = "" if torch.cuda.is_available() else processor().get("model name", "")
    return f"{name} {shared.device_name(common.pick_device())}".strip()


def fast_dtype() -> str:
    """bf16 on a GPU and on a processor that computes in it; elsewhere it is many times slower."""
    fast = "avx512_bf16" in processor().get("flags", "").split()
    return "bf16" if fast or torch.cuda.is_available() else "fp32"


def print_cost(results: Results) -> None:
    """The table's last line."""
    summaries = [line["summary"] for line in results.used.values()]
    tokens = sum(summary["tokens"] for summary in summaries)
    hours = sum(summary["seconds"] for summary in summaries) / 3600
    base = Path(results.args.model).name
    if base.endswith(".gguf"):
        base += ", unpacked to fp32: where its blocks have 4 bits, a rounding of published weights"
    print(
        f"\n{len(summaries)} runs, {tokens / 1000:,.0f}K response tokens trained on (without "
        f"probes and rewards), {hours:.2f} hours of {hardware()}, {results.args.dtype}; {base}"
    )


def draw_intervals(path: Path, rows: dict[str, list[float]], title: str) -> None:
    """A point and a 95 % interval a row, and the seeds' own values."""
    figure, axis = new_figure(0.6 + 0.35 * len(rows))
    for place, values in enumerate(rows.values()):
        mean, low, high = t_interval(values)
        axis.plot(values, [place] * len(values), ".", color="0.6")
        error = np.nan_to_num([[mean - low], [high - mean]])
        axis.errorbar(mean, place, xerr=error, fmt="o", capsize=3, color="C0")
    axis.axvline(0, color="0.5", linewidth=0.8)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(title)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def new_figure(height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, height))
    return figure, figure.add_subplot()


# ---- SFTMix


def grid(results: Results) -> None:
    """NTP and SFTMix by learning rate and epochs."""
    args, rows, drawn = results.args, [], {}
    for lr in args.lrs:
        for epochs in args.epoch_counts:
            where = cell(lr, epochs)
            lines = {}
            for variant in ("NTP", "SFTMix"):
                lines[variant] = [arm(results, variant, where, seed) for seed in range(args.seeds)]
            row = [f"{lr:g}", f"{epochs:g}"]
            for part in ("train", "held_out"):
                for found in lines.values():
                    row.append(f"{np.mean([mean_loss(line, part) for line in found]):.4f}")
            drawn[f"lr {lr:g}, {epochs:g} epochs"] = differences(lines["SFTMix"], lines["NTP"])
            rows.append([*row, shown(list(drawn.values())[-1])])
    base = results.base()
    before = [f"{mean_loss(base, part):.4f}" for part in ("train", "held_out")]
    print(f"nats per response token; before training {before[0]} on training rows, {before[1]} on")
    print(f"held-out rows; seeds: {args.seeds}, differences paired, 95 % intervals\n")
    header = ["lr", "epochs", "training rows: NTP", "SFTMix", "held-out rows: NTP", "SFTMix"]
    print_table([*header, "SFTMix - NTP, held-out"], rows)
    title = "held-out loss, SFTMix - NTP (nats per token)"
    draw_intervals(results.root / "grid.png", drawn, title)


def arms(results: Results) -> None:
    """All arms in one cell."""
    args, where, lines = results.args, cell(results.args.lr, results.args.epochs), {}
    for variant in args.variants:
        seeds = args.seeds if variant in ALL_SEEDS else min(args.seeds, args.fewer_seeds)
        lines[variant] = [arm(results, variant, where, seed) for seed in range(seeds)]
    lines.setdefault("NTP", [ntp(results, where, seed)[0] for seed in range(args.seeds)])
    base, drawn = results.base(), {}
    quarters = quartiles(base, lines["NTP"])
    loss = f"{mean_loss(base, 'held_out'):.4f}"
    rows = [["base", "-", loss, *["-"] * 5, *spread([base])]]
    for variant, found in lines.items():
        loss = np.mean([mean_loss(line, "held_out") for line in found])
        row = [variant, str(len(found)), f"{loss:.4f}"]
        if variant == "NTP":
            row += ["-", *quarter_losses(found, quarters)]
        else:
            drawn[variant] = differences(found, lines["NTP"])
            row.append(shown(drawn[variant]))
            row += [shown(differences(found, lines["NTP"], part), 3) for part in quarters]
        rows.append([*row, *spread(found)])
    print(f"{where.replace('--', '')}: held-out loss (nats per response token); under NTP the loss")
    print("itself by quartile, else differences from NTP, paired by seed, 95 % intervals\n")
    header = ["", "seeds", "loss", "- NTP", "most confident quartile", "second", "third"]
    print_table([*header, "least confident", "sd of confidences", "of their log"], rows)
    title = "held-out loss, arm - NTP (nats per token)"
    draw_intervals(results.root / "arms.png", drawn, title)


def quarter_losses(lines: list[dict], quarters: list[dict]) -> list[str]:
    cells = []
    for rows in quarters:
        losses = [mean_loss(line, "held_out", rows[seed]) for seed, line in enumerate(lines)]
        cells.append(f"{np.mean(losses):.3f}")
    return cells


# ---- a weaker reference


def first_layers(results: Results) -> Path:
    """The model's first --layers blocks under its own norm and head, saved once -> folder."""
    folder, count = results.root / f"first-{results.args.layers}-layers", results.args.layers
    if (folder / "tokenizer_config.json").exists():  # written last
        return folder
    model, tokenizer = common.load_model(results.args.model, torch.device("cpu"))
    if not hasattr(getattr(model, "model", None), "layers"):
        raise data.UserError(f"{results.args.model}: is not built like Llama; leave first layers")
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_reference(results: Results, kind: str, seed: int) -> Path:
    """Train another model as the reference -> its confidences' file."""
    model = first_layers(results) if kind == "first layers" else kind
    where = cell(REFERENCE_LR[kind], results.args.epochs)
    name = f"{shared.slug(f'reference {kind} {where}')}-{seed}"
    with Reference(results.root / name).taking():
        results.get(sftmix, name, f"--seed {seed} --model {model} {where} {NTP}", rows=False)
    return results.root / f"{name}.confidence.jsonl"


def free_confidence(results: Results, where: str, seed: int) -> Path:
    """Minus the mean perplexity of a row over the epochs of the reference's training, each just
    before its step -> file of confidences."""
    _, confidence = ntp(results, where, seed)
    stem = str(confidence).removesuffix(".confidence.jsonl")
    seen = {}
    for line in read_lines(Path(f"{stem}.seen.jsonl")):
        for index, nll in zip(line["index"], line["nll"]):
            seen.setdefault(index, set()).add(nll)  # a step made twice counts once
    lines = [{"index": i, "confidence": -np.mean(np.exp([*own]))} for i, own in seen.items()]
    common.write_jsonl(f"{stem}.free.jsonl", lines)
    return Path(f"{stem}.free.jsonl")


def read_confidences(path: Path) -> np.ndarray:
    """-> (N,) by rising index."""
    found = {}
    for line in read_lines(path):
        if "index" in line:
            own = line.get("confidence")
            found[line["index"]] = -np.mean(line["perplexity"]) if own is None else own
    return np.array([found[index] for index in sorted(found)])


def reference(results: Results) -> None:
    """Confidences of weaker references and of losses seen for free, and what they lead to."""
    args, where = results.args, cell(results.args.lr, results.args.epochs)
    plain = [ntp(results, where, seed)[0] for seed in range(args.seeds)]
    full = [arm(results, "SFTMix", where, seed) for seed in range(args.seeds)]
    row = ["the model itself", "1", "1", shown(differences(full, plain)), "-"]
    rows, drawn = [row], {"the model itself": differences(full, plain)}
    for kind in args.references:
        ranks, halves, lines = [], [], []
        for seed in range(args.seeds):
            if kind == "free":
                path = free_confidence(results, where, seed)
            else:
                path = own_reference(results, kind, seed)
            both = [read_confidences(each) for each in (ntp(results, where, seed)[1], path)]
            ranks.append(stats.spearmanr(*both).statistic)
            confident = [sftmix.partition(each)[0] for each in both]
            halves.append(len(np.intersect1d(*confident)) / len(confident[0]))
            name = f"{shared.slug(f'SFTMix by {kind} {where}')}-{seed}"
            flags = f"--seed {seed} {where} --confidence {path}"
            lines.append(results.get(sftmix, name, flags))
        row = [kind, f"{np.mean(ranks):.3f}", f"{np.mean(halves):.2f}"]
        drawn[kind] = differences(lines, plain)
        rows.append([*row, shown(drawn[kind]), shown(differences(lines, full))])
    layers = f"first layers: {args.layers} blocks"
    print(f"{where.replace('--', '')}, {args.seeds} seeds; {layers}; differences of held-out loss")
    print("(nats per response token), paired by seed, 95 % intervals\n")
    header = ["confidences by", "Spearman with the model's own", "of its confident half, kept"]
    print_table([*header, "SFTMix - NTP", "- SFTMix by the model itself"], rows)
    title = "held-out loss, SFTMix - NTP (nats per token)"
    draw_intervals(results.root / "reference.png", drawn, title)


# ---- DynamixSFT


def mixture(results: Results) -> None:
    """Full Coverage, uniform and DynamixSFT over the sources of the rows."""
    args, lines = results.args, {}
    own = f"--source_column {args.source_column}" if args.source_column else ""
    own += f" --update_every {args.update_every} {cell(args.lr, args.epochs)}"
    for name, sampling in MIXTURES.items():
        lines[name] = []
        for seed in range(args.seeds):
            flags = f"--seed {seed} --sampling {sampling} {own}"
            run = partial(results.get, dynamix_sft, f"{shared.slug(name)}-{seed}", flags)
            lines[name].append(run(rows=False))
    losses, rows = {}, []
    for name, found in lines.items():
        values = []
        for line in found:
            values.append([task["nll"] for task in line["summary"]["eval"].values()])
        losses[name] = np.array(values)
    tasks = list(lines["Full Coverage"][0]["summary"]["eval"])
    shared.print_losses(losses, tasks, args.seeds)
    for name, found in lines.items():
        change = (losses[name] - losses["Full Coverage"]).mean(1).tolist()
        row = [name, "-" if name == "Full Coverage" else shown(change)]
        for key, part in (("total", "cost"), ("datasets", "distance")):
            row.append(shared.mean_error([line["summary"][part][key] for line in found]))
        rows.append([*row, str(round(np.mean([line["summary"]["tokens"] for line in found])))])
    print("\nmacro average, paired by seed, 95 % intervals\n")
    header = ["", "- Full Coverage", "time / static", "distance from the prior", "tokens a run"]
    print_table(header, rows)
    draw_coverage(results.root / "mixture.png", lines)


def draw_coverage(path: Path, lines: dict[str, list[dict]]) -> None:
    """Bars of instance coverage by source, mean over seeds."""
    labels = list(lines["Full Coverage"][0]["summary"]["mixture"])
    figure, axis = new_figure(0.8 + 0.45 * len(labels))
    for place, (name, found) in enumerate(lines.items()):
        mixtures = [line["summary"]["mixture"] for line in found]
        means = []
        for label in labels:
            means.append(np.mean([each[label]["coverage"] for each in mixtures]))
        axis.barh(np.arange(len(labels)) + 0.25 * (place - 1), means, 0.25, label=name)
    axis.axvline(1, color="0.5", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=1)  # linear up to 1; small sources are drawn many times
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("instance coverage: drawn / (size · epochs)")
    axis.legend()
    figure.savefig(path, dpi=130, bbox_inches="tight")


# ---- DynaMiCS


def constraints(results: Results) -> None:
    """Fixed mixtures, the oracle among them, and DynaMiCS; what is not a target is a constraint."""
    args, lines = results.args, {}
    labels = [spec.partition("=")[0] for spec in args.held_out]
    held = [label for label in labels if label not in args.targets]
    own = f"--targets {' '.join(args.targets)} --constraints {' '.join(held)}"
    own += f" --lora_rank {args.lora_rank} --lr {args.lr:g} --max_steps {args.steps}"
    if args.accuracy:
        own += f" --accuracy {' '.join(args.accuracy)}"
    for name, flags in CONSTRAINED.items():
        seeds = 1 if name in ("DynaMiCS, c 2", "DynaMiCS, c 8") else args.seeds
        lines[name] = []
        for seed in range(seeds):
            run = f"{shared.slug(name)}-{seed}"
            given = f"--seed {seed} {own} {flags}"
            lines[name].append(results.get(dynamics, run, given, rows=False))
    fixed = {name: found for name, found in lines.items() if name.startswith("fixed")}
    best = max(fixed, key=lambda name: mean_reduction(fixed[name]))
    print(f"{args.seeds} seeds, mean ± standard error. reduction: of the targets' test perplexity,")
    print("%, 0 for an infeasible run; of final/: feasible or not\n")
    header = ["", "feasible on validation rows", "on test rows", "reduction", "of final/"]
    header += ["largest violation on test rows", "cost of one run"]
    print_table(header, [shared.constrained_row(name, summaries(lines[name])) for name in lines])
    print(f"\noracle among the fixed mixtures (chosen on test rows): {best}")
    print("\nlosses of final/ on test rows, mean over seeds\n")
    print_table(["", *args.targets, *held], domain_rows(lines))
    probed = []
    for name, found in lines.items():
        if name.startswith("DynaMiCS"):
            probed += [results.root / line["name"] for line in found]
    for role, names in (("targets", args.targets), ("constraints", held)):
        print(f"\nlinear model, {role}: {shared.linear_model(probed, names)}")
    draw_feasible(results.root / "constraints.png", lines)


def summaries(lines: list[dict]) -> list[dict]:
    return [line["summary"] for line in lines]


def mean_reduction(lines: list[dict]) -> float:
    return np.mean([line["summary"]["report"]["reduction_percent"] for line in lines])


def domain_rows(lines: dict[str, list[dict]]) -> list[list[str]]:
    """Test loss by domain: before training, the levels of the constraints, and of each variant."""

    def losses(report: dict, key: str) -> list[float]:
        domains = [*report["targets"].values(), *report["constraints"].values()]
        return [domain.get(key, np.nan) for domain in domains]

    first = next(iter(lines.values()))[0]["summary"]["report"]
    rows = {"before training": losses(first, "before"), "level": losses(first, "reference")}
    for name, found in lines.items():
        rows[name] = np.mean([losses(each["report"], "after") for each in summaries(found)], 0)
    cells = {}
    for name, values in rows.items():
        cells[name] = ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
    return [[name, *own] for name, own in cells.items()]


def draw_feasible(path: Path, lines: dict[str, list[dict]]) -> None:
    """Largest violation against the targets' reduction, a point a run."""
    figure, axis = new_figure(3.5)
    for number, (name, found) in enumerate(lines.items()):
        points = []
        for line in found:
            report = line["summary"]["report"]
            worst = max(domain["violation"] for domain in report["constraints"].values())
            points.append((worst, report["unconstrained_reduction_percent"]))
        axis.plot(*np.array(points).T, "os^vDPX"[number], label=name)
    axis.set_xlabel("largest violation on test rows (0: all constraints hold)")
    axis.set_ylabel("targets' perplexity\nreduction of final/, %")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")


# ---- rows, and the command


def cut(args: argparse.Namespace) -> None:
    """Write train.jsonl and test.jsonl, or with --source_column test-<value>.jsonl of each value.
    Rows are drawn at random without replacement, those of equal text never on both sides. At most
    a third of a file's rows is held out; of a value too small for --test rows, none is written."""
    text = Path(args.rows).read_text(encoding="utf-8")
    lines = {line for line in text.split("\n") if line.strip()}
    lines = sorted(line for line in lines if len(line) <= args.characters)
    order = data.data_rng(0, "cut").permutation(len(lines))
    groups = {}
    for line in (lines[i] for i in order):
        value = json.loads(line)[args.source_column] if args.source_column else None
        groups.setdefault(value, []).append(line)
    folder, left = Path(args.output_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    for value, own in groups.items():
        size = min(args.test, len(own) // 3)
        if value is not None and size < args.test:
            print(f"{value!r} is left out: {len(own)} rows are fewer than 3 x --test {args.test}")
            continue
        name = "test" if value is None else f"test-{shared.slug(str(value))}"
        common.write_text(folder / f"{name}.jsonl", "\n".join(own[:size]) + "\n")
        left += own[size:]
    left = [left[i] for i in data.data_rng(0, "cut train").permutation(len(left))]
    common.write_text(folder / "train.jsonl", "\n".join(left[: args.train]) + "\n")


TABLES = {
    "grid": grid,
    "arms": arms,
    "reference": reference,
    "mixture": mixture,
    "constraints": constraints,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = shared.argument_parser(__doc__)
    add = parser.add_argument
    add("table", choices=["cut", *TABLES])
    add("--model", help=".gguf file, folder or hub id")
    add("--data", nargs="+", help="training rows, as the scripts' --data")
    add("--held_out", nargs="+", help="evaluation rows, as the scripts' --eval_data")
    add("--output_dir", default="runs/real")
    add("--seeds", type=int, default=3)
    add("--fewer_seeds", type=int, default=3, help="of arms beside NTP, SFTMix, random halves")
    add("--dtype", choices=["fp32", "bf16"], default=fast_dtype(), help="default: the faster one")
    add("--lr", type=float, default=1e-4)
    add("--epochs", type=float, default=2.0)
    add("--lrs", type=float, nargs="+", default=[2e-5, 1e-4], help="of grid")
    add("--epoch_counts", type=float, nargs="+", default=[2, 6], help="of grid")
    add("--variants", nargs="+", choices=list(ARMS), default=list(ARMS), help="of arms")
    kinds = [*REFERENCE_LR, "free"]
    add("--references", nargs="+", choices=kinds, default=kinds, help="of reference")
    add("--layers", type=int, default=8, help="of reference: the first of the model's blocks")
    add("--source_column", help="of mixture and cut")
    add("--update_every", type=int, default=10, help="of mixture")
    add("--targets", nargs="+", default=["math"], help="of constraints")
    add("--accuracy", nargs="+", default=[], help="of constraints")
    add("--steps", type=int, default=96, help="of constraints")
    add("--lora_rank", type=int, default=32, help="of constraints")
    add("--rows", help="of cut: a JSON Lines file")
    add("--characters", type=float, default=float("inf"), help="of cut: longer rows are left out")
    add("--train", type=int, default=256, help="of cut: training rows")
    add("--test", type=int, default=128, help="of cut: held-out rows, of each source")
    args, args.flags = parser.parse_known_args(argv)
    needed = ["rows"] if args.table == "cut" else ["model", "data", "held_out"]
    for name in needed:
        if not getattr(args, name):
            parser.error(f"{args.table} needs --{name}")
    batch = 8 if args.table == "constraints" else 16
    recipe = f"--dtype {args.dtype} --batch_size {batch} --max_length 512 --save_minutes 5"
    args.shared = recipe.split()
    return args


@common.command_line
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.table == "cut":
        cut(args)
        return
    results = Results(args)
    TABLES[args.table](results)
    print_cost(results)


if __name__ == "__main__":
    main()
