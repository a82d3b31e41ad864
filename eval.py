"""The papers' evaluations from one command, for any model the scripts save (adapters too).

    python eval.py --model runs/mine/final --base meta-llama/Llama-3.1-8B --eval_data held_out.jsonl
    python eval.py --model runs/ntp/final runs/sftmix/final --tasks medqa medqa5=rows.jsonl medmcqa
    python eval.py --model runs/mine/final --tasks mt_bench alpaca_eval --judge gpt-4o
    python eval.py --model runs/mine/final --tasks mmlu gsm8k=test.jsonl,train.jsonl ifeval

Kinds of tasks, in the order they stand below:
  domain           --eval_data: loss, perplexity and token accuracy of responses, as in the scripts
  multiple choice  medqa medqa5 pubmedqa medmcqa (three-shot, SFTMix §4.2), bbq, truthfulqa_mc1,
                   truthfulqa_mc2
  lm-eval          any task of EleutherAI's lm-eval; `dynamixsft`: the ten benchmarks of that paper
  chat             mt_bench, alpaca_eval: answers in the formats of FastChat and alpaca_eval
The state is predictions/<model>/<task>.jsonl: the same command with its --output_dir goes on there.

Shapes: n rows of a task, c options of a question, M models, S bootstrap samples.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import hashlib
import http.client
import importlib
import json
import logging
import math
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import common
import data
import plots
import ranks
import runs
import sandbox
from data import HubSource, UserError
from sandbox import run_program

VERSION = 2  # of prompts and prediction lines: predictions of another version are refused
SAMPLES = 2000  # of the bootstrap
BLOCK, JUDGE_THREADS = 64, 8  # rows between two writes of predictions; requests at once


# ---- Statistics ----------------------------------------------------------------------------------
def perplexity_reduction(nll: np.ndarray, base_nll: np.ndarray) -> np.ndarray:
    """100 · (1 - exp(nll - base_nll)): by how many % the perplexity is below the base model's.
    nll, base_nll: mean loss per token in nats, of one shape. DynaMiCS' metric."""
    return 100 * (1 - np.exp(np.asarray(nll, dtype=np.float64) - base_nll))


def mc2(loglikelihood: np.ndarray, true: np.ndarray) -> float:
    """TruthfulQA's MC2: Σ_true exp(ll) / Σ exp(ll). loglikelihood (c,) nats, true (c,) bool."""
    mass = np.exp(np.asarray(loglikelihood, dtype=np.float64) - np.max(loglikelihood))
    return float(mass[np.asarray(true, dtype=bool)].sum() / mass.sum())


def bootstrap_ratios(sums: list, weights: list, clusters: list, seed: int = 0) -> np.ndarray:
    """Bootstrap of Σ sums / Σ weights, rows drawn with replacement by cluster -> (S, M) float64.
    sums, weights (M, n): numerator and weight of a row (loss and tokens; correct and 1). clusters
    (n,): labels; the turns of a dialogue stay together. All models see the same draws, so
    differences of columns are paired. Not in the papers."""
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    rng, groups = data.data_rng(seed, "bootstrap"), cluster.max() + 1
    totals = np.array([np.bincount(cluster, row, groups) for row in (*sums, *weights)])
    totals = totals.reshape(2, len(sums), groups)
    draws = (rng.integers(0, groups, groups) for _ in range(SAMPLES))
    return np.array([np.divide(*totals[:, :, drawn].sum(-1)) for drawn in draws])


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bootstrap values (S,) -> (low, high)."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(total: int, correct: int, k: int) -> float:
    """HumanEval's unbiased pass@k of `total` samples: 1 - C(total - correct, k) / C(total, k)."""
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


def grouped(rows: list[dict], by: str, key: str) -> dict:
    """{row[by]: [row[key], ...]}, in the order of first appearance."""
    result = {}
    for row in rows:
        result.setdefault(row[by], []).append(row[key])
    return result


def means(rows: list[dict], by: str, key: str) -> dict:
    """{row[by]: mean of row[key]}, sorted by row[by]."""
    return {label: float(np.mean(part)) for label, part in sorted(grouped(rows, by, key).items())}


def spread(name: str, rounds: list[float]) -> dict[str, float]:
    """{name_std: standard deviation (n - 1) over the rounds}, nothing for a single one."""
    return {f"{name}_std": float(np.std(rounds, ddof=1))} if len(rounds) > 1 else {}


# ---- State: models, tasks and predictions on disk ------------------------------------------------
@dataclass
class Task:
    """What is asked: a name, a kind, the rows, and the settings that its predictions depend on."""

    name: str
    kind: str
    settings: dict
    rows: list = field(default_factory=list)  # data.Rows, Questions or chat questions
    shots: list = field(default_factory=list)  # multiple choice: one list of Questions a round
    extra: dict = field(default_factory=dict)


class Model:
    """Loaded when the first task needs it, not at all where every prediction is already there."""

    def __init__(self, name: str, label: str, args: Namespace, device: torch.device):
        self.name, self.label, self.args, self.device = name, label, args, device
        self.loaded = None  # (model, tokenizer)
        self.max_length = args.max_length  # or what the model was trained with

    def template(self, name: str):
        """The loaded tokenizer, with --template's chat template where `name` is auto, else with
        the template of that name. Raises UserError."""
        tokenizer = self.load()[1]
        if name == "auto":
            name, self.max_length = common.choose_template(self.name, tokenizer, self.args)
        name = data.pick_template(name, tokenizer)
        return data.with_template(tokenizer, name, data.template_date(name, tokenizer))

    def load(self) -> tuple:
        if self.loaded is None:
            self.loaded = common.load_model(self.name, self.device, seed=self.args.seed)
            common.check_head(self.loaded[0].eval())
            common.describe_model(self.loaded[0], self.name, self.args.dtype)
        return self.loaded

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names, sizes and times of a model's files: a model trained again is another model."""
        path = Path(self.name)
        if not path.exists():
            return self.name + (f" seed {self.args.seed}" if self.name == "tiny" else "")
        files = sorted(f for f in [path, *path.glob("*")] if f.is_file())
        return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


# by kind of task: what tells its lines apart, and what a line holds unless it says "skipped"
LINES = {
    "domain": (["index"], {"nll": float, "tokens": int, "correct": int}),
    "choice": (["round", "index"], {"correct": int, "shots": int}),
    "mc2": (["round", "index"], {"mc2": float, "shots": int}),
    "lm_eval": (["task", "index", "filter"], {"task": str, "metrics": dict}),
    "chat": (["question_id"], {"answers": list, "prompt_cut": bool, "tstamp": float}),
    "judge": (["key"], {"key": str, "turn": int, "round": int, "score": float | None}),
}


class Predictions:
    """predictions/<model>/<task>.jsonl, one line a prediction. It grows under the name .part, whole
    lines only, and is renamed once complete: an interrupted command goes on after the last line.
    A file is believed only where its lines are the task's.

    expected: the keys of all lines, None where they are not known; known: of those that are there.
    Judgements are never complete, so they are never under another name. Raises UserError."""

    def __init__(self, path: Path, kind: str, expected: list[str] | None = None):
        grows = kind == "judge"
        self.path, self.complete = path, path.exists() and not grows
        self.part = path if grows else path.with_name(path.name + ".part")
        self.names, self.holds = LINES[kind]
        self.rows, self.known = [], set()
        file = path if self.complete else self.part
        *lines, rest = (file.read_bytes() if file.exists() else b"").split(b"\n")
        keys = None if expected is None else set(expected)
        remedy = "delete this line" if grows else "delete the file: the same command makes it again"
        for number, line in enumerate(lines, 1):
            problem = self._take(line, keys)
            if problem:
                raise UserError(f"{file}, line {number}: {problem}; {remedy}")
        if self.complete and (rest or len(lines) < len(keys or ())):
            raise UserError(f"{file}: is cut after line {len(lines)}; {remedy}")
        if rest:
            os.truncate(file, file.stat().st_size - len(rest))  # killed in the middle of a line

    def _take(self, line: bytes, keys: set[str] | None) -> str:
        """Add a line of the file -> "", or what is wrong with it."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return "is no JSON"
        key = self.key(row) if isinstance(row, dict) else ""
        if not key or (keys is not None and key not in keys):
            return "is no row of this task"
        if key in self.known:
            return "is a row that an earlier line holds"
        bad = [name for name, kind in self.holds.items() if not isinstance(row.get(name), kind)]
        if bad and not isinstance(row.get("skipped"), str):
            return f"has no good {bad[0]!r}"
        self.rows.append(row)
        self.known.add(key)
        return ""

    def key(self, row: dict) -> str:
        return line_key(*(row.get(name) for name in self.names))

    def add(self, rows: list[dict]) -> None:
        """Append those that are not there yet."""
        rows = [row for row in rows if self.key(row) not in self.known]
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with open(self.part, "ab") as stream:
            stream.write(json_lines(rows).encode("utf-8", "replace"))
        self.rows += rows
        self.known.update(map(self.key, rows))

    def finish(self) -> None:
        if not self.part.exists():
            self.add([])
        os.replace(self.part, self.path)


def line_key(*values) -> str:
    return json.dumps(values, default=str)


def open_predictions(task: Task, path: Path) -> Predictions:
    """A task's predictions, as far as they are there. Raises UserError for others."""
    if task.kind == "lm_eval":  # its lines are written at once, at the end
        path.with_name(path.name + ".part").unlink(missing_ok=True)
        return Predictions(path, "lm_eval")
    if task.kind == "chat":
        return Predictions(path, "chat", [line_key(row["question_id"]) for row in task.rows])
    if task.kind == "domain":
        return Predictions(path, "domain", [line_key(i) for i in range(len(task.rows))])
    rounds = range(len(task.shots))
    keys = [line_key(number, question.index) for number in rounds for question in task.rows]
    return Predictions(path, "mc2" if task.name == "truthfulqa_mc2" else "choice", keys)


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def write_json(path: Path, value: dict | list) -> None:
    common.write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path, missing: dict) -> dict:
    """A JSON file of ours that holds missing's keys; missing where there is no file. Raises
    UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else missing
        if isinstance(value, dict) and all(isinstance(value[key], dict) for key in missing):
            return value
    except (ValueError, RecursionError, KeyError):
        pass
    raise UserError(f"{path}: is damaged; choose another --output_dir, or delete this one")


def digest(value: object) -> str:
    """sha256 of anything JSON can hold."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def cause(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def safe_name(name: str) -> str:
    """A name as one path part: letters, digits, "_", "." and "-"."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[-80:] or "model"


def unique_names(names: list[str]) -> list[str]:
    """Names -> distinct path parts, the same whatever stands beside them unless two collide."""
    parts = [safe_name(name) for name in names]
    lower = [part.lower() for part in parts]
    ends = ["-" + digest(name)[:6] for name in names]
    return [part + end * (lower.count(part.lower()) > 1) for part, end in zip(parts, ends)]


def read_records(source: str | HubSource, split: str = "eval") -> list[tuple]:
    """A file, folder or hub id, or a benchmark's own place -> [(file, row number, record)].
    A HubSource hf://... is a JSON file on the hub. Raises UserError."""
    if isinstance(source, str):
        if source.split("/")[0] == "toy":
            raise UserError("toy holds no benchmark's rows; give it with --eval_data")
        return objects(data.find_source(source, None, 0, split).records())
    path = source.path
    if path.startswith("hf://"):
        import datasets

        try:
            with data.quiet_hub():
                local = datasets.DownloadManager().download(path)
        except Exception as error:  # network and hub raise many types
            message = f"cannot load {path} from the Hugging Face hub: {cause(error)}"
            raise UserError(message) from None
        return objects([(path, *record) for record in data.read_file(local, path)])
    return objects(data.load_hub(source, None, split))


def objects(records: list[tuple]) -> list[tuple]:
    """The records as they are. Raises UserError where one is not an object."""
    records = list(records)
    for file, number, record in records:
        data.check_object(record, f"{file}, row {number}")
    return records


def hold_out(items: list, count: int, rng: np.random.Generator) -> tuple[list, list]:
    """-> (the items that stay, `count` items drawn as shots), both in their old order."""
    drawn = set(rng.permutation(len(items))[:count].tolist())
    stay = [item for i, item in enumerate(items) if i not in drawn]
    return stay, [item for i, item in enumerate(items) if i in drawn]


def blocks(store: Predictions, items: list, keys: list[str], size: int, title: str) -> tqdm:
    """Items in lists of `size` of which store lacks a line, under a progress bar. keys: of the
    items' lines. Lists are cut at fixed places and are computed whole: what is batched together,
    and so the last digit, does not depend on where an earlier command stopped."""
    starts = range(0, len(items), size)
    left = [at for at in starts if not store.known.issuperset(keys[at : at + size])]
    return tqdm([items[at : at + size] for at in left], desc=title, leave=False)


def shared_settings(args: Namespace, data: str, **own) -> dict:
    """What a task's predictions depend on. data: a digest of its rows."""
    flags = {"limit": args.limit, "template": args.template, "dtype": args.dtype}
    return {"version": VERSION, "data": data, **flags, **own}


def open_folder(folder: Path, models: list[Model], tasks: list[Task]) -> None:
    """Make the output folder; refuse predictions of another model, other data or other settings."""
    path, other = folder / "manifest.json", "choose another --output_dir"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file")
    if folder.exists():
        if not path.exists() and {entry.name for entry in folder.iterdir()} - {".lock"}:
            raise UserError(f"--output_dir {folder}: holds other files than eval.py's; {other}")
        runs.lock(folder)
    manifest = read_json(path, {"models": {}, "tasks": {}})
    for model in models:
        entry = {"name": model.name, "fingerprint": model.fingerprint}
        if manifest["models"].setdefault(model.label, entry) != entry:
            changed = f"another {model.name} (its files have changed)"
            raise UserError(f"{folder}: holds predictions of {changed}; {other}")
    for task in tasks:
        new = json.loads(json.dumps(task.settings))
        old = manifest["tasks"].setdefault(task.name, new)
        for key in sorted({**old, **new}):
            if old.get(key) != new.get(key):
                made = f"predictions of {task.name} were made with {key} {str(old.get(key))[:16]}"
                now = f"now it is {str(new.get(key))[:16]}; give the first command's flags"
                raise UserError(f"{folder}: {made}, {now} or {other}")
    if not folder.exists():
        models[0].load()  # one that cannot be loaded leaves no folder behind
        folder.mkdir(parents=True, exist_ok=True)
        runs.lock(folder)
    write_json(path, manifest)
    runs.when_stopped(f"the same command with --output_dir {folder} goes on from here")
    print(f"run   {folder}: {len(models)} models, {len(tasks)} tasks")


# ---- Domain evaluation: --eval_data --------------------------------------------------------------
def run_domain(model: Model, task: Task, store: Predictions, args: Namespace) -> None:
    """Loss, tokens and right tokens of every response (common.score), a line a row."""
    lm, tokenizer = model.load()[0], model.template("auto")
    length = min(model.max_length or 2048, common.max_positions(lm))
    rows = [data.Dataset(task.name, task.rows)]
    encoded = data.encode_datasets(rows, tokenizer, length)[0]
    examples = {example.row: example for example in encoded}
    indices = list(range(len(task.rows)))
    keys = [line_key(i) for i in indices]
    for block in blocks(store, indices, keys, BLOCK, task.name):
        kept = [i for i in block if i in examples]
        chosen = [examples[i] for i in kept]
        scores = common.score(lm, chosen, args.batch_size, args.dtype)
        lines = dict.fromkeys(block, {"skipped": "no response token fits"})
        for i, nll, tokens, correct in zip(kept, *scores):
            lines[i] = {"nll": float(nll), "tokens": int(tokens), "correct": int(correct)}
        store.add([{"index": i, "row": task.rows[i].where} | lines[i] for i in block])


def summarise_domain(task: Task, rows: list[dict]) -> tuple[dict, dict]:
    """Prediction lines -> metrics (means weighted by tokens over the whole set), and
    {metric: {row: (sum, weight, cluster)}} for the bootstrap; so do all summarise functions."""
    kept = [row for row in rows if "skipped" not in row]
    tokens = sum(row["tokens"] for row in kept)
    nll = sum(row["nll"] for row in kept) / tokens
    accuracy = sum(row["correct"] for row in kept) / tokens
    metrics = {"nll": nll, "ppl": math.exp(min(nll, 700.0)), "accuracy": accuracy}
    metrics |= {"tokens": tokens, "n": len(kept)}
    metrics["skipped"] = len(rows) - len(kept) + task.extra["skipped"]
    losses = {row["index"]: (row["nll"], row["tokens"], row["row"]) for row in kept}
    hits = {row["index"]: (row["correct"], row["tokens"], row["row"]) for row in kept}
    return metrics, {"nll": losses, "accuracy": hits}


# ---- Multiple choice -----------------------------------------------------------------------------
@dataclass(frozen=True)
class ChoiceTask:
    """How a benchmark is asked. style: letters = options listed, the letter is scored; words = one
    of few known words is scored; answers = options not shown, the whole answer is scored."""

    style: str
    options: int  # how many there must be, 0 = any
    shots: int
    instruction: str
    hub: HubSource | None  # with an eval_split: that is scored, the train split gives the shots


LETTERS, DECISIONS = "ABCDEFGHIJ", ("yes", "no", "maybe")
EXAM = "Multiple-choice questions on medicine, each followed by the letter of its correct option."
ABSTRACT = "Research questions, each decided from its abstract with yes, no or maybe."
PASSAGE = "A question on a short passage, followed by the letter of its correct option."
BBQ = HubSource("oskarvanderwal/bbq", config="All", split="test")
CHOICE_TASKS = {
    "medqa": ChoiceTask("letters", 4, 3, EXAM, data.ALIASES["medqa"][0]),
    "medqa5": ChoiceTask("letters", 5, 3, EXAM, None),
    "pubmedqa": ChoiceTask("words", 3, 3, ABSTRACT, data.ALIASES["pubmedqa"][0]),
    "medmcqa": ChoiceTask("letters", 4, 3, EXAM, data.ALIASES["medmcqa"][0]),
    "bbq": ChoiceTask("letters", 3, 0, PASSAGE, BBQ),
    "truthfulqa_mc1": ChoiceTask("answers", 0, 0, "", data.ALIASES["truthfulqa"][0]),
    "truthfulqa_mc2": ChoiceTask("answers", 0, 0, "", data.ALIASES["truthfulqa"][0]),
}
MEDQA = {4: "; the four-option variant is medqa", 5: "; the five-option variant is medqa5"}


@dataclass(frozen=True)
class Question:
    """Text without the options, options in the order they are shown, which of them are true."""

    index: int
    text: str
    options: tuple
    true: tuple
    group: str = ""  # bbq: ambig or disambig


def question_parts(name: str, file: str, number: int, keys: dict) -> tuple:
    """A record's text, options, and which are true. Raises KeyError and the like for odd ones."""
    if name == "pubmedqa":  # the decision, not the long answer, is asked for
        contexts = keys.get("contexts", keys.get("context"))
        contexts = contexts["contexts"] if isinstance(contexts, dict) else contexts
        text = f"Abstract: {' '.join(contexts)}\nQuestion: {keys['question']}"
        answer = DECISIONS.index(str(keys["final_decision"]).strip().lower())
        return text, DECISIONS, [i == answer for i in range(3)]
    if name == "truthfulqa_mc2":
        pairs = keys["mc2_targets"].items()
        if "choices" in keys["mc2_targets"]:
            pairs = zip(keys["mc2_targets"]["choices"], keys["mc2_targets"]["labels"])
        # of {answer: label} datasets fills the answers of other rows with None
        options, labels = zip(*(pair for pair in pairs if pair[1] is not None))
        return keys["question"], options, [bool(int(label)) for label in labels]
    row = data.rows_from_record(keys, file, number)[0]
    return row.messages[-1][1], row.choices, [i == row.answer for i in range(len(row.choices))]


def read_question(name: str, index: int, file: str, number: int, record: dict, seed=0) -> Question:
    """A benchmark's record -> Question. Raises UserError. TruthfulQA's sources list true answers
    first: its options are shuffled (by seed), so that even a tie between options tells nothing."""
    how, where, found = CHOICE_TASKS[name], f"{file}, row {number}", f"keys {sorted(record)}"
    keys = {str(key).lower(): value for key, value in record.items()}
    try:
        text, options, true = question_parts(name, file, number, keys)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: is no row of {name} ({cause(error)}); {found}") from None
    count = len(options)
    if count < 2 or not any(true):
        raise UserError(f"{where}: {name} needs options of which one is right; {found}")
    if how.options not in (0, count):
        other = MEDQA.get(count, "") if name.startswith("medqa") else ""
        raise UserError(f"{where}: has {count} options, {name} has {how.options}{other}")
    order = np.arange(count)
    if how.style == "answers":
        order = data.data_rng(seed, "options", abs(index)).permutation(count)
    options = tuple(str(options[i]) for i in order)
    true = tuple(bool(true[i]) for i in order)
    return Question(index, text, options, true, str(keys.get("context_condition") or ""))


def question_text(question: Question, style: str) -> str:
    """What the model sees of a question, up to its answer; the same whichever option is true."""
    lines = [f"Question: {question.text}" if style == "answers" else question.text]
    if style == "letters":
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options)]
    return "\n".join([*lines, "Answer:"])


def scored_answers(question: Question, style: str) -> tuple:
    """What is scored for each option."""
    return tuple(LETTERS[: len(question.options)]) if style == "letters" else question.options


def choice_prompt(how: ChoiceTask, question: Question, shots: list[Question]) -> str:
    """Instruction, solved shots and the question: plain text that the answer continues. The words
    are ours; the form is lm-eval's and BioMistral's few-shot prompt, which SFTMix §4.2 follows."""
    parts = [how.instruction] if how.instruction else []
    for shot in shots:
        answer = scored_answers(shot, how.style)[shot.true.index(True)]
        parts.append(f"{question_text(shot, how.style)}\n{answer}")
    return "\n\n".join([*parts, question_text(question, how.style)])


def prepare_choice(name: str, source: str, args: Namespace) -> Task:
    """-> Task with the questions to score and the shots of every round. Shots come from the train
    split or SHOTSFILE; where there is neither, from rows of the file that are then not scored."""
    how = CHOICE_TASKS[name]
    shots = how.shots if args.shots is None else args.shots
    rounds = (args.rounds or 3) if shots else 1  # without shots every round would be the same
    test, _, train = source.partition(",")
    if not test and how.hub is None:
        raise UserError(f"{name}: is not on the hub in loadable form; give its rows: {name}=FILE")
    if not test and how.hub.eval_split:
        train = train or how.hub
    records = read_records(test or how.hub)
    solved = read_records(train, "train") if train and shots else []
    questions = [read_question(name, i, *record, args.seed) for i, record in enumerate(records)]
    pool = [read_question(name, -1 - i, *record, args.seed) for i, record in enumerate(solved)]
    rng, wanted = data.data_rng(args.seed, f"shots {name}"), shots * rounds
    if not pool:
        questions, pool = hold_out(questions, wanted, rng)
    if len(pool) < shots or not questions:
        few = f"{len(records)} rows are too few for {rounds} rounds of {shots} shots"
        raise UserError(f"{name}: {few}; give shots with {name}=FILE,SHOTSFILE")
    if len(pool) >= wanted:  # no question is a shot in two rounds
        draws = rng.permutation(len(pool))[:wanted].reshape(rounds, shots)
    else:
        draws = [rng.permutation(len(pool))[:shots] for _ in range(rounds)]
    own = {"shots": shots, "rounds": rounds, "seed": args.seed, "max_length": args.max_length}
    settings = shared_settings(args, digest([record for *_, record in records + solved]), **own)
    drawn = [list(map(pool.__getitem__, draw)) for draw in draws]
    return Task(name, "choice", settings, questions[: args.limit], drawn)


def encode_questions(
    how: ChoiceTask, questions: list, shots: list, tokenizer, length: int
) -> dict[int, tuple]:
    """-> {place in questions: (Examples of the options, shots used)}. Where all shots do not fit
    into length the first ones go; what does not fit without shots is not in the result."""
    result = {}
    for first in range(len(shots) + 1):
        left, rows = [i for i in range(len(questions)) if i not in result], []
        for i in left:
            prompt = choice_prompt(how, questions[i], shots[first:])
            answers = scored_answers(questions[i], how.style)
            rows.append(data.Row((("user", prompt),), "", choices=answers))
        for examples in data.encode_choices(rows, tokenizer, length)[0]:
            result[left[examples[0].row]] = examples, len(shots) - first
    return result


@torch.no_grad()
def option_scores(model, questions: list[list], batch_size: int, dtype: str) -> list[np.ndarray]:
    """Log-likelihood of every option, summed over its tokens; where every option is one token
    (letters), one forward pass of the prompt serves all. questions: lists of Examples, one an
    option (data.encode_choices) -> (c,) float64 each."""
    device, flat = model.device, [example for question in questions for example in question]
    if any(example.response_length > 1 for example in flat):
        nll, _, _ = common.score(model, flat, batch_size, dtype)
        return np.split(-nll, np.cumsum([len(question) for question in questions])[:-1])
    scores, lengths = [None] * len(questions), [len(question[0].ids) for question in questions]
    for group in common.micro_batches(range(len(questions)), lengths, batch_size):
        batch = common.collate([questions[i][0] for i in group], device)
        sizes = torch.tensor([len(questions[i]) for i in group], device=device)
        hidden, head = common.response_states(model, batch, dtype)  # (questions, H)
        answers = [int(example.ids[-1]) for i in group for example in questions[i]]
        targets = torch.tensor(answers, device=device)  # (options of all questions,)
        _, nll = common.response_loss(hidden.repeat_interleave(sizes, 0), targets, head)
        for i, part in zip(group, nll.double().cpu().split(sizes.tolist())):
            scores[i] = -part.numpy()
    return scores


def run_choice(model: Model, task: Task, store: Predictions, args: Namespace) -> None:
    """Log-likelihood of every option of every question in every round, a line each."""
    auto = args.template == "auto"
    lm, tokenizer = model.load()[0], model.template("plain" if auto else args.template)
    how, length = CHOICE_TASKS[task.name], min(args.max_length or 4096, common.max_positions(lm))
    for number, shots in enumerate(task.shots):
        keys = [line_key(number, question.index) for question in task.rows]
        title = f"{task.name} round {number + 1}/{len(task.shots)}"
        for block in blocks(store, task.rows, keys, BLOCK, title):
            encoded = encode_questions(how, block, shots, tokenizer, length)
            examples = [examples for examples, _ in encoded.values()]
            scores = option_scores(lm, examples, args.batch_size, args.dtype)
            lines = dict.fromkeys(range(len(block)), {"skipped": "does not fit into max_length"})
            for i, values in zip(encoded, scores):
                lines[i] = {"shots": encoded[i][1], **graded(task.name, block[i], values)}
            store.add([{"round": number, "index": block[i].index} | lines[i] for i in lines])


def graded(name: str, question: Question, scores: np.ndarray) -> dict:
    """A question's part of a prediction line. scores (c,): nats, summed over an option's tokens."""
    best = int(np.argmax(scores))
    line = {"loglikelihood": scores.tolist(), "prediction": question.options[best]}
    line["true"] = [option for option, true in zip(question.options, question.true) if true]
    line["correct"] = int(question.true[best])
    line |= {"mc2": mc2(scores, question.true)} if name == "truthfulqa_mc2" else {}
    return line | ({"group": question.group} if question.group else {})


def summarise_choice(task: Task, rows: list[dict]) -> tuple[dict, dict]:
    """Accuracy (or MC2): mean over the rounds, their standard deviation, and by group."""
    name, key = ("mc2", "mc2") if task.name == "truthfulqa_mc2" else ("accuracy", "correct")
    kept = [row for row in rows if "skipped" not in row]
    if not kept:
        raise UserError(f"{task.name}: no question fits into the positions or --max_length")
    rounds, by_index = list(means(kept, "round", key).values()), grouped(kept, "index", key)
    metrics = {name: float(np.mean(rounds)), **spread(name, rounds), "rounds": len(rounds)}
    metrics |= {"n": len(by_index), "shots": float(np.mean([row["shots"] for row in kept]))}
    metrics["skipped"] = len({row["index"] for row in rows}) - len(by_index)
    for group, mean in means([row for row in kept if "group" in row], "group", key).items():
        metrics[f"{name}_{group}"] = mean
    return metrics, {name: {i: (float(np.mean(part)), 1, i) for i, part in by_index.items()}}


# ---- lm-eval: its task definitions, prompts, stop rules and scorers; over local rows too ---------
# DynamixSFT's ten benchmarks, by their names in lm-eval 0.4.13; it has no PopQA (see POPQA)
DYNAMIXSFT = ["mmlu", "lm_eval/truthfulqa_mc2", "popqa", "bbh", "drop", "humaneval"]
DYNAMIXSFT += ["humaneval_plus", "gsm8k", "minerva_math", "ifeval"]
RUNS_CODE = ("humaneval", "mbpp")  # prefixes of tasks whose code runs by CodeEval
LOCAL = {  # tasks that take =FILE: shots of their definition, and the columns it reads
    "gsm8k": (5, {"question", "answer"}),
    "humaneval": (0, {"prompt", "test", "entry_point"}),
    "humaneval_plus": (0, {"prompt", "test", "entry_point"}),
    "ifeval": (0, {"key", "prompt", "instruction_id_list", "kwargs"}),
    "popqa": (15, {"question", "obj", "possible_answers"}),
}


class CodeEval:
    """In place of the hub's code_eval, which lm-eval's code tasks load: the same by run_program."""

    box = None  # as run_program has it; the class's, since lm-eval keeps the first object it loads

    def compute(self, references: list[str], predictions: list[list[str]], k=(1,), **_) -> tuple:
        passed = []
        for test, candidates in zip(references, predictions):
            programs = [f"{candidate}\n{test}" for candidate in candidates]
            passed.append([run_program(program, box=CodeEval.box) for program in programs])
        values = {}
        for n in (n for n in k if n <= min(map(len, passed))):
            rates = [pass_at_k(len(row), sum(row), n) for row in passed]
            values[f"pass@{n}"] = float(np.mean(rates))
        return values, passed


def load_metric(path: str, *args, **kwargs) -> object:
    """evaluate.load, but code_eval is CodeEval."""
    from evaluate.loading import load

    return CodeEval() if path == "code_eval" else load(path, *args, **kwargs)


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


@functools.cache
def task_manager() -> object:
    """lm-eval's index of its task definitions; reading them takes seconds, so once a process."""
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager()


def prepare_lm_eval(name: str, source: str, args: Namespace) -> Task:
    """-> Task, over the rows of a local file where source names one, else over the hub's."""
    task = name.removeprefix("lm_eval/")
    try:
        import lm_eval

        known = task_manager().task_index
    except ImportError:
        raise UserError(f"{task}: needs lm-eval: pip install 'lm_eval[ifeval,math]'") from None
    if task not in known and task != "popqa":
        near = ", ".join([other for other in known if task.split("_")[0] in other][:5]) or "none"
        own = f"neither one of eval.py's ({', '.join([*CHOICE_TASKS, *CHAT_TASKS])})"
        raise UserError(f"--tasks {task}: {own} nor of lm-eval's; near are {near}")
    if task.startswith(RUNS_CODE) and not args.allow_code:
        raise UserError(f"{task}: runs the model's code; add --allow_code, which uses a sandbox")
    if task.startswith(RUNS_CODE) and args.allow_code == "sandbox":
        sandbox.find_box()
    if task == "ifeval":
        check_punkt()
    local = local_rows(task, source, args) if source else {}
    own = {"lm_eval": lm_eval.__version__, "shots": args.shots, "max_length": args.max_length}
    settings = shared_settings(args, digest(local), **own)
    return Task(name, "lm_eval", settings, extra={"task": task, "local": local})


def local_rows(task: str, source: str, args: Namespace) -> dict[str, list]:
    """FILE[,SHOTSFILE] -> {"test": rows to score, "train": rows that shots are drawn from}."""
    if task not in LOCAL:
        raise UserError(f"{task}={source}: of lm-eval's tasks {', '.join(LOCAL)} take local rows")
    (shots, columns), (test, _, train) = LOCAL[task], source.partition(",")
    shots = args.shots if shots and args.shots is not None else shots
    rows, pool = read_records(test), read_records(train, "train") if train else []
    for file, number, record in rows + pool:
        if not columns <= set(record):
            needs = f"{task} needs columns {sorted(columns)}, found {sorted(record)}"
            raise UserError(f"{file}, row {number}: {needs}")
    if shots and not train:
        rows, pool = hold_out(rows, shots, data.data_rng(args.seed, f"shots {task}"))
    if len(pool) < shots or not rows:
        raise UserError(f"{source}: too few rows for {shots} shots; give {task}=FILE,SHOTSFILE")
    rows = [data.plain(record) for *_, record in rows]
    pool = [data.plain(record) for *_, record in pool]
    return {"test": rows, "train": pool} if shots else {"test": rows}


def check_punkt() -> None:
    """IFEval's scorer splits sentences by nltk's punkt_tab, which is downloaded apart from nltk."""
    try:
        importlib.import_module("langdetect")  # another library of lm_eval[ifeval]
        importlib.import_module("nltk").data.find("tokenizers/punkt_tab")
    except ImportError as error:
        raise UserError(f"ifeval: {error.name} is missing: pip install 'lm_eval[ifeval]'") from None
    except LookupError:
        how = "python -m nltk.downloader punkt_tab (offline: tokenizers/punkt_tab in $NLTK_DATA)"
        raise UserError(f"ifeval: nltk's sentence splitter is missing: {how}") from None


def lm_eval_spec(task: Task, folder: Path) -> str | dict:
    """What lm-eval is asked for: a name, or a definition whose dataset is files under folder."""
    name, local = task.extra["task"], task.extra["local"]
    if not local:
        return POPQA if name == "popqa" else name
    files = {split: str((folder / f"{name}-{split}.jsonl").resolve()) for split in local}
    for split, rows in local.items():
        common.write_text(files[split], json_lines(rows))
    train = "train" if "train" in local else None
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    data |= {"test_split": "test", "validation_split": None}
    data |= {"training_split": train, "fewshot_split": train}
    if name == "popqa":
        return {**POPQA, **data}
    base, path = task_manager().task_index[name].yaml_path, folder / f"{name}.yaml"
    definition = {"include": str(base), "task": name, **data}
    common.write_text(path, json.dumps(definition, indent=1) + "\n")  # YAML is a superset of JSON
    return str(path.resolve())


def run_lm_eval(model: Model, task: Task, store: Predictions, args: Namespace) -> None:
    """lm-eval over the task. It caches requests one by one: an interrupted task goes on inside."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm, tokenizer = model.load()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    chat = args.template not in ("auto", "plain")
    tokenizer = model.template(args.template) if chat else tokenizer
    folder = args.output_dir / "lm_eval"
    cache = folder / model.label / safe_name(task.name)
    cache.parent.mkdir(parents=True, exist_ok=True)
    length = args.max_length or common.max_positions(lm)
    lm_how = {"tokenizer": tokenizer, "batch_size": args.batch_size, "max_length": length}
    lm_how["mixed_precision_dtype"] = "bfloat16" if args.dtype == "bf16" else None
    how = {"num_fewshot": args.shots, "limit": args.limit, "task_manager": task_manager()}
    how |= {"use_cache": str(cache), "bootstrap_iters": 0}
    how["apply_chat_template"] = chat
    CodeEval.box = sandbox.unsafe if args.allow_code == "unsafe" else None
    # what would run code around CodeEval is refused by lm-eval
    safe = task.extra["task"].startswith(RUNS_CODE)
    how["confirm_run_unsafe_code"] = safe or args.allow_code == "unsafe"
    try:
        with mock.patch("evaluate.load", load_metric):
            wrapped = HFLM(lm, **lm_how)
            spec = lm_eval_spec(task, folder)
            output = lm_eval.simple_evaluate(model=wrapped, tasks=[spec], **how)
    except Exception as error:  # its loaders and scorers raise many types
        raise UserError(f"{task.name}: lm-eval failed ({cause(error)})") from error
    kept = ("results", "versions", "n-shot", "configs")
    lines = []
    for part, samples in output["samples"].items():  # the parts of a group like mmlu
        for sample in samples:
            line = {"task": part, "index": sample["doc_id"], "filter": sample["filter"]}
            line |= {"prompt": sample["arguments"][0][0], "target": sample["target"]}
            line |= {"responses": sample["resps"], "filtered": sample["filtered_resps"]}
            line["metrics"] = {key: sample[key] for key in sample["metrics"]}
            lines.append(line)
    about = {key: output[key] for key in kept if key in output}
    write_json(Path(f"{cache}.json"), {**about, "lines": len(lines)})
    store.add(lines)


def summarise_lm_eval(task: Task, rows: list[dict], results: dict) -> tuple[dict, dict]:
    """lm-eval's own numbers (results: its dict); by row those whose mean over rows they are."""
    name, metrics, by_row = task.extra["task"], {}, {}
    for part in [name] if name in results else sorted(results):
        prefix = "" if part == name else f"{part}/"
        for key, value in results[part].items():
            if isinstance(value, (int, float)) and "," in key and "_stderr," not in key:
                metrics[prefix + key.removesuffix(",none")] = float(value)
    for row in rows:
        label, end = f"{row['task']}/{row['index']}", f",{row['filter']}".removesuffix(",none")
        for key, value in row["metrics"].items():
            values = value if isinstance(value, list) else [value]
            if values and all(isinstance(each, (int, float)) for each in values):
                by_row.setdefault(key + end, {})[label] = float(sum(values)), len(values), label
    for key, items in list(by_row.items()):
        total, weight = (sum(part) for part in list(zip(*items.values()))[:2])
        if not abs(total / weight - metrics.get(key, math.inf)) < 1e-9:
            del by_row[key]
    return {**metrics, "n": len({(row["task"], row["index"]) for row in rows})}, by_row


# ---- Chat: answers in fastchat's and alpaca_eval's formats ---------------------------------------
CHAT_TASKS = {
    "mt_bench": HubSource("HuggingFaceH4/mt_bench_prompts"),
    "alpaca_eval": HubSource("hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"),
}


def read_chat_question(file: str, number: int, record: dict) -> dict:
    """A row of FastChat's question.jsonl (question_id, category, turns, reference), of its copy on
    the hub (prompt_id, prompt) or of alpaca_eval (instruction, dataset) -> the keys below."""
    turns = record.get("turns") or record.get("prompt") or record.get("instruction")
    turns = [turns] if isinstance(turns, str) else turns
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        expected = f"turns (a list of texts) or instruction, found keys {sorted(record)}"
        raise UserError(f"{file}, row {number}: no question; expected {expected}")
    name = record.get("question_id", record.get("prompt_id", number))
    reference = record.get("reference") or []
    if not isinstance(name, (int, str)) or not isinstance(reference, list):
        expected = "question_id must be a number or a text, reference a list of texts"
        raise UserError(f"{file}, row {number}: {expected}")
    question = {"question_id": name, "category": record.get("category") or "", "turns": turns}
    question["reference"] = [str(answer) for answer in reference]
    return question | {"dataset": record.get("dataset") or Path(file).stem}


def prepare_chat(name: str, source: str, args: Namespace) -> Task:
    """-> Task with the questions. Raises UserError."""
    found = read_records(source or CHAT_TASKS[name])
    records = [(file, number, data.plain(record)) for file, number, record in found]
    questions = [read_chat_question(*record) for record in records]
    if len({question["question_id"] for question in questions}) < len(questions):
        raise UserError(f"{name}: two questions have the same question_id")
    own = {"max_new_tokens": args.max_new_tokens, "temperature": 0}
    settings = shared_settings(args, digest([record for *_, record in records]), **own)
    return Task(name, "chat", settings, questions[: args.limit])


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list], max_new_tokens: int, dtype: str) -> list[tuple]:
    """Greedy answers to a batch of prompts (token ids), padded on the left -> [(text, whether the
    prompt was cut)]. A prompt that leaves no room for max_new_tokens loses its beginning."""
    from transformers import GenerationConfig

    positions = common.max_positions(model)
    room = positions - max_new_tokens
    if room < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: the model has {positions} positions")
    own = model.generation_config.eos_token_id
    stops = {*data.end_tokens(tokenizer), *(own if isinstance(own, list) else [own])}
    stops = sorted(stops - {None})
    pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    kept = [torch.tensor(prompt[-room:], device=model.device) for prompt in prompts]
    ids = pad_sequence(kept, batch_first=True, padding_value=pad, padding_side="left")
    ones = [torch.ones_like(prompt) for prompt in kept]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    tokens = {"eos_token_id": stops, "pad_token_id": pad, "bos_token_id": tokenizer.bos_token_id}
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
    config = GenerationConfig(max_new_tokens=max_new_tokens, **tokens, **greedy)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        output = model.generate(ids, attention_mask=mask, generation_config=config)
    answers = []
    for prompt, new in zip(prompts, output[:, ids.shape[1] :].tolist()):
        end = next((i for i, token in enumerate(new) if token in stops), len(new))
        text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
        answers.append((text, len(prompt) > room))
    return answers


def run_chat(model: Model, task: Task, store: Predictions, args: Namespace) -> None:
    """Answer every question, all of its turns with the history carried, a line a question."""
    lm, tokenizer = model.load()[0], model.template("auto")
    template = data.Template(tokenizer)
    keys = [line_key(question["question_id"]) for question in task.rows]
    for batch in blocks(store, task.rows, keys, args.batch_size, task.name):
        history, cut = [[] for _ in batch], [False] * len(batch)
        for turn in range(max(len(question["turns"]) for question in batch)):
            asked = [i for i, question in enumerate(batch) if turn < len(question["turns"])]
            for i in asked:
                history[i].append(("user", batch[i]["turns"][turn]))
            rows = [data.Row(tuple(history[i]), "", file="question") for i in asked]
            prompts = [template.prompt_ids(row) for row in rows]
            answers = generate(lm, tokenizer, prompts, args.max_new_tokens, args.dtype)
            for i, (text, was_cut) in zip(asked, answers):
                history[i].append(("assistant", text))
                cut[i] |= was_cut
        lines = []
        for question, messages, was_cut in zip(batch, history, cut):
            line = {key: question[key] for key in ("question_id", "category", "turns")}
            line["answers"] = [text for role, text in messages if role == "assistant"]
            lines.append(line | {"prompt_cut": was_cut, "tstamp": time.time()})
        store.add(lines)


def export_chat(model: Model, task: Task, rows: list[dict], folder: Path) -> None:
    """mt_bench/<model>.jsonl and alpaca_eval/<model>.json as FastChat and alpaca_eval read them."""
    label, dataset = model.label, {row["question_id"]: row["dataset"] for row in task.rows}
    path, lines = folder / task.name / f"{label}.json", []
    path.parent.mkdir(exist_ok=True)
    for row in rows:
        name, answers = row["question_id"], row["answers"]
        if task.name == "mt_bench":
            line = {"question_id": name, "answer_id": digest([label, name, answers])[:22]}
            line |= {"model_id": label, "choices": [{"index": 0, "turns": answers}]}
            line["tstamp"] = row["tstamp"]
        else:
            line = {"instruction": row["turns"][0], "output": answers[0], "generator": label}
            line |= {"dataset": dataset[name], "datasplit": "eval"}
        lines.append(line)
    if task.name == "mt_bench":
        common.write_text(path.with_suffix(".jsonl"), json_lines(lines))
        return
    write_json(path, lines)
    print(f"answers {path}; length-controlled win rate: alpaca_eval --model_outputs {path}")


# ---- The judge (SFTMix §4.1): any endpoint that speaks OpenAI's protocol. The wording is ours ----
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT, TIMEOUT = 6, 1.0, 60.0, 120.0  # tries; the others in seconds
BROKEN = (OSError, http.client.HTTPException, UnicodeDecodeError, json.JSONDecodeError)
BROKEN += (KeyError, IndexError, TypeError)  # replies that are tried again
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
JUDGE_SYSTEM = (
    "You grade answers of an AI assistant. Be strict and impartial: judge how helpful, relevant, "
    "correct, deep and detailed an answer is for the person who asked, not how long it is."
)
JUDGE_TASK = (
    "Grade the assistant's answer to the {which} message below. First explain your grade in a few "
    "sentences{compare}. Then end with one line of the form `SCORE: n`, where n is a whole number "
    "from 1 (useless) to 10 (could not be better)."
)
COMPARE = ", comparing the answer with the reference and naming its mistakes"


def judge_messages(question: dict, answers: list[str], turn: int) -> list[dict]:
    """The task, the conversation up to turn's answer, and its reference where the category has one
    -> chat messages."""
    with_reference = question["category"] in REFERENCE_CATEGORIES
    reference = question["reference"][turn : turn + 1] if with_reference else []
    which = ("first", "second")[turn] if turn < 2 else f"{turn + 1}th"
    text = [JUDGE_TASK.format(which=which, compare=COMPARE if reference else "")]
    for t in range(turn + 1):
        text.append(f"[user, message {t + 1}]\n{question['turns'][t]}")
        text.append(f"[assistant, answer {t + 1}]\n{answers[t]}")
    text += [f"[reference for answer {turn + 1}]\n{answer}" for answer in reference]
    system = {"role": "system", "content": JUDGE_SYSTEM}
    return [system, {"role": "user", "content": "\n\n".join(text)}]


def parse_score(text: str) -> float | None:
    """The last `SCORE: n` of a judgement -> float from 1 to 10, or None."""
    found = re.findall(r"SCORE:\W*(\d+(?:\.\d+)?)", text, flags=re.IGNORECASE)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would carry the key to another host."""

    def http_error_302(self, *_) -> None:
        """Left to the handler that raises HTTPError."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


OPENER = urllib.request.build_opener(NoRedirect)


def redirected(url: str, error: urllib.error.HTTPError) -> str:
    """What a redirect says, without the address that it names: that may hold secrets."""
    try:
        target = urllib.parse.urljoin(url, error.headers.get("Location") or "")
        host = urllib.parse.urlsplit(target).hostname
    except ValueError:
        host = "an odd address"
    return (
        f"HTTP {error.code} redirects to {host}, not followed; set OPENAI_BASE_URL to the address"
    )


def judge_url(base_url: str, key: str | None) -> tuple[str, str]:
    """$OPENAI_BASE_URL and $OPENAI_API_KEY -> where to ask, and its host for messages. Raises
    UserError, which shows neither."""
    if key and not re.fullmatch("[!-~]+", key):
        raise UserError("OPENAI_API_KEY: holds a space, a line break or a letter beyond ASCII")
    try:
        parts = urllib.parse.urlsplit(base_url)
        host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    except ValueError:  # a port that is none
        host = None
    known = host and parts.hostname and parts.scheme in ("http", "https")
    if not known or not re.fullmatch("[!-~]+", base_url):
        raise UserError("OPENAI_BASE_URL: is no http:// or https:// address of a server")
    if "@" in parts.netloc or parts.query or parts.fragment:
        more = "a user, a password or what follows ? or #"
        raise UserError(f"OPENAI_BASE_URL: holds {more}; give the key as OPENAI_API_KEY")
    return f"{base_url.rstrip('/')}/chat/completions", host


def ask(
    judge: str, messages: list, base_url: str, key: str | None, sleep: Callable = time.sleep
) -> str:
    """One chat completion -> text.

    Rate limits, server errors, timeouts and broken replies are tried again, after the time the
    server names (Retry-After) or a doubling one. Raises UserError where that does not help or the
    request itself is refused.
    """
    url, host = judge_url(base_url, key)
    where = f"--judge {judge} at {host}"
    body = json.dumps({"model": judge, "messages": messages, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    for attempt in range(ATTEMPTS):
        wait = FIRST_WAIT * 2**attempt
        try:
            request = urllib.request.Request(url, body, headers)
            with OPENER.open(request, timeout=TIMEOUT) as reply:
                value = json.loads(reply.read().decode("utf-8"))
            text = value["choices"][0]["message"]["content"]
            if isinstance(text, str) and text.strip():
                return text
            problem = "an empty answer"
        except urllib.error.HTTPError as error:
            if 300 <= error.code < 400:
                raise UserError(f"{where}: {redirected(url, error)}") from None
            message = error.read(300).decode("utf-8", "replace")
            problem = f"HTTP {error.code}: {' '.join(message.split())}"
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                raise UserError(f"{where}: {problem}") from None
            wait = retry_after(error.headers.get("Retry-After"), wait)
        except BROKEN as error:
            problem = f"{type(error).__name__}: {error}"
        if attempt + 1 < ATTEMPTS:
            sleep(min(wait, LONGEST_WAIT))
    tried = f"no answer in {ATTEMPTS} tries, the last: {problem}"
    raise UserError(f"{where}: {tried}; the same command goes on from here")


def retry_after(value: str | None, default: float) -> float:
    """Seconds that a Retry-After header asks for, a number or a date; default where it is missing
    or odd."""
    try:
        if value.strip().replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (AttributeError, TypeError, ValueError):
        return default


def judge_access() -> tuple[str, str | None]:
    """-> base URL and key, from the environment."""
    base_url = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    return base_url, os.environ.get("OPENAI_API_KEY")


def grade(judge: str, line: dict, messages: list[dict]) -> dict:
    """-> line with a judgement. One without a score is asked for once more, then counted as
    unscored (None)."""
    for _ in range(2):
        text = ask(judge, messages, *judge_access())
        score = parse_score(text)
        if score is not None:
            break
    return {**line, "score": score, "judge": judge, "judgement": text}


def judge_answers(model: Model, task: Task, rows: list[dict], args: Namespace) -> list[dict]:
    """Grade every answer in every round -> the judgements of these answers. They are appended to
    judgements/<judge>/<model>.jsonl as they come; none is asked for twice."""
    folder, saved = args.output_dir / "judgements" / safe_name(args.judge), set()
    store = Predictions(folder / f"{model.label}.jsonl", "judge")
    questions = {question["question_id"]: question for question in task.rows}
    turns = [(row, turn) for row in rows for turn in range(len(row["answers"]))]
    jobs = {}
    for row, turn in turns:
        name = row["question_id"]
        messages = judge_messages(questions[name], row["answers"], turn)
        for i in range(args.rounds or 5):
            key = digest([args.judge, name, messages, i])
            line = {"key": key, "question_id": name, "category": row["category"], "turn": turn}
            jobs[key] = {**line, "round": i}, messages
    pool = concurrent.futures.ThreadPoolExecutor(JUDGE_THREADS)
    futures = [
        pool.submit(grade, args.judge, *jobs[key])
        for key in jobs
        if line_key(key) not in store.known
    ]
    bar = {"total": len(futures), "desc": f"judge {model.label}", "leave": False}
    try:
        for future in tqdm(concurrent.futures.as_completed(futures), **bar):
            store.add([future.result()])
            saved.add(future)
    finally:  # after a failure: requests on their way are waited for and kept, no other starts
        pool.shutdown(cancel_futures=True)
        rest = [future for future in futures if future not in saved and not future.cancelled()]
        store.add([future.result() for future in rest if not future.exception()])
    return [line for line in store.rows if line["key"] in jobs]


def summarise_chat(task: Task, rows: list[dict], judgements: list[dict]) -> tuple[dict, dict]:
    """Answer lengths; with judgements the mean grade: all, first turn, second turn (SFTMix Table 1:
    Overall, ST, MT), and its standard deviation over the rounds."""
    lengths = [len(answer) for row in rows for answer in row["answers"]]
    metrics = {"n": len(rows), "answer_characters": float(np.mean(lengths))}
    metrics["prompts_cut"] = sum(row["prompt_cut"] for row in rows)
    scored = [line for line in judgements if line["score"] is not None]
    if not scored:
        return metrics, {}
    rounds = list(means(scored, "round", "score").values())
    score = float(np.mean([line["score"] for line in scored]))
    grades = {"score": score, **spread("score", rounds), "rounds": len(rounds)}
    for turn, mean in means(scored, "turn", "score").items():
        grades[f"score_turn{turn + 1}"] = mean
    grades |= {"judge": scored[0]["judge"], "unscored": len(judgements) - len(scored)}
    by_question = grouped(scored, "question_id", "score")
    by_row = {key: (float(sum(part)), len(part), key) for key, part in by_question.items()}
    return {**grades, **metrics}, {"score": by_row}


# ---- Output: intervals, differences, table -------------------------------------------------------
def difference(metric: str, rows: dict, other: dict, seed: int) -> dict[str, float]:
    """metric_diff with its paired interval over the rows that both models have; for nll also
    ppl_reduction in %. Losses per token under different tokenizers are not compared: -> {}."""
    keys = [key for key in rows if key in other]
    if not keys or (metric == "nll" and any(rows[key][1] != other[key][1] for key in keys)):
        return {}
    pairs = np.array([(rows[key][:2], other[key][:2]) for key in keys], dtype=np.float64)
    sums, weights = pairs.T.copy()  # (2, n) each
    own, base = bootstrap_ratios(sums, weights, [rows[key][2] for key in keys], seed=seed).T
    value, base_value = sums.sum(-1) / weights.sum(-1)
    result = {f"{metric}_diff": float(value - base_value)}
    result[f"{metric}_diff_low"], result[f"{metric}_diff_high"] = interval(own - base)
    if metric == "nll":
        result["ppl_reduction"] = float(perplexity_reduction(value, base_value))
        low, high = interval(perplexity_reduction(own, base))
        result |= {"ppl_reduction_low": low, "ppl_reduction_high": high}
    return result


def add_intervals(results: dict, by_row: dict, reference: str, seed: int) -> None:
    """Add 95 % intervals (<metric>_low, _high) and differences to results {model: {task: metrics}}.
    by_row: {model: {task: {metric: {row: (sum, weight, cluster)}}}}."""
    for name, tasks in by_row.items():
        for task, metrics in tasks.items():
            out, others = results[name][task], by_row.get(reference, {}).get(task, {})
            for metric, rows in metrics.items():
                sums, weights, clusters = zip(*rows.values())
                samples = bootstrap_ratios([sums], [weights], clusters, seed=seed)
                out[f"{metric}_low"], out[f"{metric}_high"] = interval(samples[:, 0])
                compared = difference(metric, rows, others.get(metric, {}), seed)
                if name != reference and compared:
                    out |= {"versus": reference, **compared}


def table_cell(row: dict, metric: str) -> str:
    """A number with its interval, spread over rounds and difference, as far as row has them."""
    if metric not in row:
        return "-"
    cell, low, std, diff = f"{row[metric]:.4f}", f"{metric}_low", f"{metric}_std", f"{metric}_diff"
    if low in row:
        cell += f" [{row[low]:.4f}, {row[f'{metric}_high']:.4f}]"
    if std in row:
        cell += f" ± {row[std]:.4f}"
    if diff in row:
        cell += f"  Δ {row[diff]:+.4f} [{row[f'{diff}_low']:+.4f}, {row[f'{diff}_high']:+.4f}]"
    return cell


def print_table(results: dict, reference: str) -> None:
    """A line for every number, a column for every model."""
    lines = [["task", "metric", "rows", *results]]
    for task in dict.fromkeys(task for tasks in results.values() for task in tasks):
        rows = [tasks.get(task, {}) for tasks in results.values()]
        count = str(max(row.get("n", 0) for row in rows))
        for metric in dict.fromkeys(key for row in rows for key in plots.main_metrics(row)):
            lines.append([task, metric, count, *(table_cell(row, metric) for row in rows)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    paired = f", Δ paired difference to {reference}" if len(results) > 1 else ""
    print(f"[ ] 95 % bootstrap interval over rows, ± standard deviation over rounds{paired}")


# ---- The script ----------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.ArgumentParser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--model", nargs="+", default=["tiny"], metavar="NAME",
        help="hub ids, folders (an adapter is merged), tiny (default); the first is the reference")
    add("--base", metavar="NAME",
        help="the model that all others are compared with, evaluated too; default none")
    add("--eval_data", nargs="+", default=[], metavar="SPEC",
        help="domains: [label=]SOURCE[#N] as in the three scripts; default none")
    add("--tasks", nargs="+", default=[], metavar="TASK",
        help="TASK[=FILE[,SHOTSFILE]] with local rows; lm_eval/NAME if both have it; default none")
    add("--shots", type=common.non_negative_int, metavar="K",
        help="solved rows; default 3 (medical, SFTMix §4.2), 0 (bbq, truthfulqa), lm-eval's own")
    add("--rounds", type=common.few, metavar="N",
        help="rounds of shots, default 3 (SFTMix §4.2); of judging, default 5 (SFTMix §4.1)")
    add("--limit", type=common.positive_int, metavar="N",
        help="only the first N rows of every task and domain, for trying out; default all")
    add("--judge", metavar="MODEL",
        help="grade mt_bench by this model at $OPENAI_BASE_URL, key $OPENAI_API_KEY; default none")
    add("--allow_code", nargs="?", const="sandbox", choices=["sandbox", "unsafe"],
        help="humaneval and mbpp run the model's code in a sandbox (bwrap or unshare); unsafe: "
             "without one; default: refuse")
    add = parser.add_argument_group("how").add_argument
    add("--template", default="auto", metavar="NAME",
        help="alpaca, plain, chat, a Jinja file; auto (default): plain for choices and lm-eval, "
             "else the tokenizer's, which our final/ was trained by, or Alpaca's")
    add("--max_length", type=common.positive_int, metavar="TOKENS",
        help="prompt and answer; default all positions, up to 4096 in choices, in domains what "
             "our final/ was trained with or 2048")
    add("--max_new_tokens", type=common.positive_int, default=1024, metavar="TOKENS",
        help="longest answer of mt_bench and alpaca_eval; default %(default)s, as FastChat")
    add("--batch_size", type=common.positive_int, default=8, metavar="EXAMPLES",
        help="per forward pass: changes memory and speed, not results; default %(default)s")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="bf16: autocast; auto (default): bf16 on a GPU that has it, else fp32")
    add("--seed", type=common.any_seed, default=0,
        help="of #N, shots, option order and bootstrap; default %(default)s")
    add("--output_dir", metavar="DIR",
        help="default runs/eval-<time>; a folder of an earlier run is continued")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.eval_data and not args.tasks:
        parser.error("nothing to do: give --eval_data or --tasks")
    return args


def prepare(args: Namespace) -> list[Task]:
    """Read everything the command names; nothing is written. Raises UserError."""
    tasks = []
    for domain in data.load_data(args.eval_data, seed=args.seed, split="eval"):
        rows, extra = domain.rows[: args.limit], {"skipped": sum(domain.left_out.values())}
        settings = shared_settings(args, data.fingerprint([domain]), max_length=args.max_length)
        tasks.append(Task(domain.label, "domain", settings, rows, extra=extra))
    kinds = dict.fromkeys(CHOICE_TASKS, prepare_choice) | dict.fromkeys(CHAT_TASKS, prepare_chat)
    for text in args.tasks:
        for part in DYNAMIXSFT if text == "dynamixsft" else [text]:
            name, _, source = part.partition("=")
            try:
                tasks.append(kinds.get(name, prepare_lm_eval)(name, source, args))
            except RecursionError:
                raise UserError(f"{name}: {source}: a row is nested too deeply") from None
    names = [safe_name(task.name).lower() for task in tasks]
    for task, name in zip(tasks, names):
        if names.count(name) > 1:
            raise UserError(f"two tasks or domains are called {task.name!r}; use label=SOURCE")
    if args.judge and "mt_bench" not in names:
        raise UserError("--judge grades mt_bench, which is not among the --tasks")
    if args.judge and not (os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")):
        raise UserError("--judge: set OPENAI_API_KEY, or OPENAI_BASE_URL of a keyless server")
    if args.judge:
        judge_url(*judge_access())
    return tasks


def evaluate_model(model: Model, tasks: list[Task], args: Namespace) -> tuple[dict, dict]:
    """All tasks of one model -> {task: metrics} and {task: what summarise_domain gives by row}."""
    run = {"domain": run_domain, "choice": run_choice, "lm_eval": run_lm_eval, "chat": run_chat}
    results, by_row, folder = {}, {}, args.output_dir
    for task in tasks:
        file = f"{model.label}/{safe_name(task.name)}.json"
        store = open_predictions(task, folder / "predictions" / f"{file}l")
        if not store.complete:
            run[task.kind](model, task, store, args)
            store.finish()
        if task.kind == "domain":
            summary = summarise_domain(task, store.rows)
        elif task.kind == "choice":
            summary = summarise_choice(task, store.rows)
        elif task.kind == "lm_eval":
            output = read_json(folder / "lm_eval" / file, {"results": {}})
            if output.get("lines", len(store.rows)) != len(store.rows):
                problem = f"is cut: {len(store.rows)} of {output['lines']} lines"
                raise UserError(f"{store.path}: {problem}; delete the file")
            summary = summarise_lm_eval(task, store.rows, output["results"])
        else:
            export_chat(model, task, store.rows, folder)
            judged = args.judge and task.name == "mt_bench"
            judgements = judge_answers(model, task, store.rows, args) if judged else []
            summary = summarise_chat(task, store.rows, judgements)
        results[task.name], by_row[task.name] = summary
    model.loaded = None
    gc.collect()
    torch.cuda.empty_cache()
    return results, by_row


@common.command_line
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if ranks.active():
        raise UserError("eval.py runs in one process; start it with plain python, not torchrun")
    import datasets

    datasets.disable_progress_bars()
    device = common.pick_device()
    args.dtype = common.pick_dtype(args.dtype, device)
    folder = args.output_dir = Path(args.output_dir or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
    names = list(dict.fromkeys(([args.base] if args.base else []) + args.model))
    for name in names:
        common.find_model(name)
    tasks = prepare(args)
    models = [Model(*both, args, device) for both in zip(names, unique_names(names))]
    new = not folder.exists()
    open_folder(folder, models, tasks)
    results, by_row = {}, {}
    try:
        for model in models:
            results[model.name], by_row[model.name] = evaluate_model(model, tasks, args)
    except UserError:
        if new and not any(folder.glob("*/*")):
            shutil.rmtree(folder)  # nothing was done in it
        raise
    add_intervals(results, by_row, names[0], args.seed)
    path = folder / "results.json"
    whole = read_json(path, {})
    for name, rows in results.items():  # what an earlier command found stays
        whole.setdefault(name, {}).update(rows)
    write_json(path, whole)
    print_table(results, names[0])
    if len(models) > 1:
        plots.draw(folder)
    print(f"done  {path}")


if __name__ == "__main__":
    main()
