"""What a command prints: sets told apart, the table and figures at its end, our own bars alone."""

import contextlib
import io
import re
import warnings

import datasets
import huggingface_hub.utils
import pytest
import transformers
from conftest import killed_at, read_json, records, to_jsonl

import common
import data
import dynamics
import dynamix_sft
import eval as evaluation
import plots
import runs
import sftmix

SCRIPTS = {"sftmix": sftmix, "dynamix_sft": dynamix_sft, "dynamics": dynamics}
OWN = {"sftmix": "--num_checkpoints 2", "dynamix_sft": "--update_every 2"}
OWN["dynamics"] = "--targets copy --updates none --probe_steps 1 --eval_limit 4"
RUN = "--template plain --max_steps 4 --batch_size 8 --lr 1e-2 --save_every 1"
BARS = {"reference", "Perp", "embeddings", "train", "evaluate", "probe", "reward"}
BEFORE = {"sftmix": "eval", "dynamix_sft": "eval", "dynamics": "test"}
each_script = pytest.mark.parametrize("script", list(SCRIPTS))
questions = [
    {"question": f"{i} + {i}?", "choices": [str(2 * i), str(i), "x"], "answer": i % 3}
    for i in range(15)
]


def start(script, folder, *flags):
    """main() of a script -> what it wrote to stdout and to stderr, by lines."""
    out, err = io.StringIO(), io.StringIO()
    command = f"{RUN} {OWN[script]} --output_dir {folder}".split()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        SCRIPTS[script].main([*command, *flags])
    bars = re.split(r"[\r\n]", err.getvalue().replace("\x1b[A", ""))
    return out.getvalue().splitlines(), [line for line in bars if line.strip()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """finished(script, rank=0) -> the folder of a run with transformers' bars switched on, the
    lines of stdout and of stderr. One label is trained on and evaluated; mc is multiple choice."""
    place, found = tmp_path_factory.mktemp("terminal"), {}
    mc = to_jsonl(place / "mc.jsonl", questions)
    sets = ["--data", "toy/copy#12", "toy/sort#16", "--eval_data", "toy/copy#14", mc]

    def run(script, rank=0):
        if (script, rank) not in found:
            own = ["--accuracy", "mc"] if script == "dynamics" else []
            folder = place / f"{script}-{rank}"
            folder.mkdir()
            (folder / "mine.png").touch()  # no figure of the run
            flags = ["--model", model_folder("llama"), *sets, *own, "--lora_rank", str(rank)]
            transformers.logging.enable_progress_bar()
            found[script, rank] = folder, *start(script, folder, *flags)
        return found[script, rank]

    return run


# ------------------------------------------------------------------------ training, evaluation


@each_script
def test_training_and_evaluation_sets_are_told_apart(finished, script):
    lines = [line for line in finished(script)[1] if line.startswith("data  ")]
    train = [line for line in lines if line.startswith("data  train ")]
    held = [line for line in lines if line.startswith("data  eval  ")]
    assert [line.split()[2] for line in train] == ["copy:", "sort:"]
    assert sorted(line.split()[2] for line in held) == ["copy:", "mc:"]
    assert len(lines) == 4 and "copy: 12 examples" in train[0] and "12 ex" not in "".join(held)


def test_eval_py_says_that_its_sets_evaluate(tmp_path, capsys):
    evaluation.main(f"--eval_data toy/copy#9 --output_dir {tmp_path / 'eval'}".split())
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("data")]
    assert len(lines) == 1 and lines[0].startswith("data  eval  copy: 9 examples")


# ------------------------------------------------------------------------ the end


def table(lines):
    """The last table of a run -> {label: {name: (before, after, change) as printed}}, the lines
    after it."""
    first, found = lines.index("eval  before training -> final/") + 1, {}
    for at, line in enumerate(lines[first:], first):
        if not line.startswith("eval  "):
            return found, lines[at:]
        cells = re.findall(r"(\w+) (\S+) -> (\S+) \((\S+)\)", line)
        found[line.split()[1]] = {name: numbers for name, *numbers in cells}
    raise AssertionError("nothing follows the table")


@each_script
@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_ends_with_its_sets_before_and_after(finished, script, rank):
    folder, lines, _ = finished(script, rank)
    summary, found = read_json(folder / "summary.json"), table(lines)[0]
    old, new = summary["eval_before"], summary["eval"]
    log, name = records(folder), BEFORE[script]
    first, last = (next(r for r in order if f"{name}/copy/nll" in r) for order in (log, log[::-1]))
    assert first["step"] == 0 and last["step"] == 4
    for label in ("copy", "mc"):
        assert old[label].keys() == new[label].keys() >= {"nll", "ppl", "accuracy", "tokens"}
        for numbers, record in ((old, first), (new, last)):
            for key, value in numbers[label].items():
                assert record[f"{name}/{label}/{key}"] == value
        a, b = old[label]["nll"], new[label]["nll"]
        assert found[label]["loss"] == [f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"] and a != b
    assert found.keys() == {"copy", "mc"}
    with_error = [label for label, cells in found.items() if "error" in cells]
    assert with_error == (["mc"] if script == "dynamics" else [])
    if with_error:
        a, b = (1 - numbers["mc"]["choice_accuracy"] for numbers in (old, new))
        assert found["mc"]["error"][:2] == [f"{a:.4f}", f"{b:.4f}"]
    # the same as it is before training, when it is measured: every run starts with its numbers
    (line,) = (x for x in lines if x.startswith("eval  copy ") and "ppl" in x)
    assert f"nll {old['copy']['nll']:.4f} " in line


@pytest.mark.parametrize("script", ["sftmix", "dynamix_sft"])
def test_without_evaluation_sets_there_is_no_table(tmp_path, script):
    lines, _ = start(script, tmp_path / "run", "--model", "tiny", "--data", "toy/copy#9")
    assert not [line for line in lines if line.startswith("eval")]
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["eval"] == summary["eval_before"] == {}


@each_script
def test_a_resumed_run_knows_what_was_before(tmp_path, script):
    flags = ["--data", "toy/copy#12", "toy/sort#16", "--eval_data", "toy/copy#14", "toy/add#15"]
    flags += ["--model", "tiny", "--log_every", "1", "--lora_rank", "0"]
    whole, _ = start(script, tmp_path / "whole", *flags)
    with killed_at(3, "train/loss"):
        start(script, tmp_path / "run", *flags)
    lines, _ = start(script, tmp_path / "run", *flags, "--resume")
    before = [read_json(tmp_path / x / "summary.json")["eval_before"] for x in ("whole", "run")]
    assert before[0] == before[1] and before[0].keys() == {"copy", "add"}
    assert table(lines)[0] == table(whole)[0]
    measured = [r for r in records(tmp_path / "run") if f"{BEFORE[script]}/copy/nll" in r]
    assert [r["step"] for r in measured] == [0, 4]  # not a second time
    assert not [line for line in lines if line.startswith("eval  ") and "ppl" in line]


def test_what_was_logged_is_found_again():
    """At that step, under that prefix; a label may hold slashes."""
    rows = {"a/b": {"nll": 1.25, "tokens": 3}, "a": {"nll": 0.1}}
    run = object.__new__(runs.Run)
    run._kept = [{"step": 0, **common.flat("eval", rows), "time/eval": 1.0, "evaluation/a/nll": 7}]
    run._kept += [
        {"step": 0, "test/a/nll": 5.0},
        {"step": 2, **common.flat("eval", {"a": {"x": 1}})},
    ]
    assert run.logged("eval", 0) == rows and run.logged("eval", 2) == {"a": {"x": 1}}
    assert run.logged("eval", 1) == {}


@each_script
def test_the_figures_are_named(finished, script):
    """Those of this run, all of them, and nothing else that lies there."""
    folder, lines, _ = finished(script)
    end = table(lines)[1]
    assert len(end) == 2 and end[1].startswith("done  ")
    word, names = end[0].split(maxsplit=1)
    assert word == "figures"
    there = {path.name for path in folder.glob("*.png")} - {"mine.png"}
    assert set(names.split(", ")) == there and len(names.split(", ")) == len(there) > 2


def test_eval_py_names_its_figure(tmp_path, model_folder, capsys):
    """There is one where models are compared."""
    models = ["tiny", model_folder("llama")]
    for count, named in ((1, []), (2, ["figures results.png"])):
        flags = ["--eval_data", "toy/copy#9", "--output_dir", str(tmp_path / f"eval{count}")]
        evaluation.main(["--model", *models[:count], *flags])
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("figures")] == named
        assert (tmp_path / f"eval{count}" / "results.png").exists() == bool(named)


def test_no_figure_is_named_where_none_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FIGURES", {**plots.FIGURES, "sftmix": ()})
    flags = ["--model", "tiny", "--data", "toy/copy#9", "--mu", "0"]
    lines, _ = start("sftmix", tmp_path / "run", *flags)
    assert not [line for line in lines if line.startswith("figures")]


# ------------------------------------------------------------------------ other people's words


@each_script
@pytest.mark.parametrize("rank", [0, 4])
def test_the_only_bars_are_ours(finished, script, rank):
    """transformers shows one for each model that is saved or loaded."""
    folder, _, bars = finished(script, rank)
    found = {re.match(r"\w*", line)[0] for line in bars if "%|" in line or "it/s" in line}
    assert "train" in found and found <= BARS
    others = [line for line in bars if line.split(":")[0].split()[0] not in BARS]
    assert not [line for line in others if not re.match(r"(train|reference|eval|update) \d", line)]
    assert transformers.logging.is_progress_bar_enabled()  # as it was
    assert list(folder.glob("final/*.safetensors"))


def test_bars_of_the_hub_are_as_they_were():
    hub = huggingface_hub.utils
    source = data.HubSource("nobody/nothing")
    try:
        for library in (datasets, hub):
            for switch in (library.enable_progress_bars, library.disable_progress_bars):
                switch()
                before = library.are_progress_bars_disabled()
                with data.hub_errors(source, "train"):
                    assert library.are_progress_bars_disabled()
                assert library.are_progress_bars_disabled() == before
    finally:
        hub.enable_progress_bars()
        datasets.disable_progress_bars()  # as conftest.py has it


def test_what_libraries_say_of_their_future_is_not_shown():
    """Other warnings are, theirs too; and outside of a command nothing is changed."""
    said = [("peft.tuners", FutureWarning), ("transformers.modeling_utils", FutureWarning)]
    kept = [("peft.tuners", UserWarning), ("transformers", RuntimeWarning)]
    kept += [("common", FutureWarning), ("peftlike", FutureWarning)]

    def speak(argv=None):
        for number, (module, category) in enumerate(said + kept):
            warnings.warn_explicit(f"{number}", category, "file.py", number, module)

    for main, expected in ((runs.command_line(speak), kept), (speak, said + kept)):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            main()
        numbers = [int(str(warning.message)) for warning in shown]
        assert [(said + kept)[number] for number in numbers] == expected


def test_a_command_leaves_the_warnings_as_they_were():
    filters = list(warnings.filters)
    runs.command_line(lambda argv: None)([])
    assert warnings.filters == filters
