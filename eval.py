"""The papers' evaluations from one command, for any model the scripts save (adapters too).

    python eval.py --model runs/mine/final --base meta-llama/Llama-3.1-8B --eval_data held_out.jsonl
    python eval.py --model runs/ntp/final runs/sftmix/final --tasks medqa medqa5=rows.jsonl medmcqa
    python eval.py --model runs/mine/final --tasks mmlu gsm8k=test.jsonl,train.jsonl mine=rows.jsonl
    python eval.py --model runs/mine/final --tasks mt_bench alpaca_eval

Kinds of tasks, in the order they stand below:
  domain     --eval_data: loss, perplexity and token accuracy of responses, as in the scripts
  benchmark  any task of EleutherAI's lm-eval, by its definition; local rows and rounds of shots
             (SFTMix §4.2) for the papers' (lm_tasks.py); `dynamixsft`: the ten of that paper
  chat       mt_bench, alpaca_eval: answers in the formats of FastChat and alpaca_eval
The state is predictions/<model>/<task>.jsonl: the same command with its --output_dir goes on there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import re
import shutil
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
import data
import judge
import lm_tasks
import plots
import ranks
import runs
import sandbox
from data import HubSource, UserError
from intervals import add_intervals
from predictions import (
    Predictions,
    blocks,
    cause,
    digest,
    json_lines,
    line_key,
    read_json,
    safe_name,
    unique_names,
    write_json,
)

VERSION = 3  # of prompts and prediction lines: predictions of another version are refused
BLOCK = 64  # rows between two writes of a domain's predictions
CHAT_TOKENS = 1024  # of an answer, as FastChat
FIRST_SEED = 1234  # of shots, lm-eval's own; a round adds 1, a --seed 100


# ---- Numbers of rows -----------------------------------------------------------------------------
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
    rows: list = field(default_factory=list)  # data.Rows or chat questions
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


def open_predictions(task: Task, path: Path) -> Predictions:
    """A task's predictions, as far as they are there. Raises UserError for others."""
    if task.kind == "lm_eval":  # its lines are written at once, at the end
        path.with_name(path.name + ".part").unlink(missing_ok=True)
        return Predictions(path, "lm_eval")
    if task.kind == "chat":
        return Predictions(path, "chat", [line_key(row["question_id"]) for row in task.rows])
    return Predictions(path, "domain", [line_key(i) for i in range(len(task.rows))])


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


# ---- Versions: of what a number depends on beside model, rows and flags --------------------------
LIBRARIES = {  # by kind of task, the names of packages
    "domain": ("torch", "transformers", "tokenizers", "numpy"),
    "chat": ("torch", "transformers", "tokenizers"),
    "lm_eval": ("torch", "transformers", "tokenizers", "numpy", "lm_eval", "datasets", "jinja2")
    + ("nltk", "langdetect", "sympy", "math-verify", "evaluate", "scikit-learn"),
}
DOCUMENTED = Path(__file__).parent / "docs" / "eval_versions.json"  # of docs/eval.md's numbers


def library_versions(task: Task) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in LIBRARIES[task.kind]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def template_version(tokenizer) -> str:
    """A digest of the chat template; plain where there is none (tokenizer: None)."""
    return "plain" if tokenizer is None else digest(tokenizer.chat_template)[:8]


def warn_of_versions(results: dict) -> None:
    """Print where libraries and definitions are not those of the documented numbers."""
    documented, other = read_json(DOCUMENTED, {"definitions": {}}), set()
    for tasks in results.values():
        for row in tasks.values():
            found = {**row["versions"], **row["versions"].get("definitions", {})}
            expected = {**documented, **documented["definitions"]}
            for name in sorted(set(found) & set(expected) - {"definitions"}):
                if found[name].split("+")[0] != expected[name]:  # torch's +cpu, +cu130
                    other.add(f"{name} {found[name]} (there {expected[name]})")
    if other:
        print(f"warning: not the versions of docs/eval.md's numbers: {', '.join(sorted(other))}")


# ---- Domain evaluation: --eval_data --------------------------------------------------------------
def run_domain(model: Model, task: Task, store: Predictions, args: Namespace) -> dict:
    """Loss, tokens and right tokens of every response (common.score), a line a row. -> versions."""
    lm, tokenizer = model.load()[0], model.template("auto")
    length = min(model.max_length or 2048, common.max_positions(lm))
    rows = [data.Dataset(task.name, task.rows)]
    encoded = data.encode_datasets(rows, tokenizer, length, split="eval")[0]
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
    return {"template": template_version(tokenizer)}


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


# ---- Benchmarks of lm-eval: by its prompts, stop rules and metrics -------------------------------
def prepare_lm_eval(name: str, source: str, args: Namespace) -> Task:
    """-> Task, over the rows of a local file where source names one, else over the hub's."""
    found = lm_tasks.find_benchmark(name, source, args, list(CHAT_TASKS))
    own = {"lm_eval": importlib.metadata.version("lm_eval"), "max_length": args.max_length}
    own |= {"shots": found.shots, "rounds": found.rounds, "seed": args.seed}
    own["max_new_tokens"] = args.max_new_tokens
    settings = shared_settings(args, digest(found.local), **own)
    return Task(name, "lm_eval", settings, extra={"benchmark": found})


def run_lm_eval(model: Model, task: Task, store: Predictions, args: Namespace) -> dict:
    """lm-eval over the task, once a round, each with its own seed of shots. It caches requests one
    by one: an interrupted task goes on inside. -> versions of definitions and template."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm, tokenizer = model.load()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    chat = args.template not in ("auto", "plain")
    tokenizer = model.template(args.template) if chat else tokenizer
    folder, file = args.output_dir / "lm_eval", f"{model.label}/{safe_name(task.name)}"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    length = args.max_length or common.max_positions(lm)
    lm_how = {"tokenizer": tokenizer, "batch_size": args.batch_size, "max_length": length}
    lm_how["mixed_precision_dtype"] = "bfloat16" if args.dtype == "bf16" else None
    benchmark = task.extra["benchmark"]
    manager = lm_tasks.task_manager(benchmark.base)
    how = {"num_fewshot": benchmark.shots, "limit": args.limit, "task_manager": manager}
    how |= {"use_cache": str(folder / file), "bootstrap_iters": 0, "apply_chat_template": chat}
    if args.max_new_tokens:
        how["gen_kwargs"] = {"max_gen_toks": args.max_new_tokens}
    sandbox.CodeEval.box = sandbox.unsafe if args.allow_code == "unsafe" else None
    # what would run code around CodeEval is refused by lm-eval
    safe = benchmark.name.startswith(lm_tasks.RUNS_CODE)
    how["confirm_run_unsafe_code"] = safe or args.allow_code == "unsafe"
    outputs, first = [], FIRST_SEED + 100 * args.seed
    try:
        with (
            mock.patch("evaluate.load", sandbox.load_metric),
            mock.patch("lm_eval.evaluator.add_env_info", create=True),  # takes seconds
            mock.patch("lm_eval.evaluator.get_git_commit_hash", create=True),
        ):
            wrapped = HFLM(lm, **lm_how)
            how |= {"model": wrapped, "tasks": [lm_tasks.definition(benchmark, folder)]}
            for seed in range(first, first + benchmark.rounds):
                outputs.append(lm_eval.simple_evaluate(fewshot_random_seed=seed, **how))
    except Exception as error:  # its loaders and scorers raise many types
        raise UserError(f"{task.name}: lm-eval failed ({cause(error)})") from error
    lines = []
    for number, output in enumerate(outputs):
        for part, samples in output["samples"].items():  # the parts of a group like mmlu
            for sample in samples:
                cut = prompt_cut(sample["arguments"], tokenizer, length)
                line = {"round": number, "task": part, **sample_line(sample), "prompt_cut": cut}
                lines.append(line)
    kept = {key: outputs[0].get(key, {}) for key in ("versions", "n-shot", "configs")}
    results = {str(number): output["results"] for number, output in enumerate(outputs)}
    write_json(folder / f"{file}.json", {"results": results, **kept, "lines": len(lines)})
    store.add(lines)
    versions = {part: definition_version(outputs[0], part) for part in outputs[0]["samples"]}
    return {"definitions": versions, "template": template_version(tokenizer if chat else None)}


def sample_line(sample: dict) -> dict:
    """lm-eval's record of a question -> what a prediction line says of it."""
    line = {"index": sample["doc_id"], "filter": sample["filter"], "target": sample["target"]}
    arguments = sample["arguments"]
    line["prompt"] = arguments[0][0]
    if len(arguments) > 1 and isinstance(arguments[0][1], str):  # multiple choice
        line["choices"] = [choice for _, choice, *_ in arguments]
        line["loglikelihood"] = [float(value) for value, _ in sample["filtered_resps"]]
    else:
        line |= {"responses": sample["resps"], "filtered": sample["filtered_resps"]}
    metrics = {key: sample[key] for key in sample["metrics"] if "bias_score" not in key}
    return line | {"metrics": metrics}


def prompt_cut(arguments: list[tuple], tokenizer, length: int) -> bool:
    """Whether a prompt and what follows it exceed the positions: lm-eval cuts its beginning."""
    prompt, *rest = arguments[0]
    if not rest:  # a text that is scored in windows
        return False
    if isinstance(rest[0], dict):
        new = rest[0].get("max_gen_toks", 256)
    else:
        new = max(len(tokenizer(choice).input_ids) for _, choice, *_ in arguments) - 1
    return len(tokenizer(prompt).input_ids) + new > length


def definition_version(output: dict, part: str) -> str:
    """A definition's own version number and a digest of what it says but for rows and flags."""
    own = ("dataset_", "fewshot_config", "num_fewshot", "generation_kwargs", "metadata")
    said = {}
    for key, value in output["configs"][part].items():
        if not key.startswith(own) and not key.endswith("_split"):
            said[key] = value
    said = json.loads(json.dumps(said, default=spoken))
    return f"{output['versions'].get(part)} {digest(said)[:8]}"


def spoken(value: object) -> str:
    """A function by its source, which lm-eval leaves as it is in a filter: its name holds where it
    lies in memory."""
    return inspect.getsource(value) if inspect.isfunction(value) else str(value)


def summarise_lm_eval(task: Task, rows: list[dict], output: dict) -> tuple[dict, dict]:
    """lm-eval's own numbers (output: its results by round), mean over the rounds; by row those
    whose mean over rows they are."""
    benchmark, values, by_row = task.extra["benchmark"], {}, {}
    name = benchmark.name
    for results in output["results"].values():
        for part in [name] if name in results else sorted(results):
            prefix = "" if part == name else f"{part}/"
            for key, value in results[part].items():
                number = isinstance(value, (int, float)) and math.isfinite(value)
                if number and "," in key and "_stderr," not in key:
                    values.setdefault(prefix + key.removesuffix(",none"), []).append(float(value))
    metrics = {}
    for key, rounds in values.items():
        metrics |= {key: float(np.mean(rounds)), **spread(key, rounds)}
    for row in rows:
        label, end = f"{row['task']}/{row['index']}", f",{row['filter']}".removesuffix(",none")
        for key, value in row["metrics"].items():
            each = value if isinstance(value, list) else [value]
            if each and all(isinstance(number, (int, float)) for number in each):
                items = by_row.setdefault(key + end, {})
                total, weight, _ = items.get(label, (0.0, 0, label))
                items[label] = total + float(sum(each)), weight + len(each), label
    for key, items in list(by_row.items()):
        total, weight = (sum(part) for part in list(zip(*items.values()))[:2])
        if not abs(total / weight - metrics.get(key, math.inf)) < 1e-9:
            del by_row[key]
    if benchmark.choice:
        metrics |= {"shots": benchmark.shots, "rounds": benchmark.rounds}
    metrics["n"] = len({(row["task"], row["index"]) for row in rows})
    metrics["prompts_cut"] = sum(row["prompt_cut"] for row in rows)
    return metrics, by_row


# ---- Chat: answers in fastchat's and alpaca_eval's formats ---------------------------------------
CHAT_TASKS = {
    "mt_bench": HubSource("HuggingFaceH4/mt_bench_prompts"),
    "alpaca_eval": HubSource("hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"),
}


# by start_key: FastChat's questions 81 to 160
MT_BENCH = (
    "b3b9f4254b3381da0a2ca7b492378b9892fb55f23d8e2279b71f9384801c529abf8cc4105754980ca81b"
    "e937762397c46e0ace09ea114ae9b089e7fd90a04eec18bb3d63985de39596e57343fd43f62828aa98f7"
    "f19f5dda318c8f489e71b27c6036bda2190f74e0523ad1aa93bb618d227b771b4eaa2e0f65115f1e9b9f"
    "528e67074b099fa798ff55d52bf8d067178b529f3342923404bc9b3d36c3aaac03243ddc9d77f749c0be"
    "4a37ad69b0af9ac6cee9adc3abe3a66e4cbb56d6fbcd7e2b8de80db06503571951f1ae8ca3ed2d674a13"
    "c169e1d5eba0b01ec3b7602be074cc40f04f2e5c91647acc68d6df8eb4ed"
)
MT_BENCH = [MT_BENCH[at : at + 6] for at in range(0, len(MT_BENCH), 6)]


def start_key(text: str) -> str:
    """A digest of a question's first 50 letters, which tell MT-Bench's questions apart."""
    letters = re.sub(r"\W+", "", text.lower())[:50]
    return hashlib.sha256(letters.encode("utf-8", "replace")).hexdigest()[:6]


def read_chat_records(source: str | HubSource) -> list[tuple]:
    """A file, or a benchmark's own place -> [(file, row number, record)]. Raises UserError."""
    if isinstance(source, str):
        return lm_tasks.read_records(source)
    path = source.path
    if not path.startswith("hf://"):
        return lm_tasks.objects(data.load_hub(source, None, "eval"))
    import datasets

    try:
        with data.quiet_hub():
            local = datasets.DownloadManager().download(path)
    except Exception as error:  # network and hub raise many types
        raise UserError(f"cannot load {path} from the Hugging Face hub: {cause(error)}") from None
    return lm_tasks.objects([(path, *record) for record in data.read_file(local, path)])


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
    if "question_id" not in record and start_key(turns[0]) in MT_BENCH:
        name = 81 + MT_BENCH.index(start_key(turns[0]))  # the hub's copy has ids of its own
    reference = record.get("reference") or []
    if not isinstance(name, (int, str)) or not isinstance(reference, list):
        expected = "question_id must be a number or a text, reference a list of texts"
        raise UserError(f"{file}, row {number}: {expected}")
    question = {"question_id": name, "category": record.get("category") or "", "turns": turns}
    question["reference"] = [str(answer) for answer in reference]
    return question | {"dataset": record.get("dataset") or Path(file).stem}


def add_reference(questions: list[dict], where: str, record: dict) -> None:
    """Give the question of its id the answers of a row of FastChat's reference_answer/gpt-4.jsonl.
    Raises UserError."""
    try:
        turns = [str(turn) for turn in record["choices"][0]["turns"]]
        name = record["question_id"]
    except (KeyError, IndexError, TypeError):
        expected = "question_id and choices, as in FastChat's reference_answer"
        raise UserError(f"{where}: no reference answer; expected {expected}") from None
    for question in questions:
        if question["question_id"] == name:
            question["reference"] = turns


def prepare_chat(name: str, source: str, args: Namespace) -> Task:
    """-> Task with the questions. Raises UserError."""
    test, _, answers = source.partition(",")
    found = read_chat_records(test or CHAT_TASKS[name])
    records = [(file, number, data.plain(record)) for file, number, record in found]
    questions = [read_chat_question(*record) for record in records]
    if len({question["question_id"] for question in questions}) < len(questions):
        raise UserError(f"{name}: two questions have the same question_id")
    for file, number, record in read_chat_records(answers) if answers else []:
        add_reference(questions, f"{file}, row {number}", data.plain(record))
    own = {"max_new_tokens": args.max_new_tokens or CHAT_TOKENS, "temperature": 0}
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


def run_chat(model: Model, task: Task, store: Predictions, args: Namespace) -> dict:
    """Answer every question, all of its turns with the history carried, a line a question.
    -> versions."""
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
            most = args.max_new_tokens or CHAT_TOKENS
            answers = generate(lm, tokenizer, prompts, most, args.dtype)
            for i, (text, was_cut) in zip(asked, answers):
                history[i].append(("assistant", text))
                cut[i] |= was_cut
        lines = []
        for question, messages, was_cut in zip(batch, history, cut):
            line = {key: question[key] for key in ("question_id", "category", "turns")}
            line["answers"] = [text for role, text in messages if role == "assistant"]
            lines.append(line | {"prompt_cut": was_cut, "tstamp": time.time()})
        store.add(lines)
    return {"template": template_version(tokenizer)}


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
        path = path.with_suffix(".jsonl")
        common.write_text(path, json_lines(lines))
        print(f"answers {path}; grades: FastChat's gen_judgment.py (docs/eval.md)")
        return
    write_json(path, lines)
    own = f"--output_path {path.with_suffix('')} --is_overwrite_leaderboard"  # one folder a model
    print(f"answers {path}; win rates: alpaca_eval --model_outputs {path} {own} (docs/eval.md)")


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
    grades |= {"judge": scored[0]["judge"], "judge_prompts": scored[0]["prompts"]}
    grades["unscored"] = len(judgements) - len(scored)
    by_question = grouped(scored, "question_id", "score")
    by_row = {key: (float(sum(part)), len(part), key) for key, part in by_question.items()}
    return {**grades, **metrics}, {"score": by_row}


# ---- Output: intervals, differences, table -------------------------------------------------------
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
    names = plots.short_names(results)
    lines = [["task", "metric", "rows", *names.values()]]
    for task in dict.fromkeys(task for tasks in results.values() for task in tasks):
        rows = [tasks.get(task, {}) for tasks in results.values()]
        count = str(max(row.get("n", 0) for row in rows))
        for metric in dict.fromkeys(key for row in rows for key in plots.main_metrics(row)):
            lines.append([task, metric, count, *(table_cell(row, metric) for row in rows)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    paired = f", Δ paired difference to {names[reference]}" if len(results) > 1 else ""
    print(f"[ ] 95 % interval over rows, ± standard deviation over rounds{paired}")


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
    add("--judge_prompts", metavar="FILE",
        help="FastChat's judge_prompts.jsonl; default a wording of ours, as the results then say")
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
    add("--max_new_tokens", type=common.positive_int, metavar="TOKENS",
        help="longest answer; default 1024 (mt_bench, alpaca_eval; as FastChat), lm-eval's own")
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
    for text in args.tasks:
        for part in lm_tasks.DYNAMIXSFT if text == "dynamixsft" else [text]:
            name, _, source = part.partition("=")
            try:
                prepare_task = prepare_chat if name in CHAT_TASKS else prepare_lm_eval
                tasks.append(prepare_task(name, source, args))
            except RecursionError:
                raise UserError(f"{name}: {source}: a row is nested too deeply") from None
    names = [safe_name(task.name).lower() for task in tasks]
    for task, name in zip(tasks, names):
        if names.count(name) > 1:
            raise UserError(f"two tasks or domains are called {task.name!r}; use label=SOURCE")
    if args.judge and "mt_bench" not in names:
        raise UserError("--judge grades mt_bench, which is not among the --tasks")
    if args.judge_prompts and not args.judge:
        raise UserError("--judge_prompts: are for --judge")
    if args.judge:
        judge.check(args)
    return tasks


def evaluate_model(model: Model, tasks: list[Task], args: Namespace) -> tuple[dict, dict]:
    """All tasks of one model -> {task: metrics} and {task: what summarise_domain gives by row}."""
    run = {"domain": run_domain, "lm_eval": run_lm_eval, "chat": run_chat}
    results, by_row, folder = {}, {}, args.output_dir
    for task in tasks:
        file = f"{model.label}/{safe_name(task.name)}.json"
        store = open_predictions(task, folder / "predictions" / f"{file}l")
        made = store.path.with_suffix(".json")
        if not store.complete:
            versions = run[task.kind](model, task, store, args)
            write_json(made, {**library_versions(task), **versions})
            store.finish()
        if task.kind == "domain":
            summary = summarise_domain(task, store.rows)
        elif task.kind == "lm_eval":
            output = read_json(folder / "lm_eval" / file, {"results": {}})
            if output.get("lines", len(store.rows)) != len(store.rows):
                problem = f"is cut: {len(store.rows)} of {output['lines']} lines"
                raise UserError(f"{store.path}: {problem}; delete the file")
            summary = summarise_lm_eval(task, store.rows, output)
        else:
            export_chat(model, task, store.rows, folder)
            judged = args.judge and task.name == "mt_bench"
            judgements = []
            if judged:
                judgements = judge.judge_answers(model.label, task.rows, store.rows, args)
            summary = summarise_chat(task, store.rows, judgements)
        results[task.name], by_row[task.name] = summary
        results[task.name]["versions"] = read_json(made, {})
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
    warn_of_versions(results)
    if len(models) > 1:
        common.print_figures(plots.draw(folder))
    print(f"done  {path}")


if __name__ == "__main__":
    main()
