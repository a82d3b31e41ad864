"""What eval.py keeps on disk: predictions, one line each, that an interrupted command goes on from.

Small JSON files, names that are path parts, and lists of rows cut at fixed places belong to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from tqdm import tqdm

import common
from data import UserError

# by kind of task: what tells its lines apart, and what a line holds unless it says "skipped"
LINES = {
    "domain": (["index"], {"nll": float, "tokens": int, "correct": int}),
    "lm_eval": (["round", "task", "index", "filter"], {"task": str, "metrics": dict}),
    "chat": (["question_id"], {"answers": list, "prompt_cut": bool, "tstamp": float}),
    "judge": (
        ["key"],
        {"key": str, "turn": int, "round": int, "prompts": str, "score": float | None},
    ),
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


def blocks(store: Predictions, items: list, keys: list[str], size: int, title: str) -> tqdm:
    """Items in lists of `size` of which store lacks a line, under a progress bar. keys: of the
    items' lines. Lists are cut at fixed places and are computed whole: what is batched together,
    and so the last digit, does not depend on where an earlier command stopped."""
    starts = range(0, len(items), size)
    left = [at for at in starts if not store.known.issuperset(keys[at : at + size])]
    return tqdm([items[at : at + size] for at in left], desc=title, leave=False)
