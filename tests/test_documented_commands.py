"""Every training command that README.md, docs/ and the scripts' own docstrings show is run on the
tiny model and few rows (run.sh: test_run_sh.py).

What the hub or a file of the reader's would provide is replaced (models, data, evaluation sets,
result files) and runs are shortened; every other flag stays as it is written. `...` stands for
PLACEHOLDER. eval.py's commands are parsed, not run: what they ask for is tested in test_eval.py.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import to_jsonl

import data
import eval as evaluation

ROOT = Path(__file__).resolve().parent.parent
SHORT = {
    "sftmix.py": "--max_steps 5 --batch_size 4 --micro_batch_size 4",
    "dynamix_sft.py": "--max_steps 4 --batch_size 4 --update_every 2 --reward_batch_size 2",
    "dynamics.py": "--max_steps 4 --batch_size 4 --probe_steps 1 --eval_limit 4",
}
PLACEHOLDER = {
    "sftmix.py": "--data toy",
    "dynamix_sft.py": "--data toy",
    "dynamics.py": "--data math numinamath fineweb --eval_data math tinymmlu bbq "
    "--targets math --constraints tinymmlu bbq",
}
# flags of a documented command that SHORT replaces, and a tracker, which may not be installed
LENGTH_FLAGS = """
--epochs --max_steps --batch_size --micro_batch_size --update_every --reward_batch_size
--probe_steps --eval_limit --output_dir --resume --track
"""
TASKS = ["copy", "add", "sort", "reverse", "compare", "count", "describe"]
# values that take the place of documented ones in every command
FIXED = {"--model": "tiny", "--ref_model": "tiny", "--lora_rank": "2", "--select_n": "12"}


def bash_blocks(path):
    """The ```bash blocks of a page."""
    text = path.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))


def docstring(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    return text.split('"""')[1].replace("\\\\", "\\")


COMMAND = re.compile(r"\s*(?:\S+=\S+ )*(?:\S*/)?python (\w+\.py)\s+((?:[^#]|(?<=\S)#)*)")


def documented_commands(scripts):
    """-> sorted list of (script, arguments as a string), from ```bash blocks and docstrings."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    texts = [*map(bash_blocks, pages), *map(docstring, scripts)]
    found = set()
    for text in texts:
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            match = COMMAND.match(line)
            if match and match[1] in scripts:
                found.add((match[1], match[2].strip()))
    return sorted(found)


def table_commands(script):
    """Flags in the tables of a script's page: `--flag ...` in backquotes, in the last column."""
    page = (ROOT / "docs" / script).with_suffix(".md").read_text(encoding="utf-8")
    cells = re.findall(r"^\|.*\| ([^|]*`--[^|]*) \|$", page, re.M)
    return [(script, f"... {flags}") for flags in re.findall(r"`(--[^`]+)`", "\n".join(cells))]


def training_commands():
    commands = documented_commands(SHORT)
    for script in SHORT:
        commands += table_commands(script)
    return commands


def label_of(spec):
    """The label a dataset SPEC gets."""
    label, source, _ = data.parse_spec(spec)
    return label or Path(source).stem


def flags_of(arguments):
    """-> {flag: its values}; a later flag takes the place of an earlier one."""
    flags = {}
    for word in shlex.split(arguments):
        if word.startswith("--"):
            flags[word] = values = []
        else:
            values.append(word)
    return flags


def toy_data(script, specs):
    """Toy datasets, under the labels of several documented ones."""
    if specs[0].startswith("toy"):
        return ["toy#24"] if script == "sftmix.py" else ["toy#60"]
    if len(specs) == 1:
        return ["toy#24"]
    return [f"{label_of(spec)}=toy/{task}#24" for spec, task in zip(specs, TASKS)]


def toy_eval_data(specs, accuracy, folder):
    """Toy evaluation sets under the documented labels, multiple choice for those of --accuracy."""
    if specs == ["toy"]:
        return [f"toy/{task}#8" for task in TASKS]
    if specs[0].startswith("toy"):
        return specs
    result = []
    for spec, task in zip(specs, TASKS):
        label = label_of(spec)
        source = choices(folder) if label in accuracy else f"toy/{task}#12"
        result.append(f"{label}={source}")
    return result


def choices(folder):
    """A multiple-choice file."""
    rows = []
    for i in range(12):
        question = f"What is {i} + 1?"
        rows.append({"question": question, "choices": [str(i), str(i + 1)], "answer": 1})
    return to_jsonl(folder / "choices.jsonl", rows)


def confidence_file(folder):
    """That of a short run on the data of all sftmix.py commands."""
    reference = folder / "reference"
    flags = ["--data", "toy#24", *SHORT["sftmix.py"].split(), "--output_dir", str(reference)]
    importlib.import_module("sftmix").main(flags)
    return str(reference / "confidence.jsonl")


def mixture_file(specs, folder):
    """Weights 1, 2, ... of the documented datasets."""
    path = folder / "weights.json"
    path.write_text(json.dumps({label_of(spec): i for i, spec in enumerate(specs, 1)}))
    return str(path)


def replaced(script, flag, flags, folder):
    """The values of a documented flag, those that do not exist here replaced."""
    values = flags[flag]
    if flag in FIXED:
        return [FIXED[flag]]
    if flag == "--data":
        return toy_data(script, values)
    if flag == "--eval_data":
        return toy_eval_data(values, flags.get("--accuracy", []), folder)
    if flag == "--confidence":
        return [confidence_file(folder)]
    if flag == "--select" and values != ["longest"]:
        return [to_jsonl(folder / "scores.jsonl", [{"score": i} for i in range(24)])]
    if flag in ("--mixture", "--sampling") and values[0].endswith(".json"):
        return [mixture_file(flags["--data"], folder)]
    if flag == "--reference":
        return [value.split("=")[0] + "=+2%" for value in values]
    return values


def shortened(script, arguments, folder):
    """The documented command with a model, data and files that exist here, and few steps."""
    flags = flags_of(arguments.replace("...", PLACEHOLDER[script], 1))
    if "--select" in flags:
        flags.setdefault("--select_n", [])  # the default of 1,000 is more than there is here
    result = []
    for flag in flags:
        if flag not in LENGTH_FLAGS.split():
            result += [flag, *replaced(script, flag, flags, folder)]
    return [*result, *SHORT[script].split(), "--output_dir", str(folder / "run")]


def execute(script, arguments, folder):
    main = importlib.import_module(Path(script).stem).main
    main(shortened(script, arguments, folder))
    assert (folder / "run" / "summary.json").exists()


def test_commands_are_found():
    for script in (*SHORT, "eval.py"):
        assert len(documented_commands([script])) >= 3, script
    for script in SHORT:
        assert len(table_commands(script)) >= 6, script


@pytest.mark.parametrize("script, arguments", training_commands())
def test_documented_flags(script, arguments):
    """Its flags as they are written, before anything is replaced."""
    if "..." not in arguments and not arguments.startswith("--resume"):
        importlib.import_module(Path(script).stem).parse_args(shlex.split(arguments))


@pytest.mark.parametrize("script, arguments", training_commands())
def test_documented_command(script, arguments, tmp_path):
    execute(script, arguments, tmp_path)


@pytest.mark.parametrize("arguments", [flags for _, flags in documented_commands(["eval.py"])])
def test_documented_evaluation(arguments):
    args = evaluation.parse_args(shlex.split(arguments))
    assert args.tasks or args.eval_data
