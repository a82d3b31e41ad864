"""run.sh: every command that it would start is one that its script takes, every row of a paper's
table is trained and evaluated; benchmarks/report.py and quality.py."""

import contextlib
import importlib.util
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import to_jsonl

import dynamics
import dynamix_sft
import eval as evaluation
import sftmix
from common import UserError
from test_documented_commands import flags_of

ROOT = Path(__file__).resolve().parent.parent
PARSERS = {script.__name__ + ".py": script for script in (sftmix, dynamix_sft, dynamics)}
PARSERS["eval.py"] = evaluation


def benchmark(name):
    """A module of benchmarks/, whose folder comes last on the path: it holds the scripts' names."""
    sys.path.append(str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # its dataclasses look for it
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    return benchmark("report")


@pytest.fixture(scope="module")
def real():
    return benchmark("real")


def run_sh(folder, *arguments, **variables):
    """run.sh in a folder of its own, so that no earlier runs/ is seen."""
    (folder / "run.sh").write_text((ROOT / "run.sh").read_text(encoding="utf-8"), encoding="utf-8")
    env = {"PATH": "/usr/bin:/bin", "PYTHON": "python", "GPUS": "0", **variables}
    command = ["bash", str(folder / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def commands(folder, *arguments, **variables):
    """What a dry run shows -> [[word, ...]]."""
    done = run_sh(folder, *arguments, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line[:2] == "+ "]


def flags_in(command):
    """{flag: values} of a command's words; what stands before the first flag is left out."""
    while not command[0].startswith("--"):
        command = command[1:]
    return flags_of(shlex.join(command))


def experiments(folder):
    return [line.split()[0] for line in run_sh(folder, "--list").stdout.splitlines()]


def test_list_says_hardware_and_hours(tmp_path, report):
    lines = run_sh(tmp_path, "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == experiments(tmp_path)
    for line in lines:
        name, count, _, gpu, hours, unit = line.split()[:6]
        assert int(count) in (1, 8) and gpu == "H100" and float(hours) > 0 and unit == "h", name
    assert set(experiments(tmp_path)) == {*report.TABLES, "dynamics-scenario"}
    tables = {f"sftmix-table{number}" for number in range(1, 10)}
    assert {*tables, "dynamix-table1", "dynamix-ablations"} <= set(report.TABLES)


@pytest.mark.parametrize("arguments", [("paper",), ("paper", "sftmix"), ("medium",)])
def test_unknown_names_are_refused(tmp_path, arguments):
    done = run_sh(tmp_path, *arguments, DRY_RUN="1")
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and not done.stdout


def test_commands_are_taken(tmp_path, real, report):
    """A typo in a flag, a choice or a script's name would be an exit here."""
    seen = set()
    for name in experiments(tmp_path):
        for command, script, *flags in commands(tmp_path, "paper", name):
            if command == "alpaca_eval":
                continue
            assert command == "python"
            if script in PARSERS:
                PARSERS[script].parse_args(flags)
            else:
                assert (ROOT / script).exists()
            seen.add(script)
    assert seen == {*PARSERS, "benchmarks/report.py", "benchmarks/quality.py"}
    for _, script, *flags in commands(tmp_path, "small"):
        if script == "benchmarks/real.py":
            args = real.parse_args(flags)
            if args.table == "cut":
                assert not args.flags
                continue
            # what real.py does not know goes to the script that its table runs
            runs = {"mixture": "dynamix_sft.py", "constraints": "dynamics.py"}
            parser = PARSERS[runs.get(args.table, "sftmix.py")]
            own = ["--targets", "math"] if args.table == "constraints" else []
            parser.parse_args(["--data", *args.data, *own, *args.shared, *args.flags])
    for _, script, *_ in commands(tmp_path, "laptop"):
        assert (ROOT / script).exists()


def test_every_row_is_trained_and_evaluated(tmp_path, report):
    """Its model's answers or scores lie where report.py looks for them."""
    for name, table in report.TABLES.items():
        found = commands(tmp_path, "paper", name)
        assert found[-1] == ["python", "benchmarks/report.py", name]
        trained, evaluated, judged = {}, {}, {}
        for command in found[:-1]:
            flags = flags_in(command)
            if command[1] in ("sftmix.py", "dynamix_sft.py"):
                trained[flags["--output_dir"][0]] = flags
            elif command[1] == "eval.py":
                evaluated[flags["--output_dir"][0]] = flags
            elif command[0] == "alpaca_eval":
                judged[flags["--output_path"][0]] = flags
        for run in table.rows:
            flags = evaluated[f"runs/{run}/eval"]
            (model,) = flags["--model"]
            if model.startswith("runs/"):
                assert f"runs/{run}" in trained
                assert model == f"runs/{run}/final"
            if table.columns == report.CHAT:
                assert {task.split("=")[0] for task in flags["--tasks"]} == {
                    "mt_bench",
                    "alpaca_eval",
                }
                assert flags["--judge"] and flags["--judge_prompts"]
                answers = f"runs/{run}/eval/alpaca_eval/runs-{run}-final"
                assert judged[answers]["--model_outputs"] == [f"{answers}.json"]
            elif table.columns == report.MEDICAL:
                tasks = {task.split("=")[0] for task in flags["--tasks"]}
                assert tasks == set(report.MEDICAL[:-1])
            else:
                assert flags["--tasks"] == ["dynamixsft"]
        used = {path for flags in trained.values() for path in flags.get("--confidence", [])}
        own = {"--confidence", "--ntp_on", "--partition"}  # a run with any has no reference
        with_reference = [run for run, flags in trained.items() if not own & set(flags)]
        assert used <= {f"{run}/confidence.jsonl" for run in with_reference}


ROWS = """
sftmix-table1 llama-alpaca-ntp --mu 0 --ntp_on full --data alpaca
sftmix-table1 mistral-ultrachat-sftmix --data ultrachat --epochs 1
sftmix-table2 llama-medalpaca-sftmix --data medalpaca --epochs 2
sftmix-table3 llama-alpaca-weaker --ref_model google/gemma-2b
sftmix-table4 llama-high --data runs/quality/high.jsonl --mu 0 --ntp_on full
sftmix-table4 llama-high-low-mixup --partition source
sftmix-table5 llama-alpaca-loss --mu 1
sftmix-table5 llama-alpaca-alone --mu 1 --ntp_on none
sftmix-table6 llama-alpaca-confident-mixup --ntp_on confident
sftmix-table6 llama-alpaca-unconfident-ntp --ntp_on unconfident --mu 0
sftmix-table7 llama-long-ntp --select longest --select_n 1000 --mu 0
sftmix-table8 llama-lora-sftmix --lora_rank 64
sftmix-table9 llama-alpaca-mu-0.5 --mu 0.5
sftmix-v4 qwen-alpaca-sftmix --model Qwen/Qwen2.5-14B
sftmix-v4 llama-tulu3-ntp --data tulu3 --epochs 1
dynamix-table1 tulu3-8b-dynamix --beta 5 --model meta-llama/Llama-3.1-8B --data tulu3
dynamix-table1 tulu2-1b-hbo --sampling hbo --data tulu2
dynamix-ablations tulu2-1b-no-prior-start --no-prior --init proportional
dynamics-scenario dynamics-mass-0.8 --mixture uniform --target_mass 0.8
dynamics-scenario dynamics-none --updates none
"""


@pytest.mark.parametrize("row", ROWS.strip().splitlines())
def test_rows_differ_as_the_paper_says(tmp_path, row):
    name, run, wanted = row.split(" ", 2)
    for command in commands(tmp_path, "paper", name):
        flags = flags_in(command) if "--output_dir" in command else {}
        if flags.get("--output_dir") == [f"runs/{run}"]:
            for flag, values in flags_of(wanted).items():
                assert flags[flag] == values
            return
    pytest.fail(f"{name} has no {run}")


def test_the_scenario(tmp_path, report):
    """Every run is evaluated, no domain is called as a task, each constraint has a gradient."""
    *runs, evaluation_, last = commands(tmp_path, "paper", "dynamics-scenario")
    assert last == ["python", "benchmarks/report.py", "dynamics-scenario"]
    flags = flags_in(evaluation_)
    assert flags["--model"] == [f"runs/{name}/final" for name in report.SCENARIO]
    assert set(flags["--tasks"]) == set(report.GENERAL) and "--eval_data" not in flags
    assert [flags_in(run)["--output_dir"] for run in runs] == [
        [f"runs/{name}"] for name in report.SCENARIO
    ]
    for run in runs:
        flags = flags_in(run)
        assert "--accuracy" not in flags
        labels = [spec.split("#")[0] for spec in flags["--eval_data"]]
        assert set(labels) == {*flags["--targets"], *flags["--constraints"]}
        known = {spec.split("#")[0] for spec in flags["--data"]}
        assert set(flags.get("--target_data", [])) <= known


NEEDS = {"sftmix-table1": "FASTCHAT", "sftmix-table2": "MEDQA5", "sftmix-table7": "FASTCHAT"}


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_missing_is_said_before_training(tmp_path, name):
    done = run_sh(tmp_path, "paper", name)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: set {NEEDS[name]}, see the head of run.sh\n"


def test_a_missing_alpaca_eval_is_said_before_training(tmp_path):
    known = {"FASTCHAT": "x", "OPENAI_API_KEY": "x", "ALPACA_EVAL": "no-such-command"}
    done = run_sh(tmp_path, "paper", "sftmix-table9", **known)
    assert done.returncode == 127 and not done.stdout and "no-such-command" in done.stderr


def test_gpus_are_counted(tmp_path):
    env = {"GPUS": "", "CUDA_VISIBLE_DEVICES": "0,3"}
    command = commands(tmp_path, "paper", "sftmix-table9", **env)[0]
    assert command[command.index("--nproc_per_node") + 1] == "2"


def test_numbers_of_the_papers_agree_with_themselves(report):
    """MT-Bench's overall is the mean of both turns, Table 2's average that of its columns."""
    checked = 0
    for table in report.TABLES.values():
        for row in table.rows.values():
            if table.columns == report.CHAT and None not in row[:3]:
                assert row[2] == pytest.approx((row[0] + row[1]) / 2, abs=1e-4)
                checked += 1
            elif table.columns == report.MEDICAL:
                assert row[4] == pytest.approx(sum(row[:4]) / 4, abs=0.011)
                checked += 1
    assert checked >= 30


def test_several_gpus_finished_runs(tmp_path):
    (tmp_path / "runs" / "llama-alpaca-ntp").mkdir(parents=True)
    (tmp_path / "runs" / "llama-alpaca-ntp" / "summary.json").write_text("{}")
    found = commands(tmp_path, "paper", "sftmix-table5", GPUS="8")
    trained = [command for command in found if "sftmix.py" in command]
    assert len(trained) == 3  # of four, one of which is finished
    for command in trained:
        launch = "python -m torch.distributed.run --standalone --nproc_per_node 8 sftmix.py"
        assert shlex.join(command).startswith(launch)
        assert command[-1] == "--resume"


# ---- report.py, quality.py


def printed(main, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([str(argument) for argument in arguments])
    return text.getvalue()


def table_row(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_report_of_chat(tmp_path, report):
    run = tmp_path / "llama-alpaca-weaker"
    grades = {"score": 4.5, "score_turn1": 4.25, "score_turn2": 4.75}
    write_json(run / "eval" / "results.json", {f"{run}/final": {"mt_bench": grades}})
    text = printed(report.main, "sftmix-table3", "--runs", tmp_path)
    paper = ["4.8500", "4.2625", "4.5563", "4.5786", "10.0483"]
    ours = ["4.2500", "4.7500", "4.5000"]
    assert table_row(text, run.name) == [run.name, *paper, *ours, "", ""]
    board = run / "eval" / "alpaca_eval" / f"runs-{run.name}-final" / "leaderboard.csv"
    board.parent.mkdir(parents=True)
    lines = [",win_rate,length_controlled_winrate", "gpt4,90.0,91.0"]
    board.write_text("\n".join([*lines, f"runs-{run.name}-final,4.5,9.5"]) + "\n")
    text = printed(report.main, "sftmix-table3", "--runs", tmp_path)
    assert table_row(text, run.name) == [run.name, *paper, *ours, "4.5000", "9.5000"]
    assert table_row(text, "llama-alpaca-sftmix")[6:] == [""] * 5


def test_report_of_benchmarks(tmp_path, report):
    found = {task: {"acc": 0.25 + 0.25 * (task == "medqa")} for task in report.MEDICAL[:-1]}
    run = tmp_path / "llama-medalpaca-ntp"
    write_json(run / "eval" / "results.json", {f"{run}/final": found})
    text = printed(report.main, "sftmix-table2", "--runs", tmp_path)
    assert table_row(text, run.name)[6:] == ["50.00", "25.00", "25.00", "25.00", "31.25"]
    ten = {task: {f"{metric},none": 0.5, "other": 1.0} for task, metric in report.METRICS.items()}
    run = tmp_path / "tulu2-1b-hbo"
    write_json(run / "eval" / "results.json", {f"{run}/final": ten})
    row = table_row(printed(report.main, "dynamix-table1", "--runs", tmp_path), run.name)
    assert row == [run.name, "26.99", "50.00"]
    del ten["drop"]  # an average of nine is none of ten
    write_json(run / "eval" / "results.json", {f"{run}/final": ten})
    row = table_row(printed(report.main, "dynamix-table1", "--runs", tmp_path), run.name)
    assert row == [run.name, "26.99", ""]


def test_report_of_several_models(tmp_path, report):
    """Another model's numbers do not stand in a run's row."""
    run = tmp_path / "llama-alpaca-weaker"
    found = {name: {"mt_bench": {"score": 4.5}} for name in ("base", "other")}
    write_json(run / "eval" / "results.json", found)
    text = printed(report.main, "sftmix-table3", "--runs", tmp_path)
    assert table_row(text, run.name)[6:] == [""] * 5


def test_report_of_the_scenario(tmp_path, report):
    run = tmp_path / "dynamics-light"
    write_json(run / "summary.json", constrained_summary(11.0, True, 0.0))
    found = {"Qwen/Qwen3-8B": {"mmlu": {"acc": 0.9}}, "runs/dynamics-light/final": {}}
    found["runs/dynamics-light/final"] = {"mmlu": {"acc": 0.25}, "gsm8k": {"exact_match,x": 0.5}}
    write_json(tmp_path / "dynamics-eval" / "results.json", found)
    row = table_row(printed(report.main, "dynamics-scenario", "--runs", tmp_path), run.name)
    assert row[1:] == ["1/1", "1/1", "11.0", "11.0", "0.0000", "4.50", "50.00", "", "25.00", ""]


def constrained_summary(reduction, feasible, violation):
    report = {"feasible": feasible, "feasible_on_validation": feasible}
    report["reduction_percent"] = reduction if feasible else 0.0
    report["unconstrained_reduction_percent"] = reduction
    report["constraints"] = {"copy": {"violation": violation}, "compare": {"violation": 0.0}}
    return {"report": report, "cost": {"total": 4.5}}


def test_report_of_the_laptop(tmp_path, report):
    root = tmp_path / "laptop"
    folders = {"sftmix/sftmix-0": 1.0, "sftmix/ntp-0": 1.5}
    folders |= {"dynamix_sft/dynamixsft-0": 2.25, "dynamix_sft/proportional-0": 2.0}
    for folder, loss in folders.items():
        evaluated = {"copy": {"nll": loss - 0.5}, "add": {"nll": loss + 0.5}}
        times = {"reference": 2.0, "confidence": 1.0, "train": 3.0}
        summary = {"eval": evaluated, "time": times, "cost": {"total": 1.25}}
        write_json(root / folder / "summary.json", summary)
    fixed = {"0.2": (5.0, True, 0.0), "0.5": (9.0, True, 0.0), "0.8": (20.0, False, 0.5)}
    for mass, values in fixed.items():
        folder = root / "dynamics" / f"fixed-target-mass-{mass}-0"
        write_json(folder / "summary.json", constrained_summary(*values))
    own = root / "dynamics" / "DynaMiCS-0" / "summary.json"
    write_json(own, constrained_summary(11.0, False, 0.01))
    text = printed(report.main, "laptop", "--runs", tmp_path)
    assert table_row(text, "SFTMix")[3:7] == ["1.000", "1.500", "-0.500", "2.00"]
    assert table_row(text, "DynamixSFT")[3:7] == ["2.250", "2.000", "+0.250", "1.25"]
    row = table_row(text, "DynaMiCS")
    assert row[1].startswith("fixed, target mass 0.5")  # 0.8 is not feasible
    assert row[3:7] == ["11.0 (not feasible)", "9.0 (feasible)", "+2.0", "4.50"]
    assert (tmp_path / "laptop" / "laptop.png").stat().st_size > 10_000


def test_what_the_pages_say_is_on_them(report):
    for page, text in report.EXPECTED.values():
        assert text and text in (ROOT / page).read_text(encoding="utf-8")


def test_halves_of_quality(tmp_path):
    quality = benchmark("quality")
    rows = {}
    for name in ("low", "high"):
        rows[name] = []
        for i in range(11):
            row = {"instruction": f"i{i}", "input": "", "output": f"{name} {i}", "text": "x"}
            rows[name].append(row)
        to_jsonl(tmp_path / f"{name}.jsonl", rows[name])
    sources = "--low", tmp_path / "low.jsonl", "--high", tmp_path / "high.jsonl"
    printed(quality.main, *sources, "--output_dir", tmp_path / "out")
    halves = {}
    for name in ("high", "low"):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        halves[name] = [json.loads(line) for line in lines]
        for row in halves[name]:
            assert row == {**row, "output": f"{name} {row['instruction'][1:]}"}
            assert set(row) == {"instruction", "input", "output"}
    assert len(halves["high"]) == 6
    prompts = [row["instruction"] for own in halves.values() for row in own]
    assert sorted(prompts) == sorted(f"i{i}" for i in range(11))
    assert prompts[:6] != [f"i{i}" for i in range(6)]  # at random
    other = [{**rows["high"][0], "instruction": "another"}, *rows["high"][1:]]
    with pytest.raises(UserError, match="do not hold the same prompts"):
        quality.halves(rows["low"], other)
