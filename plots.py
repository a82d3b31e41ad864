"""Every figure, drawn from a run folder alone: no model, no dataset, no display.

    python plots.py runs/mine --format pdf      # draws the figures of a run again, for a paper

  sftmix.py       confidence (the paper's Figure 3), perplexity, embeddings (Figure 1), loss
  dynamix_sft.py  mixture, rewards, groups (HBO), coverage, loss
  dynamics.py     losses, mixture, slopes, prediction
  eval.py         results
A figure whose data the folder does not hold is left out: its function misses a file or a key.
Shapes: C checkpoints of the reference, N rows, K datasets, M domains, U updates, S records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MOST_BINS = 50  # of the confidence histogram
MOST_SLOPES = 8  # slope matrices shown, evenly spread over the updates
LONGEST_BAR = 400  # % coverage; longer bars are cut, their number is written beside them
REWARDS = {  # by --sampling: what a reward and a value are
    "dynamix": ("1-step look-ahead reward", "Value Q"),
    "multidds": ("mean cosine with held-out gradients", "Logit w"),
    "multiuat": ("Uncertainty on held-out rows", "Logit w"),
    "hbo": ("mean norm of an example's gradient", "Logit w"),
}
STYLE = {"font.size": 8, "axes.titlesize": 9, "lines.linewidth": 1.3, "lines.markersize": 3}


# ---- Numbers -------------------------------------------------------------------------------------
def series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """-> steps (S,), values (S,) of the records that hold the key; LookupError where none does."""
    points = [(record["step"], record[key]) for record in records if key in record]
    if not points:
        raise LookupError(key)
    return tuple(np.array(points, dtype=float).T)


def short(label: str) -> str:
    """At most 28 characters, … in the middle; to matplotlib $ is no formula, _ not "hide me"."""
    label = label if len(label) <= 28 else label[:14] + "…" + label[-13:]
    return "\u200b" * label.startswith("_") + label.replace("$", r"\$")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """{name: its end, as long as tells the models apart}: runs/ntp/final is ntp, or runs/ntp."""
    paths = {name: name.rstrip("/").removesuffix("/final").split("/") for name in names}
    for count in range(1, max(map(len, paths.values()), default=0) + 1):
        short = {name: "/".join(path[-count:]) for name, path in paths.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in paths}


def confident_half(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) -> indices of the upper half, one more where N is odd, and of the lower one (§3.3)."""
    order = np.argsort(-np.asarray(confidence), kind="stable")
    return tuple(np.split(order, [(len(order) + 1) // 2]))


def log_bins(values: np.ndarray) -> np.ndarray:
    """Edges of bins of equal width in log(values), values (N,) > 0: few rows get few bins. What is
    farther from the central 90 % than half their range lies outside, else a single row could put
    all others into one bin."""
    logs = np.log(values)
    low, high = np.quantile(logs, [0.05, 0.95])
    logs = logs.clip(low - (high - low) / 2, high + (high - low) / 2)
    count = min(len(np.histogram_bin_edges(logs, "auto")) - 1, MOST_BINS)
    edges = np.histogram_bin_edges(logs, count)
    return np.exp(edges + np.linspace(-1e-3, 1e-3, len(edges)))  # rounding must lose no row


def coverage(records: list[dict], labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Passes (K,) = examples drawn / size, and coverage (K,) = passes / epochs, at the end."""
    passes = np.array([series(records, f"passes/{label}")[1][-1] for label in labels])
    return passes, passes / series(records, "epoch")[1][-1]


def chosen_step(records: list[dict]) -> int | None:
    """The step of the chosen checkpoint: the first feasible one of the lowest target total."""
    feasible = [record for record in records if record.get("eval/feasible")]
    return min(feasible, key=lambda record: record["eval/target_total"], default={}).get("step")


def main_metrics(metrics: dict) -> list[str]:
    """The numbers that a table shows: floats but for the intervals and spreads of others."""
    floats = [key for key, value in metrics.items() if isinstance(value, float) and key != "shots"]
    floats = [key for key in floats if "bias_score_" not in key]  # bbq's by category
    return [key for key in floats if not key.endswith(("_low", "_high", "_std", "_diff"))]


# ---- What the figures share ----------------------------------------------------------------------
def panels(figure: Figure, width=4.6, height=3.0, count=1, gap=0.75, below=0.7, **settings) -> list:
    """Axes of width x height inches, these gaps between; saving fits the page to their labels."""
    columns = max(1, min(4, count, int(16 / (width + gap))))
    rows = max(1, -(-count // columns))
    figure.set_size_inches(columns * (width + gap) - gap, rows * (height + below) - below)
    figure.subplots_adjust(0, 0, 1, 1, wspace=gap / width, hspace=below / height)
    return [figure.add_subplot(rows, columns, i + 1, **settings) for i in range(count)]


def colors(count: int) -> list:
    """As many distinct colours."""
    from matplotlib import colormaps

    if count > 20:
        return list(colormaps["turbo"](np.linspace(0, 1, count)))
    return list(colormaps["tab10" if count <= 10 else "tab20"].colors[:count])


def plain_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic XAxis or YAxis (4, 6, 10), fewer over many powers of ten."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    subs = ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 5), (1,))[np.searchsorted([20, 1000], high / low)]
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def plot_lines(axis: Axes, lines: list) -> None:
    """Lines [(name, (steps (S,), values (S,)))] over the steps, with markers where S is small."""
    for (name, points), color in zip(lines, colors(len(lines))):
        marker = "o" if len(points[0]) < 30 else None
        axis.plot(*points, marker=marker, color=color, label=short(name), clip_on=False)
    axis.set(xlabel="optimizer step", xlim=(0, None))


# ---- The figures: data of the run folder -> drawn into figure -----------------------------------
def plot_confidence(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Confidence by source, as mean perplexity on a log axis with the median split (Figure 3)."""
    _, *rows = read(folder / "confidence.jsonl")
    perplexity = -np.array([row["confidence"] for row in rows])
    source = np.array([row["source"] for row in rows])
    names, bins = dict.fromkeys(source.tolist()), log_bins(perplexity)
    shown = perplexity.clip(bins[0], bins[-1])
    beyond = np.sum(shown != perplexity)
    [axis] = panels(figure, title="Confidence by source", xscale="log")
    for name, color in zip(names, colors(len(names))):
        values = shown[source == name]
        style = {"histtype": "step", "color": color, "label": f"{short(name)} ({len(values):,})"}
        axis.hist(values, bins, weights=np.full(len(values), 1 / len(values)), **style)
    axis.axvline(np.median(perplexity), color="black", ls="--", label="median: Dᶜ left, Dᵘ right")
    plain_ticks(axis.xaxis)
    note = f"\nrows farther out, counted in the first and last bin: {beyond:,}" if beyond else ""
    axis.set_xlabel(f"mean perplexity over the reference's checkpoints (= −confidence){note}")
    axis.set_ylabel("share of the source's rows")


def plot_perplexity(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Median and quartiles of either half's perplexity at the C checkpoints."""
    manifest, *rows = read(folder / "confidence.jsonl")
    perplexity = np.array([row["perplexity"] for row in rows])  # (N, C)
    halves = confident_half([row["confidence"] for row in rows])
    [axis] = panels(figure, yscale="log", ylabel="perplexity of a response: median, quartiles")
    for name, half in zip(("confident", "unconfident"), halves):
        low, middle, high = np.quantile(perplexity[half], [0.25, 0.5, 0.75], axis=0)
        axis.plot(manifest["steps"], middle, "o-", label=f"{name} ({len(half):,})", clip_on=False)
        axis.fill_between(manifest["steps"], low, high, alpha=0.2)
    plain_ticks(axis.yaxis)
    axis.set(title="Training dynamics of the reference", xlabel="optimizer step", xlim=(0, None))


def plot_embeddings(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Last hidden states of the final tokens (Figure 1; by PCA, which needs no further library)."""
    manifest, *points = read(folder / "embeddings.jsonl")
    first, second = (f"{share:.0%} of the variance" for share in manifest["variance"])
    [axis] = panels(figure, height=4, title="Last hidden state of the reference")
    for half, name in (("confident", "most confident"), ("unconfident", "least confident")):
        xy = np.array([(p["x"], p["y"]) for p in points if p["half"] == half]).reshape(-1, 2)
        axis.scatter(*xy.T, 5 + 200 / len(points), alpha=0.5, lw=0, label=f"{len(xy):,} {name}")
    axis.set(xlabel=f"first component ({first})", ylabel=f"second component ({second})")


def plot_loss(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Loss per token: SFTMix's reference, NTP and Mixup apart; DynamixSFT's, and its eval sets."""
    keys = dict.fromkeys(key for record in records for key in record)
    names = {"reference/loss": "reference, NTP", "train/ntp": "NTP", "train/mixup": "Mixup"}
    if not {"train/ntp", "train/mixup"} & keys.keys():
        names["train/loss"] = "training"
    lines = [(name, series(records, key)) for key, name in names.items() if key in keys]
    for key in keys if lines and config["script"] == "dynamix_sft" else ():
        if key.startswith("eval/") and key.endswith("/nll"):
            lines.append((key.removeprefix("eval/").removesuffix("/nll"), series(records, key)))
    axes = panels(figure, count=len(lines[:1]), title="Loss", ylabel="loss per token (nats)")
    plot_lines(axes[0], lines)
    for line in axes[0].lines[len(names.keys() & keys) :]:  # evaluation sets
        line.set_linestyle(":")


def plot_mixture(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Sampling probabilities over the steps, stacked; each holds from one update to the next."""
    points = np.array([series(records, f"mixture/{label}") for label in config["datasets"]])
    steps, p = np.append(points[0, 0], records[-1]["step"]), points[:, 1]  # (S + 1,), (K, S)
    names = [f"{short(k)} {row[0]:.1%} → {row[-1]:.1%}" for k, row in zip(config["datasets"], p)]
    p = np.concatenate([p, p[:, -1:]], axis=1)  # the last one holds to the end
    [axis] = panels(figure, title="Mixture", ylabel="sampling probability")
    areas = axis.stackplot(steps, p, step="post", colors=colors(len(p)), linewidth=0)
    axis.set(xlabel="optimizer step", xlim=(0, max(steps[-1], 1)), ylim=(0, 1))
    figure.legend(areas[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5))


def plot_rewards(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Raw reward and value (Q, or an actor's logit) of every dataset over the updates."""
    titles = REWARDS.get(config["flags"].get("sampling"), REWARDS["dynamix"])
    kinds = zip(("reward", "value"), titles)
    for axis, (kind, title) in zip(panels(figure, 4, 3, 2), kinds):
        points = [series(records, f"{kind}/{label}") for label in config["datasets"]]
        plot_lines(axis, list(zip(config["datasets"], points)))
        axis.set(title=title, ylabel=kind)


def plot_groups(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Probability of each group of difficulty within its dataset (HBO), a panel a dataset."""
    found = {}
    for key in dict.fromkeys(key for record in records for key in record):
        if key.startswith("group/"):
            label, group = key.removeprefix("group/").rsplit("/", 1)
            found.setdefault(label, []).append((group, series(records, key)))
    if not found:
        raise LookupError("group/")
    most = sorted(found.items(), key=lambda item: -len(item[1]))  # the first has the legend
    axes = panels(figure, 2.6, 1.9, len(found))
    for axis, (label, lines) in zip(axes, most):
        plot_lines(axis, lines)
        axis.set(title=short(label), ylabel="p of a group")
    axes[0].lines[0].set_label("1 easiest")


def plot_coverage(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Instance coverage of every dataset beside the 100 % that proportional sampling gives."""
    sizes = config["datasets"]
    passes, share = coverage(records, list(sizes))
    bars, y = np.minimum(100 * share, LONGEST_BAR), np.arange(len(sizes))
    [axis] = panels(figure, height=0.4 + 0.22 * len(sizes), title="Instance coverage")
    axis.barh(y, bars, color=colors(len(sizes)))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    for at, value, count in zip(y, 100 * share, passes):
        text = f"{value:.0f} %{' →' if value > LONGEST_BAR else ''}, {count:.1f} passes"
        axis.text(bars[at] + bars.max() / 100, at, text, va="center", fontsize=7, bbox=box)
    axis.axvline(100, color="black", linestyle="--", linewidth=1, zorder=0.5)
    axis.set(xlim=(0, 1.4 * max(*bars, 100)), ylim=(len(sizes) - 0.4, -0.6))
    axis.set_xlabel("examples drawn / (examples · epochs), %")
    axis.set_yticks(y, [f"{short(label)} ({size:,})" for label, size in sizes.items()])


def plot_losses(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Every domain's validation loss. Dashed: a constraint's reference level, the feasible region
    shaded, or a target's loss before training; dotted: updates; star: the chosen checkpoint."""
    axes = panels(figure, 2.6, 1.9, len(config["domains"]), xlabel="optimizer step")
    palette = {"target": "tab:blue", "constraint": "tab:orange", "monitored": "0.4"}
    for axis, (label, domain) in zip(axes, config["domains"].items()):
        role, color = domain["role"], palette[domain["role"]]
        steps, values = series(records, f"eval/{label}/{domain['metric']}")
        best = steps == chosen_step(records)
        axis.plot(steps, values, "o-", color=color)
        axis.plot(steps[best], values[best], "*", color=color, markersize=9, mec="black")
        for step in config["update_steps"][1:]:
            axis.axvline(step, color="0.8", linewidth=0.6, linestyle=":")
        if role != "monitored":
            level = series(records, f"reference/{label}")[1][0]
            axis.axhline(level, color="black", linestyle="--", linewidth=0.9)
            axis.set_ylim(*axis.get_ylim())  # stays, whatever the shading reaches
            axis.axhspan(-1, level, color="tab:green", alpha=0.13 * (role == "constraint"))
        axis.set_title(f"{role} {short(label)}")
        axis.set_ylabel("NLL (nats per token)" if domain["metric"] == "nll" else "1 − accuracy")


def plot_slopes(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """The slope matrix (M, K) at up to MOST_SLOPES updates: change of a domain's loss per 1,000
    steps on a dataset, blue falls. Every panel has its own scale: slopes fall with the rate."""
    domains = {k: v for k, v in config["domains"].items() if v["role"] != "monitored"}
    rows = [f"{short(label)} ({domain['role'][0].upper()})" for label, domain in domains.items()]
    columns = [short(label) for label in config["datasets"]]
    points = [series(records, f"slope/{i}/{j}") for i in domains for j in config["datasets"]]
    steps, slopes = points[0][0], np.array(points)[:, 1].T.reshape(-1, len(rows), len(columns))
    shown = np.linspace(0, len(steps) - 1, min(MOST_SLOPES, len(steps))).round().astype(int)
    size = max(1.8, 0.22 * len(columns)), max(0.7, 0.18 * len(rows))
    axes = panels(figure, *size, len(shown), 0.3, 0.7 + 0.042 * max(map(len, columns)))
    for axis, i in zip(axes, shown):
        limit = max(np.abs(slopes[i]).max(), 1e-12)
        image = axis.imshow(slopes[i] / limit, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axis.set(title=f"step {steps[i]:.0f}, scale ±{1000 * limit:.3g}", xlabel="trained on")
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.tick_params(labelleft=axis.get_subplotspec().is_first_col())
    axes[0].set_ylabel("measured on (T target, C constraint)")
    bar = figure.add_axes((1 + 0.2 / figure.get_figwidth(), 0, 0.12 / figure.get_figwidth(), 1))
    figure.colorbar(image, cax=bar, label="loss change per 1,000 steps / scale")


def plot_prediction(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Predicted and observed change of each domain until the next update; diagonal: both equal."""
    [axis] = panels(figure, 4, 4, title="How good the linear model is", ylabel="observed change")
    values, domains = [], {k: v for k, v in config["domains"].items() if v["role"] != "monitored"}
    for (label, domain), color in zip(domains.items(), colors(len(domains))):
        _, observed = series(records, f"update/{label}/observed")
        predicted = series(records, f"update/{label}/predicted")[1][: len(observed)]
        values += [*predicted, *observed]
        style = {"marker": "o" if domain["role"] == "target" else "^", "color": color}
        name = f"{domain['role']} {short(label)}"
        axis.scatter(predicted, observed, s=22, alpha=0.8, linewidths=0, label=name, **style)
    values = np.abs(values)[np.isfinite(values)]
    end = 1.3 * max(values.max(), 1e-6)
    linear = 10 ** np.round(np.log10(max(np.median(values), 1e-6)))  # a tick: no label beside 0's
    axis.plot([-end, end], [-end, end], color="black", linewidth=0.8, linestyle="--")
    axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    if end > 10 * linear:  # probes predict some changes far too large: equal room for small ones
        axis.set_xscale("symlog", linthresh=linear)
        axis.set_yscale("symlog", linthresh=linear)
    axis.set(xlim=(-end, end), ylim=(-end, end), xlabel="predicted change until the next update")


def plot_results(figure: Figure, folder: Path, config: dict, records: list) -> None:
    """Every task's first number for every model with its 95 % interval, a panel a task."""
    [results] = read(folder / "results.json")
    first = {}  # task -> its first number
    for task, row in (item for tasks in results.values() for item in tasks.items()):
        for metric in main_metrics(row)[: len(results) > 1]:  # one model: nothing to compare
            first.setdefault(task, metric)
    axes = panels(figure, 2.8, 0.2 + 0.3 * len(results), len(first), 0.3)
    for axis, (task, metric) in zip(axes, first.items()):
        for i, tasks in enumerate(results.values()):
            row = {metric: np.nan, **tasks.get(task, {})}
            ends = [row.get(f"{metric}_{end}", row[metric]) for end in ("low", "high")]
            error = np.abs(np.array(ends) - row[metric]).reshape(2, 1)
            axis.errorbar(row[metric], i, xerr=error, fmt="o", capsize=3, color=f"C{i % 10}")
        axis.set(title=short(task), xlabel=metric, ylim=(len(results) - 0.5, -0.5))
        axis.set_yticks(range(len(results)), map(short, short_names(results).values()))
        axis.tick_params(labelleft=axis.get_subplotspec().is_first_col())
        axis.grid(axis="x", alpha=0.3)


# ---- The folder ----------------------------------------------------------------------------------
FIGURES = {
    "sftmix": (plot_confidence, plot_perplexity, plot_embeddings, plot_loss),
    "dynamix_sft": (plot_mixture, plot_rewards, plot_groups, plot_coverage, plot_loss),
    "dynamics": (plot_losses, plot_mixture, plot_slopes, plot_prediction),
    "eval": (),  # results are drawn wherever they are
}


def read(path: Path) -> list:
    """The JSON values in a file: one (.json), or one a line (.jsonl), of which a last line without
    an end is still being written. Raises UserError where it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            text = text[: text.rfind("\n") + 1].rstrip("\n").replace("\n", ",\n")
        return json.loads(f"[{text}]")
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def draw(folder: str | Path, format: str = "png") -> list[Path]:
    """Draw every figure that there is data for -> paths; a file is complete. Raises UserError."""
    from matplotlib import figure, rc_context

    folder, config, records, paths = Path(folder), {"script": "eval"}, [], []
    missing = suppress(LookupError, FileNotFoundError)
    if not (folder / "config.json").exists() and not (folder / "results.json").exists():
        raise UserError(f"{folder}: holds no run (no config.json and no results.json)")
    try:
        with missing:
            [config] = read(folder / "config.json")
            records = read(folder / "metrics.jsonl")
        for plot in (*FIGURES[config["script"]], plot_results):
            name = plot.__name__.removeprefix("plot_")
            with rc_context(STYLE), missing:
                canvas = figure.Figure()
                plot(canvas, folder, config, records)
                handles, names = canvas.axes[0].get_legend_handles_labels()
                if names:
                    canvas.legend(handles, names, loc="center left", bbox_to_anchor=(1, 0.5))
                canvas.savefig(folder / f"{name}.tmp", dpi=130, format=format, bbox_inches="tight")
                paths.append((folder / f"{name}.tmp").replace(folder / f"{name}.{format}"))
    except (OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: cannot be drawn ({type(error).__name__}: {error})") from error
    return paths


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    parser.add_argument("folder", metavar="RUN_FOLDER", help="the --output_dir of a run")
    parser.add_argument("--format", choices=["png", "pdf", "svg"], default="png")
    try:
        for path in draw(**vars(parser.parse_args(argv))):
            print(path.name)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
