"""From a file to tokens: rows, schemas, sources, toy tasks, templates, tokens. This is the ground
floor: it imports nothing of the project."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm


class UserError(Exception):
    """Something the user can put right. Shown as one line `error: ...` on stderr, exit status 2."""


def stream_id(name: str) -> int:
    """A number for a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def data_rng(seed: int, stream: str, *position: int) -> np.random.Generator:
    """Generator for one use (stream) at one position (epoch, step, ...), apart from the model's. It
    has no state to save: every process sees the same order, a baseline the method's batches."""
    return np.random.default_rng([seed, stream_id(stream), *position])


def read_jsonl(path: str | Path, flag: str) -> list:
    """The JSON value of every line of a file that `flag` names. Raises UserError with the row."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error})") from None
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{flag} {path}, row {number}: is not JSON ({error})") from None
    return values


# ---- Rows and datasets: no tokenizer so far ------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """One supervised turn as text."""

    messages: tuple  # ((role, content), ...) before the response, oldest first; () for plain text
    response: str  # what is supervised
    input: str = ""  # Alpaca's input field, apart from the last user message
    file: str = ""  # where it came from, for error messages
    number: int = 0  # row of that file, from 1
    choices: tuple = ()  # multiple choice: the answers, of which response is one
    answer: int = -1  # multiple choice: index of response in choices

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"

    @property
    def prompt(self) -> tuple | str:  # or a plain text itself
        return (self.messages, self.input) if self.messages else self.response


@dataclass
class Dataset:
    """Rows under one label, and how many rows were skipped, by reason."""

    label: str
    rows: list[Row]
    skipped: dict[str, int] = field(default_factory=dict)


def fingerprint(datasets: Iterable[Dataset]) -> str:
    """sha256 over the text of all rows in order, whatever their labels, files and tokenizer."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for row in dataset.rows:
            text = [row.messages, row.input, row.response]
            digest.update(json.dumps(text, ensure_ascii=False).encode())
    return digest.hexdigest()


# ---- Schemas: a record of any accepted form -> rows ----------------------------------------------

# prompt/input/response columns, tried in this order; "-" is no column
FLAT_SCHEMAS = [
    *("instruction/input/output", "instruction/context/response", "instruction/input/response"),
    *("prompt/input/completion", "prompt/input/response", "question/input/answer"),
    *("query/input/answer", "query/input/response", "question/input/best_answer"),
    *("problem/input/solution", "prompt/-/canonical_solution", "input/-/output"),
]
ACCEPTED = (
    "instruction/input/output, prompt/completion, prompt/response, instruction/context/response, "
    "question/answer, messages (role, content), conversations (from, value), text, or a "
    "multiple-choice schema (README, Data)"
)
ROLES = {role: role for role in ("user", "assistant", "system", "tool")}
ROLES |= dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("gpt", "bot", "model", "chatgpt", "function_call"), "assistant")
ROLES |= dict.fromkeys(("function", "observation", "function_response"), "tool")


def _text(value) -> str:
    """A cell as text: None -> "", numbers -> str. Lone surrogates cannot be encoded: replaced."""
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    return str(value).encode("utf-8", "replace").decode("utf-8")


def labelled_choices(targets: dict) -> tuple[list, list]:
    """TruthfulQA's {"choices": .., "labels": ..} or {answer: 0, 1 or None} -> both as lists."""
    if "choices" in targets:
        return list(targets["choices"]), list(targets["labels"])
    kept = {choice: int(label) for choice, label in targets.items() if label is not None}
    return list(kept), list(kept.values())


def _multiple_choice(record: dict) -> tuple[str, list, int] | None:
    """-> (question, choices, index of the right one), or None where the record is no such row."""
    get, question = record.get, _text(record.get("question"))
    if "ans0" in record and "label" in record:  # BBQ
        choices = [record[f"ans{i}"] for i in range(10) if get(f"ans{i}") is not None]
        return f"{_text(get('context'))}\n{question}".strip(), choices, int(get("label"))
    if get("mc1_targets"):  # TruthfulQA
        choices, labels = labelled_choices(record["mc1_targets"])
        return question, choices, labels.index(1)
    if get("endings") and "label" in record:  # HellaSwag
        return _text(get("ctx")), list(record["endings"]), int(get("label"))
    if "opa" in record and "cop" in record:  # MedMCQA
        return question, [record[f"op{letter}"] for letter in "abcd"], int(get("cop"))
    options, answer = get("options"), get("answer_idx")  # MedQA
    if not options or answer is None:  # MMLU
        options, answer = get("choices"), get("answer")
    elif isinstance(options, dict):
        keys = [key for key in sorted(options) if options[key] is not None]
        return question, [options[key] for key in keys], keys.index(str(answer))
    if not options or answer is None or not isinstance(options, (list, tuple)):
        return None
    index = "ABCDEFGHIJ".index(answer) if isinstance(answer, str) else int(answer)
    return question, list(options), index


def _dialogue(turns: list, file: str, number: int) -> list[Row]:
    """Turns (role, content) or (from, value) -> a Row for each assistant turn, the turns before it
    as history (SFTMix §4.1)."""
    messages, rows = [], []
    for turn in turns:
        role, content = turn.get("role") or turn.get("from"), turn.get("content")
        content = _text(turn.get("value") if content is None else content)
        name = ROLES.get(_text(role).strip().lower())
        if name is None:
            known = ", ".join(sorted(ROLES))
            raise UserError(f"{file}, row {number}: unknown role {role!r}; known are {known}")
        if name == "assistant" and messages and messages[-1][0] in ("user", "tool"):
            rows.append(Row(tuple(messages), content, file=file, number=number))
        messages.append((name, content))
    return rows


def _glaive(system: str, chat: str) -> list[dict]:
    """Glaive's one string `USER: .. ASSISTANT: .. <|endoftext|> FUNCTION RESPONSE: ..` -> turns."""
    system = re.sub(r"^SYSTEM:\s*", "", system).strip()
    turns = [{"role": "system", "content": system}] if system else []
    parts = re.split(r"(USER|ASSISTANT|FUNCTION RESPONSE):", chat.replace("<|endoftext|>", ""))
    for name, text in zip(parts[1::2], parts[2::2]):
        turns.append({"role": name.lower().replace(" ", "_"), "content": text.strip()})
    return turns


def _match_schema(keys: dict, file: str, number: int) -> list[Row] | None:
    """Rows of a record by its columns, or None where they fit no schema."""

    def row(question, response, extra="", **choice):
        messages = (("user", _text(question)),)
        return [Row(messages, _text(response), _text(extra), file, number, **choice)]

    for column in ("messages", "conversations", "conversation"):
        turns = keys.get(column)
        if isinstance(turns, (list, tuple)) and turns:
            return _dialogue(turns, file, number)
    if "chat" in keys and "system" in keys:
        return _dialogue(_glaive(_text(keys["system"]), _text(keys["chat"])), file, number)
    found = _multiple_choice(keys)
    if found:
        question, choices, answer = found
        choices = tuple(_text(choice) for choice in choices)
        if not 0 <= answer < len(choices):
            problem = f"right answer {answer} of only {len(choices)} choices"
            raise UserError(f"{file}, row {number}: {problem}")
        return row(question, choices[answer], choices=choices, answer=answer)
    if "question" in keys and "long_answer" in keys:  # PubMedQA
        contexts = keys.get("contexts", keys.get("context")) or []
        contexts = contexts.get("contexts", []) if isinstance(contexts, dict) else contexts
        return row(keys["question"], keys["long_answer"], "\n".join(map(_text, contexts)))
    for schema in FLAT_SCHEMAS:
        prompt, extra, response = schema.split("/")
        if keys.get(prompt) is not None and response in keys:
            return row(keys[prompt], keys[response], keys.get(extra))
    return [Row((), _text(keys["text"]), "", file, number)] if "text" in keys else None


def rows_from_record(record: dict, file: str = "data", number: int = 1) -> list[Row]:
    """One record of any schema -> its rows (several for a dialogue). Column names are compared in
    lower case, spaces as underscores. Raises UserError naming file, row and the keys found."""
    full = {str(key).strip().lower().replace(" ", "_"): value for key, value in record.items()}
    present = {key: value for key, value in full.items() if value is not None}
    where, found = f"{file}, row {number}", f"keys {sorted(full)}"
    try:
        for keys in (present, full):  # a column may be null only because other rows have it
            rows = _match_schema(keys, file, number)
            if rows is not None:
                return rows
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: cannot read the row ({cause}); {found}") from None
    raise UserError(f"{where}: {found} fit no known schema; accepted are {ACCEPTED}")


# ---- Sources: SPEC -> datasets -------------------------------------------------------------------
@dataclass(frozen=True)
class HubSource:
    """Where an alias points. Column names are not part of it: they are read from the rows."""

    path: str
    config: str | None = None
    split: str = "train"
    eval_split: str | None = None  # where --eval_data reads, if the source keeps rows for that
    source_column: str | None = None  # split into one dataset per value
    stream: bool = False  # too large to download: read only the first rows


STREAM_ROWS = 10_000  # head of a streamed corpus when the SPEC has no #N
MEDALPACA = ["medical_flashcards", "wikidoc", "wikidoc_patient_information", "medqa", "mediqa"]
MEDALPACA += ["cord19", "health_advice", "mmmlu", "pubmed_causal"]
ALIASES = {
    "alpaca": [HubSource("tatsu-lab/alpaca")],
    "ultrachat": [HubSource("HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft")],
    # SFTMix's 263K medical rows are named "MedAlpaca" and no more: the medical_meadow collection
    "medalpaca": [HubSource(f"medalpaca/medical_meadow_{name}") for name in MEDALPACA],
    "tulu2": [HubSource("allenai/tulu-v2-sft-mixture", source_column="dataset")],
    "tulu3": [HubSource("allenai/tulu-3-sft-mixture", source_column="source")],
    "gsm8k": [HubSource("openai/gsm8k", "main", eval_split="test")],
    "numinamath": [HubSource("AI-MO/NuminaMath-CoT")],
    "code_feedback": [HubSource("m-a-p/CodeFeedback-Filtered-Instruction")],
    "medical_flashcards": [HubSource("medalpaca/medical_meadow_medical_flashcards")],
    "glaive": [HubSource("glaiveai/glaive-function-calling-v2")],
    "fineweb": [HubSource("HuggingFaceFW/fineweb", "sample-10BT", stream=True)],
    "wikipedia": [HubSource("wikimedia/wikipedia", "20231101.en", stream=True)],
    "tinymmlu": [HubSource("tinyBenchmarks/tinyMMLU", "all", "test")],
    "tinyhellaswag": [HubSource("tinyBenchmarks/tinyHellaswag", "default", "validation")],
    "pubmedqa": [HubSource("qiaojin/PubMedQA", "pqa_labeled")],
    "medqa": [HubSource("GBaker/MedQA-USMLE-4-options", eval_split="test")],
    "medmcqa": [HubSource("openlifescienceai/medmcqa", eval_split="validation")],
    "truthfulqa": [HubSource("truthfulqa/truthful_qa", "multiple_choice", "validation")],
}
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def _bad_json_row(file: Path) -> str | None:
    """Where a JSON file is not one of objects, and why. Lines end at "\\n" only: raw U+2028 is
    legal JSON."""
    number = 1
    try:
        text = file.read_bytes().decode("utf-8", "strict")
        array = text.lstrip().startswith("[")
        for number, entry in enumerate(json.loads(text) if array else text.split("\n"), 1):
            record = entry if array else json.loads(entry.strip() or "{}")
            if not isinstance(record, dict):
                return f", row {number}: expected an object, found {type(record).__name__}"
    except UnicodeDecodeError as error:
        return f": not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        return f", row {error.lineno if array else number}: not JSON: {error.msg}"
    return None


def _load_file(file: Path):
    """Records of one local file, through the datasets library."""
    from datasets import load_dataset

    kind = FILE_TYPES[file.suffix.lower()]
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")
    options = {"keep_default_na": False} if kind == "csv" else {}  # an answer "NA" is text
    try:
        return load_dataset(kind, data_files=[str(file)], split="train", **options)
    except Exception as error:  # datasets wraps every parser's own errors
        cause = error.__cause__ or error
    unread = f": cannot be read as {kind} ({type(cause).__name__}: {cause})"
    raise UserError(f"{file}{(kind == 'json' and _bad_json_row(file)) or unread}")


def load_hub(source: HubSource, limit: int | None, split: str = "train"):
    """Records of a HubSource; a streamed one only up to limit rows. Raises UserError."""
    from datasets import load_dataset

    split = source.eval_split if split == "eval" and source.eval_split else source.split
    try:
        loaded = load_dataset(source.path, source.config, split=split, streaming=source.stream)
        return list(loaded.take(limit or STREAM_ROWS)) if source.stream else loaded
    except Exception as error:  # the library raises many types
        name = source.path + (f" ({source.config})" if source.config else "")
        what = f"{name}, split {split}, from the Hugging Face hub"
        cause = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(f"cannot load {what}: {cause}") from None


SPEC_FORM = re.compile(r"(?:(?P<label>[^=/\\#]+)=)?(?P<source>[^#]+)(?:#(?P<count>\d+))?")


def parse_spec(spec: str) -> tuple[str | None, str, int | None]:
    """`[label=]SOURCE[#N]` -> (label or None, source, N or None). Raises UserError."""
    match = SPEC_FORM.fullmatch(spec)
    if not match or match["count"] == "0":
        raise UserError(f"{spec!r} is no dataset; expected [label=]SOURCE[#N] with N at least 1")
    return match["label"], match["source"], match["count"] and int(match["count"])


def read_source(source: str, limit: int | None, split: str) -> tuple[list, str, str | None]:
    """A SPEC's SOURCE -> ([(file, row number, record)], default label, column to split by or None).
    toy: a record is a Row. limit: rows read of a streamed source. split: "train" or "eval"."""
    if source == "toy" or source.startswith("toy/"):
        task = source[4:] or None
        records = [(row.file, row.number, row) for row in toy_rows(task, split)]
        return records, task or "toy", None if task else "task"
    path, column, records = Path(source), None, []
    known = ", ".join(FILE_TYPES)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in FILE_TYPES)
        if not found:
            raise UserError(f"{source}: the folder holds no {known} file")
        parts, label = [(str(file), _load_file(file)) for file in found], path.resolve().name
    elif path.is_file():
        if path.suffix.lower() not in FILE_TYPES:
            raise UserError(f"{source}: unknown file type {path.suffix!r}; expected one of {known}")
        parts, label = [(source, _load_file(path))], path.stem
    elif path.suffix.lower() in FILE_TYPES or source[0] in "./~" or source.count("/") > 1:
        raise UserError(f"{source}: no such file or folder")
    elif source not in ALIASES and "/" not in source:
        aliases = ", ".join(sorted(ALIASES))
        raise UserError(f"{source}: no such file, folder or alias; aliases are toy, {aliases}")
    else:
        entries = ALIASES.get(source) or [HubSource(source)]
        parts = [(entry.path, load_hub(entry, limit, split)) for entry in entries]
        label, column = source.split("/")[-1], entries[0].source_column
    for file, part in parts:
        records += [(file, number, record) for number, record in enumerate(part, 1)]
    return records, label, column


def _rows_by_group(records: list, column: str | None) -> dict:
    """{value of the column: rows}; one group, None, where there is no column. Raises UserError."""
    groups = {}
    for file, number, record in records:
        if isinstance(record, Row):  # toy, whose tasks keep their order
            group, rows = file.removeprefix("toy/") if column else None, [record]
        elif column and record.get(column) is None:
            keys = sorted(record)
            raise UserError(f"{file}, row {number}: no column {column!r} to split by; keys {keys}")
        else:
            group = _text(record[column]) if column else None
            rows = rows_from_record(record, file, number)
        groups.setdefault(group, []).extend(rows)
    return groups if column == "task" else {key: groups[key] for key in sorted(groups, key=str)}


def load_spec(spec: str, source_column: str | None, seed: int, split: str) -> list[Dataset]:
    """One SPEC -> its datasets: one, or one a value of --source_column or the alias's own column.
    #N keeps N random rows (drawn with seed) in file order. Rows whose response is blank are skipped
    and counted. split "eval" (for --eval_data): toy's held-out rows, and an alias's test split
    where it has one. Raises UserError."""
    label, source, count = parse_spec(spec)
    records, default_label, column = read_source(source, count, split)
    if source_column and source.split("/")[0] != "toy":
        column = source_column
    if count is not None:
        if count > len(records):
            raise UserError(f"{spec}: asks for {count} rows of {len(records)}")
        keep = data_rng(seed, "subset").choice(len(records), count, replace=False)
        records = [records[i] for i in sorted(keep)]
    if not records:
        raise UserError(f"{spec}: no rows")
    result = []
    for group, rows in _rows_by_group(records, column).items():
        name = group if column else default_label
        if label:
            name = f"{label}/{group}" if column else label
        kept = [row for row in rows if row.response.strip()]
        if not kept:
            raise UserError(f"{spec}: dataset {name!r} has no row with a response")
        empty = len(rows) - len(kept)
        result.append(Dataset(name, kept, {"empty response": empty} if empty else {}))
    return result


def load_data(specs: Sequence[str], source_column=None, seed: int = 0, split: str = "train"):
    """SPECs -> list of Dataset with distinct labels (each SPEC may give several)."""
    result = []
    for spec in specs:
        result += load_spec(spec, source_column, seed, split)
    labels = [dataset.label for dataset in result]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UserError(f"two datasets are called {twice[0]!r}; name them with label=SOURCE")
    return result


# ---- Toy tasks: small, synthetic, always the same rows -------------------------------------------

# Training rows: unequal sizes and difficulties. noise is not part of plain `toy`.
TOY_TASKS = {"describe": 640, "copy": 480, "compare": 320, "add": 240, "sort": 160}
TOY_TASKS |= {"reverse": 96, "count": 64, "noise": 320}
TOY_EVAL_ROWS = 64


def _toy_word(rng: np.random.Generator, syllables: int) -> str:
    consonants, vowels = list("bdfgklmnprstvz"), list("aeiou")
    return "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(syllables))


def toy_example(task: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """One random example of a task -> (instruction, input, response)."""
    if task == "copy":
        word = _toy_word(rng, 3)
        return "Repeat the word.", word, word
    if task == "reverse":
        word = _toy_word(rng, 2)
        return "Write the word backwards.", word, word[::-1]
    if task == "add":
        a, b = rng.integers(10, 100, 2)
        return "Add the two numbers.", f"{a} + {b}", str(a + b)
    if task == "compare":
        a, b = rng.choice(np.arange(10, 1000), 2, replace=False)
        return "Which number is larger?", f"{a} or {b}", f"{max(a, b)} is larger than {min(a, b)}."
    if task == "sort":
        digits = rng.integers(0, 10, 5)
        return "Sort the digits.", " ".join(map(str, digits)), " ".join(map(str, sorted(digits)))
    if task == "count":
        word, letter = _toy_word(rng, 5), rng.choice(list("aeiou"))
        question = f"How often does the letter {letter} occur in the word?"
        return question, word, f"{word.count(letter)} times"
    if task == "describe":
        name, age = _toy_word(rng, 2).capitalize(), rng.integers(18, 90)
        job = rng.choice(["baker", "pilot", "nurse", "farmer", "judge"])
        sentence = f"{name} is {age} years old and works as a {job}."
        return "Introduce this person in a sentence.", f"{name}, {age}, {job}", sentence
    # noise: nothing to learn but the letters' distribution, the response ignores the prompt
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return "Answer.", _toy_word(rng, 3), "".join(rng.choice(letters, 8))


def toy_rows(task: str | None = None, split: str = "train") -> list[Row]:
    """Rows of one task or of all, always the same. No prompt of split "eval" is in "train"."""
    if task is not None and task not in TOY_TASKS:
        raise UserError(f"toy/{task}: no such task; there are {', '.join(TOY_TASKS)}")
    result = []
    for name in [task] if task else [name for name in TOY_TASKS if name != "noise"]:
        size = TOY_TASKS[name] if split == "train" else TOY_EVAL_ROWS
        rng, seen = data_rng(0, name, stream_id(split)), set()
        while len(seen) < size:
            instruction, extra, response = toy_example(name, rng)
            held_out = hashlib.sha256((instruction + extra).encode()).digest()[0] % 5 == 0
            if held_out != (split == "train") and (instruction, extra) not in seen:
                seen.add((instruction, extra))
                messages = (("user", instruction),)
                result.append(Row(messages, response, extra, f"toy/{name}", len(seen)))
    return result


# ---- Templates and tokens: rows -> examples ------------------------------------------------------

ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_INPUT = ", paired with an input that provides further context"
ALPACA_REQUEST = ". Write a response that appropriately completes the request."
HEADINGS = {"user": "Instruction:\n", "assistant": "Response:"}
HEADINGS |= {"tool": "Tool:\n", "system": "System:\n"}


def alpaca_prompt(row: Row) -> str:
    """Stanford Alpaca's prompt; earlier turns are more sections, a system message its preamble."""
    messages = list(row.messages)
    preamble = ALPACA_TASK + (ALPACA_INPUT if row.input else "") + ALPACA_REQUEST
    if messages and messages[0][0] == "system":
        preamble = messages.pop(0)[1]
    sections = [f"### {HEADINGS[role]}{content}" for role, content in messages]
    if row.input:
        sections.append(f"### Input:\n{row.input}")
    return "\n\n".join([preamble, *sections, "### Response:"])


def plain_prompt(row: Row) -> str:
    """The messages one below the other, nothing added."""
    lines = [content for _, content in row.messages]
    return "\n".join(lines + ([row.input] if row.input else [])) + "\n"


def chat_parts(row: Row, tokenizer) -> tuple[str, str]:
    """-> (prompt, response) as text by the tokenizer's own chat template. Raises UserError where
    the template renders the prompt differently once the response follows."""
    messages = [{"role": role, "content": content} for role, content in row.messages]
    answer = {"role": "assistant", "content": row.response}
    if row.input:
        messages[-1]["content"] += "\n\n" + row.input
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        try:
            prompt = render(messages, add_generation_prompt=True)
        except Exception:  # no system role (Gemma): the first user turn takes its text
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise
            system = messages.pop(0)
            messages[0]["content"] = system["content"] + "\n\n" + messages[0]["content"]
            prompt = render(messages, add_generation_prompt=True)
        full = render([*messages, answer])
    except Exception as error:
        problem = f"the chat template fails ({error}); try --template alpaca"
        raise UserError(f"{row.where}: {problem}") from None
    if not full.startswith(prompt):
        problem = "the chat template changes the prompt once a response follows, so the boundary"
        raise UserError(f"{row.where}: {problem} between them is unclear; try --template alpaca")
    return prompt, full[len(prompt) :].rstrip()


def pick_template(name: str, tokenizer) -> str:
    """auto -> chat where the tokenizer has a chat template, else alpaca. Raises UserError."""
    if name == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if name == "chat" and not tokenizer.chat_template:
        problem = "this tokenizer has no chat template; use --template alpaca or plain"
        raise UserError(f"--template chat: {problem}")
    return name


@dataclass(frozen=True)
class Example:
    """A tokenised Row: ids[start:] is supervised, ids[:start] is context."""

    ids: np.ndarray  # (T,) int64
    start: int  # at least 1: the first token has nothing that predicts it
    row: int  # index of the Row in its Dataset
    dataset: int = 0  # index of the Dataset

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.start


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer itself begins a text with BOS (Llama, Gemma: yes; GPT-2, Qwen: no)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def _prompt_and_response(row: Row, tokenizer, template: str) -> tuple[str, str, bool]:
    """-> (prompt, response, whether the special tokens in them are a chat template's own)."""
    if not row.messages:
        return "", row.response, False
    if template == "chat":
        return (*chat_parts(row, tokenizer), True)
    prompt = alpaca_prompt(row) if template == "alpaca" else plain_prompt(row)
    return prompt, row.response, False


def _split_ids(texts: list, tokenizer) -> list[tuple[list[int], list[int]]]:
    """[(prompt, response, are special tokens in them real ones)] -> [(prompt ids, response ids)]:
    what follows the prompt's ids in the joint tokenisation, or tokenised apart where it differs."""
    result = [None] * len(texts)
    for special in {text[2] for text in texts}:
        options = {"add_special_tokens": False, "verbose": False}
        ids = partial(tokenizer, split_special_tokens=not special, **options)
        chosen = [i for i, text in enumerate(texts) if text[2] == special]
        prompts = ids([texts[i][0] for i in chosen]).input_ids
        joints = ids([texts[i][0] + texts[i][1] for i in chosen]).input_ids
        for i, prompt, joint in zip(chosen, prompts, joints):
            response = joint[len(prompt) :]
            if joint[: len(prompt)] != prompt:
                response = ids(texts[i][1]).input_ids
            result[i] = prompt, response
    return result


CHUNK = 1000  # rows tokenised at once


def encode(
    rows: list[Row], tokenizer, template: str, max_length: int, dataset: int = 0, progress: str = ""
) -> tuple[list[Example], dict[str, int]]:
    """Tokenise rows -> (examples, {reason: rows skipped}). Supervised are the response and one EOS.
    One BOS where the tokenizer adds one, none beside a chat template's. Too long: cut on the right,
    skipped where no response is left. Special tokens in data are text, but for chat templates."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise UserError("the tokenizer has no EOS token, so the model could not learn to stop")
    begin, plain_begin = [bos] if adds_bos(tokenizer) else [], [] if bos is None else [bos]
    examples, skipped = [], Counter()
    starts, hidden = range(0, len(rows), CHUNK), not progress or len(rows) < 2 * CHUNK
    bar = tqdm(starts, f"tokenise {progress}", disable=hidden, unit="k rows", leave=False)
    for at in bar:
        block = rows[at : at + CHUNK]
        texts = [_prompt_and_response(row, tokenizer, template) for row in block]
        for i, (prompt, response) in enumerate(_split_ids(texts, tokenizer)):
            if texts[i][2]:
                context = prompt
                if response[-1:] == [eos]:
                    response = response[:-1]  # the template's own end of turn
            else:
                context = begin + prompt if block[i].messages else plain_begin
            ids = (context + response + [eos])[:max_length]
            start, reason = max(1, len(context)), None
            if not response:
                reason = "empty response"
            elif eos in response:
                reason = "end token inside the response"
            elif len(ids) <= start:
                reason = "prompt fills max_length"
            if reason:
                skipped[reason] += 1
            else:
                examples.append(Example(np.array(ids, dtype=np.int64), start, at + i, dataset))
    return examples, dict(skipped)


def encode_datasets(sets: list[Dataset], tokenizer, template: str, max_length: int, quiet=False):
    """encode() over datasets -> a list of examples for each; prints what was skipped.
    Raises UserError where a dataset keeps nothing."""
    result = []
    for k, dataset in enumerate(sets):
        progress = "" if quiet else dataset.label
        examples, found = encode(dataset.rows, tokenizer, template, max_length, k, progress)
        skipped = dict(Counter(dataset.skipped) + Counter(found))
        if not quiet:
            tokens = sum(example.response_length for example in examples)
            note = "".join(f", skipped {count} ({key})" for key, count in skipped.items())
            counts = f"{len(examples):,} examples, {tokens:,} response tokens"
            print(f"data  {dataset.label}: {counts}{note}")
        if not examples:
            problem = f"no example is left at --max_length {max_length}; skipped: {skipped}"
            raise UserError(f"dataset {dataset.label!r}: {problem}")
        result.append(examples)
    return result


def encode_choices(rows: list[Row], tokenizer, template: str, max_length: int) -> tuple[list, dict]:
    """Multiple-choice rows -> (questions, {reason: rows skipped}). A question is a list of Example,
    one a choice, without an end token: they differ in the answer alone. All must fit. Raises
    UserError."""
    flat, owner = [], []
    for number, row in enumerate(rows):
        if len(row.choices) < 2:
            problem = "is no multiple-choice row, accuracy over choices cannot be measured on it"
            raise UserError(f"{row.where}: {problem}")
        flat += [replace(row, response=choice) for choice in row.choices]
        owner += [number] * len(row.choices)
    found = {number: [] for number in range(len(rows))}
    for example in encode(flat, tokenizer, template, max_length)[0]:
        if example.ids[-1] == tokenizer.eos_token_id and example.response_length > 1:  # not cut
            number = owner[example.row]
            found[number].append(replace(example, ids=example.ids[:-1], row=number))
    whole = [found[i] for i, row in enumerate(rows) if len(found[i]) == len(row.choices)]
    cut = len(rows) - len(whole)
    return whole, {"a choice does not fit": cut} if cut else {}


def show_examples(examples: list[Example], tokenizer, count: int = 2) -> None:
    """Print examples decoded, each supervised token between ⟦ ⟧."""
    for example in examples[:count]:
        context = tokenizer.decode(example.ids[: example.start].tolist())
        marked = [f"⟦{tokenizer.decode([i])}⟧" for i in example.ids[example.start :].tolist()]
        counts = f"{example.start} context tokens, {example.response_length} supervised ⟦⟧"
        print(f"--- row {example.row}: {counts}\n{context}{''.join(marked)}")
    print("---", flush=True)
