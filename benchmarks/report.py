"""What run.sh ends with: our numbers, and those that they are held to.

    python benchmarks/report.py laptop           # runs/laptop: one table and laptop.png
    python benchmarks/report.py sftmix-table1    # runs/<row>: ours beside the paper's

It runs nothing: a cell whose run is missing is empty. The papers' numbers are those of the texts we
have; where a table was not readable there, the cell is empty, too.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shared
from shared import print_table

# ---- the papers' numbers

CHAT = ("ST", "MT", "overall", "WR", "LC WR")  # MT-Bench: first turn, second; AlpacaEval-2
GRADES = {"ST": "score_turn1", "MT": "score_turn2", "overall": "score"}
WIN_RATES = {"WR": "win_rate", "LC WR": "length_controlled_winrate"}
MEDICAL = ("medqa", "medqa5", "pubmedqa", "medmcqa", "average")
TEN = ("average of ten",)
# DynamixSFT names its benchmarks, not their metrics
METRICS = {"mmlu": "acc", "truthfulqa_mc2": "acc", "popqa": "accuracy", "bbh": "exact_match"}
METRICS |= {"drop": "f1", "humaneval": "pass@1", "humaneval_plus": "pass@1"}
METRICS |= {"gsm8k": "exact_match", "minerva_math": "math_verify"}
METRICS |= {"ifeval": "prompt_level_strict_acc"}


@dataclass(frozen=True)
class Table:
    source: str
    columns: tuple[str, ...]
    rows: dict[str, tuple]  # the run's folder under runs/ -> the paper's numbers, None: not known


def overall(value: float | None = None, mt=None, wr=None, lc=None) -> tuple:
    """A row of CHAT of which little is known."""
    return (None, mt, value, wr, lc)


PLAIN = (4.9100, 3.8150, 4.3625, 4.0714, 8.6528)  # NTP and SFTMix, Llama-3.1-8B on Alpaca-52K
SFTMIX = (5.2125, 3.9525, 4.5825, 4.9031, 10.3195)
SHARED = {"llama-alpaca-ntp": PLAIN, "llama-alpaca-sftmix": SFTMIX}
UNKNOWN = (None,)
V2 = "SFTMix, arXiv 2410.05248v2, Table"
TABLES = {
    "sftmix-table1": Table(
        f"{V2} 1",
        CHAT,
        SHARED
        | {
            "mistral-alpaca-ntp": overall(4.6163, wr=4.3560, lc=9.1759),
            "mistral-alpaca-sftmix": overall(4.9100, wr=4.5386, lc=9.4994),
            "llama-ultrachat-ntp": overall(5.6000, mt=5.0125, wr=5.0665, lc=8.4505),
            "llama-ultrachat-sftmix": overall(5.8125, mt=5.3500, wr=5.1149, lc=9.3810),
            "mistral-ultrachat-ntp": (5.7625, 4.6938, 5.2281, 4.4899, 7.7732),
            "mistral-ultrachat-sftmix": (5.9813, 4.8813, 5.4313, 4.6117, 8.7650),
        },
    ),
    "sftmix-table2": Table(
        f"{V2} 2, accuracy in %",
        MEDICAL,
        {
            "medalpaca-7b": (38.94, 33.96, 57.20, 34.90, 41.25),
            "PMC_LLAMA_7B": (27.94, 21.24, 54.87, 24.57, 32.16),
            "BioMedGPT-LM-7B": (38.62, 34.72, 58.27, 35.57, 41.80),
            "meditron-7b": (35.09, 26.73, 56.93, 34.03, 38.20),
            "BioMistral-7B": (43.86, 37.58, 50.13, 44.14, 43.93),
            "Llama-3.1-8B": (59.68, 53.23, 73.40, 52.79, 59.78),
            "llama-medalpaca-ntp": (59.31, 54.52, 75.40, 53.65, 60.72),
            "llama-medalpaca-sftmix": (60.88, 55.38, 77.80, 54.15, 62.05),
            "Mistral-7B-v0.1": (49.18, 43.94, 72.33, 47.98, 53.36),
            "mistral-medalpaca-ntp": (49.10, 44.62, 75.40, 48.15, 54.32),
            "mistral-medalpaca-sftmix": (51.77, 45.72, 77.40, 49.03, 55.98),
        },
    ),
    "sftmix-table3": Table(
        f"{V2} 3",
        CHAT,
        {
            "llama-alpaca-sftmix": SFTMIX,
            "llama-alpaca-weaker": (4.8500, 4.2625, 4.5563, 4.5786, 10.0483),
        },
    ),
    "sftmix-table4": Table(
        f"{V2} 4",
        CHAT,
        {
            "llama-high": (6.1175, 5.2575, 5.6875, 7.2636, 11.4490),
            "llama-high-low-ntp": (5.9000, 5.1825, 5.5412, 6.5871, 11.9590),
            "llama-high-low-mixup": (5.8025, 5.0975, 5.4500, 5.9382, 11.1768),
        },
    ),
    "sftmix-table5": Table(
        f"{V2} 5",
        CHAT,
        SHARED
        | {
            "llama-alpaca-loss": (4.7050, 4.1075, 4.4062, 3.9450, 8.2856),
            "llama-alpaca-alone": (5.0125, 4.0000, 4.5062, 3.5821, 7.2964),
        },
    ),
    "sftmix-table6": Table(
        f"{V2} 6",
        CHAT,
        SHARED
        | {
            "llama-alpaca-confident-mixup": overall(4.5425),
            "llama-alpaca-confident-ntp": overall(4.2913),
            "llama-alpaca-unconfident-mixup": overall(4.5425, lc=8.9392),
            "llama-alpaca-unconfident-ntp": overall(4.2778, lc=7.9889),
        },
    ),
    "sftmix-table7": Table(
        f"{V2} 7",
        CHAT,
        {
            "llama-alpagasus-ntp": (4.9787, 3.5275, 4.2531, 4.0752, 8.7182),
            "llama-alpagasus-sftmix": (5.1725, 3.9663, 4.5694, 4.9006, 10.3089),
            "llama-long-ntp": overall(4.4137),
            "llama-long-sftmix": overall(4.6212),
        }
        | SHARED,
    ),
    "sftmix-table8": Table(
        f"{V2} 8",
        CHAT,
        {
            "llama-lora-ntp": (4.9350, 3.7600, 4.3475, 3.8841, 8.5104),
            "llama-lora-sftmix": (5.3350, 3.8088, 4.5719, 4.8785, 9.8030),
        }
        | SHARED,
    ),
    "sftmix-table9": Table(
        f"{V2} 9",
        CHAT,
        {
            "llama-alpaca-mu-0.1": (5.0600, 4.0238, 4.5419, 4.7715, 10.0172),
            "llama-alpaca-sftmix": SFTMIX,
            "llama-alpaca-mu-0.5": (4.9606, 3.8968, 4.4287, 4.5092, 9.5034),
        },
    ),
    "sftmix-v4": Table(
        "SFTMix, arXiv 2410.05248v4, from notes on it",
        CHAT,
        {
            "qwen-alpaca-ntp": overall(6.1930, lc=13.9508),
            "qwen-alpaca-sftmix": overall(6.5247, lc=15.0235),
            "llama-tulu3-ntp": overall(),
            "llama-tulu3-sftmix": overall(),
        },
    ),
    "dynamix-table1": Table(
        "DynamixSFT, arXiv 2508.12116v2, main table, from notes on it",
        TEN,
        {
            "tulu2-1b-proportional": (26.67,),
            "tulu2-1b-uniform": (24.84,),
            "tulu2-1b-multidds": (26.85,),
            "tulu2-1b-multiuat": (26.68,),
            "tulu2-1b-hbo": (26.99,),
            "tulu2-1b-dynamix": (27.70,),
            "tulu3-1b-proportional": (31.42,),
            "tulu3-1b-hbo": (31.68,),
            "tulu3-1b-dynamix": (33.07,),
            "tulu3-8b-proportional": (61.55,),
            "tulu3-8b-hbo": (62.19,),
            "tulu3-8b-dynamix": (63.11,),
        },
    ),
    "dynamix-ablations": Table(
        "DynamixSFT, arXiv 2508.12116v2, ablations, from notes on it",
        TEN,
        {
            "tulu2-1b-dynamix": (27.70,),
            "tulu2-1b-no-prior": (25.9,),
            "tulu2-1b-no-prior-start": (26.3,),
            "tulu2-1b-entropy": UNKNOWN,
            "tulu2-1b-beta-2": UNKNOWN,
            "tulu2-1b-beta-8": UNKNOWN,
            "tulu2-1b-gamma-0.1": UNKNOWN,
            "tulu2-1b-gamma-0.5": UNKNOWN,
            "tulu2-1b-alpha-0.9": UNKNOWN,
            "tulu2-1b-alpha-0.99": UNKNOWN,
            "tulu2-1b-every-20": UNKNOWN,
            "tulu2-1b-every-100": UNKNOWN,
        },
    ),
}
GENERAL = {"gsm8k": "exact_match", "bbq": "acc", "mmlu": "acc", "hellaswag": "acc_norm"}
SCENARIO = ("dynamics-mass-0", "dynamics-mass-0.2", "dynamics-mass-0.5", "dynamics-mass-0.8")
SCENARIO += ("dynamics-mass-1", "dynamics-gradient", "dynamics-none", "dynamics-light")
SCENARIO += ("dynamics-dense",)
DYNAMICS = (
    "DynaMiCS, arXiv 2605.10770, from notes on it: over 50 scenarios a median reduction of 11 %\n"
    "for Qwen3-8B, where the best fixed mixture, chosen after the fact, has 0 %; 5.8 % without\n"
    "warm-up; 1.4 to 1.7 static runs. The notes give no single scenario."
)


# ---- ours


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def results(run: Path) -> dict:
    """{task: metrics} of the one model in a run's eval/results.json; {} where there is none, and
    where several are: none is to stand in another's row."""
    found = list(read_json(run / "eval" / "results.json").values())
    return found[0] if len(found) == 1 else {}


def metric(metrics: dict, name: str) -> float | None:
    """A metric by lm-eval's name, whatever its filter; of several filters the first."""
    values = [value for key, value in metrics.items() if key.split(",")[0] == name]
    return values[0] if values else None


def win_rates(run: Path) -> dict:
    """The row of the run's model in alpaca_eval's leaderboard.csv; {} where there is none."""
    name = f"runs-{run.name}-final"
    for path in sorted((run / "eval" / "alpaca_eval").rglob("leaderboard.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if next(iter(row.values())) == name:  # its first column has no title
                    return row
    return {}


def chat_row(run: Path) -> list[float | None]:
    grades, rates = results(run).get("mt_bench", {}), win_rates(run)
    values = [grades.get(key) for key in GRADES.values()]
    return values + [float(rates[key]) if rates.get(key) else None for key in WIN_RATES.values()]


def medical_row(run: Path) -> list[float | None]:
    found = results(run)
    values = [metric(found.get(task, {}), "acc") for task in MEDICAL[:-1]]
    return percentages([*values, average(values)])


def ten_row(run: Path) -> list[float | None]:
    found = results(run)
    return percentages([average([metric(found.get(task, {}), m) for task, m in METRICS.items()])])


def average(values: list[float | None]) -> float | None:
    """None unless all are there: an average of fewer is another number."""
    return None if None in values else float(np.mean(values))


def percentages(values: list[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


OURS = {CHAT: chat_row, MEDICAL: medical_row, TEN: ten_row}


def cells(values: list[float | None] | tuple, digits: int) -> list[str]:
    return ["" if value is None else f"{value:.{digits}f}" for value in values]


def paper_table(name: str, root: Path) -> None:
    table = TABLES[name]
    rows, digits = [], 4 if table.columns == CHAT else 2
    for run, paper in table.rows.items():
        ours = OURS[table.columns](root / run)
        rows.append([run, *cells(paper, digits), *cells(ours, digits)])
    print(f"{name}: {table.source}. Ours: one seed\n")
    header = [f"paper: {column}" for column in table.columns]
    print_table(["run", *header, *[f"ours: {column}" for column in table.columns]], rows)
    if table.columns == TEN:
        print(f"\nThe paper does not name its metrics; ours are {METRICS}")


def scenario(root: Path) -> None:
    """The runs' own reports, and eval.py's benchmarks."""
    done = [name for name in SCENARIO if shared.finished(root / name)]
    found, rows = read_json(root / "dynamics-eval" / "results.json"), []
    for name in done:
        own = [tasks for model, tasks in found.items() if Path(model).parent.name == name]
        scores = [metric((own or [{}])[0].get(task, {}), m) for task, m in GENERAL.items()]
        row = shared.constrained_row(name, [shared.summary(root / name)])
        rows.append([*row, *cells(percentages(scores), 2)])
    print(f"dynamics-scenario: {DYNAMICS}\n")
    header = ["", "feasible on validation rows", "on test rows", "reduction", "of final/"]
    header += ["largest violation on test rows", "cost of one run"]
    print_table([*header, *[f"{task}, {m} (%)" for task, m in GENERAL.items()]], rows)


# ---- laptop

# What the pages say of these experiments over more seeds, word for word
EXPECTED = {
    "SFTMix": ("docs/sftmix.md", "macro average, paired by seed: +0.0138 ± 0.0050"),
    "DynamixSFT": ("docs/dynamix_sft.md", "macro average, paired by seed: -0.0132 ± 0.0220"),
    "DynaMiCS": ("docs/dynamics.md", "10.9 ± 0.6 % against 11.1 ± 0.3 %"),
}
MASSES = ("0.2", "0.5", "0.8")


def losses(run: Path) -> dict[str, float]:
    """Held-out loss by task, nats per response token."""
    return {task: found["nll"] for task, found in shared.summary(run)["eval"].items()}


def sftmix_cost(runs: Path) -> float:
    """Reference, confidences and training of SFTMix, over the training of NTP."""
    own, plain = (shared.summary(runs / name)["time"] for name in ("sftmix-0", "ntp-0"))
    return sum(own[part] for part in ("reference", "confidence", "train")) / plain["train"]


def loss_row(method: str, baseline: str, runs: tuple[Path, Path], cost: float) -> list[str]:
    own, plain = (np.mean([*losses(run).values()]) for run in runs)
    numbers = [f"{own:.3f}", f"{plain:.3f}", f"{own - plain:+.3f}", f"{cost:.2f}"]
    page, text = EXPECTED[method]
    return [method, baseline, "held-out loss, nats", *numbers, f"{text} ({page})"]


def reductions(root: Path) -> dict[str, dict]:
    """Runs of dynamics.py -> their reports."""
    names = {f"fixed, target mass {mass}": f"fixed-target-mass-{mass}-0" for mass in MASSES}
    names["DynaMiCS"] = "DynaMiCS-0"
    return {name: shared.summary(root / folder)["report"] for name, folder in names.items()}


def constrained_row(root: Path) -> list[str]:
    """DynaMiCS beside the best fixed mixture: by the reductions of the models they end with."""
    found = reductions(root)
    own = found.pop("DynaMiCS")
    best = max(found, key=lambda name: found[name]["reduction_percent"])
    values = [report["unconstrained_reduction_percent"] for report in (own, found[best])]
    shown = []
    for value, report in zip(values, (own, found[best])):
        shown.append(f"{value:.1f} ({'feasible' if report['feasible'] else 'not feasible'})")
    cost = shared.summary(root / "DynaMiCS-0")["cost"]["total"]
    page, text = EXPECTED["DynaMiCS"]
    numbers = [*shown, f"{values[0] - values[1]:+.1f}", f"{cost:.2f}"]
    return ["DynaMiCS", f"{best}, the best of three", "reduction, %", *numbers, f"{text} ({page})"]


def laptop(root: Path) -> None:
    """One table, one figure."""
    root = root / "laptop"
    sft, mixed = root / "sftmix", root / "dynamix_sft"
    pairs = {
        "SFTMix - NTP": (sft / "sftmix-0", sft / "ntp-0"),
        "DynamixSFT - proportional": (mixed / "dynamixsft-0", mixed / "proportional-0"),
    }
    costs = [sftmix_cost(sft), shared.summary(mixed / "dynamixsft-0")["cost"]["total"]]
    rows = []
    for (name, runs), cost in zip(pairs.items(), costs):
        rows.append(loss_row(*name.split(" - "), runs, cost))
    rows.append(constrained_row(root / "dynamics"))
    print("one seed each: signs and sizes may differ from the last column, which is over seeds\n")
    header = ["method", "baseline", "measure", "method's", "baseline's", "difference"]
    print_table([*header, "cost, static runs", "docs/ say"], rows)
    draw(root / "laptop.png", pairs, reductions(root / "dynamics"))
    print(f"\nfigure {root / 'laptop.png'}")


def draw(path: Path, pairs: dict[str, tuple[Path, Path]], reports: dict[str, dict]) -> None:
    """Differences of the loss by task; reduction against the largest violation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    *bars, points = figure.subplots(1, 3)
    for axis, (name, runs) in zip(bars, pairs.items()):
        own, plain = (losses(run) for run in runs)
        tasks = list(own)
        axis.barh(range(len(tasks)), [own[task] - plain[task] for task in tasks], color="C0")
        axis.set_yticks(range(len(tasks)), tasks)
        axis.invert_yaxis()
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("held-out loss, difference (nats per token)")
    for number, (name, report) in enumerate(reports.items()):
        worst = max(domain["violation"] for domain in report["constraints"].values())
        size = report["unconstrained_reduction_percent"]
        points.plot(worst, size, "os^D"[number], color=f"C{number}", label=name)
    points.axvline(0, color="0.5", linewidth=0.8)
    points.set_title("DynaMiCS and fixed mixtures")
    points.set_xlabel("largest violation on test rows (nats)")
    points.set_ylabel("targets' perplexity\nreduction, %")
    points.legend(fontsize="small")
    for axis in (*bars, points):
        axis.locator_params(axis="x", nbins=5)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("name", choices=["laptop", *TABLES, "dynamics-scenario"])
    parser.add_argument("--runs", default="runs", help="the folder of the runs")
    args = parser.parse_args(argv)
    root = Path(args.runs)
    if args.name in TABLES:
        paper_table(args.name, root)
    else:
        {"laptop": laptop, "dynamics-scenario": scenario}[args.name](root)


if __name__ == "__main__":
    main()
