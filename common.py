"""Plumbing shared by sftmix.py, dynamix_sft.py and dynamics.py. No equation of a paper stands here, except the
perplexities of a dataset (the confidence pass) and plain cross-entropy.

Sections: 1 errors and flags · 2 data · 3 templates and tokens · 4 model · 5 batches · 6 chunked response loss ·
7 scoring and evaluation · 8 optimisation · 9 run folder and checkpoints · 10 snapshots

Shapes: B examples, T tokens, R response rows (one per supervised token), V vocabulary, H hidden, K datasets.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import datasets as hf_datasets
import numpy as np
import torch
import transformers
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# 1. Errors and flags
# ----------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can put right. Shown as one line `error: ...` on stderr, exit status 2."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports a bad flag in one line."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def command_line(main):
    """Decorator of `main(argv=None)`: a UserError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\ninterrupted: continue with --resume and the run folder", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


def _positive(kind):
    def parse(text):
        value = kind(text)
        if not value > 0 or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
        return value
    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _non_negative(kind):
    def parse(text):
        value = kind(text)
        if not value >= 0 or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
        return value
    parse.__name__ = f"non-negative {kind.__name__}"
    return parse


def _fraction(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


positive_int, positive_float = _positive(int), _positive(float)
non_negative_int, non_negative_float, fraction = _non_negative(int), _non_negative(float), _fraction


def add_shared_flags(parser):
    """The flags that all three scripts have, with the same name and help. Each script then sets its own paper's recipe
    with parser.set_defaults; a test keeps names and helps equal."""
    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="tiny", metavar="NAME", help="hub id, local folder, or tiny (about 1M random parameters, byte-level tokenizer)")
    add("--data", nargs="+", default=["toy"], metavar="SPEC", help="training datasets: [label=]SOURCE[#N]; SOURCE = alias, hub id, .json .jsonl .parquet .csv file, folder of them, or toy; #N = N random rows")
    add("--eval_data", nargs="+", default=[], metavar="SPEC", help="fixed evaluation sets, one metric row each")
    add("--source_column", metavar="NAME", help="split every training file into one dataset per value of this column")
    add("--template", choices=["auto", "alpaca", "chat", "plain"], default="auto", help="auto: the tokenizer's chat template if it has one, else Alpaca's prompt")
    add("--max_length", type=positive_int, metavar="TOKENS", help="longest example; default min(2048, what the model has positions for)")
    add("--show_batch", action="store_true", help="print decoded training examples with the supervised tokens marked, then go on")
    add = parser.add_argument_group("optimisation").add_argument
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive_float, metavar="N", help="passes over the training data")
    length.add_argument("--max_steps", type=positive_int, metavar="N", help="optimizer steps, instead of --epochs")
    add("--batch_size", type=positive_int, metavar="EXAMPLES", help="examples per optimizer step, over all ranks")
    add("--micro_batch_size", type=positive_int, metavar="EXAMPLES", default=8, help="examples per forward pass; changes memory and speed, not the result")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--weight_decay", type=non_negative_float, help="AdamW's decay, on matrices only (not on biases and norms)")
    add("--schedule", choices=["cosine", "linear", "constant"], help="learning rate after warm-up: to 0 along a cosine or a line, or constant")
    add("--warmup_ratio", type=fraction, help="share of the steps with linearly rising learning rate")
    add("--max_grad_norm", type=positive_float, default=1.0, help="clip the global gradient norm to this (not in the papers)")
    add = parser.add_argument_group("precision and memory").add_argument
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="bf16: autocast over fp32 master weights; auto: bf16 on a GPU that has it, else fp32")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, about 1.3x the time")
    add("--lora_rank", type=non_negative_int, default=0, metavar="R", help="train a LoRA adapter of this rank on all linear layers; 0 = full fine-tuning")
    add("--lora_alpha", type=positive_float, metavar="A", help="LoRA scale, update = A/R · BA; default 2R")
    add("--lora_dropout", type=fraction, default=0.0, help="dropout on the adapter's input")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=non_negative_int, default=0, help="of data order, sampling and adapter init; data order does not depend on the model's RNG")
    add("--output_dir", metavar="DIR", help="run folder; default runs/<script>-<model>-<seed>-<time>")
    add("--resume", nargs="?", const=True, metavar="DIR", help="continue the run in DIR (or in --output_dir), bit for bit on CPU")
    add("--log_every", type=positive_int, default=10, metavar="STEPS", help="steps between lines of metrics.jsonl")
    add("--eval_every", type=non_negative_int, default=0, metavar="STEPS", help="steps between evaluations of --eval_data; 0 = only at the end")
    add("--save_every", type=non_negative_int, default=500, metavar="STEPS", help="steps between checkpoints for --resume; 0 = none")
    add("--track", choices=["tensorboard", "wandb"], help="also log to a tracker; metrics.jsonl is always written")
    return parser


def distributed_rank():
    """-> (rank, world size). The three loops run on one process for now; the batch functions already slice by rank."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise UserError(f"WORLD_SIZE={world}: several processes are not supported yet; start the script with plain python")
    return rank, world


# ----------------------------------------------------------------------------------------------------------------------
# 2. Data: SPEC -> Dataset of Row (text). Nothing here depends on a tokenizer.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One supervised turn as text."""
    messages: tuple          # ((role, content), ...) before the response, oldest first; () for plain text
    response: str            # what is supervised
    input: str = ""          # Alpaca's input field, apart from the last user message
    file: str = ""           # where it came from, for error messages
    number: int = 0          # row of that file, from 1
    choices: tuple = ()      # multiple choice: the answers, of which response is one
    answer: int = -1         # multiple choice: index of response in choices

    @property
    def where(self):
        return f"{self.file}, row {self.number}"


@dataclass
class Dataset:
    """Rows under one label, and how many rows were left out, by reason."""
    label: str
    rows: list
    dropped: dict = field(default_factory=dict)


@dataclass(frozen=True)
class HubSource:
    """Where an alias points. Column names are not part of it: they are read from the rows."""
    path: str
    config: str | None = None
    split: str = "train"
    eval_split: str | None = None     # where --eval_data reads, if the source keeps rows for that
    source_column: str | None = None  # split into one dataset per value
    stream: bool = False              # too large to download: read only the first rows


STREAM_ROWS = 10_000  # head of a streamed corpus when the SPEC has no #N
MEDALPACA = ("medical_flashcards", "wikidoc", "wikidoc_patient_information", "medqa", "mediqa", "cord19",
             "health_advice", "mmmlu", "pubmed_causal")
ALIASES = {
    "alpaca": [HubSource("tatsu-lab/alpaca")],
    "ultrachat": [HubSource("HuggingFaceH4/ultrachat_200k", split="train_sft", eval_split="test_sft")],
    # SFTMix's 263K medical set is not identified in the paper beyond "MedAlpaca": this is the medical_meadow collection.
    "medalpaca": [HubSource(f"medalpaca/medical_meadow_{name}") for name in MEDALPACA],
    "tulu2": [HubSource("allenai/tulu-v2-sft-mixture", source_column="dataset")],
    "tulu3": [HubSource("allenai/tulu-3-sft-mixture", source_column="source")],
    "gsm8k": [HubSource("openai/gsm8k", config="main", eval_split="test")],
    "numinamath": [HubSource("AI-MO/NuminaMath-CoT")],
    "code_feedback": [HubSource("m-a-p/CodeFeedback-Filtered-Instruction")],
    "medical_flashcards": [HubSource("medalpaca/medical_meadow_medical_flashcards")],
    "glaive": [HubSource("glaiveai/glaive-function-calling-v2")],
    "fineweb": [HubSource("HuggingFaceFW/fineweb", config="sample-10BT", stream=True)],
    "wikipedia": [HubSource("wikimedia/wikipedia", config="20231101.en", stream=True)],
    "tinymmlu": [HubSource("tinyBenchmarks/tinyMMLU", config="all", split="test")],
    "tinyhellaswag": [HubSource("tinyBenchmarks/tinyHellaswag", config="default", split="validation")],
    "pubmedqa": [HubSource("qiaojin/PubMedQA", config="pqa_labeled")],
    "medqa": [HubSource("GBaker/MedQA-USMLE-4-options", eval_split="test")],
    "medmcqa": [HubSource("openlifescienceai/medmcqa", eval_split="validation")],
    "truthfulqa": [HubSource("truthfulqa/truthful_qa", config="multiple_choice", split="validation")],
}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
         "model": "assistant", "chatgpt": "assistant", "system": "system", "tool": "tool", "function": "tool",
         "observation": "tool", "function_response": "tool", "function_call": "assistant"}
# (prompt column, optional input column, response column), tried in this order on lower-cased names
FLAT_SCHEMAS = [("instruction", "input", "output"), ("instruction", "context", "response"), ("instruction", "input", "response"),
                ("prompt", "input", "completion"), ("prompt", "input", "response"), ("question", "input", "answer"),
                ("query", "input", "answer"), ("query", "input", "response"), ("question", "input", "best_answer"),
                ("problem", "input", "solution"), ("prompt", None, "canonical_solution"), ("input", None, "output")]
ACCEPTED = ("instruction/input/output, prompt/completion, prompt/response, instruction/context/response, question/answer, "
            "messages (role, content), conversations (from, value), text, or a multiple-choice schema (README, Data)")


def _text(value):
    """A cell as text: None -> "", numbers -> str. Lone surrogates cannot be encoded, so they are replaced."""
    if value is None:
        return ""
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return value.encode("utf-8", "replace").decode("utf-8")


def _multiple_choice(record):
    """-> (question, choices, index of the right one), or None where the record is no multiple-choice row."""
    get = record.get
    if "ans0" in record and "label" in record:  # BBQ
        choices = [record[f"ans{i}"] for i in range(10) if get(f"ans{i}") is not None]
        return f"{_text(get('context'))}\n{_text(get('question'))}".strip(), choices, int(get("label"))
    if get("mc1_targets"):  # TruthfulQA
        targets = record["mc1_targets"]
        if "choices" in targets:
            choices, labels = list(targets["choices"]), list(targets["labels"])
        else:  # {answer: 0 or 1}; columns that datasets filled in for other rows are None
            pairs = [(key, value) for key, value in targets.items() if value is not None]
            choices, labels = [key for key, _ in pairs], [int(value) for _, value in pairs]
        return _text(get("question")), choices, labels.index(1)
    if get("endings") and "label" in record:  # HellaSwag
        return _text(get("ctx")), list(record["endings"]), int(get("label"))
    if "opa" in record and "cop" in record:  # MedMCQA, official columns
        return _text(get("question")), [record[f"op{letter}"] for letter in "abcd"], int(get("cop"))
    if get("options") and get("answer_idx") is not None:  # MedQA
        options = record["options"]
        if isinstance(options, dict):
            keys = [key for key in sorted(options) if options[key] is not None]
            return _text(get("question")), [options[key] for key in keys], keys.index(str(record["answer_idx"]))
        answer = record["answer_idx"]
        return _text(get("question")), list(options), "ABCDEFGHIJ".index(answer) if isinstance(answer, str) else int(answer)
    if get("choices") and get("answer") is not None and isinstance(record["choices"], (list, tuple)):  # MMLU
        answer = record["answer"]
        return _text(get("question")), list(record["choices"]), "ABCDEFGHIJ".index(answer) if isinstance(answer, str) else int(answer)
    return None


def _dialogue(turns, file, number):
    """[(role, content)] -> one Row per assistant turn, the turns before it as history (SFTMix §4.1)."""
    messages = []
    for role, content in turns:
        name = ROLES.get(_text(role).strip().lower())
        if name is None:
            raise UserError(f"{file}, row {number}: unknown role {role!r}; known are {', '.join(sorted(ROLES))}")
        messages.append((name, _text(content)))
    return [Row(tuple(messages[:i]), content, file=file, number=number) for i, (role, content) in enumerate(messages)
            if role == "assistant" and i > 0 and messages[i - 1][0] in ("user", "tool")]


def _glaive(system, chat):
    """Glaive's one string `USER: ... ASSISTANT: ... <|endoftext|> FUNCTION RESPONSE: ...` -> [(role, content)]."""
    parts = re.split(r"(USER|ASSISTANT|FUNCTION RESPONSE):", chat.replace("<|endoftext|>", ""))
    roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
    turns = [(roles[name], content.strip()) for name, content in zip(parts[1::2], parts[2::2])]
    system = re.sub(r"^SYSTEM:\s*", "", system).strip()
    return ([("system", system)] if system else []) + turns


def rows_from_record(record, file="data", number=1):
    """One record of any accepted schema -> list of Row (several for a dialogue). Column names are compared in lower case
    with spaces as underscores. A null response counts as empty. Raises UserError naming file, row and the keys found."""
    full = {str(key).strip().lower().replace(" ", "_"): value for key, value in record.items()}
    present = {key: value for key, value in full.items() if value is not None}
    try:
        for keys in (present, full):  # a column may be null only because other rows of the file have it
            for column in ("messages", "conversations", "conversation"):
                turns = keys.get(column)
                if isinstance(turns, (list, tuple)) and turns:
                    return _dialogue([(t.get("role") or t.get("from"), t["content"] if "content" in t and t["content"] is not None
                                       else t.get("value")) for t in turns], file, number)
            if "chat" in keys and "system" in keys:
                return _dialogue(_glaive(_text(keys["system"]), _text(keys["chat"])), file, number)
            if (found := _multiple_choice(keys)) is not None:
                question, choices, answer = found
                choices = tuple(_text(choice) for choice in choices)
                if not 0 <= answer < len(choices):
                    raise UserError(f"{file}, row {number}: right answer {answer} of only {len(choices)} choices")
                return [Row((("user", question),), choices[answer], file=file, number=number, choices=choices, answer=answer)]
            if "question" in keys and "long_answer" in keys:  # PubMedQA
                contexts = keys.get("contexts", keys.get("context")) or []
                contexts = contexts.get("contexts", []) if isinstance(contexts, dict) else contexts
                return [Row((("user", _text(keys["question"])),), _text(keys["long_answer"]), "\n".join(map(_text, contexts)), file, number)]
            for prompt, extra, response in FLAT_SCHEMAS:
                if keys.get(prompt) is not None and response in keys:
                    return [Row((("user", _text(keys[prompt])),), _text(keys[response]), _text(keys.get(extra)), file, number)]
            if "text" in keys:
                return [Row((), _text(keys["text"]), file=file, number=number)]
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{file}, row {number}: cannot read the row ({type(error).__name__}: {error}); keys {sorted(full)}") from None
    raise UserError(f"{file}, row {number}: keys {sorted(full)} fit no known schema; accepted are {ACCEPTED}")


def _bad_json_row(file):
    """-> (row, message) of the first line or array that is no JSON object. Rows end at "\\n" only: raw U+2028 is legal JSON."""
    text = Path(file).read_bytes().decode("utf-8", "strict")
    if text.lstrip().startswith("["):
        try:
            for number, record in enumerate(json.loads(text), 1):
                if not isinstance(record, dict):
                    return number, f"expected an object, found {type(record).__name__}"
        except json.JSONDecodeError as error:
            return error.lineno, f"not JSON: {error.msg}"
        return None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                if not isinstance(json.loads(line), dict):
                    return number, "expected an object"
            except json.JSONDecodeError as error:
                return number, f"not JSON: {error.msg}"
    return None


def _load_file(file):
    """Records of one local file, through the datasets library."""
    kind = FILE_TYPES[file.suffix.lower()]
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")
    options = {"keep_default_na": False} if kind == "csv" else {}  # an answer "NA" or "null" is text
    try:
        return hf_datasets.load_dataset(kind, data_files=[str(file)], split="train", **options)
    except Exception as error:  # datasets wraps every parser's own errors
        cause = error.__cause__ or error
        try:
            bad = _bad_json_row(file) if kind == "json" else None
        except UnicodeDecodeError as unicode_error:
            raise UserError(f"{file}: not UTF-8 (byte {unicode_error.start})") from None
        if bad:
            raise UserError(f"{file}, row {bad[0]}: {bad[1]}") from None
        raise UserError(f"{file}: cannot be read as {kind} ({type(cause).__name__}: {cause})") from None


def load_hub(source, limit, split="train"):
    """Records of a HubSource; a streamed one only up to limit rows."""
    split = source.eval_split if split == "eval" and source.eval_split else source.split
    try:
        loaded = hf_datasets.load_dataset(source.path, source.config, split=split, streaming=source.stream)
        return list(loaded.take(limit or STREAM_ROWS)) if source.stream else loaded
    except Exception as error:
        name = source.path + (f" ({source.config})" if source.config else "")
        raise UserError(f"cannot load {name}, split {split}, from the Hugging Face hub: {type(error).__name__}: "
                        f"{str(error)[:300]}") from None


SPEC_FORM = re.compile(r"(?:(?P<label>[^=/\\#]+)=)?(?P<source>[^#]+)(?:#(?P<count>\d+))?")


def parse_spec(spec):
    """`[label=]SOURCE[#N]` -> (label or None, source, N or None)."""
    match = SPEC_FORM.fullmatch(spec)
    if not match or match["count"] == "0":
        raise UserError(f"{spec!r} is no dataset; expected [label=]SOURCE[#N] with N at least 1")
    return match["label"], match["source"], match["count"] and int(match["count"])


def read_source(source, limit, split):
    """A SPEC's SOURCE -> ([(file, row number, record)], default label, column to split by or None); toy: record = (task, Row).
    limit: rows that are read of a streamed source. split: "train", or "eval" for the rows kept for evaluation. Raises UserError."""
    if source == "toy" or source.startswith("toy/"):
        rows = toy_rows(source[4:] or None, split)
        return [(f"toy/{task}", i, (task, row)) for i, (task, row) in enumerate(rows, 1)], source.replace("/", "_"), "task"
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FILE_TYPES)
        if not files:
            raise UserError(f"{source}: the folder holds no {', '.join(FILE_TYPES)} file")
        return [(str(file), i, record) for file in files for i, record in enumerate(_load_file(file), 1)], path.resolve().name, None
    if path.is_file():
        if path.suffix.lower() not in FILE_TYPES:
            raise UserError(f"{source}: unknown file type {path.suffix!r}; expected one of {', '.join(FILE_TYPES)}")
        return [(source, i, record) for i, record in enumerate(_load_file(path), 1)], path.stem, None
    if path.suffix.lower() in FILE_TYPES or source[0] in "./~" or source.count("/") > 1:
        raise UserError(f"{source}: no such file or folder")
    if source not in ALIASES and "/" not in source:
        raise UserError(f"{source}: no such file, folder or alias; aliases are toy, {', '.join(sorted(ALIASES))}")
    sources = ALIASES.get(source) or [HubSource(source)]
    records = [(entry.path, i, record) for entry in sources for i, record in enumerate(load_hub(entry, limit, split), 1)]
    return records, source.split("/")[-1], sources[0].source_column


def load_spec(spec, source_column=None, seed=0, split="train"):
    """One SPEC -> list of Dataset: one, or one per value of the source column (--source_column, or the alias's own).

    #N keeps N random rows (drawn with seed) in file order. Rows whose response is blank are left out and counted.
    split "eval" (for --eval_data): toy's held-out rows, and an alias's test split where it has one. Raises UserError.
    """
    label, source, count = parse_spec(spec)
    records, default_label, column = read_source(source, count, split)
    if column != "task" and source_column:
        column = source_column
    if count is not None:
        if count > len(records):
            raise UserError(f"{spec}: asks for {count} rows of {len(records)}")
        keep = np.random.default_rng([seed, _stream("subset")]).choice(len(records), count, replace=False)
        records = [records[i] for i in sorted(keep)]
    groups = {}
    for file, number, record in records:
        if column == "task":
            group, rows = record[0], [record[1]]
        else:
            if column and record.get(column) is None:
                raise UserError(f"{file}, row {number}: no column {column!r} to split by; keys {sorted(record)}")
            group, rows = _text(record[column]) if column else None, rows_from_record(record, file, number)
        groups.setdefault(group, []).extend(rows)
    result = []
    for group, rows in sorted(groups.items(), key=lambda item: str(item[0])) if column != "task" else groups.items():
        name = label if label and source.startswith("toy/") else (f"{label}/{group}" if label else group) if column else (label or default_label)
        kept = [row for row in rows if row.response.strip()]
        if not kept:
            raise UserError(f"{spec}: dataset {name!r} has no row with a response")
        result.append(Dataset(name, kept, {"empty response": len(rows) - len(kept)} if len(kept) < len(rows) else {}))
    if not result:
        raise UserError(f"{spec}: no rows")
    return result


def load_data(specs, source_column=None, seed=0, split="train"):
    """SPECs -> list of Dataset with distinct labels (each SPEC may give several)."""
    result = [dataset for spec in specs for dataset in load_spec(spec, source_column, seed, split)]
    labels = [dataset.label for dataset in result]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two datasets are called {label!r}; name them with label=SOURCE")
    return result


def fingerprint(datasets):
    """sha256 over the text of all rows in order. Labels, files and tokenizers do not enter: the same rows elsewhere match."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for row in dataset.rows:
            digest.update(json.dumps([row.messages, row.input, row.response], ensure_ascii=False).encode())
    return digest.hexdigest()


def _toy_word(rng, syllables):
    return "".join(rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(syllables))


def _toy_copy(rng):
    word = _toy_word(rng, 3)
    return "Repeat the word.", word, word


def _toy_reverse(rng):
    word = _toy_word(rng, 2)
    return "Write the word backwards.", word, word[::-1]


def _toy_add(rng):
    a, b = rng.integers(10, 100, 2)
    return "Add the two numbers.", f"{a} + {b}", str(a + b)


def _toy_compare(rng):
    a, b = rng.choice(np.arange(10, 1000), 2, replace=False)
    return "Which number is larger?", f"{a} or {b}", f"{max(a, b)} is larger than {min(a, b)}."


def _toy_sort(rng):
    digits = rng.integers(0, 10, 5)
    return "Sort the digits.", " ".join(map(str, digits)), " ".join(map(str, sorted(digits)))


def _toy_count(rng):
    word = _toy_word(rng, 5)
    letter = rng.choice(list("aeiou"))
    return f"How often does the letter {letter} occur in the word?", word, f"{word.count(letter)} times"


def _toy_describe(rng):
    name, age, job = _toy_word(rng, 2).capitalize(), rng.integers(18, 90), rng.choice(["baker", "pilot", "nurse", "farmer", "judge"])
    return "Introduce this person in a sentence.", f"{name}, {age}, {job}", f"{name} is {age} years old and works as a {job}."


def _toy_noise(rng):
    """Nothing to learn but the letters' distribution: the response does not depend on the prompt."""
    return "Answer.", _toy_word(rng, 3), "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 8))


# task -> (generator, training rows): unequal sizes and difficulties. noise is not part of plain `toy`.
TOY_TASKS = {"describe": (_toy_describe, 640), "copy": (_toy_copy, 480), "compare": (_toy_compare, 320), "add": (_toy_add, 240),
             "sort": (_toy_sort, 160), "reverse": (_toy_reverse, 96), "count": (_toy_count, 64), "noise": (_toy_noise, 320)}
TOY_EVAL_ROWS = 64


def toy_rows(task=None, split="train"):
    """Small synthetic instruction tasks, always the same rows -> list of (task, Row). No prompt of "eval" is in "train"."""
    if task is not None and task not in TOY_TASKS:
        raise UserError(f"toy/{task}: no such task; there are {', '.join(TOY_TASKS)}")
    result = []
    for name in [task] if task else [name for name in TOY_TASKS if name != "noise"]:
        generate, size = TOY_TASKS[name]
        size = size if split == "train" else TOY_EVAL_ROWS
        rng, seen = np.random.default_rng([0, _stream(name), _stream(split)]), set()
        while len(seen) < size:
            instruction, extra, response = generate(rng)
            held_out = hashlib.sha256((instruction + extra).encode()).digest()[0] % 5 == 0
            if held_out != (split == "train") and (instruction, extra) not in seen:
                seen.add((instruction, extra))
                result.append((name, Row((("user", instruction),), response, extra, f"toy/{name}", len(seen))))
    return result


# ----------------------------------------------------------------------------------------------------------------------
# 3. Templates and tokens: Row -> Example
# ----------------------------------------------------------------------------------------------------------------------

ALPACA_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                     "Write a response that appropriately completes the request.")
ALPACA_WITHOUT_INPUT = ("Below is an instruction that describes a task. "
                        "Write a response that appropriately completes the request.")


@dataclass(frozen=True)
class Example:
    """A tokenised Row: ids[start:] is supervised, ids[:start] is context."""
    ids: np.ndarray   # (T,) int64
    start: int        # at least 1: the first token has nothing that predicts it
    row: int          # index of the Row in its Dataset
    dataset: int = 0  # index of the Dataset

    @property
    def response_tokens(self):
        return len(self.ids) - self.start


def alpaca_prompt(row):
    """Stanford Alpaca's prompt. Turns before the last are more sections of the same form; a system message takes the
    place of the preamble."""
    messages = list(row.messages)
    preamble = ALPACA_WITH_INPUT if row.input else ALPACA_WITHOUT_INPUT
    if messages and messages[0][0] == "system":
        preamble = messages.pop(0)[1]
    heading = {"user": "### Instruction:\n", "assistant": "### Response:", "tool": "### Tool:\n", "system": "### System:\n"}
    sections = [heading[role] + content for role, content in messages]
    if row.input:
        sections.append(f"### Input:\n{row.input}")
    return "\n\n".join([preamble, *sections, "### Response:"])


def plain_prompt(row):
    """The messages one below the other, nothing added."""
    return "\n".join([content for _, content in row.messages] + ([row.input] if row.input else [])) + "\n"


def chat_parts(row, tokenizer):
    """-> (prompt text, response text) by the tokenizer's own chat template; the first ends where generation would begin.
    Raises UserError naming the row where the template renders the prompt differently once the response follows."""
    messages = [{"role": role, "content": content} for role, content in row.messages]
    if row.input:
        messages[-1]["content"] += "\n\n" + row.input

    def render(messages):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages + [{"role": "assistant", "content": row.response}], tokenize=False)
        return prompt, full

    try:
        try:
            prompt, full = render(messages)
        except Exception:  # templates without a system role (Gemma) raise: the first user turn takes its text
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise
            first = {"role": messages[1]["role"], "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
            prompt, full = render([first] + messages[2:])
    except Exception as error:
        raise UserError(f"{row.where}: the chat template fails ({error}); try --template alpaca") from None
    if not full.startswith(prompt):
        raise UserError(f"{row.where}: the chat template changes the prompt once a response follows, so the boundary "
                        "between them is unclear; try --template alpaca")
    return prompt, full[len(prompt):].rstrip()


def pick_template(name, tokenizer):
    """auto -> chat where the tokenizer has a chat template, else alpaca."""
    if name == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if name == "chat" and not tokenizer.chat_template:
        raise UserError("--template chat: this tokenizer has no chat template; use --template alpaca or plain")
    return name


def adds_bos(tokenizer):
    """Whether the tokenizer itself begins a text with BOS (Llama, Gemma: yes; GPT-2, Qwen: no)."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def encode(rows, tokenizer, template, max_length, dataset=0, progress=None):
    """Tokenise rows -> (list of Example, {reason: rows left out}).

    Supervised are the response and exactly one EOS. The response's ids are what follows the prompt's ids where the
    joint tokenisation keeps them, and are tokenised apart where it does not. One BOS where the tokenizer adds one, none
    added to a chat template's text. Too long: cut on the right (then without EOS), left out where no response token
    remains. Special tokens written out in data are plain text, except under a chat template, whose markers they are.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise UserError("the tokenizer has no EOS token, so the model could not learn to stop")
    begin = [bos] if adds_bos(tokenizer) else []
    examples, dropped = [], {}

    def ids_of(texts, special):
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=not special, verbose=False).input_ids

    def leave_out(reason):
        dropped[reason] = dropped.get(reason, 0) + 1

    chunk = 1000
    for at in tqdm(range(0, len(rows), chunk), desc=f"tokenise {progress}", disable=progress is None or len(rows) < 2 * chunk,
                   unit="k rows", leave=False):
        block = rows[at:at + chunk]
        parts = []  # (prompt, response, chat)
        for row in block:
            if not row.messages:
                parts.append(("", row.response, False))
            elif template == "chat":
                parts.append((*chat_parts(row, tokenizer), True))
            else:
                parts.append(((alpaca_prompt if template == "alpaca" else plain_prompt)(row), row.response, False))
        chat = [i for i, part in enumerate(parts) if part[2]]
        flat = [i for i, part in enumerate(parts) if not part[2]]
        prompts, joints = [None] * len(parts), [None] * len(parts)
        for chosen, special in ((chat, True), (flat, False)):
            for i, prompt, joint in zip(chosen, ids_of([parts[i][0] for i in chosen], special),
                                        ids_of([parts[i][0] + parts[i][1] for i in chosen], special)):
                prompts[i], joints[i] = prompt, joint
        for i, (prompt, joint) in enumerate(zip(prompts, joints)):
            response = joint[len(prompt):] if joint[:len(prompt)] == prompt else ids_of([parts[i][1]], parts[i][2])[0]
            if parts[i][2]:
                if response and response[-1] == eos:
                    response = response[:-1]  # the template's own end of turn
                context = prompt
            else:
                context = begin + prompt if block[i].messages else ([bos] if bos is not None else [])
            if not response:
                leave_out("empty response")
                continue
            if eos in response:
                leave_out("end token inside the response")
                continue
            ids = (context + response + [eos])[:max_length]
            start = max(1, len(context))
            if len(ids) <= start:
                leave_out("prompt fills max_length")
                continue
            examples.append(Example(np.array(ids, dtype=np.int64), start, at + i, dataset))
    return examples, dropped


def encode_datasets(datasets, tokenizer, template, max_length, quiet=False):
    """encode() over datasets -> list (one per dataset) of lists of Example; prints what was left out.
    Raises UserError where a dataset keeps nothing."""
    result = []
    for k, dataset in enumerate(datasets):
        examples, dropped = encode(dataset.rows, tokenizer, template, max_length, k, None if quiet else dataset.label)
        dropped = {reason: dataset.dropped.get(reason, 0) + dropped.get(reason, 0) for reason in {**dataset.dropped, **dropped}}
        if not quiet:
            tokens = sum(example.response_tokens for example in examples)
            note = "".join(f", left out {count} ({reason})" for reason, count in dropped.items())
            print(f"data  {dataset.label}: {len(examples):,} examples, {tokens:,} response tokens{note}")
        if not examples:
            raise UserError(f"dataset {dataset.label!r}: no example is left at --max_length {max_length}; left out: {dropped}")
        result.append(examples)
    return result


def show_examples(examples, tokenizer, count=2):
    """Print examples decoded, each supervised token between ⟦ ⟧ (look at your data before you train on it)."""
    for example in examples[:count]:
        context = tokenizer.decode(example.ids[:example.start].tolist())
        supervised = "".join(f"⟦{tokenizer.decode([token])}⟧" for token in example.ids[example.start:].tolist())
        print(f"--- row {example.row}: {example.start} context tokens, {example.response_tokens} supervised ⟦⟧\n{context}{supervised}")
    print("---", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Model
# ----------------------------------------------------------------------------------------------------------------------


def tiny_tokenizer():
    """Byte-level tokenizer: 256 bytes, then <pad>, <s>, </s> (all distinct); BOS is added like Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                                model_max_length=2048)


def tiny_model(seed=0):
    """GPT-2 of about 1M random parameters (4 layers of 128, no dropout), the same for the same seed."""
    config = transformers.GPT2Config(vocab_size=259, n_positions=2048, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=257, eos_token_id=258, pad_token_id=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config)


def pick_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name, device):
    """auto -> bf16 where the GPU computes in it, else fp32 (bf16 on a CPU is slower, not faster)."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return name


def autocast(device, dtype):
    """bf16 matrix products over fp32 master weights; nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


def load_model(name, device, *, seed=0, dtype="fp32", gradient_checkpointing=False, lora_rank=0, lora_alpha=None, lora_dropout=0.0):
    """-> (model, tokenizer). Full fine-tuning keeps fp32 master weights (bf16 ones lose updates of lr 2e-6); under LoRA
    with bf16 the frozen base is bf16 and the adapter fp32. Raises UserError."""
    if name == "tiny":
        model, tokenizer = tiny_model(seed), tiny_tokenizer()
    else:
        if (name[0] in "./~" or name.count("/") > 1) and not Path(name).is_dir():
            raise UserError(f"--model {name}: no such folder")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            storage = torch.bfloat16 if lora_rank and dtype == "bf16" else torch.float32
            if Path(name, "adapter_config.json").is_file():  # an adapter saved by these scripts: merged, then trained on
                import peft
                model = peft.AutoPeftModelForCausalLM.from_pretrained(name, dtype=storage).merge_and_unload()
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=storage)
        except Exception as error:  # transformers raises many types, with messages of many lines
            raise UserError(f"--model {name}: cannot be loaded ({type(error).__name__}: {str(error)[:300]})") from None
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"--model {name}: the tokenizer has {len(tokenizer):,} tokens, the model embeds only {rows:,}")
    model.config.use_cache = False
    if lora_rank:
        import peft
        transposed = any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules())  # GPT-2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = peft.get_peft_model(model, peft.LoraConfig(
                task_type="CAUSAL_LM", r=lora_rank, lora_alpha=lora_alpha or 2 * lora_rank, lora_dropout=lora_dropout,
                target_modules="all-linear", fan_in_fan_out=transposed))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # the only name from transformers 6 on
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora_rank:
            model.enable_input_require_grads()  # else the frozen embedding cuts the gradient off
    return model.to(device), tokenizer


def causal_lm(model):
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def max_positions(model):
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048


@dataclass(frozen=True)
class Head:
    """The output head: logits = cap(scale · (hidden @ weight.T + bias)), cap(s) = softcap · tanh(s / softcap)."""
    weight: torch.Tensor              # (V, H)
    bias: torch.Tensor | None = None  # (V,)
    scale: float = 1.0                # Cohere multiplies by logit_scale, Granite divides by logits_scaling
    softcap: float | None = None      # Gemma-2


def output_head(model):
    """The Head of any causal LM of transformers."""
    lm = causal_lm(model)
    layer, config = lm.get_output_embeddings(), lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    return Head(layer.weight, getattr(layer, "bias", None), float(scale), getattr(config, "final_logit_softcapping", None))


def hidden_states(model, ids):
    """Last hidden state after the final norm, the input of the head. ids (B, T) right-padded -> (B, T, H).
    Causal attention never looks to the right, so padding there needs no attention mask."""
    lm = causal_lm(model)
    return getattr(lm, lm.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model, device):
    """Raise UserError unless our head gives the model's own logits: some architectures do more than Head knows of."""
    lm, head, training = causal_lm(model), output_head(model), model.training
    model.eval()
    ids = torch.arange(8, device=device)[None] % head.weight.shape[0]
    own = lm(input_ids=ids, use_cache=False).logits.float()
    raw = _product(hidden_states(model, ids)[0], head.weight)
    raw = (raw if head.bias is None else raw + head.bias) * head.scale
    ours = raw if not head.softcap else head.softcap * torch.tanh(raw / head.softcap)
    model.train(training)
    limit = 1e-3 if own.dtype == lm.dtype else 3e-2  # lm.dtype bf16: the model rounds its own logits
    error = ((ours - own[0]).abs().max() / own.abs().max().clamp_min(1e-6)).item()
    if not error <= limit:
        raise UserError(f"{lm.config.model_type}: logits differ from the model's own by {error:.1e} (relative): this architecture's "
                        "head is not supported")


def check_gradients(model, example, device, dtype):
    """Raise UserError unless a backward pass reaches every trainable parameter (LoRA + checkpointing can cut it off).
    Experts that no token is routed to are excused. Leaves no gradient behind."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    batch = collate([example], device)
    with autocast(device, dtype):
        hidden = hidden_states(model, batch.ids)
    loss, _ = response_loss(batch.select(hidden), batch.targets, output_head(model))
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
               and "expert" not in name]
    model.zero_grad(set_to_none=True)
    if missing:
        raise UserError(f"{len(missing)} of {len(names)} trainable tensors get no gradient, the first is {missing[0]}")


def describe_model(model, name, dtype):
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model {name}: {total:,} parameters, {trainable:,} trainable, {dtype}, {next(model.parameters()).device}")


# ----------------------------------------------------------------------------------------------------------------------
# 5. Batches. Order comes from its own stateless generator: (seed, stream, epoch) -> numpy RNG, so a cursor is two numbers,
#    every rank sees the same order, and a baseline sees the batches of the method.
# ----------------------------------------------------------------------------------------------------------------------

LENGTH_WINDOW = 16  # optimizer batches within which examples are grouped by length
LENGTH_GROUP = 8    # examples of similar length that stay together; a batch is made of several groups, of any lengths


def _stream(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def data_rng(seed, stream, *position):
    """numpy generator for one use (stream) at one position (epoch, step, ...), apart from the model's RNG."""
    return np.random.default_rng([seed, _stream(stream), *position])


def batch_sizes(total, batch_size):
    """(steps,) near-equal sizes of at most batch_size that add up to total: no tiny last batch."""
    steps = -(-total // batch_size)
    return np.diff(np.linspace(0, total, steps + 1).round().astype(int))


def length_grouped(order, lengths, sizes, rng, window=LENGTH_WINDOW, group=LENGTH_GROUP):
    """Cut a permutation into batches of groups of examples of similar length.

    order (N,) permuted indices; lengths (N_all,) by index; sizes (steps,). Within each window of batches the examples are
    sorted by length and cut into groups of at most `group`, which are dealt to the window's batches at random. So
    micro-batches waste little on padding, and yet a batch holds all lengths: batches of one length would be batches of one
    kind of task, and a batch of short responses, divided by its few tokens, would count each of them for more. Every index is
    used exactly once; window=1 groups nothing across batches. -> list of index arrays
    """
    batches, at = [], 0
    for first in range(0, len(sizes), window):
        counts = np.asarray(sizes[first:first + window])
        block = order[at:at + counts.sum()]
        at += counts.sum()
        block = block[np.argsort(lengths[block], kind="stable")]
        slots = [(batch, size) for batch, count in enumerate(counts) for size in batch_sizes(count, group)]
        dealt = rng.permutation(len(slots))
        groups = np.split(block, np.cumsum([slots[i][1] for i in dealt])[:-1])
        members = [[] for _ in counts]
        for i, indices in zip(dealt, groups):
            members[slots[i][0]].append(indices)
        batches += [np.concatenate([*parts, block[:0]]) for parts in members]
    return batches


def epoch_batches(lengths, batch_size, seed, epoch, stream="order", window=LENGTH_WINDOW):
    """One epoch of shuffled, length-grouped batches over all examples -> list of index arrays; each example once."""
    rng = data_rng(seed, stream, epoch)
    return length_grouped(rng.permutation(len(lengths)), np.asarray(lengths), batch_sizes(len(lengths), batch_size), rng, window)


class MixtureSampler:
    """Batches whose examples come from K datasets with given probabilities: for each example a dataset is drawn, then that
    dataset's next example. Every dataset is passed through in a random order without replacement, reshuffled for each pass.
    The order is a function of (seed, dataset, pass) and the draws one of (seed, step), so `drawn` is the whole state.

    sizes (K,) examples per dataset; lengths (N,) tokens of all examples, dataset after dataset: an example's index is its
    place there. drawn (K,): examples taken from each dataset so far.
    """

    def __init__(self, sizes, lengths, batch_size, seed):
        self.sizes, self.lengths = np.asarray(sizes, dtype=np.int64), np.asarray(lengths)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.batch_size, self.seed = batch_size, seed
        self.drawn, self._order = np.zeros(len(self.sizes), dtype=np.int64), {}

    def _take(self, k, count):
        """The next count examples of dataset k, over as many passes as that needs -> indices."""
        parts = []
        while count:
            number, at = divmod(int(self.drawn[k]), int(self.sizes[k]))
            if self._order.get(k, (None,))[0] != number:
                self._order[k] = number, data_rng(self.seed, "pass", k, number).permutation(self.sizes[k])
            part = self._order[k][1][at:at + count]
            parts.append(part)
            self.drawn[k] += len(part)
            count -= len(part)
        return self.starts[k] + np.concatenate(parts)

    def batches(self, probabilities, step, steps=1):
        """The batches of optimizer steps step .. step + steps - 1, drawn with probabilities (K,) -> list of index arrays.
        Several at once are grouped by length (length_grouped: less padding). A batch of LENGTH_GROUP examples or fewer is then
        of one length; with steps=1 every batch is drawn by itself."""
        rng = data_rng(self.seed, "mixture", step)
        arms = rng.choice(len(self.sizes), steps * self.batch_size, p=probabilities)
        order = np.empty(len(arms), dtype=np.int64)
        for k in np.unique(arms):
            order[arms == k] = self._take(k, int((arms == k).sum()))
        return length_grouped(order, self.lengths, [self.batch_size] * steps, rng, window=steps)


def rank_slice(batch, rank, world):
    """This rank's part of a global batch; disjoint over ranks, and together the batch."""
    return batch[rank::world]


def micro_batches(items, lengths, micro_batch_size):
    """Split a batch into micro-batches of similar length. items, lengths: equally long lists -> list of lists."""
    order = sorted(range(len(items)), key=lambda i: (-lengths[i], i))  # longest first: memory peaks at once
    return [[items[i] for i in order[at:at + micro_batch_size]] for at in range(0, len(order), micro_batch_size)]


@dataclass
class Batch:
    """A padded micro-batch. Rows run through example 0's response, then example 1's, ..."""
    ids: torch.Tensor        # (B, T) right-padded
    positions: torch.Tensor  # (R,) index into (B·T) of the token that predicts each supervised token
    targets: torch.Tensor    # (R,) the supervised tokens
    lengths: torch.Tensor    # (B,) supervised tokens per example, on the CPU

    def select(self, hidden):
        """(B, T, H) -> (R, H): the states that predict the supervised tokens."""
        return hidden.reshape(-1, hidden.shape[-1])[self.positions]


def collate(examples, device):
    """Pad examples on the right. Supervision goes by position, never by token id, so padding with any id is harmless.
    An entry may be None: it has length 0 and no line in ids (a missing partner in a batch that pairs its halves)."""
    width = max(len(example.ids) for example in examples if example is not None)
    ids = np.zeros((sum(example is not None for example in examples), width), dtype=np.int64)
    positions, targets = [], []
    for b, example in enumerate(example for example in examples if example is not None):
        ids[b, :len(example.ids)] = example.ids
        positions.append(np.arange(b * width + example.start - 1, b * width + len(example.ids) - 1))
        targets.append(example.ids[example.start:])
    move = functools.partial(torch.Tensor.to, device=device, non_blocking=True)
    return Batch(move(torch.from_numpy(ids)), move(torch.from_numpy(np.concatenate(positions))),
                 move(torch.from_numpy(np.concatenate(targets))),
                 torch.tensor([0 if example is None else example.response_tokens for example in examples]))


# ----------------------------------------------------------------------------------------------------------------------
# 6. Chunked response loss: logits of a few hundred rows at a time, gradient computed in the forward pass
# ----------------------------------------------------------------------------------------------------------------------


def _product(a, b):
    """a @ b.T with fp32 (float64 for float64) result: bf16 inputs keep their speed, the sum is not rounded to bf16."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return a.to(wide) @ b.to(wide).T


def soft_cross_entropy_(logits, targets, probs, head):
    """Cross-entropy between the head's softmax and targets that spread over k tokens, row by row, in place.

    logits (R, V): raw products hidden @ weight.T + bias, fp32 or float64; overwritten with d nll / d logits (the chain
    through the head's scale and soft-cap included). targets (R, k) token ids, probs (R, k) their probabilities.
    -> nll (R,) = logsumexp(s) - Σ_k probs_k s[targets_k]. Targets are subtracted in logits' own precision.
    """
    if head.scale != 1.0:
        logits.mul_(head.scale)
    slope = None
    if head.softcap:
        logits.div_(head.softcap).tanh_()
        slope = 1 - logits ** 2
        logits.mul_(head.softcap)
    probs = probs.to(logits.dtype)
    picked = (logits.gather(1, targets) * probs).sum(1)
    peak = logits.amax(1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(1, keepdim=True)
    nll = (peak + total.log()).squeeze(1) - picked
    logits.div_(total).scatter_add_(1, targets, -probs)
    if slope is not None:
        logits.mul_(slope)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    return nll


def cross_entropy_(logits, targets, head):
    """soft_cross_entropy_ with one target a row. targets (R,) -> nll (R,)."""
    return soft_cross_entropy_(logits, targets[:, None], torch.ones_like(targets, dtype=logits.dtype)[:, None], head)


def chunk_rows(vocabulary, device):
    """Rows of logits held at once: 128 to 1,024 are equally fast, fewer are slow, more only cost memory."""
    return max(128, min(1024, (2 ** 27 if device.type == "cuda" else 2 ** 25) // vocabulary))


class _ChunkedHead(torch.autograd.Function):
    """Σ over blocks of block_loss(logits of the block); see chunked_head_loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, blocks, block_loss, want_gradient):
        needs_hidden, needs_weight, needs_bias = (want_gradient and need for need in ctx.needs_input_grad[:3])
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        narrow = hidden.dtype if hidden.is_cuda else wide  # on a GPU products take bf16 inputs; a CPU gains nothing by it
        matrix = weight.detach().to(narrow)
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if needs_weight else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=hidden.device) if needs_bias else None
        totals = 0.0
        for rows, *extra in blocks:
            states = hidden[rows].to(narrow)
            logits = _product(states, matrix)                               # (rows, V)
            if bias is not None:
                logits += bias
            totals = totals + block_loss(logits, rows, *extra)              # logits now hold d loss / d logits
            if needs_bias:
                d_bias += logits.sum(0)
            if needs_hidden or needs_weight:
                gradient = logits.to(narrow)
                if needs_hidden:
                    d_hidden[rows] = _product(gradient, matrix.T)           # (rows, H)
                if needs_weight and narrow == wide:
                    d_weight.addmm_(gradient.T, states)
                elif needs_weight:
                    d_weight += _product(gradient.T, states.T)
            del logits
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        return totals

    @staticmethod
    def backward(ctx, d_totals):
        gradients = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes):
            if gradient is not None:
                scale = d_totals[0].to(gradient.dtype)  # only the first total is differentiable
                # in place: (V, H) is large. float64 is for gradient checks, which call backward again.
                gradient = (gradient * scale if gradient.dtype == torch.float64 else gradient.mul_(scale)).to(dtype)
            gradients.append(gradient)
        return (*gradients, None, None, None)


def chunked_head_loss(hidden, head, blocks, block_loss):
    """A loss over the logits of many rows without ever holding more than a block of them.

    hidden (R, H); blocks: list of (rows (r,), ...) tuples; block_loss(logits (r, V), rows, ...) -> (k,) float64 sums,
    after overwriting logits with the gradient of the first sum. -> (k,) totals; the first is differentiable in hidden, weight
    and bias. Under no_grad nothing but the values is computed. In fp32 and bf16 backward may be called only once.
    """
    want_gradient = torch.is_grad_enabled()
    return _ChunkedHead.apply(hidden, head.weight, head.bias, blocks, block_loss, want_gradient)


def response_loss(hidden, targets, head, correct=None):
    """Plain cross-entropy summed over response tokens. hidden (R, H), targets (R,).
    -> loss (float64 scalar, differentiable), nll (R,) fp32 per token without gradient.
    correct: a (R,) bool tensor to fill with "the argmax is the target"."""
    nll = torch.empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)

    def block_loss(logits, rows):
        if correct is not None:
            correct[rows] = logits.argmax(1) == targets[rows]
        nll[rows] = cross_entropy_(logits, targets[rows], head)
        return nll[rows].sum(dtype=torch.float64)[None]

    blocks = [(rows,) for rows in torch.arange(len(targets), device=hidden.device).split(chunk_rows(*head.weight.shape[:1], hidden.device))]
    return chunked_head_loss(hidden, head, blocks, block_loss)[0], nll


# ----------------------------------------------------------------------------------------------------------------------
# 7. Scoring and evaluation
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model, examples, batch_size, device, dtype, progress=None):
    """Loss of every example, in evaluation mode, sums accumulated in float64.

    -> nll (N,) summed over the response, tokens (N,) int64, correct (N,) int64 tokens whose argmax is the target.
    Batches are sorted by length (longest first). Leaves the model in the mode it was in.
    """
    head, training = output_head(model), model.training
    nll, tokens, correct = np.zeros(len(examples)), np.zeros(len(examples), np.int64), np.zeros(len(examples), np.int64)
    model.eval()
    with tqdm(total=len(examples), desc=progress, disable=progress is None, leave=False, unit="ex") as bar:
        for group in micro_batches(range(len(examples)), [len(example.ids) for example in examples], batch_size):
            batch = collate([examples[i] for i in group], device)
            with autocast(device, dtype):
                hidden = hidden_states(model, batch.ids)
            hits = torch.zeros(len(batch.targets), dtype=torch.bool, device=device)
            _, rows = response_loss(batch.select(hidden), batch.targets, head, hits)
            sizes = batch.lengths.tolist()
            nll[group] = [part.sum().item() for part in rows.double().cpu().split(sizes)]
            correct[group] = [part.sum().item() for part in hits.cpu().split(sizes)]
            tokens[group] = sizes
            bar.update(len(group))
    model.train(training)
    return nll, tokens, correct


def perplexities(model, examples, batch_size, device, dtype, progress="confidence"):
    """The confidence pass (SFTMix §3.1): Perp(Y|X) = exp(mean NLL of the response) of every example -> (N,) float64.
    Raises UserError where one is not finite."""
    nll, tokens, _ = score(model, examples, batch_size, device, dtype, progress)
    with np.errstate(over="ignore"):
        values = np.exp(nll / tokens)
    if not np.isfinite(values).all():
        raise UserError(f"the perplexity of {np.sum(~np.isfinite(values))} examples is not finite: the reference model diverged; lower --lr")
    return values


def evaluate(model, eval_sets, batch_size, device, dtype, progress=True):
    """{label: examples} -> {label: {"nll", "ppl", "accuracy", "tokens"}}, weighted by tokens over the whole set."""
    result = {}
    for label, examples in eval_sets.items():
        nll, tokens, correct = score(model, examples, batch_size, device, dtype, f"evaluate {label}" if progress else None)
        mean = nll.sum() / tokens.sum()
        result[label] = {"nll": float(mean), "ppl": float(np.exp(min(mean, 700.0))),
                         "accuracy": float(correct.sum() / tokens.sum()), "tokens": int(tokens.sum())}
    return result


def encode_choices(rows, tokenizer, template, max_length):
    """Multiple-choice rows -> (list of questions, {reason: rows left out}). A question is a list of Examples, one a choice in
    the row's order, without an end token: what differs between the choices is the answer alone. A question with a choice
    that does not fit into max_length is left out. Raises UserError where a row has no choices."""
    flat, questions, dropped = [], [], {}
    for row in rows:
        if len(row.choices) < 2:
            raise UserError(f"{row.where}: is no multiple-choice row, accuracy over choices cannot be measured on it")
        flat += [replace(row, response=choice) for choice in row.choices]
    examples, _ = encode(flat, tokenizer, template, max_length)
    whole = {example.row: replace(example, ids=example.ids[:-1]) for example in examples
             if example.ids[-1] == tokenizer.eos_token_id and example.response_tokens > 1}
    at = 0
    for number, row in enumerate(rows):
        question = [whole.get(i) for i in range(at, at + len(row.choices))]
        at += len(row.choices)
        if None in question:
            dropped["a choice does not fit"] = dropped.get("a choice does not fit", 0) + 1
        else:
            questions.append([replace(example, row=number) for example in question])
    return questions, dropped


def choose(model, questions, batch_size, device, dtype, progress=None):
    """Log-likelihood of every choice, summed over its tokens -> list of float64 arrays, one a question (lm-eval's `acc`
    takes the argmax)."""
    nll, _, _ = score(model, [example for question in questions for example in question], batch_size, device, dtype, progress)
    return np.split(-nll, np.cumsum([len(question) for question in questions])[:-1])


# ----------------------------------------------------------------------------------------------------------------------
# 8. Optimisation
# ----------------------------------------------------------------------------------------------------------------------


def make_optimizer(model, lr, weight_decay):
    """Fused AdamW; matrices decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def learning_rate(step, total, peak, schedule, warmup_ratio):
    """Learning rate of optimizer step `step` (from 0) of `total`: rises linearly over warmup_ratio · total steps, then
    cosine or linear to 0, or constant. The first step is not at 0 and the last not yet."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]


def optimizer_step(model, optimizer, lr, max_grad_norm):
    """Set the learning rate, clip the global norm, step, clear. -> gradient norm before clipping (float).
    Raises UserError where it is not finite; nothing is updated then."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm).item()
    if not math.isfinite(norm):
        raise UserError(f"the gradient norm is {norm}: training diverged; lower --lr (the last checkpoint is kept)")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def total_steps(args, steps_per_epoch):
    """--max_steps, or --epochs turned into optimizer steps."""
    return args.max_steps if args.max_steps else max(1, math.ceil(args.epochs * steps_per_epoch - 1e-9))


# ----------------------------------------------------------------------------------------------------------------------
# 9. Run folder, metrics and checkpoints
# ----------------------------------------------------------------------------------------------------------------------

# Flags that may differ when a run is resumed: they change what is written, not what is computed.
RESUME_FREE = {"output_dir", "resume", "log_every", "eval_every", "save_every", "track", "show_batch"}


def write_text(path, text):
    """Write a file so that a reader sees the old or the new one, never half of it."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def rng_state():
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def trainable_state(model):
    """name -> tensor of the trainable parameters (all of them, or the adapter's)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trainable_state(model, state):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])


def _git_commit():
    here = Path(__file__).resolve().parent
    try:
        call = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=10)
        commit = call(["git", "rev-parse", "HEAD"]).stdout.strip()
        return (commit + ("+changes" if call(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")) or None
    except (OSError, subprocess.SubprocessError):
        return None


class Run:
    """The run folder: config.json, metrics.jsonl, checkpoint/, figures, final/ and, last, summary.json.

    Open it once everything that can be wrong with the user's input has been checked: nothing is written before.
    run.state is the checkpoint that --resume found, or None; run.finished says that there is nothing left to do.
    """

    def __init__(self, script, args, **config):
        if args.resume and args.resume is not True:
            args.output_dir = args.resume
        if args.resume and not args.output_dir:
            raise UserError("--resume: which run? give its folder, --resume runs/...")
        model = Path(args.model).name or "model"
        self.folder = Path(args.output_dir or f"runs/{script}-{model}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
        args.output_dir = str(self.folder)
        flags = {key: value for key, value in vars(args).items() if key != "resume"}
        self.script, self.state, self.time, self._before, self._started = script, None, {}, 0.0, time.perf_counter()
        old = self.folder / "config.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output_dir {self.folder}: is a file")
        if old.exists() and not args.resume:
            raise UserError(f"{self.folder} already holds a run: continue it with --resume {self.folder}, or choose another --output_dir")
        if args.resume and not old.exists():
            raise UserError(f"--resume {self.folder}: there is no run in this folder (no config.json)")
        self.finished = (self.folder / "summary.json").exists()
        offset = 0
        if args.resume:
            self._check_same(json.loads(old.read_text(encoding="utf-8")), script, flags, config)
            saved = self.folder / "checkpoint" / "state.pt"
            if saved.exists() and not self.finished:
                self.state = torch.load(saved, map_location="cpu", weights_only=True)
                offset, self.time, self._before = (self.state[key] for key in ("metrics_offset", "time", "seconds"))
        writer = None if self.finished else self._tracker_library(args.track)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tracker = writer and self._open_tracker(args.track, writer, args)
        if not args.resume:
            versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                        "datasets": hf_datasets.__version__, "numpy": np.__version__,
                        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"}
            write_text(old, json.dumps({"script": script, "flags": flags, **config, "versions": versions, "git_commit": _git_commit(),
                                        "command": sys.argv}, indent=1, ensure_ascii=False) + "\n")
        if not self.finished:
            self._metrics = open(self.folder / "metrics.jsonl", "ab")
            self._metrics.truncate(offset)  # lines after the checkpoint will be written again
        print(f"run   {self.folder}" + (" (resumed)" if self.state else ""))

    @staticmethod
    def _check_same(old, script, flags, config):
        if old["script"] != script:
            raise UserError(f"--resume: the run was made by {old['script']}.py, not {script}.py")
        flags = json.loads(json.dumps(flags))
        for key in sorted(set(flags) - RESUME_FREE):
            if old["flags"].get(key) != flags[key]:
                raise UserError(f"--resume: --{key} was {old['flags'].get(key)!r} and is now {flags[key]!r}; give the flags of the first start")
        for key, value in json.loads(json.dumps(config)).items():
            if old.get(key) != value:
                raise UserError(f"--resume: {key.replace('_', ' ')} differs from the first start; has a data file or the model changed?")

    @staticmethod
    def _tracker_library(name):
        """The tracker's library, imported only when asked for."""
        try:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                return SummaryWriter
            if name == "wandb":
                import wandb
                return wandb
        except ImportError:
            raise UserError(f"--track {name} needs: pip install {name}") from None
        return None

    def _open_tracker(self, name, library, args):
        """-> function(step, {metric: number}). A method's stages each count their own steps."""
        if name == "tensorboard":
            writer = library(self.folder / "tensorboard")
            return lambda step, values: [writer.add_scalar(key, value, step) for key, value in values.items()] and writer.flush()
        library.init(name=self.folder.name, dir=str(self.folder), config=vars(args), resume="allow", id=re.sub(r"\W", "-", self.folder.name))
        library.define_metric("*", step_metric="step")
        return lambda step, values: library.log({"step": step, **values})

    @contextlib.contextmanager
    def timer(self, name):
        """Add the seconds spent inside to time[name]."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.time[name] = self.time.get(name, 0.0) + time.perf_counter() - started

    @property
    def seconds(self):
        """Wall-clock seconds of the run, over all its starts."""
        return self._before + time.perf_counter() - self._started

    def log(self, step, values, line=None):
        """One JSON line (with time/<timer> in seconds so far), and one human line where given."""
        record = {"step": step, **values, **{f"time/{name}": round(seconds, 3) for name, seconds in self.time.items()}}
        self._metrics.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self._metrics.flush()
        if self._tracker:
            self._tracker(step, {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"})
        if line:
            tqdm.write(line)

    def save_checkpoint(self, state):
        """Everything the loop needs to go on as if nothing had happened; the model's RNG is added here."""
        folder = self.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        os.fsync(self._metrics.fileno())
        state = {**state, "rng": rng_state(), "metrics_offset": self._metrics.tell(), "time": dict(self.time), "seconds": self.seconds}
        with open(folder / "state.pt.tmp", "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(folder / "state.pt.tmp", folder / "state.pt")

    def metrics(self):
        """All records of metrics.jsonl so far."""
        self._metrics.flush()
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]

    def save_model(self, model, tokenizer, name="final"):
        """Model (or adapter) and tokenizer in Hugging Face format under <name>/, complete or not there at all."""
        import shutil
        temporary, final = self.folder / f"{name}.tmp", self.folder / name
        shutil.rmtree(temporary, ignore_errors=True)
        lm = causal_lm(model)
        lm.config.use_cache = True  # as it came: users generate with what we save
        model.save_pretrained(temporary)
        lm.config.use_cache = False
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)

    def finish(self, summary):
        """Write summary.json: the sign that the run is complete."""
        summary = {**summary, "seconds": round(self.seconds, 3), "time": {name: round(value, 3) for name, value in self.time.items()}}
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        self._metrics.close()
        print(f"done  {self.folder}/summary.json after {summary['seconds']:.0f} s: "
              + ", ".join(f"{name} {value:.0f} s" for name, value in self.time.items()))


def print_evaluation(result):
    """A table of evaluate()'s numbers."""
    width = max(map(len, result))
    for label, row in result.items():
        print(f"eval  {label:<{width}}  nll {row['nll']:.4f}  ppl {row['ppl']:.4f}  accuracy {row['accuracy']:.4f}  ({row['tokens']:,} tokens)")


def new_figure(columns=1, rows=1, width=5.2, height=3.4):
    """matplotlib figure and axes without a display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False)


def log_axis(axis):
    """Make a matplotlib XAxis or YAxis logarithmic with plain numbers (4, 6, 10 instead of powers of ten)."""
    from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8), numticks=8))
    axis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(100, 100)))
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure, path):
    """Write a PNG under its final name once it is complete, and free the figure."""
    import matplotlib.pyplot as plt
    figure.savefig(f"{path}.tmp", dpi=130, format="png")
    plt.close(figure)
    os.replace(f"{path}.tmp", path)


# ----------------------------------------------------------------------------------------------------------------------
# 10. Snapshots: try a step and put everything back, bit for bit
# ----------------------------------------------------------------------------------------------------------------------


class Snapshot:
    """A copy of trainable parameters, optimizer state, RNGs and train/eval mode, to be restored any number of times.

    On a GPU the copy stays there if it fits into half of what is free, else it goes to the CPU's memory (self.device says).
    Data cursors need no copy: data order is a function of (seed, stream, position).
    """

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        if self.device.type == "cuda":
            needed = sum(3 * p.numel() * p.element_size() for p in self.parameters)  # weights and Adam's two moments
            if needed > torch.cuda.mem_get_info()[0] / 2:
                self.device = torch.device("cpu")
        with torch.no_grad():
            self.weights = [p.detach().to(self.device, copy=True) for p in self.parameters]
            self.moments = [{key: value.detach().to(self.device if value.dim() else value.device, copy=True)
                             for key, value in optimizer.state[p].items()} if p in optimizer.state else None for p in self.parameters]
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.rng, self.modes = rng_state(), [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def restore(self):
        """Put everything back as it was; gradients are cleared."""
        for parameter, weight, moments in zip(self.parameters, self.weights, self.moments):
            parameter.copy_(weight)
            parameter.grad = None
            if moments is None:
                self.optimizer.state.pop(parameter, None)
            else:
                for key, value in moments.items():
                    self.optimizer.state[parameter][key].copy_(value)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate
        for module, training in self.modes:
            module.training = training
        set_rng_state(self.rng)
