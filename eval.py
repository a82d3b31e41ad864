"""The papers' evaluations from one command, for any model the scripts save (adapters too).

    python eval.py --model runs/mine/final --base meta-llama/Llama-3.1-8B --eval_data held_out.jsonl
    python eval.py --model runs/ntp/final runs/sftmix/final --tasks medqa medqa5=medqa5.jsonl pubmedqa medmcqa
    python eval.py --model runs/mine/final --tasks mt_bench alpaca_eval --judge gpt-4o
    python eval.py --model runs/mine/final --tasks mmlu gsm8k=test.jsonl,train.jsonl ifeval

Kinds of tasks, in the order they stand below:
  domain           --eval_data: loss, perplexity and token accuracy of responses; what the three scripts report at their end
  multiple choice  medqa medqa5 pubmedqa medmcqa (three-shot, SFTMix §4.2), bbq, truthfulqa_mc1, truthfulqa_mc2
  lm-eval          any task name of EleutherAI's lm-eval; `dynamixsft` stands for the ten benchmarks of that paper
  chat             mt_bench and alpaca_eval: answers in the formats of FastChat and alpaca_eval; --judge grades mt_bench
The state is predictions/<model>/<task>.jsonl: the same command with the same --output_dir goes on where it stopped.

Shapes: n rows of a task, M models, S bootstrap samples.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import email.utils
import functools
import gc
import hashlib
import http.client
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import common
from common import HubSource, UserError

VERSION = 1  # of prompts and prediction lines: predictions of another version are refused

# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def perplexity_reduction(nll, base_nll):
    """100 · (1 - exp(nll - base_nll)): by how many % the perplexity is below the base model's (DynaMiCS' metric, METHODS.md 3).
    nll, base_nll: mean loss per token in nats, numbers or arrays of one shape."""
    return 100 * (1 - np.exp(np.asarray(nll, dtype=np.float64) - base_nll))


def mc2(loglikelihood, true):
    """TruthfulQA's MC2: probability of the true answers over that of all, Σ_true exp(ll) / Σ exp(ll).
    loglikelihood (c,) nats, true (c,) bool -> float64 in [0, 1]."""
    loglikelihood = np.asarray(loglikelihood, dtype=np.float64)
    mass = np.exp(loglikelihood - loglikelihood.max())
    return float(mass[np.asarray(true, dtype=bool)].sum() / mass.sum())


def bootstrap_ratios(sums, weights, clusters, samples=2000, seed=0):
    """Bootstrap of Σ sums / Σ weights, the rows drawn with replacement by cluster (the turns of one dialogue stay together).

    sums, weights (M, n): numerator and weight of each row (loss and tokens; correct and 1). All M models see the same
    draws, so differences of the result's columns are paired. clusters (n,): labels. -> (S, M) float64. Not in the papers.
    """
    sums, weights = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    count, groups = len(sums), cluster.max() + 1
    totals = np.zeros((2, count, groups))
    for m in range(count):
        totals[0, m] = np.bincount(cluster, sums[m], groups)
        totals[1, m] = np.bincount(cluster, weights[m], groups)
    rng, result = common.data_rng(seed, "bootstrap"), np.empty((samples, count))
    for s in range(samples):
        drawn = rng.integers(0, groups, groups)
        above, below = totals[:, :, drawn].sum(-1)
        result[s] = above / below
    return result


def interval(values):
    """95 % percentile interval of bootstrap values (S,) -> (low, high)."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(total, correct, k):
    """Unbiased estimate of pass@k from `total` samples of which `correct` pass: 1 - C(total-correct, k) / C(total, k) (HumanEval)."""
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


# ----------------------------------------------------------------------------------------------------------------------
# State: models, tasks, and predictions on disk
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What is asked: a name, a kind, the rows, and the settings that its predictions depend on."""
    name: str
    kind: str
    settings: dict
    rows: list = field(default_factory=list)   # Dataset.rows, Questions or chat questions
    shots: list = field(default_factory=list)  # multiple choice: one list of Questions a round
    extra: dict = field(default_factory=dict)


class Model:
    """A model that is loaded when the first task needs it, and not at all where every prediction is already there."""

    def __init__(self, name, label, args, device):
        self.name, self.label, self.args, self.device, self._loaded = name, label, args, device, None

    def load(self):
        if self._loaded is None:
            self._loaded = common.load_model(self.name, self.device, seed=self.args.seed)
            self._loaded[0].eval()
            common.check_head(self._loaded[0], self.device)
            common.describe_model(self._loaded[0], self.name, self.args.dtype)
        return self._loaded

    def free(self):
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @functools.cached_property
    def fingerprint(self):
        """Names, sizes and times of a local folder's files: a model trained again is another model."""
        if not Path(self.name).is_dir():
            return self.name + (f" seed {self.args.seed}" if self.name == "tiny" else "")
        files = sorted(file for file in Path(self.name).iterdir() if file.is_file())
        return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


class Predictions:
    """predictions/<model>/<task>.jsonl, one line a prediction. It grows under the name .part, whole lines only, and is renamed
    once complete: an interrupted command goes on after the last line. grows: never complete, so never under another name."""

    def __init__(self, path, grows=False):
        self.path, self.part, self.complete = path, path if grows else path.with_name(path.name + ".part"), path.exists()
        data = (path if self.complete else self.part).read_bytes() if self.complete or self.part.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path if self.complete else self.part, whole)  # killed in the middle of a line
        self.rows = [json.loads(line) for line in data[:whole].decode("utf-8").split("\n") if line]

    def add(self, rows):
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with open(self.part, "ab") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode("utf-8", "replace"))
        self.rows += rows

    def clear(self):
        self.part.unlink(missing_ok=True)
        self.rows = []

    def finish(self):
        if not self.part.exists():
            self.add([])
        os.replace(self.part, self.path)
        self.complete = True


def digest(value):
    """sha256 of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()


def safe_name(name):
    """A name as one path part: letters, digits, "_", "." and "-"."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[-80:] or "model"


def unique_names(names):
    """Names -> distinct path parts, the same for a name whatever stands beside it unless two of them collide."""
    plain = [safe_name(name).lower() for name in names]
    return [safe_name(name) + ("-" + digest(name)[:6] if plain.count(safe_name(name).lower()) > 1 else "") for name in names]


def read_records(source):
    """A local file, folder or hub id -> list of (file, row number, record). HubSource: the benchmark's own place on the hub; one
    whose path is a file's address (hf://...) is that JSON file."""
    if not isinstance(source, HubSource):
        if source.split("/")[0] == "toy":
            raise UserError("toy holds no benchmark's rows; give it with --eval_data")
        return list(common.read_source(source, None, "eval")[0])
    if source.path.startswith("hf://"):
        try:
            records = common.hf_datasets.load_dataset("json", data_files=source.path, split="train")
        except Exception as error:
            raise UserError(f"cannot load {source.path} from the Hugging Face hub: {type(error).__name__}: {str(error)[:300]}") from None
    else:
        records = common.load_hub(source, None)
    return [(source.path, number, record) for number, record in enumerate(records, 1)]


def shared_settings(args, data, **own):
    """What a task's predictions depend on: they are refused under other settings. data: a digest of its rows."""
    return {"version": VERSION, "data": data, "limit": args.limit, "template": args.template, "dtype": args.dtype, **own}


def check_manifest(folder, models, tasks):
    """Refuse a folder whose predictions were made by another model, other data or other settings; -> the merged manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": {}, "tasks": {}}
    if folder.exists() and not path.exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder}: holds other files than eval.py's; choose another folder")
    for label, entry in ((model.label, {"name": model.name, "fingerprint": model.fingerprint}) for model in models):
        if manifest["models"].setdefault(label, entry) != entry:
            raise UserError(f"{folder}: holds predictions of another {entry['name']} (its files have changed); choose another --output_dir")
    for task in tasks:
        old, new = manifest["tasks"].setdefault(task.name, task.settings), json.loads(json.dumps(task.settings))
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                raise UserError(f"{folder}: predictions of {task.name} were made with {key} {str(old.get(key))[:16]}, now it is {str(new.get(key))[:16]}; "
                                "give the first command's flags or choose another --output_dir")
    return manifest


# ----------------------------------------------------------------------------------------------------------------------
# Domain evaluation: --eval_data
# ----------------------------------------------------------------------------------------------------------------------

BLOCK = 64  # rows between two writes of predictions


def blocks(items, size):
    return [items[at:at + size] for at in range(0, len(items), size)]


def run_domain(model, task, store, args):
    """Loss, tokens and right tokens of every response (common.score), a line a row."""
    lm, tokenizer = model.load()
    template = common.pick_template(args.template, tokenizer)
    length = min(args.max_length or 2048, common.max_positions(lm))
    examples = {e.row: e for e in common.encode_datasets([common.Dataset(task.name, task.rows)], tokenizer, template, length)[0]}
    done = {row["index"] for row in store.rows}
    for block in tqdm(blocks([i for i in range(len(task.rows)) if i not in done], BLOCK), desc=task.name, leave=False):
        kept = [i for i in block if i in examples]
        scores = common.score(lm, [examples[i] for i in kept], args.batch_size, model.device, args.dtype) if kept else ([], [], [])
        found = {i: {"nll": float(n), "tokens": int(t), "correct": int(c)} for i, n, t, c in zip(kept, *scores)}
        store.add([{"index": i, "row": task.rows[i].where, **found.get(i, {"left_out": "no response token fits"})} for i in block])


def summarise_domain(task, rows):
    """Prediction lines -> metrics (weighted by tokens over the whole set), and {metric: {index: (sum, weight, cluster)}}."""
    kept = [row for row in rows if "left_out" not in row]
    tokens = sum(row["tokens"] for row in kept)
    nll = sum(row["nll"] for row in kept) / tokens
    metrics = {"nll": nll, "ppl": math.exp(min(nll, 700.0)), "accuracy": sum(row["correct"] for row in kept) / tokens, "tokens": tokens,
               "n": len(kept), "left_out": len(rows) - len(kept) + task.extra["left_out"]}
    return metrics, {"nll": {row["index"]: (row["nll"], row["tokens"], row["row"]) for row in kept},
                     "accuracy": {row["index"]: (row["correct"], row["tokens"], row["row"]) for row in kept}}


# ----------------------------------------------------------------------------------------------------------------------
# Multiple choice
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceTask:
    """How a benchmark is asked. style: letters = options listed, the letter is scored; words = the option is scored, as one of
    few known words; answers = options not shown, the whole answer is scored. options: how many there must be (0 = any)."""
    style: str
    options: int
    shots: int
    instruction: str
    test: HubSource | None
    train: HubSource | None = None  # where shots come from; None: rows held out of the test split


MEDICAL = "Multiple-choice questions on medicine, each followed by the letter of its correct option."
CHOICE_TASKS = {
    "medqa": ChoiceTask("letters", 4, 3, MEDICAL, HubSource("GBaker/MedQA-USMLE-4-options", split="test"), HubSource("GBaker/MedQA-USMLE-4-options")),
    "medqa5": ChoiceTask("letters", 5, 3, MEDICAL, None),
    "pubmedqa": ChoiceTask("words", 3, 3, "Research questions, each decided from its abstract with yes, no or maybe.",
                           HubSource("qiaojin/PubMedQA", config="pqa_labeled")),
    "medmcqa": ChoiceTask("letters", 4, 3, MEDICAL, HubSource("openlifescienceai/medmcqa", split="validation"), HubSource("openlifescienceai/medmcqa")),
    "bbq": ChoiceTask("letters", 3, 0, "A question on a short passage, followed by the letter of its correct option.",
                      HubSource("oskarvanderwal/bbq", config="All", split="test")),
    "truthfulqa_mc1": ChoiceTask("answers", 0, 0, "", HubSource("truthfulqa/truthful_qa", config="multiple_choice", split="validation")),
    "truthfulqa_mc2": ChoiceTask("answers", 0, 0, "", HubSource("truthfulqa/truthful_qa", config="multiple_choice", split="validation")),
}
LETTERS = "ABCDEFGHIJ"
DECISIONS = ("yes", "no", "maybe")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: text without the options, options in the order they are shown, which of them are true."""
    index: int
    text: str
    options: tuple
    true: tuple
    group: str = ""


def read_question(name, index, file, number, record, seed=0):
    """A benchmark's record, in its official columns or those of common.rows_from_record -> Question. TruthfulQA's sources list the
    true answers first: its options are shuffled, so that even a tie between options tells nothing. Raises UserError."""
    keys = {str(key).lower(): value for key, value in record.items()}
    try:
        if name == "pubmedqa":  # the decision, not the long answer, is asked for
            contexts = keys.get("contexts", keys.get("context"))
            contexts = contexts["contexts"] if isinstance(contexts, dict) else contexts
            text = "\n".join([f"Abstract: {' '.join(contexts)}", f"Question: {keys['question']}"])
            options, answer = DECISIONS, DECISIONS.index(str(keys["final_decision"]).strip().lower())
            true = [i == answer for i in range(3)]
        elif name == "truthfulqa_mc2":
            targets = keys["mc2_targets"]
            pairs = list(zip(targets["choices"], targets["labels"])) if "choices" in targets else [p for p in targets.items() if p[1] is not None]
            text, options, true = keys["question"], [option for option, _ in pairs], [bool(int(label)) for _, label in pairs]
        else:
            row = common.rows_from_record(record, file, number)[0]
            text, options, true = row.messages[-1][1], row.choices, [i == row.answer for i in range(len(row.choices))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}, row {number}: is no row of {name} ({type(error).__name__}: {error}); keys {sorted(record)}") from None
    task = CHOICE_TASKS[name]
    if len(options) < 2 or not any(true):
        raise UserError(f"{file}, row {number}: {name} needs options of which one is right; keys {sorted(record)}")
    if task.options and len(options) != task.options:
        other = {("medqa", 5): "; the five-option variant is medqa5", ("medqa5", 4): "; the four-option one is medqa"}.get((name, len(options)), "")
        raise UserError(f"{file}, row {number}: has {len(options)} options, {name} has {task.options}{other}")
    order = np.arange(len(options))
    if task.style == "answers":
        order = common.data_rng(seed, "options", abs(index)).permutation(len(options))
    return Question(index, text, tuple(str(options[i]) for i in order), tuple(bool(true[i]) for i in order), str(keys.get("context_condition") or ""))


def question_text(question, style):
    """The question as the model sees it, up to where its answer begins on the next line. Independent of which option is true."""
    if style == "letters":
        return question.text + "\n" + "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options)) + "\nAnswer:"
    return (f"Question: {question.text}" if style == "answers" else question.text) + "\nAnswer:"


def scored_answers(question, style):
    """What is scored for each option."""
    return tuple(LETTERS[:len(question.options)]) if style == "letters" else question.options


def choice_prompt(task, question, shots):
    """Instruction, solved shots, and the question, in our own words; the form is lm-eval's and BioMistral's few-shot prompt (SFTMix
    §4.2 follows the latter): plain text that the answer continues."""
    solved = [question_text(shot, task.style) + "\n" + scored_answers(shot, task.style)[shot.true.index(True)] for shot in shots]
    return "\n\n".join([part for part in [task.instruction, *solved] if part] + [question_text(question, task.style)])


def prepare_choice(name, source, args):
    """-> Task with the questions to score and the shots of every round. Shots come from the train split, from SHOTSFILE, or, where
    there is neither, from rows of the same file that are then not scored."""
    task = CHOICE_TASKS[name]
    shots = task.shots if args.shots is None else args.shots
    rounds = (args.rounds or 3) if shots else 1  # without shots every round would be the same
    test, _, train = (source or "").partition(",")
    if not test and task.test is None:
        raise UserError(f"{name}: is not on the hub in a form that can be loaded; give its rows with {name}=FILE")
    records = read_records(test or task.test)
    train = train or (task.train if not test else None)
    train_records = read_records(train) if train and shots else []
    questions = [read_question(name, i, *record, args.seed) for i, record in enumerate(records)]
    rng = common.data_rng(args.seed, f"shots {name}")
    if train_records:
        pool = [read_question(name, -1 - i, *record, args.seed) for i, record in enumerate(train_records)]
    else:
        held_out = set(rng.permutation(len(questions))[:shots * rounds].tolist())
        pool = [question for question in questions if question.index in held_out]
        questions = [question for question in questions if question.index not in held_out]
    if len(pool) < shots or not questions:
        raise UserError(f"{name}: {len(records)} rows are too few for {rounds} rounds of {shots} shots; give shots with {name}=FILE,SHOTSFILE")
    if len(pool) >= shots * rounds:  # no question is a shot in two rounds
        order = rng.permutation(len(pool))[:shots * rounds].reshape(rounds, shots)
    else:
        order = [rng.permutation(len(pool))[:shots] for _ in range(rounds)]
    settings = shared_settings(args, digest([record for *_, record in records + train_records]), shots=shots, rounds=rounds, seed=args.seed,
                               max_length=args.max_length)
    return Task(name, "choice", settings, questions[:args.limit], [[pool[i] for i in draw] for draw in order])


def encode_questions(task, questions, shots, tokenizer, template, length):
    """-> {place in questions: (Examples of the options, shots used)}. Where all shots do not fit into length the first ones go."""
    result, pending = {}, list(range(len(questions)))
    for first in range(len(shots) + 1):
        rows = [common.Row((("user", choice_prompt(task, questions[i], shots[first:])),), "", choices=scored_answers(questions[i], task.style))
                for i in pending]
        encoded, _ = common.encode_choices(rows, tokenizer, template, length)
        result |= {pending[question[0].row]: (question, len(shots) - first) for question in encoded}
        pending = [i for i in pending if i not in result]
        if not pending:
            break
    return result


@torch.no_grad()
def option_scores(model, questions, batch_size, device, dtype):
    """common.choose, but where every option is one token (letters), one forward pass over the prompt serves all of them.
    questions: lists of Examples, one an option -> list of float64 arrays of log-likelihoods."""
    if any(example.response_tokens > 1 for question in questions for example in question):
        return common.choose(model, questions, batch_size, device, dtype)
    scores, head = [None] * len(questions), common.output_head(model)
    for group in common.micro_batches(range(len(questions)), [len(question[0].ids) for question in questions], batch_size):
        batch, sizes = common.collate([questions[i][0] for i in group], device), torch.tensor([len(questions[i]) for i in group], device=device)
        with common.autocast(device, dtype):
            hidden = batch.select(common.hidden_states(model, batch.ids)).repeat_interleave(sizes, 0)        # (options of all questions, H)
        targets = torch.tensor([int(example.ids[-1]) for i in group for example in questions[i]], device=device)
        _, nll = common.response_loss(hidden, targets, head)
        for i, part in zip(group, nll.double().cpu().split(sizes.tolist())):
            scores[i] = -part.numpy()
    return scores


def run_choice(model, task, store, args):
    """Log-likelihood of every option of every question in every round (option_scores), a line each."""
    lm, tokenizer = model.load()
    how, length = CHOICE_TASKS[task.name], min(args.max_length or 4096, common.max_positions(lm))
    template = "plain" if args.template == "auto" else common.pick_template(args.template, tokenizer)
    done = {(row["round"], row["index"]) for row in store.rows}
    for number, shots in enumerate(task.shots):
        questions = [question for question in task.rows if (number, question.index) not in done]
        for block in tqdm(blocks(questions, BLOCK), desc=f"{task.name} round {number + 1}/{len(task.shots)}", leave=False):
            encoded = encode_questions(how, block, shots, tokenizer, template, length)
            scores = dict(zip(encoded, option_scores(lm, [examples for examples, _ in encoded.values()], args.batch_size, model.device, args.dtype)))
            store.add([choice_line(task.name, number, question, scores.get(i), encoded[i][1] if i in encoded else 0) for i, question in enumerate(block)])


def choice_line(name, number, question, scores, shots):
    """The prediction line of a question: scores (c,) log-likelihoods in nats, summed over an option's tokens, or None."""
    line = {"round": number, "index": question.index}
    if scores is None:
        return {**line, "left_out": "does not fit into max_length"}
    best = int(np.argmax(scores))
    line |= {"shots": shots, "loglikelihood": [float(score) for score in scores], "prediction": question.options[best],
             "true": [option for option, true in zip(question.options, question.true) if true], "correct": int(question.true[best])}
    if name == "truthfulqa_mc2":
        line["mc2"] = mc2(scores, question.true)
    return line | ({"group": question.group} if question.group else {})


def summarise_choice(task, rows):
    """Accuracy (or MC2): mean over the rounds, their standard deviation, and by group; see summarise_domain."""
    key = "mc2" if task.name == "truthfulqa_mc2" else "accuracy"
    kept = [{**row, key: row.get("mc2", row["correct"])} for row in rows if "left_out" not in row]
    if not kept:
        raise UserError(f"{task.name}: no question fits into the model's positions or --max_length")
    rounds = [np.mean([row[key] for row in kept if row["round"] == number]) for number in sorted({row["round"] for row in kept})]
    by_index = {}
    for row in kept:
        by_index.setdefault(row["index"], []).append(row[key])
    metrics = {key: float(np.mean(rounds)), **({f"{key}_std": float(np.std(rounds, ddof=1))} if len(rounds) > 1 else {}), "n": len(by_index),
               "rounds": len(rounds), "shots": float(np.mean([row["shots"] for row in kept])), "left_out": len({row["index"] for row in rows}) - len(by_index)}
    for group in sorted({row["group"] for row in kept if "group" in row}):
        metrics[f"{key}_{group}"] = float(np.mean([row[key] for row in kept if row.get("group") == group]))
    return metrics, {key: {index: (float(np.mean(values)), 1, index) for index, values in by_index.items()}}


# ----------------------------------------------------------------------------------------------------------------------
# lm-eval: its task definitions, prompts, stop rules and scorers; over local rows too
# ----------------------------------------------------------------------------------------------------------------------

LM_EVAL_HINT = "needs EleutherAI's lm-eval: pip install 'lm_eval[ifeval,math]'"
# The ten benchmarks of DynamixSFT (METHODS.md 2), by their names in lm-eval 0.4.13. lm-eval has no PopQA: its definition is ours.
DYNAMIXSFT = ["mmlu", "lm_eval/truthfulqa_mc2", "popqa", "bbh", "drop", "humaneval", "humaneval_plus", "gsm8k", "minerva_math", "ifeval"]
RUNS_CODE = ("humaneval", "mbpp")  # prefixes of names; lm-eval marks further ones as unsafe and refuses them without --allow_code
# The tasks that take =FILE: shots of their definition, and the columns it reads.
LOCAL = {"gsm8k": (5, {"question", "answer"}), "humaneval": (0, {"prompt", "test", "entry_point"}), "humaneval_plus": (0, {"prompt", "test", "entry_point"}),
         "ifeval": (0, {"key", "prompt", "instruction_id_list", "kwargs"}), "popqa": (15, {"question", "obj", "possible_answers"})}
CODE_SECONDS, CODE_BYTES = 10, 4 * 2 ** 30  # limits of one generated program
LIMITED = """
import os, resource, sys
seconds, size, token = int(sys.argv[1]), int(sys.argv[2]), sys.stdin.read()
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
report, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
os.dup2(null, 1)
os.dup2(null, 2)
exec(compile(open("program.py", encoding="utf-8").read(), "program.py", "exec"), {"__name__": "__main__"})
os.write(report, token.encode())
"""


def run_program(source, seconds=CODE_SECONDS, memory=CODE_BYTES):
    """Run generated Python in a subprocess of its own: empty folder and environment, limits on wall clock, CPU seconds, memory and
    file size, killed with all its children. True only if it ran to its end: an early exit, even with status 0, does not
    pass. This is no jail: the program can read files and open connections, so run untrusted models in a container."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.py").write_text(source, encoding="utf-8", errors="replace")
        process = subprocess.Popen([sys.executable, "-I", "-c", LIMITED, str(seconds), str(memory)], cwd=folder, env={"HOME": folder},
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            output, _ = process.communicate(token.encode(), timeout=seconds + 1)
            return output == token.encode()
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate(timeout=1)  # a grandchild in a session of its own may hold the pipe open


class CodeEval:
    """Takes the place of the hub's `code_eval` metric, which lm-eval's code tasks load: the same answer, by run_program."""

    def compute(self, references, predictions, k=(1,), **_):
        passed = [[run_program(f"{candidate}\n{test}") for candidate in candidates] for candidates, test in zip(predictions, references)]
        values = {f"pass@{n}": float(np.mean([pass_at_k(len(row), sum(row), n) for row in passed])) for n in k if n <= min(map(len, passed))}
        return values, passed


@contextlib.contextmanager
def own_code_eval():
    """evaluate.load("code_eval") gives CodeEval inside."""
    import evaluate
    original = evaluate.load
    evaluate.load = lambda path, *args, **kwargs: CodeEval() if path == "code_eval" else original(path, *args, **kwargs)
    try:
        yield
    finally:
        evaluate.load = original


def popqa_results(doc, results):
    """PopQA: right if one of the accepted answers occurs in the generated line."""
    answers = doc["possible_answers"]
    answers = json.loads(answers) if isinstance(answers, str) else answers
    return {"accuracy": float(any(str(answer).lower() in results[0].lower() for answer in answers))}


POPQA = {"task": "popqa", "dataset_path": "akariasai/PopQA", "test_split": "test", "fewshot_split": "test", "output_type": "generate_until", "num_fewshot": 15,
         "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{obj}}", "process_results": popqa_results,
         "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 32},
         "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}]}


@functools.cache
def task_manager():
    """lm-eval's index of its task definitions; reading them takes seconds, so once a process."""
    import lm_eval.tasks
    return lm_eval.tasks.TaskManager()


def prepare_lm_eval(name, source, args):
    """-> Task. With a source the rows of a local file, and shots as in prepare_choice; else the task's own data from the hub."""
    task, local = name.removeprefix("lm_eval/"), {}
    try:
        import lm_eval
        known = task_manager().task_index
    except ImportError:
        raise UserError(f"{task}: {LM_EVAL_HINT}") from None
    if task not in known and task != "popqa":
        near = [other for other in known if task.split("_")[0] in other][:5]
        raise UserError(f"--tasks {task}: neither one of eval.py's ({', '.join([*CHOICE_TASKS, *CHAT_TASKS])}) nor of lm-eval's"
                        + (f"; near are {', '.join(near)}" if near else ""))
    if task.startswith(RUNS_CODE) and not args.allow_code:
        raise UserError(f"{task}: runs code that the model writes; add --allow_code, best in a container")
    if task == "ifeval":
        check_punkt()
    if source:
        if task not in LOCAL:
            raise UserError(f"{task}={source}: of lm-eval's tasks {', '.join(LOCAL)} take local rows")
        (shots, columns), (test, _, train) = LOCAL[task], source.partition(",")
        records = [read_records(test), read_records(train) if train else []]
        for file, number, record in sum(records, []):
            if not columns <= set(record):
                raise UserError(f"{file}, row {number}: {task} needs columns {sorted(columns)}, found {sorted(record)}")
        rows, pool = ([record for *_, record in part] for part in records)
        shots = args.shots if shots and args.shots is not None else shots
        if shots and not train:
            held_out = set(common.data_rng(args.seed, f"shots {task}").permutation(len(rows))[:shots].tolist())
            pool, rows = [row for i, row in enumerate(rows) if i in held_out], [row for i, row in enumerate(rows) if i not in held_out]
        if len(pool) < shots or not rows:
            raise UserError(f"{task}={source}: too few rows for {shots} shots; give them with {task}=FILE,SHOTSFILE")
        local = {"test": rows, **({"train": pool} if shots else {})}
    settings = shared_settings(args, digest(local), lm_eval=lm_eval.__version__, shots=args.shots, max_length=args.max_length)
    return Task(name, "lm_eval", settings, extra={"task": task, "local": local})


def check_punkt():
    """IFEval's scorer splits sentences with nltk's punkt_tab, which is downloaded apart from nltk."""
    try:
        import langdetect  # noqa: F401, another library of lm_eval[ifeval]
        import nltk
        nltk.data.find("tokenizers/punkt_tab")
    except ImportError as error:
        raise UserError(f"ifeval: {error.name} is missing: pip install 'lm_eval[ifeval]'") from None
    except LookupError:
        raise UserError("ifeval: nltk's sentence splitter is missing: python -m nltk.downloader punkt_tab (offline: a folder with "
                        "tokenizers/punkt_tab, named by NLTK_DATA)") from None


def lm_eval_spec(task, folder):
    """What lm-eval is asked for: a name, or its own task definition with the dataset overridden by files under folder."""
    name, local = task.extra["task"], task.extra["local"]
    override = {}
    if local:
        folder.mkdir(parents=True, exist_ok=True)
        files = {split: str((folder / f"{name}-{split}.jsonl").resolve()) for split in local}
        for split, rows in local.items():
            common.write_text(files[split], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        override = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "test_split": "test", "validation_split": None,
                    "training_split": "train" if "train" in local else None, "fewshot_split": "train" if "train" in local else None}
    if name == "popqa":
        return {**POPQA, **override}
    if not local:
        return name
    base = task_manager().task_index[name].yaml_path
    path = folder / f"{name}.yaml"  # YAML is a superset of JSON
    common.write_text(path, json.dumps({"include": str(base), "task": name, **override}, indent=1) + "\n")
    return str(path.resolve())


def run_lm_eval(model, task, store, args):
    """lm-eval over the task: its requests are cached one by one, so an interrupted task goes on inside."""
    import logging
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    lm, tokenizer = model.load()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder, name = store.path.parents[2] / "lm_eval", safe_name(task.name)
    cache = folder / model.label
    cache.mkdir(parents=True, exist_ok=True)
    if args.template == "chat":
        common.pick_template("chat", tokenizer)
    try:
        with own_code_eval():
            wrapped = HFLM(pretrained=lm, tokenizer=tokenizer, batch_size=args.batch_size, max_length=args.max_length or common.max_positions(lm),
                           mixed_precision_dtype="bfloat16" if args.dtype == "bf16" else None)
            output = lm_eval.simple_evaluate(model=wrapped, tasks=[lm_eval_spec(task, folder)], num_fewshot=args.shots, limit=args.limit,
                                             task_manager=task_manager(), use_cache=str(cache / name), bootstrap_iters=0, apply_chat_template=args.template == "chat",
                                             confirm_run_unsafe_code=args.allow_code)
    except Exception as error:  # its loaders and scorers raise many types
        raise UserError(f"{task.name}: lm-eval failed ({type(error).__name__}: {str(error)[:300]})") from error
    common.write_text(cache / f"{name}.json", json.dumps({key: output[key] for key in ("results", "versions", "n-shot", "configs") if key in output},
                                                         indent=1, default=str) + "\n")
    store.clear()
    store.add([{"task": part, "index": sample["doc_id"], "filter": sample["filter"], "prompt": sample["arguments"][0][0], "target": sample["target"],
                "responses": sample["resps"], "filtered": sample["filtered_resps"], "metrics": {key: sample[key] for key in sample["metrics"]}}
               for part, samples in output["samples"].items() for sample in samples])


def summarise_lm_eval(task, rows, results):
    """lm-eval's own numbers (results: its dict), and by row those of which the mean over rows is lm-eval's number."""
    name = task.extra["task"]
    parts = [name] if name in results else sorted(results)
    metrics, by_row = {}, {}
    for part in parts:
        for key, value in results[part].items():
            if isinstance(value, (int, float)) and "," in key and "_stderr," not in key:
                metrics[("" if part == name else f"{part}/") + key.removesuffix(",none")] = float(value)
    for row in rows:
        for key, value in row["metrics"].items():
            values = value if isinstance(value, list) else [value]
            if values and all(isinstance(v, (int, float)) for v in values):
                label = key if row["filter"] == "none" else f"{key},{row['filter']}"
                by_row.setdefault(label, {})[f"{row['task']}/{row['index']}"] = (float(sum(values)), len(values), f"{row['task']}/{row['index']}")
    means = {key: sum(s for s, _, _ in items.values()) / sum(w for _, w, _ in items.values()) for key, items in by_row.items()}
    by_row = {key: items for key, items in by_row.items() if abs(means[key] - metrics.get(key, math.inf)) < 1e-9}
    return {**metrics, "n": len({(row["task"], row["index"]) for row in rows})}, by_row


# ----------------------------------------------------------------------------------------------------------------------
# Chat: answers in the formats of FastChat and alpaca_eval
# ----------------------------------------------------------------------------------------------------------------------

CHAT_TASKS = {"mt_bench": HubSource("HuggingFaceH4/mt_bench_prompts"), "alpaca_eval": HubSource("hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json")}
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")  # FastChat's judge sees a reference answer for these


def read_chat_question(number, record, file):
    """A row of FastChat's question.jsonl ({question_id, category, turns, reference}), of its copy on the hub ({prompt_id, prompt, ...}) or of
    alpaca_eval ({instruction, dataset}) -> {"question_id", "category", "turns", "reference", "dataset"}."""
    turns = record.get("turns") or record.get("prompt") or record.get("instruction")
    turns = [turns] if isinstance(turns, str) else list(turns or [])
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{file}, row {number}: no question; expected turns (a list of texts) or instruction, found keys {sorted(record)}")
    category = record.get("category") or ""
    return {"question_id": record.get("question_id", record.get("prompt_id", number)), "category": category, "turns": turns,
            "reference": [str(answer) for answer in record.get("reference") or []], "dataset": record.get("dataset") or Path(file).stem}


def prepare_chat(name, source, args):
    """-> Task with the questions. Raises UserError."""
    records = read_records(source or CHAT_TASKS[name])
    questions = [read_chat_question(number, record, file) for file, number, record in records]
    if len({question["question_id"] for question in questions}) < len(questions):
        raise UserError(f"{name}: two questions have the same question_id")
    settings = shared_settings(args, digest([record for *_, record in records]), max_new_tokens=args.max_new_tokens, temperature=0)
    return Task(name, "chat", settings, questions[:args.limit])


def prompt_ids(messages, tokenizer, template):
    """((role, content), ...) ending with the user -> token ids up to where the answer begins, as in training (common.encode)."""
    row = common.Row(tuple(messages), "answer", file="question")
    if template == "chat":
        return tokenizer(common.chat_parts(row, tokenizer)[0], add_special_tokens=False).input_ids
    text = (common.alpaca_prompt if template == "alpaca" else common.plain_prompt)(row)
    begin = [tokenizer.bos_token_id] if common.adds_bos(tokenizer) else []
    return begin + tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, device, dtype):
    """Greedy answers to a batch of prompts (lists of token ids), padded on the left -> [(text, whether the prompt was cut)].
    A prompt that leaves no room for max_new_tokens loses its beginning."""
    room = common.max_positions(model) - max_new_tokens
    if room < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: the model has only {common.max_positions(model)} positions")
    width = min(room, max(map(len, prompts)))
    stops = model.generation_config.eos_token_id
    stops = sorted({tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [] if stops is None else [stops])})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    ids, mask = torch.full((len(prompts), width), pad), torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        kept = prompt[-width:]
        ids[i, width - len(kept):], mask[i, width - len(kept):] = torch.tensor(kept), 1
    config = transformers.GenerationConfig(do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=max_new_tokens, eos_token_id=stops,
                                           pad_token_id=pad, bos_token_id=tokenizer.bos_token_id, use_cache=True)
    with common.autocast(device, dtype):
        output = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)[:, width:].tolist()
    answers = []
    for tokens, prompt in zip(output, prompts):
        end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
        answers.append((tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(), len(prompt) > room))
    return answers


def run_chat(model, task, store, args):
    """Answer every question, all of its turns with the history carried, a line a question."""
    lm, tokenizer = model.load()
    template = common.pick_template(args.template, tokenizer)
    done = {row["question_id"] for row in store.rows}
    for batch in tqdm(blocks([question for question in task.rows if question["question_id"] not in done], args.batch_size), desc=task.name, leave=False):
        history, answers, cut = [[] for _ in batch], [[] for _ in batch], [False] * len(batch)
        for turn in range(max(len(question["turns"]) for question in batch)):
            asked = [i for i, question in enumerate(batch) if turn < len(question["turns"])]
            for i in asked:
                history[i].append(("user", batch[i]["turns"][turn]))
            prompts = [prompt_ids(history[i], tokenizer, template) for i in asked]
            for i, (text, was_cut) in zip(asked, generate(lm, tokenizer, prompts, args.max_new_tokens, model.device, args.dtype)):
                history[i].append(("assistant", text))
                answers[i].append(text)
                cut[i] |= was_cut
        store.add([{"question_id": question["question_id"], "category": question["category"], "turns": question["turns"], "answers": answer,
                    "prompt_cut": was_cut, "tstamp": time.time()} for question, answer, was_cut in zip(batch, answers, cut)])


def export_chat(model, task, rows, folder):
    """mt_bench/<model>.jsonl as FastChat's judge reads it, alpaca_eval/<model>.json as alpaca_eval's command does."""
    dataset = {question["question_id"]: question["dataset"] for question in task.rows}
    path = folder / task.name / f"{model.label}.{'jsonl' if task.name == 'mt_bench' else 'json'}"
    path.parent.mkdir(exist_ok=True)
    if task.name == "mt_bench":
        lines = [{"question_id": row["question_id"], "answer_id": digest([model.label, row["question_id"], row["answers"]])[:22], "model_id": model.label,
                  "choices": [{"index": 0, "turns": row["answers"]}], "tstamp": row["tstamp"]} for row in rows]
        common.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    else:
        outputs = [{"instruction": row["turns"][0], "output": row["answers"][0], "generator": model.label, "dataset": dataset[row["question_id"]],
                    "datasplit": "eval"} for row in rows]
        common.write_text(path, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The judge: single-answer grades from any endpoint that speaks OpenAI's protocol
# ----------------------------------------------------------------------------------------------------------------------

ATTEMPTS, FIRST_WAIT, LONGEST_WAIT, TIMEOUT, JUDGE_THREADS = 6, 1.0, 60.0, 120.0, 8  # tries; seconds; seconds; seconds; requests at once
JUDGE_SYSTEM = ("You grade answers of an AI assistant. Be strict and impartial: judge how helpful, relevant, correct, deep and detailed an answer "
                "is for the person who asked, not how long it is.")
JUDGE_TASK = ("Grade the assistant's answer to the {which} message below. First explain your grade in a few sentences{compare}. Then end with one "
              "line of the form `SCORE: n`, where n is a whole number from 1 (useless) to 10 (could not be better).")


def judge_messages(question, answers, turn):
    """The conversation up to turn's answer, the reference where the category has one, and what to do -> chat messages."""
    reference = question["reference"][turn:turn + 1] if question["category"] in REFERENCE_CATEGORIES else []
    text = [JUDGE_TASK.format(which=("first", "second")[turn] if turn < 2 else f"{turn + 1}th",
                              compare=", comparing the answer with the reference and naming its mistakes" if reference else "")]
    for t in range(turn + 1):
        text += [f"[user, message {t + 1}]\n{question['turns'][t]}", f"[assistant, answer {t + 1}]\n{answers[t]}"]
    text += [f"[reference for answer {turn + 1}]\n{answer}" for answer in reference]
    return [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": "\n\n".join(text)}]


def parse_score(text):
    """The last `SCORE: n` of a judgement -> float from 1 to 10, or None."""
    found = re.findall(r"SCORE:\W*(\d+(?:\.\d+)?)", text, flags=re.IGNORECASE)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


def ask(judge, messages, base_url, key, sleep=time.sleep):
    """One chat completion -> text. Rate limits, server errors, timeouts and broken replies are tried again, after the time the server
    names (Retry-After) or a doubling one. Raises UserError where that does not help or the request itself is refused."""
    body = json.dumps({"model": judge, "messages": messages, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    for attempt in range(ATTEMPTS):
        wait = FIRST_WAIT * 2 ** attempt
        try:
            request = urllib.request.Request(f"{base_url.rstrip('/')}/chat/completions", body, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                text = json.loads(reply.read().decode("utf-8"))["choices"][0]["message"]["content"]
            if isinstance(text, str) and text.strip():
                return text
            problem = "an empty answer"
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {' '.join(error.read(300).decode('utf-8', 'replace').split())}"
            if error.code not in (408, 409, 425, 429) and error.code < 500:
                raise UserError(f"--judge {judge} at {base_url}: {problem}") from None
            wait = retry_after(error.headers.get("Retry-After"), wait)
        except (OSError, http.client.HTTPException, UnicodeDecodeError, json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if attempt + 1 < ATTEMPTS:
            sleep(min(wait, LONGEST_WAIT))
    raise UserError(f"--judge {judge} at {base_url}: no answer in {ATTEMPTS} tries, the last: {problem}; the same command goes on from here")


def retry_after(value, default):
    """Seconds that a Retry-After header asks for: a number or a date; default where it is missing or odd."""
    try:
        return max(0.0, float(value) if value.strip().replace(".", "", 1).isdigit() else email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (AttributeError, TypeError, ValueError):
        return default


def judge_answers(model, task, rows, args, folder):
    """Grade every answer in every round; judgements are appended to judgements/<judge>/<model>.jsonl as they come, under a key of judge,
    question, prompt and round, and none is asked for twice. -> the judgements of these answers."""
    questions = {question["question_id"]: question for question in task.rows}
    store = Predictions(folder / "judgements" / safe_name(args.judge) / f"{model.label}.jsonl", grows=True)
    known, jobs = {line["key"]: line for line in store.rows}, {}
    for row in rows:
        for turn in range(len(row["answers"])):
            messages = judge_messages(questions[row["question_id"]], row["answers"], turn)
            for number in range(args.rounds or 5):
                key = digest([args.judge, row["question_id"], messages, number])
                jobs[key] = {"key": key, "question_id": row["question_id"], "category": row["category"], "turn": turn, "round": number}, messages
    base_url, api_key = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1", os.environ.get("OPENAI_API_KEY")

    def grade(job):
        line, messages = job
        for _ in range(2):  # an answer without a score is asked for once more, then counted as unscored
            text = ask(args.judge, messages, base_url, api_key)
            if (score := parse_score(text)) is not None:
                break
        return {**line, "score": score, "judge": args.judge, "judgement": text}

    pool, saved = concurrent.futures.ThreadPoolExecutor(JUDGE_THREADS), set()
    futures = [pool.submit(grade, job) for key, job in jobs.items() if key not in known]
    try:
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc=f"judge {model.label}", leave=False):
            store.add([future.result()])
            saved.add(future)
    finally:  # after a failure: requests on their way are waited for and kept, the others are not started
        pool.shutdown(cancel_futures=True)
        store.add([f.result() for f in futures if f not in saved and not f.cancelled() and not f.exception()])
    return [line for line in store.rows if line["key"] in jobs]


def summarise_chat(task, rows, judgements):
    """Answer lengths; with judgements (lines, or None) the mean grade: first turn, second turn and all (SFTMix Table 1: ST, MT,
    Overall), the mean over rounds and their standard deviation."""
    metrics = {"n": len(rows), "answer_characters": float(np.mean([len(answer) for row in rows for answer in row["answers"]])),
               "prompts_cut": sum(row["prompt_cut"] for row in rows)}
    scored = [line for line in judgements or [] if line["score"] is not None]
    if not scored:
        return metrics, {}
    by_question = {}
    for line in scored:
        by_question.setdefault(line["question_id"], []).append(line["score"])
    by_round = [np.mean([line["score"] for line in scored if line["round"] == number]) for number in sorted({line["round"] for line in scored})]
    turns = {f"score_turn{turn + 1}": float(np.mean([line["score"] for line in scored if line["turn"] == turn])) for turn in sorted({line["turn"] for line in scored})}
    return ({"score": float(np.mean([line["score"] for line in scored])), **({"score_std": float(np.std(by_round, ddof=1))} if len(by_round) > 1 else {}), **turns,
             "judge": scored[0]["judge"], "rounds": len(by_round), "unscored": len(judgements) - len(scored), **metrics},
            {"score": {key: (float(sum(values)), len(values), key) for key, values in by_question.items()}})


# ----------------------------------------------------------------------------------------------------------------------
# Output: intervals, differences, table, figure
# ----------------------------------------------------------------------------------------------------------------------


def add_intervals(results, by_row, reference, seed):
    """Add 95 % intervals to results {model: {task: {metric: value}}}: <metric>_low, _high, and against the reference model
    <metric>_diff with its paired interval; for nll also ppl_reduction (in %). by_row {model: {task: {metric: {row: (sum, weight,
    cluster)}}}}: pairs are the rows that both models have. Losses per token under different tokenizers are not compared."""
    for name, tasks in by_row.items():
        for task, metrics in tasks.items():
            for metric, rows in metrics.items():
                keys, out = list(rows), results[name][task]
                sums, weights, clusters = zip(*(rows[key] for key in keys))
                out[f"{metric}_low"], out[f"{metric}_high"] = interval(bootstrap_ratios([sums], [weights], clusters, seed=seed)[:, 0])
                other = by_row.get(reference, {}).get(task, {}).get(metric)
                if name == reference or other is None:
                    continue
                keys = [key for key in keys if key in other]
                if not keys or (metric == "nll" and any(rows[key][1] != other[key][1] for key in keys)):
                    continue
                pair = np.array([[[side[key][part] for key in keys] for side in (rows, other)] for part in (0, 1)], dtype=np.float64)   # (2, 2, n)
                samples = bootstrap_ratios(*pair, [rows[key][2] for key in keys], seed=seed)                                      # (S, 2)
                values = pair[0].sum(-1) / pair[1].sum(-1)
                out |= {"versus": reference, f"{metric}_diff": float(values[0] - values[1])}
                out[f"{metric}_diff_low"], out[f"{metric}_diff_high"] = interval(samples[:, 0] - samples[:, 1])
                if metric == "nll":
                    out["ppl_reduction"] = float(perplexity_reduction(*values))
                    out["ppl_reduction_low"], out["ppl_reduction_high"] = interval(perplexity_reduction(samples[:, 0], samples[:, 1]))


def main_metrics(metrics):
    """The numbers that the table and the figure show: floats without the intervals and spreads that belong to others."""
    return [key for key, value in metrics.items() if isinstance(value, float)
            and not re.search(r"_(low|high|std|diff|diff_low|diff_high)$", key) and key != "shots"]


def print_table(results, reference):
    """One table: a line for every number, a column for every model; the interval in brackets, the spread over rounds behind ±."""
    names = list(results)
    lines = [["task", "metric", "rows", *names]]
    for task in dict.fromkeys(task for tasks in results.values() for task in tasks):
        for metric in dict.fromkeys(key for name in names for key in main_metrics(results[name].get(task, {}))):
            line = [task, metric, str(max(results[name].get(task, {}).get("n", 0) for name in names))]
            for name in names:
                row = results[name].get(task, {})
                cell = f"{row[metric]:.4f}" if metric in row else "-"
                if f"{metric}_low" in row:
                    cell += f" [{row[f'{metric}_low']:.4f}, {row[f'{metric}_high']:.4f}]"
                if f"{metric}_std" in row:
                    cell += f" ± {row[f'{metric}_std']:.4f}"
                if f"{metric}_diff" in row:
                    cell += f"  Δ {row[f'{metric}_diff']:+.4f} [{row[f'{metric}_diff_low']:+.4f}, {row[f'{metric}_diff_high']:+.4f}]"
                line.append(cell)
            lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print("[ ] 95 % bootstrap interval over rows, ± standard deviation over rounds" + (f", Δ paired difference to {reference}" if len(names) > 1 else ""))


def plot_results(path, results):
    """Every task's first number for every model with its 95 % interval, a panel a task."""
    names, tasks = list(results), list(dict.fromkeys(task for rows in results.values() for task in rows if main_metrics(rows[task])))
    columns = min(4, len(tasks))
    figure, axes = common.new_figure(columns, -(-len(tasks) // columns), width=3.6, height=0.9 + 0.35 * len(names))
    for axis, task in zip(axes.flat, tasks):
        metric = main_metrics(next(rows[task] for rows in results.values() if task in rows))[0]
        for i, name in enumerate(names):
            row = results[name].get(task, {})
            if metric in row:
                error = [[max(0, row[metric] - row[f"{metric}_low"])], [max(0, row[f"{metric}_high"] - row[metric])]] if f"{metric}_low" in row else None
                axis.errorbar(row[metric], i, xerr=error, fmt="o", capsize=3, color=f"C{i % 10}")
        axis.set(title=task, xlabel=metric, yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        axis.set_yticklabels([name if len(name) < 29 else "…" + name[-27:] for name in names] if axis in axes[:, 0] else [""] * len(names))
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.15)
    for axis in axes.flat[len(tasks):]:
        axis.set_axis_off()
    common.save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = common.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--model", nargs="+", default=["tiny"], metavar="NAME", help="models: hub id, local folder (an adapter is merged), or tiny; with several, all are compared with the first")
    add("--base", metavar="NAME", help="the model that all others are compared with, evaluated too")
    add("--eval_data", nargs="+", default=[], metavar="SPEC", help="domains: [label=]SOURCE[#N] as in the three scripts")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="TASK[=FILE[,SHOTSFILE]]: " + ", ".join([*CHOICE_TASKS, "mt_bench", "alpaca_eval", "dynamixsft"])
        + ", or any lm-eval task name (lm_eval/NAME where both have one); FILE: local rows instead of the hub's")
    add("--shots", type=common.non_negative_int, metavar="K", help="solved examples in the prompt; default 3 for the medical tasks (SFTMix §4.2), 0 for bbq and truthfulqa, lm-eval's own for its tasks")
    add("--rounds", type=common.positive_int, metavar="N", help="multiple choice: rounds with different shots, default 3 (SFTMix §4.2); judge: rounds averaged, default 5 (§4.1)")
    add("--limit", type=common.positive_int, metavar="N", help="only the first N rows of every task and domain; for trying out")
    add("--judge", metavar="MODEL", help="grade mt_bench by this model; endpoint and key from OPENAI_BASE_URL, OPENAI_API_KEY")
    add("--allow_code", action="store_true", help="let humaneval and the like run the code that the model writes, in a limited subprocess")
    add = parser.add_argument_group("how").add_argument
    add("--template", choices=["auto", "alpaca", "chat", "plain"], default="auto", help="auto: domains and chat the tokenizer's chat template, else Alpaca's; multiple choice and lm-eval plain text")
    add("--max_length", type=common.positive_int, metavar="TOKENS", help="longest prompt with answer; default min(2048, positions) for domains as in training, min(4096, positions) for multiple choice, all positions for lm-eval")
    add("--max_new_tokens", type=common.positive_int, default=1024, metavar="TOKENS", help="longest answer of mt_bench and alpaca_eval (FastChat's default)")
    add("--batch_size", type=common.positive_int, default=8, metavar="EXAMPLES", help="examples per forward pass; changes memory and speed, not the result")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="bf16: autocast; auto: bf16 on a GPU that has it, else fp32")
    add("--seed", type=common.non_negative_int, default=0, help="of #N, shots, option order and bootstrap")
    add("--output_dir", metavar="DIR", help="default runs/eval-<time>; a folder of an earlier run is continued")
    args = parser.parse_args(argv)
    if not args.eval_data and not args.tasks:
        parser.error("nothing to do: give --eval_data or --tasks")
    return args


def prepare(args):
    """Read everything the command names -> list of Task; nothing is written. Raises UserError."""
    tasks = []
    for dataset in common.load_data(args.eval_data, seed=args.seed, split="eval"):
        settings = shared_settings(args, common.fingerprint([dataset]), max_length=args.max_length)
        tasks.append(Task(dataset.label, "domain", settings, dataset.rows[:args.limit], extra={"left_out": sum(dataset.dropped.values())}))
    for text in [part for text in args.tasks for part in (DYNAMIXSFT if text == "dynamixsft" else [text])]:
        name, _, source = text.partition("=")
        kind = prepare_choice if name in CHOICE_TASKS else prepare_chat if name in CHAT_TASKS else prepare_lm_eval
        tasks.append(kind(name, source, args))
    names = [safe_name(task.name).lower() for task in tasks]
    for task, name in zip(tasks, names):
        if names.count(name) > 1:
            raise UserError(f"two tasks or domains are called {task.name!r}; name domains with label=SOURCE")
    if args.judge and "mt_bench" not in names:
        raise UserError("--judge grades mt_bench, which is not among the --tasks")
    if args.judge and not (os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")):
        raise UserError("--judge: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server that needs none")
    return tasks


def evaluate_model(model, tasks, args, folder):
    """All tasks of one model -> {task: metrics}, {task: {metric: {row: (sum, weight, cluster)}}}."""
    run = {"domain": run_domain, "choice": run_choice, "lm_eval": run_lm_eval, "chat": run_chat}
    results, by_row = {}, {}
    for task in tasks:
        store = Predictions(folder / "predictions" / model.label / f"{safe_name(task.name)}.jsonl")
        if not store.complete:
            run[task.kind](model, task, store, args)
            store.finish()
        if task.kind == "domain":
            summary = summarise_domain(task, store.rows)
        elif task.kind == "choice":
            summary = summarise_choice(task, store.rows)
        elif task.kind == "lm_eval":
            summary = summarise_lm_eval(task, store.rows, json.loads((folder / "lm_eval" / model.label / f"{safe_name(task.name)}.json").read_text())["results"])
        else:
            path = export_chat(model, task, store.rows, folder)
            judged = judge_answers(model, task, store.rows, args, folder) if args.judge and task.name == "mt_bench" else None
            summary = summarise_chat(task, store.rows, judged)
            if task.name == "alpaca_eval":
                print(f"answers {path}; length-controlled win rate: alpaca_eval --model_outputs {path}")
        results[task.name], by_row[task.name] = summary
    model.free()
    return results, by_row


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    common.distributed_rank()
    device = common.pick_device()
    args.dtype = common.pick_dtype(args.dtype, device)
    common.hf_datasets.disable_progress_bars()
    names = list(dict.fromkeys(([args.base] if args.base else []) + args.model))
    for name in names:
        if (name[0] in "./~" or name.count("/") > 1) and not Path(name).is_dir():
            raise UserError(f"--model {name}: no such folder")
    tasks = prepare(args)
    models = [Model(name, label, args, device) for name, label in zip(names, unique_names(names))]
    folder = Path(args.output_dir or f"runs/eval-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file")
    manifest = check_manifest(folder, models, tasks)
    if not folder.exists():
        models[0].load()  # a model that cannot be loaded leaves no folder behind
    folder.mkdir(parents=True, exist_ok=True)
    common.write_text(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    print(f"run   {folder}: {len(models)} models, {len(tasks)} tasks")
    results, by_row = {}, {}
    try:
        for model in models:
            results[model.name], by_row[model.name] = evaluate_model(model, tasks, args, folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command with --output_dir {folder} goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    add_intervals(results, by_row, names[0], args.seed)
    path = folder / "results.json"
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, rows in results.items():  # what an earlier command found stays
        whole.setdefault(name, {}).update(rows)
    common.write_text(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    print_table(results, names[0])
    if len(models) > 1:
        plot_results(folder / "results.png", results)
    print(f"done  {path}")


if __name__ == "__main__":
    main()
