"""plots.py: every figure from a synthetic run folder, and the numbers behind the figures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plots
from data import UserError

ROOT = Path(__file__).parent.parent
SFTMIX = ["confidence.png", "perplexity.png", "embeddings.png", "loss.png"]
DYNAMIX = ["mixture.png", "rewards.png", "coverage.png", "loss.png"]
DYNAMICS = ["losses.png", "mixture.png", "slopes.png", "prediction.png"]


# ---- Run folders, as the scripts write them ------------------------------------------------------
def labels_of(kind: str, count: int) -> list[str]:
    """Labels of 20 to 50 characters, with what trips a plot: slash, dollar, underscore first."""
    middle = ("open-assistant/", "flan_v2_$5_", "science.", "code-alpaca-20k_")
    return [f"_{kind}-{i}-{middle[i % 4]}{'x' * (i % 13 + 4)}-train" for i in range(count)]


def write(folder: Path, config: dict, records: list[dict], **files: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    for name, lines in {"metrics": records, **files}.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def named(prefix: str, labels: list[str], values) -> dict:
    return {f"{prefix}/{label}": float(value) for label, value in zip(labels, values)}


def log_steps(steps: int, every: int) -> list[int]:
    return sorted({1, *range(every, steps + 1, every), steps})


def loss(step: int, steps: int) -> float:
    return 2 + 3 * float(np.exp(-3 * step / steps))


def sftmix_run(folder, rows=60, sources=("a", "b"), checkpoints=3, steps=25, mixup=True):
    rng = np.random.default_rng(0)
    config = {"script": "sftmix", "flags": {"log_every": 10}, "datasets": dict.fromkeys(sources, 9)}
    records = [{"step": s, "reference/loss": loss(s, steps)} for s in log_steps(steps // 2, 10)]
    for s in log_steps(steps, 10):
        parts = {"train/ntp": loss(s, steps), "train/mixup": loss(s, steps) + 0.2}
        records.append({"step": s, "train/loss": loss(s, steps) + 0.04, **(parts if mixup else {})})
        records.append({"step": s, "eval/held/nll": 4.0})  # not in loss.png
    falling = np.linspace(1, 0.5, checkpoints)
    scores, points = (
        [{"steps": [4 * c + 4 for c in range(checkpoints)]}],
        [{"variance": [0.3, 0.1]}],
    )
    for i in range(rows):
        kind = i % len(sources)
        values = 1 + np.exp(rng.normal(1.5 + 2 * kind / len(sources), 0.6)) * falling
        row = {"index": i, "source": sources[kind], "perplexity": values.tolist()}
        scores.append({**row, "confidence": -float(values.mean())})
        half, (x, y) = ("confident", "unconfident")[i % 2], rng.normal(i % 2, 1, 2).tolist()
        points.append({"index": i, "half": half, "x": x, "y": y})
    return write(folder, config, records, confidence=scores, embeddings=points)


def dynamix_run(folder, labels=("a", "b/c"), updates=3, evals=("a", "b/c")):
    """An update every 10 steps, none at the last; 8 examples a step."""
    rng, count = np.random.default_rng(0), len(labels)
    sizes = {label: 100 * (i + 1) for i, label in enumerate(labels)}
    config = {"script": "dynamix_sft", "flags": {"log_every": 5}, "datasets": sizes}
    p, steps, drawn = np.full(count, 1 / count), 10 * updates + 7, np.zeros(count)
    records = [{"step": 0, **{f"eval/{label}/nll": 5 + i / 9 for i, label in enumerate(evals)}}]
    start = {**named("mixture", labels, p), **named("value", labels, np.zeros(count))}
    records.append({"step": 0, **start})
    for s in range(1, steps + 1):
        drawn += 8 * p
        if s in log_steps(steps, 5):
            line = {"epoch": 8 * s / sum(sizes.values()), "train/loss": loss(s, steps)}
            passes = named("passes", labels, drawn / list(sizes.values()))
            records.append({"step": s, **line, **named("mixture", labels, p), **passes})
        if s % 10 == 0 and s < steps:
            p = rng.dirichlet(np.full(count, 4.0))
            record = {**named("mixture", labels, p), **named("value", labels, rng.random(count))}
            rewards = named("reward", labels, rng.normal(0.02, 0.01, count))
            records.append({"step": s, **record, **rewards})
    after = {f"eval/{label}/nll": 3 + i / 9 for i, label in enumerate(evals)}
    return write(folder, config, [*records, {"step": steps, **after}])


def dynamics_run(folder, labels=("a", "b"), domains=("t/1", "c", "m"), updates=3, probes=True):
    """An update every 20 steps. The first domain is the target, the last one is only monitored."""
    rng, steps = np.random.default_rng(0), 20 * updates
    config = {
        "script": "dynamics",
        "flags": {"log_every": 10},
        "datasets": dict.fromkeys(labels, 9),
    }
    roles = ["target", *["constraint"] * (len(domains) - 2), "monitored"]
    rules = [{"role": role, "metric": ("nll", "error")[role == "constraint"]} for role in roles]
    config |= {"domains": dict(zip(domains, rules)), "update_steps": list(range(0, steps, 20))}
    keys = [f"eval/{label}/{rule['metric']}" for label, rule in config["domains"].items()]
    decided, losses = domains[:-1], np.full(len(domains), 0.7)
    records = [{"step": 0, **named("reference", decided, losses)}]
    for s in range(0, steps + 1, 20):
        losses = losses + rng.normal(0, 0.02, len(losses)) * (s > 0)
        record = dict(zip(keys, losses.tolist()))
        record |= {"eval/target_total": losses[0], "eval/feasible": int(s in (20, 40))}
        for label in decided if s and probes else ():
            record[f"update/{label}/observed"] = rng.normal(-0.05, 0.03)
        records.append({"step": s, **record})
        if s < steps:
            update = named("mixture", labels, rng.dirichlet(np.ones(len(labels))))
            for label in decided if probes else ():
                update[f"update/{label}/predicted"] = rng.normal(-0.05, 0.05)
                update |= named(f"slope/{label}", labels, rng.normal(0, 1e-3, len(labels)))
            records.append({"step": s, "update/horizon": 20, **update})
            line = {"train/loss": loss(s, steps), **named("passes", labels, np.ones(len(labels)))}
            records.append({"step": s + 10, **line})
    return write(folder, config, records)


def eval_folder(folder, models=("base", "runs/mine/final"), tasks=("medqa", "gsm8k")):
    results = {}
    for m, model in enumerate(models):
        results[model] = {}
        for t, task in enumerate(tasks):
            value = 0.4 + 0.03 * m + 0.02 * t
            row = {"n": 100, "accuracy": value, "accuracy_low": value - 0.05}
            results[model][task] = {**row, "accuracy_high": value + 0.05, "accuracy_std": 0.01}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def drawn(folder: Path, format: str = "png") -> list[str]:
    """Names of what draw() drew, after a look at the files: nothing else is new, all are images."""
    before = set(folder.iterdir())
    paths = plots.draw(folder, format)
    assert set(folder.iterdir()) == before | set(paths)  # no temporary file
    for path in paths:
        head = path.read_bytes()[:8]
        assert head.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[format])
    return [path.name for path in paths]


def pixels(path: Path) -> np.ndarray:
    """(height, width, 3) in [0, 1]"""
    from matplotlib.image import imread

    return imread(path)[..., :3]


def border_is_white(path: Path) -> bool:
    """Nothing is cut: saving left a margin all around."""
    image = pixels(path)
    edges = (image[:3], image[-3:], image[:, :3], image[:, -3:])
    return all((edge == 1).all() for edge in edges)


def axes_of(plot, folder: Path) -> list:
    """The axes of one figure, to read numbers from."""
    from matplotlib.figure import Figure

    figure, [config] = Figure(), plots.read(folder / "config.json")
    plot(figure, folder, config, plots.read(folder / "metrics.jsonl"))
    return figure.axes


# ---- Which figures -------------------------------------------------------------------------------
RUNS = {
    "sftmix": (sftmix_run, SFTMIX),
    "dynamix_sft": (dynamix_run, DYNAMIX),
    "dynamics": (dynamics_run, DYNAMICS),
    "eval": (eval_folder, ["results.png"]),
}


@pytest.mark.parametrize("script", RUNS)
def test_every_figure(tmp_path, script):
    make, names = RUNS[script]
    folder = make(tmp_path / "run")
    assert drawn(folder) == names
    for name in names:
        image = pixels(folder / name)
        assert min(image.shape[:2]) > 100 and image.std() > 0.05 and border_is_white(folder / name)
    first = [(folder / name).read_bytes() for name in names]
    assert drawn(folder) == names  # again, over the old ones: the same
    assert [(folder / name).read_bytes() for name in names] == first


LARGE = {
    "sftmix": lambda folder, names: sftmix_run(folder, 400, names("source", 19), 5),
    "dynamix_sft": lambda folder, names: dynamix_run(folder, names("data", 19), 12, names("e", 19)),
    "dynamics": lambda folder, names: dynamics_run(folder, names("d", 16), names("domain", 13), 5),
    "eval": lambda folder, names: eval_folder(folder, names("model", 9), names("task", 13)),
}


@pytest.fixture()
def saved(monkeypatch):
    """The figures that draw() saves, in order."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize("script", LARGE)
def test_many_long_labels_fit(tmp_path, saved, script):
    """Nothing is cut at the page's border, and no label or legend lies on a panel of another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    folder = LARGE[script](tmp_path / "run", labels_of)
    names = drawn(folder)
    assert names == RUNS[script][1] and len(saved) == len(names)
    for name, figure in zip(names, saved):
        assert border_is_white(folder / name), name
        renderer = FigureCanvasAgg(figure).get_renderer()
        for axis in figure.axes:
            frame = axis.get_window_extent()
            others = [other for other in figure.axes if other is not axis]
            texts = [text for other in others for text in other.findobj(Text) if text.get_text()]
            for artist in [*figure.legends, *(text for text in texts if text.get_visible())]:
                box = artist.get_window_extent(renderer)
                assert not frame.overlaps(box), (name, axis.get_title(), artist)


def test_a_legend_names_every_dataset(tmp_path, saved):
    labels = labels_of("data", 19)
    plots.draw(dynamix_run(tmp_path / "run", labels, 2, labels))
    mixture, rewards, _coverage, losses = saved
    expected = [plots.short(label) for label in labels]
    for figure, first in ((rewards, []), (losses, ["training"])):
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == first + expected
    stacked = [text.get_text().rsplit(" ", 3)[0] for text in mixture.legends[0].get_texts()]
    assert stacked == expected[::-1]


SMALL = {
    "sftmix": lambda folder: sftmix_run(folder, 2, ("a",), 1, 1),
    "dynamix_sft": lambda folder: dynamix_run(folder, ("a",), 1, ()),
    "dynamics": lambda folder: dynamics_run(folder, ("a",), ("t", "m"), 1),
    "eval": lambda folder: eval_folder(folder, ("a", "b"), ("t",)),
}


@pytest.mark.parametrize("script", SMALL)
def test_the_smallest_runs(tmp_path, script):
    assert drawn(SMALL[script](tmp_path / "run")) == RUNS[script][1]


def test_what_is_missing_is_left_out(tmp_path):
    folder = sftmix_run(tmp_path / "baseline", mixup=False)
    (folder / "confidence.jsonl").unlink()
    (folder / "embeddings.jsonl").unlink()
    assert drawn(folder) == ["loss.png"]
    static = dynamix_run(tmp_path / "static", updates=0)
    assert drawn(static) == [name for name in DYNAMIX if name != "rewards.png"]
    assert drawn(dynamics_run(tmp_path / "fixed", probes=False)) == ["losses.png", "mixture.png"]
    assert drawn(eval_folder(tmp_path / "one", models=("base",))) == []
    for script in ("sftmix", "dynamix_sft", "dynamics"):
        config = {"script": script, "flags": {"log_every": 10}, "datasets": {"a": 9}}
        config |= {"domains": {"t": {"role": "target", "metric": "nll"}}, "update_steps": [0]}
        folder = write(tmp_path / f"new-{script}", config, [])
        assert drawn(folder) == []
        (folder / "metrics.jsonl").unlink()
        assert drawn(folder) == []


def test_a_running_run_is_drawn(tmp_path):
    folder = dynamix_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 40, "train/lo')
    assert drawn(folder) == DYNAMIX


# ---- The command ---------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["pdf", "svg"])
def test_format(tmp_path, capsys, format):
    folder = dynamix_run(tmp_path / "run")
    plots.main([str(folder), "--format", format])
    names = [name.replace("png", format) for name in DYNAMIX]
    assert capsys.readouterr().out.split() == names
    assert drawn(folder, format) == names and not list(folder.glob("*.png"))


def damage(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder


ERRORS = {
    "no folder": (lambda folder: folder / "nothing", "holds no run"),
    "empty": (lambda folder: folder, "holds no run"),
    "a file": (lambda folder: damage(folder, "file", "x") / "file", "holds no run"),
    "config": (lambda folder: damage(folder, "config.json", '{"script"'), "config.json: cannot be"),
    "script": (lambda folder: damage(folder, "config.json", '{"script": "ppo"}'), "ppo"),
    "no object": (lambda folder: damage(folder, "config.json", "[1]"), "cannot be drawn"),
    "results": (lambda folder: damage(folder, "results.json", "{,}"), "results.json: cannot be"),
    "metrics": (
        lambda folder: damage(dynamix_run(folder), "metrics.jsonl", '{"step": 0}\n{"step"\n'),
        "line 2",
    ),
    "numbers": (
        lambda folder: damage(dynamix_run(folder), "metrics.jsonl", "1\n2\n"),
        "cannot be drawn",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(tmp_path, capsys, case):
    make, expected = ERRORS[case]
    folder = make(tmp_path)
    with pytest.raises(SystemExit) as stop:
        plots.main([str(folder)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and expected in err
    assert not list(tmp_path.glob("**/*.png")) and not list(tmp_path.glob("**/*.tmp"))
    with pytest.raises(UserError):
        plots.draw(folder)


@pytest.mark.parametrize("argv", [[], ["runs/x", "--format", "gif"], ["runs/x", "--colour", "red"]])
def test_bad_flags_are_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        plots.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_no_display_no_torch_and_matplotlib_only_where_it_is_used(tmp_path):
    folder = dynamix_run(tmp_path / "run")
    code = f"""
import sys
for name in ("torch", "transformers", "datasets", "common", "sftmix", "dynamix_sft", "dynamics"):
    sys.modules[name] = None  # importing it fails
import plots
assert "matplotlib" not in sys.modules
plots.main([{str(folder)!r}])
assert "matplotlib.pyplot" not in sys.modules  # no window, no figure kept open
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.split() == DYNAMIX, shown.stderr


# ---- The numbers ---------------------------------------------------------------------------------
def test_series():
    records = [{"step": 0, "a": 5}, {"step": 3}, {"step": 4, "a": 2.5, "a/b": 1}]
    steps, values = plots.series(records, "a")
    assert steps.tolist() == [0, 4] and values.tolist() == [5, 2.5]
    with pytest.raises(LookupError):
        plots.series(records, "b")


def test_short():
    assert plots.short("a" * 28) == "a" * 28
    assert plots.short("abcdefghijklmnopqrstuvwxyz-0123456789") == "abcdefghijklmn…yz-0123456789"
    assert len(plots.short("x" * 29)) == len(plots.short("x" * 400)) == 28
    assert plots.short("a$b$") == r"a\$b\$"
    assert plots.short("_a")[1:] == "_a" and not plots.short("_a").startswith("_")


def test_confident_half():
    upper, lower = plots.confident_half(np.array([-3.0, -1.0, -2.0, -1.0, -9.0]))
    assert upper.tolist() == [1, 3, 2] and lower.tolist() == [0, 4]
    upper, lower = plots.confident_half([0.0, 0.0, 0.0, 0.0])
    assert upper.tolist() == [0, 1] and lower.tolist() == [2, 3]


@pytest.mark.parametrize(("rows", "bins"), [(1, 1), (2, 2), (20, 6), (5000, 41), (100_000, 50)])
def test_bins_fit_the_rows(rows, bins):
    values = np.exp(np.random.default_rng(0).normal(2, 0.5, rows))
    edges = plots.log_bins(values)
    assert len(edges) == bins + 1
    inside = np.histogram(values, edges)[0].sum()
    assert 0.997 * rows <= inside <= rows and (inside == rows or rows > 1000)
    assert np.ptp(np.diff(np.log(edges))) < 1e-3  # equal widths


def test_bins_of_equal_values():
    for rows in (1, 20, 5000):
        for value in (1.0, 3.0):
            edges = plots.log_bins(np.full(rows, value))
            assert np.histogram(np.full(rows, value), edges)[0].tolist() == [rows]


@pytest.mark.parametrize("rows", [20, 200, 5000])
def test_a_row_far_off_does_not_widen_the_bins(rows):
    """The others lie in as many bins as without it, or nearly."""
    values = np.exp(np.random.default_rng(0).normal(2, 0.5, rows))
    counts, far = np.histogram(values, plots.log_bins(values))[0], np.append(values, 1e9)
    edges = plots.log_bins(far)
    filled = np.count_nonzero(np.histogram(values, edges)[0])
    assert filled >= 0.8 * np.count_nonzero(counts) and edges[-1] < 10 * values.max()


def test_a_tenth_of_the_rows_is_no_row_far_off():
    """Most are learned by heart, the others are spread: all are inside."""
    values = np.append(np.full(900, 1.0), np.linspace(2, 20, 100))
    assert np.histogram(values, plots.log_bins(values))[0].sum() == 1000


def test_the_confidence_figure_counts_every_row(tmp_path):
    """The bars of each source add up to 1; how many lie farther out is said."""
    for name, far in (("near", 0), ("far", 2)):
        folder = sftmix_run(tmp_path / name, rows=60)
        manifest, *rows = plots.read(folder / "confidence.jsonl")
        for row, value in zip(rows[:far], (1e6, 1e7)):
            row["confidence"] = -value
        text = "".join(json.dumps(line) + "\n" for line in [manifest, *rows])
        (folder / "confidence.jsonl").write_text(text, encoding="utf-8")
        [axis] = axes_of(plots.plot_confidence, folder)
        edges = plots.log_bins(np.array([-row["confidence"] for row in rows]))
        for patch in axis.patches:  # the outline goes up and down at every edge
            heights = patch.get_xy()[1:-1:2, 1]
            assert len(heights) == len(edges) - 1 and heights.sum() == pytest.approx(1)
        said = axis.get_xlabel().partition("\n")[2]
        assert said == ("rows farther out, counted in the first and last bin: 2" if far else "")


def test_coverage():
    """The last log line: 1,000 and 3,000 examples, 2 epochs; 3,000 and 5,000 drawn."""
    old = {"step": 10, "epoch": 1.0, "passes/a": 1.0, "passes/b/c": 1.0}
    last = {"step": 20, "epoch": 2.0, "passes/a": 3.0, "passes/b/c": 5 / 3}
    passes, share = plots.coverage([old, last, {"step": 20, "eval/a/nll": 1.0}], ["a", "b/c"])
    assert passes.tolist() == [3.0, 5 / 3] and share.tolist() == [1.5, 5 / 6]


def test_chosen_step():
    def record(step, feasible, total):
        return {"step": step, "eval/feasible": feasible, "eval/target_total": total}

    records = [record(0, 0, 9.0), record(10, 1, 3.0), record(20, 0, 1.0), record(30, 1, 2.0)]
    assert plots.chosen_step([*records, {"step": 35}, record(40, 1, 2.0)]) == 30  # first of equals
    assert plots.chosen_step(records[:1]) is None and plots.chosen_step([]) is None


def test_main_metrics():
    row = {"n": 4, "shots": 3.0, "acc": 0.5, "acc_low": 0.4, "acc_high": 0.6, "acc_std": 0.1}
    row |= {"acc_diff": 0.1, "acc_diff_low": 0.0, "acc_diff_high": 0.2, "versus": "x", "f1": 0.3}
    row |= {"versions": {"torch": "2"}, "amb_bias_score_Age": 0.1}
    assert plots.main_metrics(row) == ["acc", "f1"]


def test_colors_are_distinct():
    for count in (1, 2, 10, 11, 20, 21, 60):
        assert len({tuple(color) for color in plots.colors(count)}) == count


# ---- What a figure shows -------------------------------------------------------------------------
def lines_of(axis) -> dict:
    return {line.get_label(): line.get_xdata().tolist() for line in axis.lines}


def test_loss_shows_ntp_and_mixup_apart_or_evaluation_sets(tmp_path):
    [axis] = axes_of(plots.plot_loss, sftmix_run(tmp_path / "mixup", steps=25))
    whole = [1, 10, 20, 25]
    assert lines_of(axis) == {"reference, NTP": [1, 10, 12], "NTP": whole, "Mixup": whole}
    [axis] = axes_of(plots.plot_loss, sftmix_run(tmp_path / "baseline", steps=25, mixup=False))
    assert lines_of(axis) == {"reference, NTP": [1, 10, 12], "training": whole}
    [axis] = axes_of(
        plots.plot_loss, dynamix_run(tmp_path / "dynamix", updates=1, evals=("a/nll",))
    )
    assert lines_of(axis) == {"training": [1, 5, 10, 15, 17], "a/nll": [0, 17]}
    assert [line.get_linestyle() for line in axis.lines] == ["-", ":"]


def test_mixture_ends_at_the_last_step(tmp_path):
    [axis] = axes_of(plots.plot_mixture, dynamix_run(tmp_path / "run", updates=2))
    assert axis.get_xlim() == (0, 27) and axis.get_ylim() == (0, 1)
    names = [text.get_text() for text in axis.figure.legends[0].get_texts()]
    assert [name.split()[0] for name in names] == ["b/c", "a"] and "50.0% →" in names[0]
    [axis] = axes_of(plots.plot_mixture, dynamics_run(tmp_path / "dynamics", updates=2))
    assert axis.get_xlim() == (0, 40)


def test_losses_mark_the_chosen_checkpoint_and_the_level(tmp_path):
    folder = dynamics_run(tmp_path / "run")
    records = plots.read(folder / "metrics.jsonl")
    chosen = plots.chosen_step(records)
    target, constraint, monitored = axes_of(plots.plot_losses, folder)
    assert target.get_title() == "target t/1" and target.get_ylabel() == "NLL (nats per token)"
    assert constraint.get_ylabel() == "1 − accuracy"
    for axis in (target, constraint, monitored):
        assert axis.lines[1].get_xdata().tolist() == [chosen]
        dashed = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"]
        assert dashed == ([] if axis is monitored else [0.7])
    [shade] = constraint.patches  # below the level is feasible
    assert shade.get_y() < 0 and shade.get_y() + shade.get_height() == pytest.approx(0.7)
    assert shade.get_alpha() > 0 and target.patches[0].get_alpha() == 0 and not monitored.patches
    for record in records:
        record["eval/feasible"] = 0
    config = plots.read(folder / "config.json")[0]
    write(folder, config, records)
    assert axes_of(plots.plot_losses, folder)[0].lines[1].get_xdata().tolist() == []


def test_slopes_show_the_matrix_per_thousand_steps(tmp_path):
    folder = dynamics_run(tmp_path / "run", updates=12)
    *panels, _bar = axes_of(plots.plot_slopes, folder)
    assert len(panels) == plots.MOST_SLOPES
    record = next(line for line in plots.read(folder / "metrics.jsonl") if "slope/c/a" in line)
    matrix = np.array([[record[f"slope/{i}/{j}"] for j in "ab"] for i in ("t/1", "c")])
    limit = np.abs(matrix).max()
    np.testing.assert_allclose(panels[0].images[0].get_array(), matrix / limit)
    assert panels[0].get_title() == f"step 0, scale ±{1000 * limit:.3g}"
    assert panels[-1].get_title().startswith("step 220,")
    names = [text.get_text() for text in panels[0].get_yticklabels()]
    assert names == ["t/1 (T)", "c (C)"]


def test_prediction_pairs_what_was_predicted_with_what_came(tmp_path):
    folder = dynamics_run(tmp_path / "run", updates=2)
    records = plots.read(folder / "metrics.jsonl")[:-1]  # the last interval is not over
    config = plots.read(folder / "config.json")[0]
    [axis] = axes_of(plots.plot_prediction, write(folder, config, records))
    predicted = plots.series(records, "update/c/predicted")[1]
    observed = plots.series(records, "update/c/observed")[1]
    assert len(predicted) == 2 and len(observed) == 1
    assert axis.collections[1].get_offsets().tolist() == [[predicted[0], observed[0]]]
    assert axis.collections[1].get_label() == "constraint c"


def test_confidence_shows_shares_of_each_source(tmp_path):
    [axis] = axes_of(plots.plot_confidence, sftmix_run(tmp_path / "run", 31, ("a", "b", "c")))
    assert [patch.get_label() for patch in axis.patches] == ["a (11)", "b (10)", "c (10)"]
    for patch in axis.patches:  # an outline: two points a bin
        assert patch.get_xy()[1:-1:2, 1].sum() == pytest.approx(1)


def test_perplexity_shows_the_medians_of_both_halves(tmp_path):
    folder = sftmix_run(tmp_path / "run", 21)
    _, *rows = plots.read(folder / "confidence.jsonl")
    rows = sorted(rows, key=lambda row: -row["confidence"])
    perplexity = np.array([row["perplexity"] for row in rows])
    [axis] = axes_of(plots.plot_perplexity, folder)
    for line, half in zip(axis.lines, (perplexity[:11], perplexity[11:])):
        assert line.get_xdata().tolist() == [4, 8, 12]
        np.testing.assert_allclose(line.get_ydata(), np.median(half, axis=0))
    assert [line.get_label() for line in axis.lines] == ["confident (11)", "unconfident (10)"]


def test_coverage_bars_are_cut_their_numbers_are_not(tmp_path):
    config = {"script": "dynamix_sft", "flags": {}, "datasets": {"a": 1000, "b": 10}}
    records = [{"step": 5, "epoch": 2.0, "passes/a": 1.0, "passes/b": 9.0}]
    [axis] = axes_of(plots.plot_coverage, write(tmp_path / "run", config, records))
    assert [bar.get_width() for bar in axis.patches] == [50, plots.LONGEST_BAR]
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["50 %, 1.0 passes", "450 % →, 9.0 passes"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a (1,000)", "b (10)"]


def test_results_show_the_first_number_with_its_interval(tmp_path):
    rows = {"n": 9, "acc": 0.5, "acc_low": 0.25, "acc_high": 0.875, "f1": 0.1}
    results = {"a": {"x": rows}, "b": {"x": {"acc": 0.75}, "y": {"nll": 2.0}}}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    first, second = axes_of(plots.plot_results, tmp_path)
    assert (first.get_title(), first.get_xlabel()) == ("x", "acc")
    assert (second.get_title(), second.get_xlabel()) == ("y", "nll")
    intervals = [bars.get_segments()[0][:, 0].tolist() for bars in first.collections]
    assert intervals == [[0.25, 0.875], [0.75, 0.75]]


def test_groups_of_difficulty(tmp_path):
    """A panel a dataset that has groups, the one with most of them first; no figure without."""
    folder = dynamix_run(tmp_path / "run")
    assert "groups.png" not in {path.name for path in plots.draw(folder)}
    lines = []
    for step, p in ((0, 0.5), (8, 0.7)):
        own = {"group/a/1": 1.0, "group/b/c/1": p, "group/b/c/2": 1 - p}
        lines.append(json.dumps({"step": step, **own}) + "\n")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(lines)
    one, other = axes_of(plots.plot_groups, folder)
    assert (one.get_title(), other.get_title()) == ("b/c", "a")
    assert [line.get_ydata().tolist() for line in one.lines] == [
        [0.5, 0.7],
        [0.5, pytest.approx(0.3)],
    ]
    assert "groups.png" in {path.name for path in plots.draw(folder)}


@pytest.mark.parametrize("name", ["multidds", "multiuat", "hbo", "dynamix", "mine.json"])
def test_reward_titles_say_what_a_reward_is(tmp_path, name):
    folder = dynamix_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["flags"]["sampling"] = name
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    titles = tuple(axis.get_title() for axis in axes_of(plots.plot_rewards, folder))
    assert titles == plots.REWARDS.get(name, plots.REWARDS["dynamix"])
