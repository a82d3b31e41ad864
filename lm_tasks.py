"""Benchmarks as tasks of lm-eval for eval.py: local rows in the columns that lm-eval's definitions
read, and definition files that include lm-eval's own and change the rows, the number of shots and,
in medqa5 and multiple-choice files of a user's own, the options.
"""

from __future__ import annotations

import functools
import importlib
import json
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import common
import data
import sandbox
from data import UserError
from predictions import cause, json_lines, safe_name

# DynamixSFT's ten benchmarks, by their names in lm-eval 0.4.13; it has no PopQA (see POPQA)
DYNAMIXSFT = ["mmlu", "truthfulqa_mc2", "popqa", "bbh", "drop", "humaneval", "humaneval_plus"]
DYNAMIXSFT += ["gsm8k", "minerva_math", "ifeval"]
CHOICES = {  # multiple choice: lm-eval's name, shots (SFTMix §4.2: three), options of a row
    "medqa": ("medqa_4options", 3, 4),
    "medqa5": ("medqa_4options", 3, 5),
    "pubmedqa": ("pubmedqa", 3, 0),
    "medmcqa": ("medmcqa", 3, 4),
    "bbq": ("bbq", 0, 0),
    "truthfulqa_mc1": ("truthfulqa_mc1", 0, 0),
    "truthfulqa_mc2": ("truthfulqa_mc2", 0, 0),
}
OWN_FILE = ("medqa_4options", 3, 0)  # --tasks mine=FILE: asked as medqa
VARIANTS = {4: "; the four-option variant is medqa", 5: "; the five-option variant is medqa5"}
LISTED = {  # medqa's definition for any number of options
    "doc_to_text": "Question: {{question}}\n{% for choice in choices %}"
    f"{{{{'{data.LETTERS}'[loop.index0]}}}}. {{{{choice}}}}\n{{% endfor %}}Answer:",
    "doc_to_target": "answer",
    "doc_to_choice": f"{{{{'{data.LETTERS}'[:choices|length]|list}}}}",
}
SAME_SPLIT = {"bbq": "test", "truthfulqa_mc1": "validation", "truthfulqa_mc2": "validation"}
BBQ = ["context", "question", "ans0", "ans1", "ans2", "label", "question_polarity"]
BBQ += ["context_condition", "category"]
FOLDERS = ["medqa", "pubmedqa", "medmcqa", "bbq", "truthfulqa", "gsm8k", "humaneval", "ifeval"]
RUNS_CODE = ("humaneval", "mbpp")  # prefixes of tasks whose code runs by sandbox.CodeEval
LOCAL = {  # other tasks that take =FILE: shots of their definition, and the columns it reads
    "gsm8k": (5, {"question", "answer"}),
    "humaneval": (0, {"prompt", "test", "entry_point"}),
    "humaneval_plus": (0, {"prompt", "test", "entry_point"}),
    "ifeval": (0, {"key", "prompt", "instruction_id_list", "kwargs"}),
    "popqa": (15, {"question", "obj", "possible_answers"}),
}


@dataclass
class Benchmark:
    """A task of lm-eval. local: {"test": rows, "train": rows of shots} in the definition's columns,
    {} for the hub's. shots: None leaves lm-eval's own number."""

    name: str
    base: str  # lm-eval's name of the definition
    shots: int | None
    rounds: int  # times that it is asked, each with other shots
    choice: bool  # of the multiple choice that eval.py adds to lm-eval's
    local: dict = field(default_factory=dict)


def popqa_results(doc: dict, results: list[str]) -> dict[str, float]:
    """PopQA: right if one of the accepted answers occurs in the generated line."""
    answers = doc["possible_answers"]
    answers = json.loads(answers) if isinstance(answers, str) else answers
    return {"accuracy": float(any(str(each).lower() in results[0].lower() for each in answers))}


POPQA = {"task": "popqa", "dataset_path": "akariasai/PopQA", "output_type": "generate_until"}
POPQA |= {"test_split": "test", "fewshot_split": "test", "num_fewshot": 15}
POPQA |= {"doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{obj}}"}
POPQA["generation_kwargs"] = {"until": ["\n"], "do_sample": False, "max_gen_toks": 32}
POPQA["process_results"] = popqa_results
POPQA["metric_list"] = [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}]


def letters_record(name: str, file: str, number: int, record: dict) -> dict:
    """A question with lettered options, of any of the usual columns -> the columns of lm-eval's
    definition, or of LISTED. Raises UserError."""
    if {"sent1", "ending0", "label"} <= set(record):  # medqa's on the hub
        endings = [record[f"ending{i}"] for i in range(9) if f"ending{i}" in record]
        record = {"question": record["sent1"], "choices": endings, "answer": record["label"]}
    row = data.rows_from_record(record, file, number)[0]
    count, wanted = len(row.choices), CHOICES.get(name, OWN_FILE)[2]
    if count < 2:
        raise UserError(f"{file}, row {number}: {name} needs options of which one is right")
    if wanted not in (0, count):
        other = VARIANTS.get(count, "") if name.startswith("medqa") else ""
        problem = f"has {count} options, {name} has {wanted}{other}"
        raise UserError(f"{file}, row {number}: {problem}")
    question, choices = row.messages[-1][1], list(row.choices)
    if name == "medqa":
        ends = {f"ending{i}": choice for i, choice in enumerate(choices)}
        return {"sent1": question, **ends, "label": row.answer}
    if name == "medmcqa":
        options = {f"op{letter}": choice for letter, choice in zip("abcd", choices)}
        return {"question": question, **options, "cop": row.answer}
    return {"question": question, "choices": choices, "answer": row.answer}


def choice_record(name: str, keys: dict) -> dict:
    """A row of pubmedqa, bbq or truthfulqa -> the columns of lm-eval's definition. keys: the row's
    by lower-case names. Raises KeyError, ValueError and the like for odd rows."""
    if name == "pubmedqa":
        contexts = keys.get("contexts", keys.get("context"))
        contexts = contexts["contexts"] if isinstance(contexts, dict) else contexts
        decision = str(keys["final_decision"]).strip().lower()
        if decision not in ("yes", "no", "maybe") or isinstance(contexts, str):
            raise ValueError("final_decision is yes, no or maybe, contexts a list")
        texts = [str(text) for text in contexts]
        return {"QUESTION": str(keys["question"]), "CONTEXTS": texts, "final_decision": decision}
    if name == "bbq":
        from lm_eval.tasks.bbq.utils import UNKNOWN_RESPONSES

        row = {column: keys[column] for column in BBQ}
        answers = [row["ans0"], row["ans1"], row["ans2"]]
        if row["label"] not in (0, 1, 2) or not set(answers) & set(UNKNOWN_RESPONSES):
            raise ValueError("label is 0, 1 or 2, and one answer says that it is not known")
        row["answer_info"] = {key: keys["answer_info"][key] for key in ("ans0", "ans1", "ans2")}
        groups = keys["additional_metadata"]["stereotyped_groups"]
        return row | {"additional_metadata": {"stereotyped_groups": list(groups)}}
    targets = f"{name.removeprefix('truthfulqa_')}_targets"
    choices, labels = data.labelled_choices(keys[targets])
    if set(labels) != {0, 1} or len(labels) != len(choices):
        raise ValueError(f"{targets} holds true (1) and false (0) answers")
    order = sorted(range(len(labels)), key=lambda i: -labels[i])  # mc1's first is the true one
    both = {"choices": [choices[i] for i in order], "labels": sorted(labels, reverse=True)}
    return {"question": str(keys["question"]), targets: both}


def local_record(name: str, file: str, number: int, record: dict) -> dict:
    """A row of a local file -> the columns that the task's definition reads. Raises UserError."""
    if name in LOCAL:
        if not LOCAL[name][1] <= set(record):
            needs = f"{name} needs columns {sorted(LOCAL[name][1])}, found {sorted(record)}"
            raise UserError(f"{file}, row {number}: {needs}")
        return data.plain(record)
    if name not in CHOICES or CHOICES[name][2]:
        return letters_record(name, file, number, record)
    keys = {str(key).lower(): value for key, value in data.plain(record).items()}
    try:
        return choice_record(name, keys)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"is no row of {name} ({cause(error)}); keys {sorted(keys)}"
        raise UserError(f"{file}, row {number}: {problem}") from None


def local_rows(name: str, source: str, shots: int) -> dict[str, list]:
    """FILE[,SHOTSFILE] -> {"test": rows to score, "train": rows that shots are drawn from}; without
    the second, shots are other rows of the first."""
    test, _, train = source.partition(",")
    records, solved = read_records(test), read_records(train, "train") if train else []
    rows = [local_record(name, *record) for record in records]
    pool = [local_record(name, *record) for record in solved]
    if not rows or shots > (len(pool) if train else len(rows) - 1):
        few = f"{len(rows)} rows and {len(pool)} for shots are too few for {shots} shots"
        raise UserError(f"{name}: {source}: {few}; give {name}=FILE,SHOTSFILE")
    return {"test": rows, "train": pool} if train and shots else {"test": rows}


def read_records(source: str, split: str = "eval") -> list[tuple]:
    """A file, folder or hub id -> [(file, row number, record)]. Raises UserError."""
    if source.split("/")[0] == "toy":
        raise UserError("toy holds no benchmark's rows; give it with --eval_data")
    return objects(data.find_source(source, None, 0, split).records())


def objects(records: Iterable[tuple]) -> list[tuple]:
    """The records as they are. Raises UserError where one is not an object."""
    records = list(records)
    for file, number, record in records:
        data.check_object(record, f"{file}, row {number}")
    return records


@functools.cache
def index_of(every: bool) -> object:
    """lm-eval's index of all of its task definitions, or of FOLDERS, which takes no half minute."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = None if every else [root / folder for folder in FOLDERS]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=every)


def task_manager(name: str) -> object:
    """The smallest index that knows a task of lm-eval; that of all where none does."""
    return index_of(name != "popqa" and name not in index_of(False).task_index)


def find_benchmark(name: str, source: str, args: Namespace, others: list[str]) -> Benchmark:
    """--tasks NAME[=SOURCE] -> Benchmark, over the rows of a local file where source names one,
    else over the hub's. others: tasks that are not lm-eval's, for the message. Raises UserError."""
    task = name.removeprefix("lm_eval/")
    base, shots, _ = CHOICES.get(name, (task, None, 0))
    try:
        known = {*task_manager(base).task_index, "popqa"}
    except ImportError:
        raise UserError(f"{name}: needs lm-eval: pip install 'lm_eval[ifeval,math]'") from None
    own_file = bool(source) and name not in CHOICES and task not in known
    choice = name in CHOICES or own_file
    if task not in known and not choice:
        near = ", ".join([other for other in known if task.split("_")[0] in other][:5]) or "none"
        ours = f"neither one of eval.py's ({', '.join([*CHOICES, *others])}) nor of lm-eval's"
        file = f"a multiple-choice file of your own is {task}=FILE"
        raise UserError(f"--tasks {task}: {ours}; near are {near}; {file}")
    if source and not choice and task not in LOCAL:
        raise UserError(f"{task}={source}: of lm-eval's tasks {', '.join(LOCAL)} take local rows")
    check_needs(task, args.allow_code)
    if source and task in LOCAL:
        shots = LOCAL[task][0]
    elif own_file:
        base, shots, _ = OWN_FILE
    if args.shots is not None and (choice or shots != 0):  # where lm-eval has 0 it takes no others
        shots = args.shots
    rounds = (args.rounds or 3) if choice and shots else 1
    local = local_rows(task, source, shots or 0) if source else {}
    if choice and not source:
        check_hub(task, base)
    return Benchmark(task, base, shots, rounds, choice, local)


def check_needs(task: str, allow_code: str | None) -> None:
    """Refuse a task that runs code without leave, or whose libraries are not there."""
    if task.startswith(RUNS_CODE) and not allow_code:
        raise UserError(f"{task}: runs the model's code; add --allow_code, which uses a sandbox")
    if task.startswith(RUNS_CODE) and allow_code == "sandbox":
        sandbox.find_box()
    if task == "ifeval":  # its scorer splits sentences by punkt_tab, which is no part of nltk
        try:
            importlib.import_module("langdetect")  # another library of lm_eval[ifeval]
            importlib.import_module("nltk").data.find("tokenizers/punkt_tab")
        except ImportError as error:
            missing = f"{error.name} is missing: pip install 'lm_eval[ifeval]'"
            raise UserError(f"ifeval: {missing}") from None
        except LookupError:
            how = (
                "python -m nltk.downloader punkt_tab (offline: tokenizers/punkt_tab in $NLTK_DATA)"
            )
            raise UserError(f"ifeval: nltk's sentence splitter is missing: {how}") from None


def check_hub(name: str, base: str) -> None:
    """Refuse a multiple-choice task whose rows the hub does not give. Raises UserError."""
    if name == "medqa5":
        raise UserError("medqa5: is not on the hub in loadable form; give its rows: medqa5=FILE")
    try:
        with data.quiet_hub():
            task_manager(base).load([base])
    except Exception as error:  # network, hub and lm-eval raise many types
        problem = f"cannot load its rows from the Hugging Face hub: {cause(error)}"
        raise UserError(f"{name}: {problem}; local rows: {name}=FILE") from None


def definition(task: Benchmark, folder: Path) -> str | dict:
    """What lm-eval is asked for: its own name, or a file under folder that includes lm-eval's
    definition and changes rows, shots and options. `lm_eval --tasks FILE` takes it too."""
    name, local, split = task.name, task.local, SAME_SPLIT.get(task.name)
    spec, stem = {}, safe_name(name)
    if local:
        files = {part: str((folder / f"{stem}-{part}.jsonl").resolve()) for part in local}
        for part, rows in local.items():
            common.write_text(files[part], json_lines(rows))
        spec = {"dataset_path": "json", "dataset_name": None, "training_split": None}
        spec |= {"dataset_kwargs": {"data_files": files}, "validation_split": None}
        spec |= {"test_split": "test", "fewshot_split": "train" if "train" in local else "test"}
    elif task.choice and task.shots and split:  # no question is its own shot
        spec = {"validation_split": None, "test_split": split, "fewshot_split": split}
    spec |= {"num_fewshot": task.shots} if task.shots is not None else {}
    if name == "popqa":
        return {**POPQA, **spec}
    if not local and not task.choice:
        return name
    if task.choice and (name == "medqa5" or name not in CHOICES):
        spec |= LISTED
    include = str(task_manager(task.base).task_index[task.base].yaml_path)
    text = json.dumps({"include": include, "task": name, **spec}, indent=1)
    path = folder / f"{stem}.yaml"
    common.write_text(path, text + "\n")  # YAML is a superset of JSON
    return str(path.resolve())
