"""Every training command that README.md, docs/, run.sh and the scripts' own docstrings show is run on the tiny model and few rows.

What the hub or a file of the reader's would provide is replaced (models, data, evaluation sets, result files) and runs are
shortened; every other flag stays as it is written. `...` stands for PLACEHOLDER. eval.py's commands are parsed, not run: what
they ask for is tested in test_eval.py.
"""
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import common
import eval as evaluation

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"sftmix.py": ["--max_steps", "5", "--batch_size", "4", "--micro_batch_size", "4"],
         "dynamix_sft.py": ["--max_steps", "4", "--batch_size", "4", "--update_every", "2", "--reward_batch_size", "2"],
         "dynamics.py": ["--max_steps", "4", "--batch_size", "4", "--probe_steps", "1", "--eval_limit", "4"]}
PLACEHOLDER = {"sftmix.py": "--data toy", "dynamix_sft.py": "--data toy",
               "dynamics.py": "--data math numinamath fineweb --eval_data math tinymmlu bbq --targets math --constraints tinymmlu bbq"}
LENGTH_FLAGS = {"--epochs", "--max_steps", "--batch_size", "--micro_batch_size", "--update_every", "--reward_batch_size", "--probe_steps", "--eval_limit",
                "--output_dir", "--resume"}


def documented_commands(scripts):
    """-> sorted list of (script, arguments as a string), from ```bash blocks and docstrings."""
    texts = ["\n".join(re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M))
             for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    texts += [(ROOT / script).read_text(encoding="utf-8").split('"""')[1].replace("\\\\", "\\") for script in scripts]
    found = set()
    for text in texts:
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            match = re.match(r"\s*(?:\S+=\S+ )*(?:\S*/)?python (\w+\.py)\s+((?:[^#]|(?<=\S)#)*)", line)
            if match and match[1] in scripts:
                found.add((match[1], match[2].strip()))
    return sorted(found)


def table_commands(script):
    """Flags in the tables of a script's page: `--flag ...` in backquotes, in the last column."""
    rows = re.findall(r"^\|.*\| ([^|]*`--[^|]*) \|$", (ROOT / "docs" / script.replace(".py", ".md")).read_text(encoding="utf-8"), re.M)
    return [(script, f"... {flags}") for row in rows for flags in re.findall(r"`(--[^`]+)`", row)]


def run_sh_commands(size, folder):
    """What run.sh would start, printed instead: PYTHON=echo. Run in a folder of its own, so that no earlier runs/ is seen."""
    (folder / "run.sh").write_text((ROOT / "run.sh").read_text())
    done = subprocess.run(["bash", str(folder / "run.sh"), size], capture_output=True, text=True, env={"PYTHON": "echo", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    return [tuple(line.split(" ", 1)) for line in done.stdout.splitlines()]


def label_of(spec):
    """The label a dataset SPEC gets."""
    label, source, _ = common.parse_spec(spec)
    return label or Path(source).stem


def shortened(script, arguments, folder):
    """The documented command with a model, data and files that exist here, and few steps."""
    words = shlex.split(arguments.replace("...", PLACEHOLDER[script], 1))
    flags = {}
    for word in words:  # a later flag takes the place of the placeholder's
        if word.startswith("--"):
            flags[word] = []
        else:
            flags[list(flags)[-1]].append(word)
    tasks, result = ["copy", "add", "sort", "reverse", "compare", "count", "describe"], []
    for flag, values in flags.items():
        if flag in LENGTH_FLAGS:
            continue
        if flag in ("--model", "--ref_model"):
            values = ["tiny"]
        elif flag == "--data" and not values[0].startswith("toy"):
            values = [f"{label_of(value)}=toy/{task}#24" for value, task in zip(values, tasks)] if len(values) > 1 else ["toy#24"]
        elif flag == "--data":
            values = ["toy#24"] if script == "sftmix.py" else ["toy#60"]
        elif flag == "--eval_data" and values == ["toy"]:
            values = [f"toy/{task}#8" for task in tasks]
        elif flag == "--eval_data" and not values[0].startswith("toy"):
            values = [f"{label_of(value)}={choices(folder)}" if label_of(value) in flags.get("--accuracy", []) else f"{label_of(value)}=toy/{task}#12"
                      for value, task in zip(values, tasks)]
        elif flag == "--confidence":
            importlib.import_module("sftmix").main(["--data", "toy#24", *SHORT["sftmix.py"], "--output_dir", str(folder / "reference")])
            values = [str(folder / "reference" / "confidence.jsonl")]
        elif flag == "--select" and values != ["longest"]:
            values = [write(folder / "scores.jsonl", [{"score": i} for i in range(24)])]
            result += [] if "--select_n" in flags else ["--select_n", "12"]
        elif flag == "--select_n":
            values = ["12"]
        elif flag == "--mixture" and values[0].endswith(".json"):
            values = [str(folder / "weights.json")]
            Path(values[0]).write_text(json.dumps({label_of(value): i + 1 for i, value in enumerate(flags["--data"])}))
        elif flag == "--reference":
            values = [value.split("=")[0] + "=+2%" for value in values]
        elif flag == "--lora_rank":
            values = ["2"]
        result += [flag, *values]
    return [*result, *SHORT[script], "--output_dir", str(folder / "run")]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def choices(folder):
    """A multiple-choice file."""
    return write(folder / "choices.jsonl", [{"question": f"What is {i} + 1?", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(12)])


def execute(script, arguments, folder):
    importlib.import_module(script[:-3]).main(shortened(script, arguments, folder))
    assert (folder / "run" / "summary.json").exists()


def test_commands_are_found():
    for script in (*SHORT, "eval.py"):
        assert len(documented_commands([script])) >= 3, script
    assert all(len(table_commands(script)) >= 6 for script in SHORT)


@pytest.mark.parametrize("script, arguments", documented_commands(SHORT) + [command for script in SHORT for command in table_commands(script)])
def test_documented_command(script, arguments, tmp_path):
    execute(script, arguments, tmp_path)


@pytest.mark.parametrize("arguments", [arguments for _, arguments in documented_commands(["eval.py"])])
def test_documented_evaluation(arguments):
    args = evaluation.parse_args(shlex.split(arguments))
    assert args.tasks or args.eval_data


@pytest.mark.parametrize("size", ["laptop", "paper"])
def test_run_sh(size, tmp_path):
    commands = run_sh_commands(size, tmp_path)
    assert {script for script, _ in commands} >= set(SHORT)
    for number, (script, arguments) in enumerate(commands):
        folder = tmp_path / str(number)
        folder.mkdir()
        if script == "eval.py":
            evaluation.parse_args(shlex.split(arguments))
        else:
            execute(script, arguments, folder)
