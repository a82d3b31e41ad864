"""From a file to tokens: files, schemas, sources, toy tasks, templates, tokens. This is the ground
floor: it imports nothing of the project.

No step guesses. A file's text arrives character by character; what a row says is used, refused
with file and row, or counted (Dataset.left_out); what a template is given must be in what it
renders."""

from __future__ import annotations

import contextlib
import copy
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
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


# ---- Rows and datasets: no tokenizer so far ------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """One supervised turn as text. A message is (role, content) or (role, content, keys): keys is
    JSON text of what else its turn holds for the template (tool_calls, reasoning_content, ...)."""

    messages: tuple  # before the response, oldest first; () for plain text
    response: str  # what is supervised
    input: str = ""  # Alpaca's input field, apart from the last user message
    file: str = ""  # where it came from, for error messages
    number: int = 0  # row of that file, from 1
    choices: tuple = ()  # multiple choice: the answers, of which response is one
    answer: int = -1  # multiple choice: index of response in choices
    keys: str = ""  # of the response's turn, as in messages
    tools: str = ""  # JSON text of the tools that the template is told of

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"

    @property
    def prompt(self) -> tuple | str:  # or a plain text itself
        return (self.messages, self.input) if self.messages else self.response


DIGESTS = np.dtype([("text", "<u8", 2), ("prompt", "<u8")])


@dataclass
class Dataset:
    """Rows under one label, and what of its files is not in them."""

    label: str
    rows: list[Row]
    left_out: dict[str, int] = field(default_factory=dict)  # rows and turns not used, by reason
    unused: list[str] = field(default_factory=list)  # columns that nothing was read from

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def digests(self) -> np.ndarray:
        return row_digests(self.rows)

    def note(self, left_out: dict[str, int], unused: Iterable[str]) -> None:
        """Add what of a record is not in the rows."""
        self.left_out = dict(Counter(self.left_out) + Counter(left_out))
        self.unused += sorted(set(unused).difference(self.unused))


def row_digests(rows: Iterable[Row]) -> np.ndarray:
    """(n,) DIGESTS: of each row's text, whatever its file and tokenizer, and of its prompt."""
    result = []
    for row in rows:
        text = [row.messages, row.input, row.response]
        text += [row.keys, row.tools] if row.keys or row.tools else []
        parts = []
        for part, size in ((text, 16), (row.prompt, 8)):
            raw = json.dumps(part, ensure_ascii=False).encode()
            parts.append(hashlib.blake2b(raw, digest_size=size).digest())
        result.append(b"".join(parts))
    return np.frombuffer(b"".join(result), DIGESTS)


def fingerprint(datasets: Iterable[Dataset]) -> str:
    """sha256 over the text of all rows in order, whatever their labels, files and tokenizer."""
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(dataset.digests["text"].tobytes())
    return digest.hexdigest()


# ---- Files: bytes -> records, nothing inferred ---------------------------------------------------
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv"}
FILE_TYPES |= {".parquet": "parquet", ".arrow": "arrow"}
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # its byte order marks
NEVER_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


class Number(str):
    """A number in a JSON file, as the text that stands there: 1.50 stays 1.50."""


def _not_json(constant: str):
    raise ValueError(f"{constant} is not JSON")


def parse_json(text: str):
    """A JSON value; its numbers are Number. Raises ValueError."""
    try:
        options = {"parse_int": Number, "parse_float": Number, "parse_constant": _not_json}
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def plain(value: object) -> object:
    """A JSON value with int and float in place of Number."""
    if isinstance(value, Number):
        return float(value) if set(value) & set(".eE") else int(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


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
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag} {path}, row {number}: is not JSON ({error})") from None
    return values


def file_kind(path: Path) -> str | None:
    """json, csv, parquet or arrow by the file's name, compressed or not; None for other files."""
    name = path.name.lower()
    for ending in COMPRESSION:
        name = name.removesuffix(ending)
    if path.name in NEVER_DATA or name.startswith("."):
        return None
    return FILE_TYPES.get(Path(name).suffix)


def _lines(stream: io.BufferedReader) -> Iterator[str]:
    """Lines of UTF-8 text, without a byte order mark. A line ends at "\\n" alone: raw U+2028 is
    legal. Raises UnicodeDecodeError, its start counted from the file's."""
    at = 0
    for raw in stream:
        try:
            yield (raw if at else raw.removeprefix(b"\xef\xbb\xbf")).decode()
        except UnicodeDecodeError as error:
            error.start += at
            raise
        at += len(raw)


def _json_records(stream: io.BufferedReader, file: str) -> Iterator[tuple]:
    """Records of an array, or of JSON Lines, a line at a time."""
    number, blank, array, lines = 0, True, False, _lines(stream)
    try:
        for number, line in enumerate(lines, 1):
            array = blank and line.lstrip()[:1] == "["
            blank = blank and not line.strip()
            if array:
                text = "\n" * (number - 1) + line + "".join(lines)
                yield from enumerate(parse_json(text), 1)
            elif line.strip():
                yield number, parse_json(line)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if array else f"row {number}"
        raise UserError(f"{file}, {place}: not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise UserError(f"{file}, row {number}: not JSON: {error}") from None


def _csv_records(text: str, file: str) -> list[tuple]:
    """Records of a comma-separated file with a header; every cell is text."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records = []
    try:
        header = next(reader, [])
        for other in ";\t|":
            if len(header) == 1 and other in header[0]:
                raise UserError(f"{file}: its columns are separated by {other!r}; expected ','")
        if len(set(header)) < len(header):
            raise UserError(f"{file}: two columns have the same name; found {header}")
        for cells in reader:
            if cells and len(cells) != len(header):
                problem = f"{len(cells)} cells, the header names {len(header)} columns"
                raise UserError(f"{file}, row {len(records) + 1}: {problem}")
            if cells:
                records.append((len(records) + 1, dict(zip(header, cells))))
    except csv.Error as error:
        problem = f"not CSV: {error} (line {reader.line_num})"
        raise UserError(f"{file}, row {len(records) + 1}: {problem}") from None
    return records


def _without_null(value):
    """A cell of a table: Arrow fills the keys that a struct lacks with null."""
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return value


def _table_records(kind: str, raw: bytes) -> Iterator[tuple]:
    """Records of a Parquet or Arrow file, its columns as they are."""
    import pyarrow
    import pyarrow.parquet

    source = pyarrow.BufferReader(raw)
    if kind == "parquet":
        table = pyarrow.parquet.read_table(source)
    else:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source).read_all()
    table.validate(full=True)  # a damaged offset would end the process
    nested = [f.name for f in table.schema if pyarrow.types.is_nested(f.type)]
    parts = (batch.to_pylist() for batch in table.to_batches(max_chunksize=1000))
    for number, record in enumerate(itertools.chain.from_iterable(parts), 1):
        record.update((name, _without_null(record[name])) for name in nested)
        yield number, record


def read_file(path: str | Path, name: str = "") -> Iterator[tuple[int, dict]]:
    """(row number from 1, record) of a local file, one after the other. JSON by json.loads, numbers
    as Number; CSV as text; .gz and .zst too. name: what the file is called where `path` is a
    cache's. Raises UserError naming file and row."""
    import pyarrow

    file, start = name or str(path), b""
    kind, packed = file_kind(Path(file)), COMPRESSION.get(Path(file).suffix.lower())
    try:
        with pyarrow.input_stream(str(path), packed) as raw, io.BufferedReader(raw) as stream:
            start = stream.peek(4)[:4]
            if not start:
                raise UserError(f"{file}: the file is empty")
            if b"\0" in start and kind in ("json", "csv") and start[:2] not in UTF_16:
                raise UserError(f"{file}: begins with NUL bytes; if it is UTF-16, save it as UTF-8")
            if kind == "json":
                yield from _json_records(stream, file)
            elif kind == "csv":
                yield from _csv_records(stream.read().decode("utf-8-sig"), file)
            else:
                yield from _table_records(kind, stream.read())
    except UnicodeDecodeError as error:
        found = "it looks like UTF-16; " if start[:2] in UTF_16 else ""
        problem = f"not UTF-8 (byte {error.start})"
        raise UserError(f"{file}: {problem}; {found}save it as UTF-8") from None
    except (OSError, pyarrow.ArrowException) as error:
        problem = f"cannot be read as {kind} ({type(error).__name__}: {error})"
        raise UserError(f"{file}: {problem}") from None


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
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIALOGUES = ("messages", "conversations", "conversation")
ROLES = {role: role for role in ("user", "assistant", "system", "tool")}
ROLES |= {"human": "user", "prompter": "user", "developer": "system"}
ROLES |= dict.fromkeys(("gpt", "bot", "model", "chatgpt", "function_call"), "assistant")
ROLES |= dict.fromkeys(("function", "observation", "function_response"), "tool")
TEXT_KEYS = ("name", "tool_call_id", "reasoning_content")  # of a turn, for the template
TURN_KEYS = {"role", "from", "content", "value", "weight", "train", "tool_calls", "function_call"}
TURN_KEYS |= set(TEXT_KEYS)


@dataclass
class Record:
    """A record while its rows are read from it: which columns were used, which turns were not."""

    columns: dict
    file: str
    number: int
    used: set = field(default_factory=set)
    unused: set = field(default_factory=set)  # keys of turns
    left_out: Counter = field(default_factory=Counter)

    def take(self, name: str):
        self.used.add(name)
        return self.columns.get(name)

    def present(self, *names: str) -> bool:
        return all(self.columns.get(name) is not None for name in names)

    def unused_columns(self) -> set[str]:
        filled = {name for name, value in self.columns.items() if value not in (None, "", [])}
        return (filled - self.used) | self.unused


def _text(value) -> str:
    """A cell or a turn's content as text: null -> "", a number as in the file, text parts one below
    the other. Raises ValueError for anything else: structure is never turned into text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "\n".join(_part(part) for part in value)
    if isinstance(value, (int, float, Decimal)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):x}"
        raise ValueError(f"{half} is half of a character, so the text is no Unicode") from None
    return str(value)


def _part(part) -> str:
    """One part of a content list: {"type": "text", "text": ..}."""
    if isinstance(part, dict) and part.get("type") == "text":
        return _text(part.get("text"))
    kind = part.get("type", sorted(part)) if isinstance(part, dict) else _shown(part)
    raise ValueError(f"expected text or parts of type text, found a list with {kind}")


def _shown(value) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _json_cell(value, what: str) -> list:
    """A column that holds a list, or JSON text of one; [] where there is none. Raises ValueError"""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"{what} is a text that is not JSON ({error})") from None
    if not value:
        return []
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list in {what}, found {_shown(value)}")
    return list(value)


def _is_turns(value) -> bool:
    """Whether a cell is a list of turns (and not text or text parts)."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def _weight(turn: dict, role: str) -> bool:
    """Whether a turn may be supervised by its own keys weight (0, 1) and train. Raises
    ValueError."""
    for key in ("weight", "train"):
        if turn.get(key) is None:
            continue
        value = str(turn[key]).lower()
        if value not in ("0", "1", "0.0", "1.0", "true", "false"):
            raise ValueError(f"a turn's {key} is {turn[key]!r}; it can be 0 or 1, true or false")
        if value in ("0", "0.0", "false"):
            return False
        if role != "assistant":
            raise ValueError(f"a {role} turn's {key} is {turn[key]!r}; only answers are trained on")
    return True


def _tool_calls(turn: dict) -> list[dict]:
    """A turn's calls in today's form; arguments written as JSON text become what they say, since
    that is what chat templates expect."""
    calls = _json_cell(turn.get("tool_calls"), "tool_calls")
    if turn.get("function_call"):  # OpenAI's older form
        calls = [*calls, {"type": "function", "function": turn["function_call"]}]
    result = []
    for call in calls:
        call = {key: value for key, value in call.items() if value is not None}
        function = dict(call.get("function") or call)
        if not function.get("name"):
            raise ValueError(f"a tool call without a name: {_shown(call)}")
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):  # what is no JSON stays text
                function["arguments"] = parse_json(function["arguments"])
        kept = {"id": call["id"]} if "id" in call else {}
        result.append(kept | {"type": "function", "function": plain(function)})
    return result


def _message(turn: dict, record: Record) -> tuple[tuple, bool]:
    """A turn -> (role, content[, keys]), and whether it may be supervised. Raises ValueError."""
    if not isinstance(turn, dict):
        raise ValueError(f"expected a turn with role and content, found {_shown(turn)}")
    turn = {key: value for key, value in turn.items() if value is not None}
    given = turn.get("role", turn.get("from"))
    role = ROLES.get(str(given).strip().lower())
    if role is None:
        raise ValueError(f"unknown role {given!r}; known are {', '.join(sorted(ROLES))}")
    content = _text(turn.get("content", turn.get("value")))
    keys = {key: _text(turn[key]) for key in TEXT_KEYS if turn.get(key)}
    calls = _tool_calls(turn)
    if calls:
        keys["tool_calls"] = calls
    record.unused |= {f"{key} (of a turn)" for key in turn if key not in TURN_KEYS}
    message = (role, content, json.dumps(keys, ensure_ascii=False)) if keys else (role, content)
    return message, _weight(turn, role)


def _dialogue(record: Record, turns: Sequence, context: Sequence = ()) -> list[Row]:
    """A Row for each assistant turn of `turns`, with what stands before it as history (SFTMix
    §4.1); the turns of `context` are history alone."""
    messages, rows, found = _before(record), [], False
    for place, turn in enumerate([*context, *turns]):
        message, trained = _message(turn, record)
        if message[0] == "system" and messages and messages[0][0] == "system" and not place:
            if message[1] != messages[0][1]:
                raise ValueError("a system column and another system turn; keep one of them")
            continue
        if message[0] == "assistant" and place >= len(context):
            found = True
            if not trained:
                record.left_out["turn of weight 0"] += 1
            elif not messages:
                record.left_out["assistant turn with nothing before it"] += 1
            else:
                where = {"file": record.file, "number": record.number}
                keys = message[2] if len(message) > 2 else ""
                rows.append(Row(tuple(messages), message[1], keys=keys, **where))
        messages.append(message)
    if not found:
        record.left_out["no assistant turn"] += 1
    tools = _tools(record)
    return [replace(row, tools=tools) for row in rows] if tools else rows


def _before(record: Record) -> list[tuple]:
    """Messages of the columns system or system_prompt, and history ([[question, answer], ...] or
    turns)."""
    messages = []
    for column in ("system", "system_prompt"):
        if record.present(column) and not messages:
            content = _text(record.take(column))
            messages += [("system", content)] if content else []
    for pair in _json_cell(record.take("history"), "history"):
        if isinstance(pair, dict):
            messages.append(_message(pair, record)[0])
        elif isinstance(pair, (list, tuple)) and len(pair) == 2:
            messages += [("user", _text(pair[0])), ("assistant", _text(pair[1]))]
        else:
            raise ValueError(f"history holds {_shown(pair)}; expected [question, answer]")
    return messages


def _tools(record: Record) -> str:
    """JSON text of the columns tools or functions, "" where they are empty."""
    tools = _json_cell(record.take("tools"), "tools")
    functions = _json_cell(record.take("functions"), "functions")
    tools += [{"type": "function", "function": function} for function in functions]
    for tool in tools:
        if not isinstance(tool, dict):
            raise ValueError(f"expected the description of a tool, found {_shown(tool)}")
    return json.dumps(plain(tools), ensure_ascii=False) if tools else ""


def _glaive(record: Record) -> list[dict]:
    """Glaive's one string `USER: .. ASSISTANT: .. <|endoftext|> FUNCTION RESPONSE: ..` -> turns."""
    system, chat = _text(record.take("system")), _text(record.take("chat"))
    system = re.sub(r"^SYSTEM:\s*", "", system).strip()
    record.columns = {**record.columns, "system": system}
    turns, parts = [], re.split(r"(USER|ASSISTANT|FUNCTION RESPONSE):", chat)
    for name, text in zip(parts[1::2], parts[2::2]):
        content = text.replace("<|endoftext|>", "").strip()
        turns.append({"role": name.lower().replace(" ", "_"), "content": content})
    return turns


def _flat(record: Record, schema: str) -> list[Row]:
    """Rows of a schema of three columns; prompt and response may be lists of messages."""
    names = schema.split("/")
    question, extra, answer = (record.take(name) for name in names)
    context = question if _is_turns(question) else [{"role": "user", "content": question}]
    turns = answer if _is_turns(answer) else [{"role": "assistant", "content": answer}]
    rows, extra = _dialogue(record, turns, context), _text(extra)
    return [replace(row, input=extra) for row in rows] if extra else rows


def labelled_choices(targets: dict) -> tuple[list, list]:
    """TruthfulQA's {"choices": .., "labels": ..} or {answer: 0, 1 or None} -> both as lists."""
    if "choices" in targets:
        return list(targets["choices"]), [int(label) for label in targets["labels"]]
    kept = {choice: int(label) for choice, label in targets.items() if label is not None}
    return list(kept), list(kept.values())


def _answer_index(answer, options: list, names: Sequence[str] = LETTERS) -> int:
    """Which option an answer means: a number is an index from 0; a text is one letter (names of
    the options, either case), one option's text, or an index. Raises ValueError."""
    count, text = len(options), _text(answer)
    if isinstance(answer, (int, Number)) and not isinstance(answer, bool):
        if not 0 <= int(answer) < count:
            raise ValueError(f"right answer {answer} of only {count} choices")
        return int(answer)
    meant = {i for i in range(count) if text.strip().upper() == str(names[i]).upper()}
    meant |= {i for i in range(count) if text == options[i]}
    if not meant and text.isdecimal() and int(text) < count:
        meant = {int(text)}
    if len(meant) > 1:
        raise ValueError(f"answer {text!r} may mean {len(meant)} of the {count} options")
    if not meant:
        raise ValueError(f"answer {text!r} is none of the {count} options")
    return meant.pop()


def _choice_columns(record: Record) -> tuple | None:
    """-> (question, options, answer, names of the options), or None where the record is no
    multiple-choice row. What the columns are called tells the benchmark."""
    take = record.take
    if record.present("ans0", "label"):  # BBQ
        names = [f"ans{i}" for i in range(10) if record.present(f"ans{i}")]
        question = f"{_text(take('context'))}\n{_text(take('question'))}".strip()
        return question, [take(name) for name in names], take("label"), LETTERS
    if record.columns.get("mc1_targets"):  # TruthfulQA
        options, labels = labelled_choices(take("mc1_targets"))
        return take("question"), options, labels.index(1), LETTERS
    if record.present("endings", "label"):  # HellaSwag
        return take("ctx"), take("endings"), take("label"), LETTERS
    if record.present("opa", "cop"):  # MedMCQA
        names = [f"op{letter}" for letter in "abcd"]
        return take("question"), [take(name) for name in names], take("cop"), LETTERS
    for column in ("options", "choices"):  # MedQA, MMLU
        options = record.columns.get(column)
        named = [name for name in ("answer_idx", "answer") if name in record.columns]
        answer = next(filter(record.present, named), named[0] if named else None)  # null: refused
        if answer and options and isinstance(options, (list, tuple, dict)):
            take(column)
            names = LETTERS
            if isinstance(options, dict):
                names = sorted(key for key in options if options[key] is not None)
                options = [options[name] for name in names]
            return take("question"), options, take(answer), names
    return None


def _multiple_choice(record: Record) -> list[Row] | None:
    """The row of a multiple-choice record, or None."""
    found = _choice_columns(record)
    if found is None:
        return None
    question, options, answer, names = found
    choices = tuple(_text(option) for option in options)
    index = _answer_index(answer, choices, names)
    messages = (*_before(record), ("user", _text(question)))
    where = {"file": record.file, "number": record.number}
    return [Row(messages, choices[index], choices=choices, answer=index, **where)]


def _match_schema(record: Record) -> list[Row] | None:
    """Rows of a record by its columns, or None where they fit no schema."""
    for column in DIALOGUES:
        if record.columns.get(column):
            return _dialogue(record, _json_cell(record.take(column), column))
    if record.present("chat", "system"):
        return _dialogue(record, _glaive(record))
    rows = _multiple_choice(record)
    if rows:
        return rows
    if record.present("question", "long_answer"):  # PubMedQA
        column = "contexts" if record.present("contexts") else "context"
        contexts = record.take(column) or []
        contexts = contexts.get("contexts", []) if isinstance(contexts, dict) else contexts
        rows = _flat(record, "question/-/long_answer")
        return [replace(row, input="\n".join(map(_text, contexts))) for row in rows]
    for nullable in (False, True):  # a response may be null where other rows have one
        for schema in FLAT_SCHEMAS:
            prompt, _, response = schema.split("/")
            there = response in record.columns if nullable else record.present(response)
            if record.present(prompt) and there:
                return _flat(record, schema)
    if "text" in record.columns:
        return [Row((), _text(record.take("text")), "", record.file, record.number)]
    if any(column in record.columns for column in DIALOGUES):
        record.left_out["no assistant turn"] += 1
        return []
    return None


def check_object(record: object, where: str) -> None:
    """Raise UserError unless a record is a JSON object."""
    if not isinstance(record, dict):
        kind = "null" if record is None else type(record).__name__
        raise UserError(f"{where}: expected an object, found {kind}")


def read_record(record: dict, file: str = "data", number: int = 1) -> tuple[list[Row], Record]:
    """One record of any schema -> its rows (several for a dialogue), and what was not used. Column
    names are compared in lower case, spaces as underscores. Raises UserError naming file, row and
    the keys found."""
    where = f"{file}, row {number}"
    check_object(record, where)
    columns = {str(key).strip().lower().replace(" ", "_"): v for key, v in record.items()}
    found, state = f"keys {sorted(columns)}", Record(columns, file, number)
    try:
        rows = _match_schema(state)
    except ValueError as error:
        raise UserError(f"{where}: {error}; {found}") from None
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: cannot read the row ({cause}); {found}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; {found}") from None
    if rows is None:
        raise UserError(f"{where}: {found} fit no known schema; accepted are {ACCEPTED}")
    return rows, state


def rows_from_record(record: dict, file: str = "data", number: int = 1) -> list[Row]:
    """The rows of read_record."""
    return read_record(record, file, number)[0]


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
    "autoif": [HubSource("Post-training-Data-Flywheel/AutoIF-instruct-61k")],
    "medical_flashcards": [HubSource("medalpaca/medical_meadow_medical_flashcards")],
    "glaive": [HubSource("glaiveai/glaive-function-calling-v2")],
    "fineweb": [HubSource("HuggingFaceFW/fineweb", "sample-10BT", stream=True)],
    "wikipedia": [HubSource("wikimedia/wikipedia", "20231101.en", stream=True)],
    "nemotron_safety": [HubSource("nvidia/Llama-Nemotron-Post-Training-Dataset", "SFT", "safety")],
    "bbq": [HubSource("oskarvanderwal/bbq", "All", "test")],
    "tinymmlu": [HubSource("tinyBenchmarks/tinyMMLU", "all", "test")],
    "tinyhellaswag": [HubSource("tinyBenchmarks/tinyHellaswag", "default", "validation")],
    "pubmedqa": [HubSource("qiaojin/PubMedQA", "pqa_labeled")],
    "medqa": [HubSource("GBaker/MedQA-USMLE-4-options", eval_split="test")],
    "medmcqa": [HubSource("openlifescienceai/medmcqa", eval_split="validation")],
    "truthfulqa": [HubSource("truthfulqa/truthful_qa", "multiple_choice", "validation")],
}
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")


def split_of(file: Path) -> str:
    """The split that a file's name speaks of, as the hub's files do; "" where it names none."""
    found = [word for word in re.split("[^a-z]+", file.name.lower()) if word in SPLIT_NAMES]
    return SPLIT_NAMES[found[0]] if found else ""


def of_split(paths: list[Path], split: str) -> list[Path]:
    """Those of the files (or folders) that hold `split`: "train" is what is called so, or nothing
    at all; "eval" test, else validation. [] where all are another split's."""
    wanted = ("test", "validation", "", "train") if split == "eval" else ("train", "")
    for name in wanted:
        found = [path for path in paths if split_of(path) == name]
        if found:
            return found
    return []


def _saved(path: Path, read: Callable) -> list[Path]:
    """What a file that save_to_disk wrote names: read(its value) -> names of the same folder. []
    where there is no such file. Raises UserError."""
    try:
        if not path.is_file():
            return []
        return [path.parent / name for name in read(json.loads(path.read_text(encoding="utf-8")))]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: is not what save_to_disk writes ({cause})") from None


def folder_files(folder: Path, split: str, above: tuple = ()) -> list[Path]:
    """The files of a folder that hold `split` ("train" or "eval"): what save_to_disk wrote, or data
    files in it or in its data/ (a clone of a hub repository). above: the real folders that hold it.
    Raises UserError."""
    above = (*above, folder.resolve())
    if above.count(above[-1]) > 1:
        raise UserError(f"{above[-1]}: the folder holds itself, by a link")
    files = _saved(
        folder / "state.json", lambda state: [file["filename"] for file in state["_data_files"]]
    )
    if files:
        return files
    if (folder / "dataset_dict.json").is_file():
        found = _saved(folder / "dataset_dict.json", lambda saved: saved["splits"])
    else:
        found = [file for file in sorted(folder.iterdir()) if file_kind(file)]
        if not found and (folder / "data").is_dir():
            found = [file for file in sorted((folder / "data").iterdir()) if file_kind(file)]
    if not found:
        folders = sorted(child.name for child in folder.iterdir() if child.is_dir())[:5]
        advice = f"; give one of its folders: {', '.join(folders)}" if folders else ""
        known = ", ".join(FILE_TYPES)
        raise UserError(f"{folder}: the folder holds no {known} file{advice}")
    chosen = of_split(found, split)
    names = ", ".join(path.name for path in chosen[:3] or found[:3])
    if not chosen:
        raise UserError(f"{folder}: holds no training split, only {names}; give one of them")
    if len(chosen) < len(found):
        print(f"data  {folder}: {len(chosen)} of {len(found)} files or splits, by name: {names}")
    parts = [folder_files(path, split, above) if path.is_dir() else [path] for path in chosen]
    return [file for part in parts for file in part]


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """No warnings of the hub's libraries inside (each try of a request is one): what is wrong is
    one line of ours. No progress bars of theirs, where they are imported by now."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    imported = [sys.modules.get(name) for name in ("huggingface_hub.utils", "datasets")]
    shown = [lib for lib in imported if lib and not lib.are_progress_bars_disabled()]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for library in shown:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        for library in shown:
            library.enable_progress_bars()


@contextlib.contextmanager
def hub_errors(source: HubSource, split: str) -> Iterator[None]:
    """What the hub's libraries raise inside, many types, is a UserError."""
    try:
        with quiet_hub():
            yield
    except UserError:
        raise
    except Exception as error:
        name = source.path + (f" ({source.config})" if source.config else "")
        what = f"{name}, split {split}, from the Hugging Face hub"
        cause = f"{type(error).__name__}: {str(error)[:300]}"
        advice = "; is there a network?" if isinstance(error, ConnectionError) else ""
        raise UserError(f"cannot load {what}: {cause}{advice}") from None


def hub_files(builder, split: str) -> list[tuple[str, str]]:
    """[(name, local copy)] of a repository of JSON or CSV files, which read_file reads, since
    `datasets` infers types; [] of any other."""
    import datasets

    if builder.name not in ("json", "csv"):
        return []
    files = [str(file) for file in builder.config.data_files[split]]
    return list(zip(files, datasets.DownloadManager().download(files)))


def load_hub(source: HubSource, limit: int | None, split: str = "train") -> Iterator[tuple]:
    """(file, row number, record) of a HubSource, one after the other; of a streamed one only up to
    limit. It runs no code of a repository (loading scripts ended with `datasets` 4). Raises
    UserError."""
    import datasets

    split = source.eval_split if split == "eval" and source.eval_split else source.split
    with hub_errors(source, split):
        builder = datasets.load_dataset_builder(source.path, source.config)
        files = [] if source.stream else hub_files(builder, split)
        for name, path in files:
            yield from ((name, *record) for record in read_file(path, name))
        if files:
            return
        options = {"split": split, "streaming": source.stream}
        records = datasets.load_dataset(source.path, source.config, **options)
        records = records.take(limit or STREAM_ROWS) if source.stream else records
        yield from ((source.path, i, record) for i, record in enumerate(records, 1))


def hub_content(source: HubSource, split: str) -> list[str]:
    """What the records of load_hub depend on: the sha256 of its files, or the library's own name of
    this version of the dataset, with the repository's commit."""
    import datasets

    split = source.eval_split if split == "eval" and source.eval_split else source.split
    with hub_errors(source, split):
        builder = datasets.load_dataset_builder(source.path, source.config)
        files = [] if source.stream else hub_files(builder, split)
        if files:
            return [f"{file_kind(Path(name))} {sha256(path)}" for name, path in files]
        return [f"{source.path} {source.config} {split} {builder.cache_dir} {source.stream}"]


def sha256(path: str | Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


SPEC_FORM = re.compile(r"(?:(?P<label>[^=/\\#]+)=)?(?P<source>[^#]+)(?:#(?P<count>\d{1,20}))?")


def parse_spec(spec: str) -> tuple[str | None, str, int | None]:
    """`[label=]SOURCE[#N]` -> (label or None, source, N or None). What is a file or folder's whole
    name is that. Raises UserError."""
    if spec and os.path.exists(spec):
        return None, spec, None
    match = SPEC_FORM.fullmatch(spec)
    if not match or int(match["count"] or 1) == 0:
        form = "expected [label=]SOURCE[#N] with N at least 1"
        raise UserError(f"{spec[:200]!r} is no dataset; {form}")
    return match["label"], match["source"], match["count"] and int(match["count"])


@dataclass
class Source:
    """What a SPEC names. A record of toy is a Row."""

    spec: str
    records: Callable[[], Iterable[tuple]]  # (file, row number, record), read anew at each call
    content: Callable[[], list[str]]  # what the records depend on: digests; [] is not to be kept
    label: str  # that the datasets get, or begin with
    column: str | None  # that splits it
    prefix: bool = False  # whether the label was given by the SPEC
    drawn: str = ""  # which of the records #N keeps

    def name(self, group: str | None) -> str:
        """The label of the rows with this value of the column."""
        if self.column is None:
            return self.label
        return f"{self.label}/{group}" if self.prefix else str(group)


def find_source(spec: str, source_column: str | None, seed: int, split: str) -> Source:
    """A SPEC -> its Source, of whose records #N random ones are kept (drawn with seed) in file
    order. source_column: --source_column, in place of the alias's own. split: "train" or "eval"
    (for --eval_data: toy's held-out rows, and an alias's test split where it has one). Raises
    UserError."""
    label, name, count = parse_spec(spec)
    path, known = Path(name), ", ".join(FILE_TYPES)
    if name == "toy" or name.startswith("toy/"):
        source = toy_source(spec, name[4:] or None, split)
    elif path.is_dir():
        files = folder_files(path, split)
        source = file_source(spec, files, path.resolve().name, source_column)
    elif path.is_file():
        if not file_kind(path):
            raise UserError(f"{name}: unknown file type {path.suffix!r}; expected one of {known}")
        stem = path.name
        while Path(stem).suffix.lower() in {**FILE_TYPES, **COMPRESSION}:
            stem = Path(stem).stem
        source = file_source(spec, [path], stem, source_column)
    elif file_kind(path) or name[0] in "./~" or name.count("/") > 1:
        raise UserError(f"{name}: no such file or folder")
    elif name not in ALIASES and "/" not in name:
        aliases = ", ".join(sorted(ALIASES))
        raise UserError(f"{name}: no such file, folder or alias; aliases are toy, {aliases}")
    else:
        entries = ALIASES.get(name) or [HubSource(name)]
        source = hub_source(spec, entries, count, split)
        source.label, source.column = name.split("/")[-1], source_column or entries[0].source_column
    if label:
        source.label, source.prefix = label, True
    if count is not None:
        source.records = functools.partial(_subset, source.records, spec, count, seed)
        source.drawn = f"{count} by seed {seed}"
    return source


def toy_source(spec: str, task: str | None, split: str) -> Source:
    rows = toy_rows(task, split)
    records = [(row.file, row.number, row) for row in rows]
    return Source(spec, lambda: records, list, task or "toy", None if task else "task")


def file_source(spec: str, files: list[Path], label: str, column: str | None) -> Source:
    records, content = (functools.partial(f, files) for f in (_file_records, _file_content))
    return Source(spec, records, content, label, column)


def _file_records(files: list[Path]) -> Iterator[tuple]:
    for file in files:
        yield from ((str(file), *record) for record in read_file(file))


def _file_content(files: list[Path]) -> list[str]:
    try:
        return [f"{file_kind(file)} {file.suffix.lower()} {sha256(file)}" for file in files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def hub_source(spec: str, entries: list[HubSource], limit: int | None, split: str) -> Source:
    records = functools.partial(_hub_records, entries, limit, split)
    if any(entry.stream for entry in entries):  # not twice over the network
        records = functools.cache(lambda: [*_hub_records(entries, limit, split)])
    return Source(spec, records, functools.partial(_hub_content, entries, split), spec, None)


def _hub_records(entries: list[HubSource], limit: int | None, split: str) -> Iterator[tuple]:
    return itertools.chain.from_iterable(load_hub(entry, limit, split) for entry in entries)


def _hub_content(entries: list[HubSource], split: str) -> list[str]:
    return [line for entry in entries for line in hub_content(entry, split)]


def _subset(records: Callable, spec: str, count: int, seed: int) -> Iterator[tuple]:
    """`count` random records in their order. They are read twice: few are held at a time."""
    total = sum(1 for _ in records())
    if count > total:
        raise UserError(f"{spec}: asks for {count} rows of {total}")
    keep = np.zeros(total, bool)
    keep[data_rng(seed, "subset").choice(total, count, replace=False)] = True
    return itertools.compress(records(), keep)


def read_rows(file: str, number: int, record, column: str | None) -> tuple[str | None, Dataset]:
    """A record of a Source -> value of the column that splits it, and its rows, with what of it is
    not in them. Rows whose response is blank are left out and counted. Raises UserError."""
    if isinstance(record, Row):  # toy
        return (file.removeprefix("toy/") if column else None), Dataset("", [record])
    rows, state = read_record(record, file, number)
    unused, group = state.unused_columns(), None
    if column:
        if record.get(column) is None:
            problem = f"no column {column!r} to split by; keys {sorted(record)}"
            raise UserError(f"{file}, row {number}: {problem}")
        group = _text(record[column])
        unused.discard(column.strip().lower().replace(" ", "_"))
    kept = [row for row in rows if row.response.strip() or row.keys]
    state.left_out["empty response"] += len(rows) - len(kept)
    left_out = {reason: count for reason, count in state.left_out.items() if count}
    return group, Dataset("", kept, left_out, sorted(unused))


def order_groups(source: Source, groups: dict) -> list[str | None]:
    """{value of the column: its Dataset} of a SPEC -> the values in the order of its datasets
    (toy's in its own). Raises UserError where one has no row."""
    if not groups:
        raise UserError(f"{source.spec}: no rows")
    for group, read in groups.items():
        if not read.size:
            why = ", ".join(f"{reason}: {n}" for reason, n in read.left_out.items())
            name = source.name(group)
            raise UserError(f"{source.spec}: dataset {name!r} has no row with a response ({why})")
    return [*groups] if source.column == "task" else sorted(groups, key=str)


def load_spec(spec: str, source_column: str | None, seed: int, split: str) -> list[Dataset]:
    """One SPEC -> its datasets with all their rows: one, or one a value of --source_column or the
    alias's own column (find_source). Raises UserError."""
    source, groups = find_source(spec, source_column, seed, split), {}
    for file, number, record in source.records():
        group, found = read_rows(file, number, record, source.column)
        dataset = groups.setdefault(group, Dataset(source.name(group), []))
        dataset.rows += found.rows
        dataset.note(found.left_out, found.unused)
    return [groups[group] for group in order_groups(source, groups)]


def check_labels(labels: Sequence[str]) -> None:
    """Raise UserError where two datasets have the same label."""
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UserError(f"two datasets are called {twice[0]!r}; name them with label=SOURCE")


def load_data(specs: Sequence[str], source_column=None, seed: int = 0, split: str = "train"):
    """SPECs -> list of Dataset with distinct labels (each SPEC may give several)."""
    result = []
    for spec in specs:
        result += load_spec(spec, source_column, seed, split)
    check_labels([dataset.label for dataset in result])
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


# ---- Templates: every prompt is a chat template of the tokenizer ---------------------------------

# Stanford Alpaca's prompt. Earlier turns are more sections, a system message is its preamble, a
# turn's `input` (Alpaca's field) a section of its own.
ALPACA = """
{%- set headings = {'user': 'Instruction:\\n', 'assistant': 'Response:', 'tool': 'Tool:\\n',
    'system': 'System:\\n'} -%}
{%- set found = namespace(input=false) -%}
{%- for m in messages if m.input -%}{%- set found.input = true -%}{%- endfor -%}
{%- if messages[0].role == 'system' -%}
{{ messages[0].content }}
{%- else -%}
{{ 'Below is an instruction that describes a task' }}
{%- if found.input -%}
{{ ', paired with an input that provides further context' }}
{%- endif -%}
{{ '. Write a response that appropriately completes the request.' }}
{%- endif -%}
{%- for m in messages -%}
{%- if not (loop.first and m.role == 'system') -%}
{{ '\\n\\n### ' ~ headings[m.role] ~ m.content }}
{%- endif -%}
{%- if m.input -%}{{ '\\n\\n### Input:\\n' ~ m.input }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n\\n### Response:' }}
{%- elif messages[-1].role == 'assistant' -%}{{ eos_token }}{%- endif -%}
"""
# The messages one below the other, nothing added.
PLAIN = """
{%- for m in messages -%}
{{ m.content }}{%- if m.input -%}{{ '\\n' ~ m.input }}{%- endif -%}
{%- if loop.last and m.role == 'assistant' and not add_generation_prompt -%}
{{ eos_token }}{%- else -%}{{ '\\n' }}{%- endif -%}
{%- endfor -%}
"""
TEMPLATES = {"alpaca": ALPACA, "plain": PLAIN}
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")  # today's date, in a template


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer itself begins a text with BOS (Llama, Gemma: yes; GPT-2, Qwen: no)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def pick_template(name: str, tokenizer) -> str:
    """auto -> chat where the tokenizer has a chat template, else alpaca. Raises UserError."""
    if name == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if name == "chat" and not tokenizer.chat_template:
        problem = "this tokenizer has no chat template; use --template alpaca or plain"
        raise UserError(f"--template chat: {problem}")
    return name


def template_text(name: str, tokenizer) -> str:
    """The Jinja text of alpaca, plain, chat (the tokenizer's own) or a Jinja file. Raises
    UserError."""
    if name in TEMPLATES:
        return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + TEMPLATES[name]
    if name == "chat":
        return tokenizer.get_chat_template()
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = "auto, alpaca, chat, plain or a Jinja file"
        raise UserError(f"--template {name}: expected {known} ({error})") from None


def template_date(name: str, tokenizer, first: str | None = None) -> str | None:
    """The date (YYYY-MM-DD) that a template which writes today's writes for good: `first`, that of
    the run's first start, else today. None for a template without one."""
    if not CLOCK.search(template_text(name, tokenizer)):
        return None
    return first or datetime.date.today().isoformat()


TEMPLATE_SECONDS = 10  # that a template may take for two short turns


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds inside, where the system can: Unix, main thread."""
    here = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if not here:
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it ran for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def with_template(tokenizer, name: str, date: str | None = None):
    """-> a copy of the tokenizer whose chat template is the one of --template (pick_template's
    choice), tried once. date (YYYY-MM-DD) takes the place of today's in templates that write it,
    so that what is saved renders what was trained. Raises UserError."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so the model could not learn to stop")
    text = template_text(name, tokenizer)
    day = datetime.date.fromisoformat(date) if date else datetime.date.today()
    result = copy.copy(tokenizer)
    result.chat_template = CLOCK.sub(lambda found: repr(day.strftime(found[2])), text)
    where = f" of {tokenizer.name_or_path}" if name == "chat" and tokenizer.name_or_path else ""
    if "strftime_now(" in result.chat_template:
        problem = "its strftime_now has no plain text as format, so its date cannot be kept"
        raise UserError(f"--template {name}{where}: cannot be used: {problem}")
    try:
        with time_limit(TEMPLATE_SECONDS):
            Template(result).ids([Row((("user", "One?"),), "Two.")])
    except (UserError, TimeoutError) as error:
        problem = str(error).split(": ", 1)[-1].removesuffix("; try --template alpaca")
        advice = "" if name in TEMPLATES else "; try --template alpaca"
        raise UserError(f"--template {name}{where}: cannot be used: {problem}{advice}") from None
    return result


def _pieces(content: str) -> list[str]:
    """What of a turn's text must be in what a template renders: a think block and what follows it
    are moved apart and trimmed."""
    return [part.removeprefix("<think>").strip() for part in content.strip().split("</think>")]


def _holds(text: str, piece: str) -> bool:
    return piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text


def _function_names(keys: str, column: str = "") -> list[str]:
    """Names of the tools of a row, or of the calls of a turn's keys."""
    found = json.loads(keys) if keys else []
    entries = found.get(column, []) if column else found
    return [entry.get("function", entry).get("name", "") for entry in entries]


class Template:
    """The chat template of a tokenizer (with_template) and what training must know of it: where a
    response begins, what ends a turn, which text is a special token and which a user wrote."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = {token.content: i for i, token in added.items() if token.special}
        alone = sorted(self.special, key=len, reverse=True)
        self.marker = re.compile("|".join(map(re.escape, alone)) or r"(?!)")
        stripped = [self._with_space(token) for token in added.values() if token.special]
        self.apart = re.compile(f"({'|'.join(stripped)})" if stripped else r"(?!)")
        self.seen = {}  # shape of a dialogue -> the turn that the template leaves out, or None
        probe = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
        first = [{**probe[0], "input": "More"}]
        question = self._apply(first, None, True, Row(probe, ""))
        self.takes_input = "More" in question
        self.opening = question.removeprefix(self._apply(first, None, False, Row(probe, "")))
        full = self._apply(probe, None, False, Row(probe, ""))
        self.after = full[full.rfind("Two.") + 4 :]
        # the template's own end of turn: the first added token after an answer, None without one
        places = {self.after.find(t.content): t.content for t in added.values()}
        self.end = places.get(min((at for at in places if at >= 0), default=None))
        self.end_token = self._id(self.end) if self.end else tokenizer.eos_token_id

    @staticmethod
    def _with_space(token) -> str:
        """Pattern of an added token, with the white space that it swallows."""
        left, right = r"\s*" * token.lstrip, r"\s*" * token.rstrip
        return left + re.escape(token.content) + right

    def _id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def _apply(self, messages: list, tools: list | None, generate: bool, row: Row) -> str:
        """The tokenizer's own rendering. Raises UserError naming the row."""
        options = {"tokenize": False, "add_generation_prompt": generate}
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **options)
        except Exception as error:  # raise_exception of the template, and Jinja's own types
            problem = f"the chat template fails ({error}); try --template alpaca"
            raise UserError(f"{row.where}: {problem}") from None

    def _messages(self, row: Row) -> list[dict]:
        """The turns before the response as the tokenizer takes them."""
        messages = []
        for role, content, *keys in row.messages:
            more = json.loads(keys[0]) if keys else {}
            messages.append({"role": role, "content": content, **more})
        if row.input and self.takes_input:
            messages[-1]["input"] = row.input
        elif row.input:
            messages[-1]["content"] += "\n\n" + row.input
        return messages

    def _render(self, row: Row) -> tuple[str, str]:
        """-> (text up to where the response begins, text with the response). Raises UserError."""
        messages, tools = self._messages(row), json.loads(row.tools) if row.tools else None
        answer = {"role": "assistant", "content": row.response}
        answer |= json.loads(row.keys) if row.keys else {}
        try:
            prompt = self._apply(messages, tools, True, row)
        except UserError:  # no system role (Gemma): the first user turn takes its text
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise
            system = messages.pop(0)["content"]
            messages[0]["content"] = system + "\n\n" + messages[0]["content"]
            prompt = self._apply(messages, tools, True, row)
        full = self._apply([*messages, answer], tools, False, row)
        if not full.startswith(prompt):  # Qwen3 after two assistant turns: another think block
            at = full.rfind(self.opening) if self.marker.search(self.opening) else -1
            if at >= 0:
                return full[: at + len(self.opening)], full
            problem = "the chat template changes the prompt once a response follows, so the"
            problem += " boundary between them is unclear; try --template alpaca"
            raise UserError(f"{row.where}: {problem}")
        return prompt, full

    def _left_out(self, row: Row) -> str | None:
        """The first thing of a row that the template does not render, in words. Turns are told
        apart by standing in for their texts; each shape of a dialogue is tried once."""
        roles = tuple((role, bool(text.strip()), *keys) for role, text, *keys in row.messages)
        shape = roles, bool(row.response.strip()), bool(row.input), row.keys, row.tools
        if shape not in self.seen:
            marked = []
            for i, (role, text, *keys) in enumerate(row.messages):
                marked.append((role, f"Turn{i}." if text.strip() else "", *keys))
            response = "Answer." if row.response.strip() else ""
            extra = "Input." if row.input else ""
            one = replace(row, messages=tuple(marked), response=response, input=extra)
            prompt, full = self._render(one)
            lost = [role for role, text, *_ in marked if text not in prompt]
            lost += ["input"] if extra not in prompt else []
            lost += ["assistant"] if response not in full[len(prompt) :] else []
            self.seen[shape] = f"the {lost[0]} turn's text" if lost else None
        return self.seen[shape]

    def _check(self, row: Row, prompt: str, answer: str) -> None:
        """Raise UserError unless what went into the template is in what came out; the think blocks
        of earlier answers may be left out."""
        lost = self._left_out(row)
        for role, text, *keys in row.messages:
            if not _holds(prompt, _pieces(text)[-1] if role == "assistant" else text.strip()):
                lost = lost or f"the {role} turn's text"
            for name in _function_names(keys[0], "tool_calls") if keys else []:
                lost = lost or (None if name in prompt else f"the call of {name}")
        for name in _function_names(row.tools):
            lost = lost or (None if name in prompt else f"the tool {name}")
        if row.keys:
            for name in _function_names(row.keys, "tool_calls"):
                lost = lost or (None if name in answer else f"the call of {name}")
            reasoning = json.loads(row.keys).get("reasoning_content", "").strip()
            lost = lost or (None if _holds(answer, reasoning) else "the reasoning")
        if not all(_holds(answer, piece) for piece in _pieces(row.response)):
            lost = lost or "the response"
        if lost:
            raise UserError(f"{row.where}: the chat template leaves out {lost}")

    def text(self, row: Row) -> tuple[str, str]:
        """-> (prompt, response with the template's own end of turn where it has one). Raises
        UserError naming the row."""
        prompt, full = self._render(row)
        answer = full[len(prompt) :]
        self._check(row, prompt, answer)
        at = answer.rfind(self.end) if self.end else -1
        if at >= 0:
            return prompt, answer[: at + len(self.end)]
        return prompt, answer.removesuffix(self.after)

    def _stand_ins(self, row: Row) -> tuple[Row, str]:
        """The row with special tokens that its own text spells out replaced by <mark>i<mark>, so
        that those left in the rendering are the template's; and the mark, "" where there are
        none."""
        parts = [part for _, *rest in row.messages for part in rest]
        text = "\n".join([*parts, row.response, row.input, row.keys, row.tools])
        if not self.marker.search(text):
            return row, ""
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
        names = list(self.special)

        def hide(text: str) -> str:
            return self.marker.sub(lambda found: f"{mark}{names.index(found[0])}{mark}", text)

        messages = tuple((role, *map(hide, rest)) for role, *rest in row.messages)
        texts = {key: hide(getattr(row, key)) for key in ("response", "input", "keys", "tools")}
        return replace(row, messages=messages, **texts), mark

    def _split_ids(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered text with stand-ins: the template's tokens, and text between them."""
        ids, names = [], list(self.special)
        for i, part in enumerate(self.apart.split(text)):
            if i % 2:
                ids.append(self.special[self.marker.search(part)[0]])
            elif part:
                shown = re.sub(f"{mark}(\\d+){mark}", lambda found: names[int(found[1])], part)
                ids += self._tokenize([shown], split_special_tokens=True)[0]
        return ids

    def _tokenize(self, texts: list[str], **options) -> list[list[int]]:
        options |= {"add_special_tokens": False, "verbose": False}
        return self.tokenizer(texts, **options).input_ids if texts else []

    def prompt_ids(self, row: Row) -> list[int]:
        """Ids up to where the response begins."""
        row, mark = self._stand_ins(row)
        prompt = self._render(row)[0]
        return self._split_ids(prompt, mark) if mark else self._tokenize([prompt])[0]

    def ids(self, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
        """-> (prompt ids, response ids with one end of turn) of each row. The response is what
        follows the prompt's ids in the joint tokenisation, or tokenised apart where that differs;
        a plain text follows BOS where the tokenizer adds one. Raises UserError."""
        result, chosen, texts = [None] * len(rows), [], []
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        begin = [bos] if adds_bos(self.tokenizer) else []
        for i, row in enumerate(rows):
            if not row.messages:
                text = self._tokenize([row.response], split_special_tokens=True)[0]
                result[i] = begin, [*text, eos]
                continue
            row, mark = self._stand_ins(row)
            prompt, response = self.text(row)
            if mark:
                result[i] = self._split_ids(prompt, mark), self._split_ids(response, mark)
            else:
                chosen.append(i)
                texts.append((prompt, response))
        prompts = self._tokenize([prompt for prompt, _ in texts])
        joints = self._tokenize(["".join(text) for text in texts])
        for i, text, prompt, joint in zip(chosen, texts, prompts, joints):
            response = joint[len(prompt) :]
            if joint[: len(prompt)] != prompt:
                response = self._tokenize([text[1]])[0]
            result[i] = prompt, response
        last = {*self.special.values(), self.end_token, eos}
        return [(p, r if r and r[-1] in last else [*r, eos]) for p, r in result]


def end_tokens(tokenizer) -> list[int]:
    """Where generation must stop under the tokenizer's template: at its own end of turn, and at
    EOS, which ends plain text."""
    return list(dict.fromkeys([Template(tokenizer).end_token, tokenizer.eos_token_id]))


# ---- Tokens: rows -> examples --------------------------------------------------------------------
@dataclass(frozen=True)
class Example:
    """A tokenised Row: ids[start:] is supervised, ids[:start] is context."""

    ids: np.ndarray  # (T,) int64
    start: int  # at least 1: the first token has nothing that predicts it
    row: int  # index of the Row in its Dataset
    dataset: int = 0  # index of the Dataset
    cut: bool = False  # whether --max_length cut off the end of turn

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.start


TABLE = np.dtype(  # of an example: where its tokens begin in its part, how many, Example's own
    [("begin", "<i8"), ("length", "<i4"), ("start", "<i4"), ("row", "<i4")]
    + [("dataset", "<i4"), ("cut", "?"), ("part", "<i2")]
)


class Examples(Sequence):
    """N tokenised rows in flat arrays, which processes can share: an Example is made when it is
    asked for. A slice is Examples, of the same tokens."""

    def __init__(self, tokens: list[np.ndarray], table: np.ndarray):
        self.tokens = tokens  # int32 each; those of an example are in tokens[its part]
        self.table = table  # (N,) TABLE

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        table, ids = np.zeros(len(examples), TABLE), [example.ids for example in examples]
        table["length"] = [len(own) for own in ids]
        table["begin"] = np.cumsum(table["length"]) - table["length"]
        for name in ("start", "row", "dataset", "cut"):
            table[name] = [getattr(example, name) for example in examples]
        return cls([np.concatenate([*ids, np.zeros(0)]).astype("<i4")], table)

    @classmethod
    def join(cls, several: Sequence[Examples]) -> Examples:
        """The examples of several, one after the other."""
        tokens, tables = [], []
        for examples in several:
            table = examples.table.copy()
            table["part"] += len(tokens)
            tokens += examples.tokens
            tables.append(table)
        return cls(tokens, np.concatenate(tables))

    def take(self, chosen: np.ndarray | slice) -> Examples:
        """Those at some indices, in that order."""
        return Examples(self.tokens, self.table[chosen])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int | slice) -> Example | Examples:
        if isinstance(i, slice):
            return self.take(i)
        begin, length, start, row, dataset, cut, part = self.table[i].item()
        ids = self.tokens[part][begin : begin + length].astype(np.int64)
        return Example(ids, start, row, dataset, cut)

    @property
    def lengths(self) -> np.ndarray:
        return self.table["length"].astype(np.int64)

    @property
    def response_lengths(self) -> np.ndarray:
        return self.lengths - self.table["start"]

    def fingerprint(self) -> str:
        """sha256 over the boundaries of the examples, then over their token ids in order."""
        table, digest = self.table, hashlib.sha256()
        for name in ("length", "start"):
            digest.update(table[name].tobytes())
        follows = table["begin"][1:] == table["begin"][:-1] + table["length"][:-1]
        follows &= table["part"][1:] == table["part"][:-1]
        for run in np.split(table, np.flatnonzero(~follows) + 1) if len(table) else []:
            first, last = run[0], run[-1]
            tokens = self.tokens[first["part"]][first["begin"] : last["begin"] + last["length"]]
            digest.update(tokens)
        return digest.hexdigest()


CHUNK = 1000  # rows tokenised at once
CUT = "cut at --max_length"


def encode(
    rows: list[Row], tokenizer, max_length: int, dataset: int = 0, progress: str = ""
) -> tuple[list[Example], dict[str, int]]:
    """Tokenise rows by the tokenizer's template (with_template) -> (examples, {reason: rows left
    out or cut}). Supervised are the response and one end of turn. Too long: cut on the right, left
    out where no response remains. tokenizer: or its Template, made once. Raises UserError."""
    template = tokenizer if isinstance(tokenizer, Template) else Template(tokenizer)
    examples, counts = [], Counter()
    starts, hidden = range(0, len(rows), CHUNK), not progress or len(rows) < 2 * CHUNK
    for at in tqdm(starts, f"tokenise {progress}", disable=hidden, unit="k rows", leave=False):
        pairs = template.ids(rows[at : at + CHUNK])
        for row, (context, response) in enumerate(pairs, at):
            ids, start = (context + response)[:max_length], max(1, len(context))
            cut = len(ids) < len(context) + len(response)
            if len(response) < 2:
                counts["empty response"] += 1
            elif len(ids) <= start:
                counts["prompt fills max_length"] += 1
            else:
                counts[CUT] += cut
                examples.append(Example(np.array(ids, dtype=np.int64), start, row, dataset, cut))
    return examples, {reason: count for reason, count in counts.items() if count}


def encode_datasets(
    sets: list[Dataset], tokenizer, max_length: int, quiet: bool = False, split: str = "train"
) -> list[Examples]:
    """encode() over datasets -> Examples of each; adds what was left out or cut to each
    Dataset's left_out, and prints it. split: "train" or "eval", what they are for. Raises UserError
    where a dataset keeps nothing."""
    result = []
    for k, dataset in enumerate(sets):
        progress = "" if quiet else dataset.label
        examples, found = encode(dataset.rows, tokenizer, max_length, k, progress)
        dataset.left_out = dict(Counter(dataset.left_out) + Counter(found))
        if not quiet:
            tokens = sum(example.response_length for example in examples)
            print(summary(dataset, split, len(examples), tokens))
        if not examples:
            problem = f"no example is left at --max_length {max_length}; {dataset.left_out}"
            raise UserError(f"dataset {dataset.label!r}: {problem}")
        result.append(Examples.of(examples))
    return result


def summary(dataset: Dataset, split: str, examples: int, tokens: int) -> str:
    """A line about a dataset, for the terminal. split: "train" or "eval", what it is for."""
    counts = f"{examples:,} examples, {tokens:,} response tokens"
    return f"data  {split:<5} {dataset.label}: {counts}{notes(dataset)}"


def notes(dataset: Dataset) -> str:
    """What of a dataset was cut, left out or not used, for the terminal."""
    left_out = dict(dataset.left_out)
    cut = left_out.pop(CUT, 0)
    parts = [f", {cut:,} {CUT}"] if cut else []
    if left_out:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
        parts.append(f"; left out: {reasons}")
    if dataset.unused:
        parts.append(f"; columns not used: {', '.join(dataset.unused)}")
    return "".join(parts)


def encode_choices(rows: list[Row], tokenizer, max_length: int) -> tuple[list, dict]:
    """Multiple-choice rows -> (questions, {reason: rows left out}). A question is a list of
    Example, one a choice, without an end token: they differ in the answer alone. All must fit.
    Raises UserError."""
    flat, owner = [], []
    for number, row in enumerate(rows):
        if len(row.choices) < 2:
            problem = "is no multiple-choice row, accuracy over choices cannot be measured on it"
            raise UserError(f"{row.where}: {problem}")
        flat += [replace(row, response=choice) for choice in row.choices]
        owner += [number] * len(row.choices)
    found = {number: [] for number in range(len(rows))}
    for example in encode(flat, tokenizer, max_length)[0]:
        if not example.cut:
            number = owner[example.row]
            found[number].append(replace(example, ids=example.ids[:-1], row=number))
    whole = [found[i] for i, row in enumerate(rows) if len(found[i]) == len(row.choices)]
    cut = len(rows) - len(whole)
    return whole, {"a choice does not fit": cut} if cut else {}


def show_examples(examples: Iterable[Example], tokenizer, count: int = 2) -> None:
    """Print the first examples of each dataset decoded, what is supervised between ⟦ and ⟧."""
    shown = Counter()
    for example in examples:
        shown[example.dataset] += 1
        if shown[example.dataset] <= count:
            context = tokenizer.decode(example.ids[: example.start].tolist())
            response = tokenizer.decode(example.ids[example.start :].tolist())
            counts = f"{example.start} context tokens, {example.response_length} supervised ⟦⟧"
            print(f"--- dataset {example.dataset}, row {example.row}: {counts}")
            print(f"{context}⟦{response}⟧")
    print("---", flush=True)
