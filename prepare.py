"""Preparation of a run's data: SPECs are read and tokenised once, into flat arrays that are kept in
a cache and mapped into memory, so that the next start takes seconds and processes share the pages.

The cache is $CLEANSFT_CACHE, or ~/.cache/cleansft: a folder for each SPEC under a key of all that
its tokens depend on. It is checked by sha256 whenever it is used, and made again where it is not
what was written; it can be deleted at any time.

Shapes: N examples, n rows with a response, T tokens of an example."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import runs
from data import Examples, UserError

RECORDS = 1000  # prepared at once, by one process
MOST_PROCESSES = 16


@dataclass
class Prepared:
    """A dataset as a run takes it: a data.Dataset whose rows stay in their files."""

    label: str
    examples: Examples
    digests: np.ndarray  # (n,) DIGESTS of its rows
    left_out: dict[str, int]
    unused: list[str]

    @property
    def size(self) -> int:
        return len(self.digests)

    def keep(self, rows: np.ndarray, number: int) -> Prepared:
        """Some of its rows (bool, (n,)), as dataset `number` of a run."""
        examples = self.examples.take(rows[self.examples.table["row"]])
        examples.table["row"] = (np.cumsum(rows) - 1)[examples.table["row"]]
        examples.table["dataset"] = number
        return replace(self, examples=examples, digests=self.digests[rows])


def pool(sets: Sequence[Prepared]) -> tuple[Examples, np.ndarray]:
    """All examples of some datasets, and the index of each one's row among the rows of all of
    them (N,)."""
    examples = Examples.join([one.examples for one in sets])
    first = np.cumsum([0] + [one.size for one in sets])
    return examples, first[examples.table["dataset"]] + examples.table["row"]


@dataclass(frozen=True)
class Recipe:
    """What tokens depend on beside the SPEC, and where they are kept."""

    tokenizer: object  # with --template's chat template (data.with_template)
    max_length: int
    seed: int  # of #N
    split: str = "train"  # or "eval"
    column: str | None = None  # --source_column
    cache: Path | None = None  # None: nothing is kept

    @functools.cached_property
    def tokenizer_sha256(self) -> str:
        """Over all that the tokenizer would be saved as: vocabulary, rules, template and its
        date."""
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    digest.update(f"{file.name} {data.sha256(file)}\n".encode())
        return digest.hexdigest()


# ---- Records -> arrays ---------------------------------------------------------------------------
@dataclass
class Part:
    """Some rows of one dataset as arrays, or all of them."""

    size: int = 0  # rows, n
    left_out: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    examples: list[Examples] = field(default_factory=list)  # one after the other
    digests: list[np.ndarray] = field(default_factory=list)
    note = data.Dataset.note


def prepare_records(
    records: list[tuple], column: str | None, template: data.Template, max_length: int
) -> dict[str | None, Part]:
    """Read and tokenise some records of a Source -> the part of each dataset among them; its
    tables count rows and tokens from 0. Raises UserError."""
    groups, parts = {}, {}
    for record in records:
        group, found = data.read_rows(*record, column)
        dataset = groups.setdefault(group, data.Dataset("", []))
        dataset.rows += found.rows
        dataset.note(found.left_out, found.unused)
    for group, dataset in groups.items():
        examples, counts = data.encode(dataset.rows, template, max_length)
        dataset.note(counts, ())
        parts[group] = Part(dataset.size, dataset.left_out, dataset.unused)
        parts[group].examples.append(Examples.of(examples))
        parts[group].digests.append(dataset.digests)
    return parts


def write_tokens(parts: Iterable[dict], stream: io.BufferedIOBase) -> dict:
    """Tokens of all parts into a stream, one after the other -> {group: Part of the whole source,
    without them}: their tables count the rows of a dataset, and the tokens of the stream."""
    whole, at = {}, 0
    for part in parts:
        for group, own in part.items():
            total, (examples,) = whole.setdefault(group, Part()), own.examples
            examples.table["begin"] += at
            examples.table["row"] += total.size
            at += stream.write(examples.tokens[0].tobytes()) // 4
            total.examples.append(Examples([], examples.table))
            total.digests += own.digests
            total.note(own.left_out, own.unused)
            total.size += own.size
    return whole


# ---- Several processes, where there are many records ---------------------------------------------
_work = None  # of a worker: what it does with each chunk


def _begin_work(work, parent: int) -> None:
    """A worker begins: it leaves signals to its parent, and does not outlive it."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do_work(records: list[tuple]) -> dict:
    return _work(records)


def processes() -> int:
    """That prepare at once: one a core that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(MOST_PROCESSES, cores)


def prepared_parts(records: Iterable[tuple], work) -> Iterator[dict]:
    """work(chunk) of all records, chunk by chunk and in their order; by several processes where
    they have more than a chunk each to do. Raises UserError where one of them is killed."""
    records, count = iter(records), processes()
    chunks = iter(lambda: list(itertools.islice(records, RECORDS)), [])
    first = list(itertools.islice(chunks, 2 * count))
    if count == 1 or len(first) < 2 * count:
        yield from map(work, first)
        return
    # a fork shares the tokenizer; nothing is on a GPU yet
    context, begin = multiprocessing.get_context("fork"), (work, os.getpid())
    with ProcessPoolExecutor(count, context, _begin_work, begin) as pool:
        try:
            while first:  # a few chunks at a time: memory does not grow with the file
                yield from pool.map(_do_work, first)
                first = list(itertools.islice(chunks, 2 * count))
        except BrokenExecutor:
            advice = "is memory short? taskset -c 0 before the command makes it a single one"
            raise UserError(f"one of {count} processes that prepare data ended; {advice}") from None


def with_bar(parts: Iterator[dict], spec: str) -> Iterator[dict]:
    """The parts, and a progress bar where there are more than two."""
    first = list(itertools.islice(parts, 3))
    parts, few = itertools.chain(first, parts), len(first) < 3
    yield from tqdm(parts, f"prepare {spec}", disable=few, unit="k records", leave=False)


def tokenise(source: data.Source, recipe: Recipe, stream: io.BufferedIOBase) -> tuple:
    """A source's tokens into the stream -> what is kept beside them: [{"group", "size", "examples",
    "left_out", "unused"} of each dataset], table (N,), digests (n,). Raises UserError."""
    template, about = data.Template(recipe.tokenizer), []
    options = {"column": source.column, "template": template, "max_length": recipe.max_length}
    parts = prepared_parts(source.records(), functools.partial(prepare_records, **options))
    whole = write_tokens(with_bar(parts, source.spec), stream)
    order = data.order_groups(source, whole)
    for group in order:
        part, count = whole[group], sum(map(len, whole[group].examples))
        if not count:
            problem = f"no example is left at --max_length {recipe.max_length}; {part.left_out}"
            raise UserError(f"dataset {source.name(group)!r}: {problem}")
        counts = {"size": part.size, "examples": count, "left_out": part.left_out}
        about.append({"group": group, **counts, "unused": part.unused})
    tables = [part.table for group in order for part in whole[group].examples]
    digests = [digest for group in order for digest in whole[group].digests]
    return about, np.concatenate(tables), np.concatenate(digests)


# ---- The cache -----------------------------------------------------------------------------------
FILES = ("tokens.bin", "table.npy", "digests.npy", "about.json")
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")


def cache_folder() -> Path | None:
    """$CLEANSFT_CACHE or ~/.cache/cleansft; None, with a warning, where nothing can be written."""
    place = Path(os.environ.get("CLEANSFT_CACHE") or os.path.expanduser("~/.cache/cleansft"))
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return place.resolve()
    except OSError as error:
        advice = "CLEANSFT_CACHE=DIR names another place, --no_cache asks for none"
        print(f"warning: no cache in {place} ({error.strerror}); {advice}")
        return None


def cache_key(source: data.Source, recipe: Recipe) -> str | None:
    """sha256 over all that the tokens depend on, this code included; None where nothing is kept
    (toy)."""
    content = source.content()
    if not content:
        return None
    versions = [platform.python_version(), *map(importlib.metadata.version, LIBRARIES)]
    code = [data.sha256(data.__file__), data.sha256(__file__)]
    rows = [content, source.drawn, source.column]
    depends = [rows, recipe.tokenizer_sha256, recipe.max_length, code, versions]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def read_cache(place: Path) -> tuple | None:
    """-> about, tokens, table, digests as tokenise gives them, mapped into memory; None where they
    are not there, or are not what was written."""
    if not place.exists():
        return None
    problems = runs.damaged_files(place, FILES)
    if problems:
        print(f"cache {problems[0]}; made again")
        return None
    about = json.loads((place / "about.json").read_text(encoding="utf-8"))
    tokens = np.memmap(place / "tokens.bin", "<i4", "r")
    arrays = (np.load(place / name, mmap_mode="r") for name in ("table.npy", "digests.npy"))
    return about, tokens, *arrays


def write_cache(place: Path, source: data.Source, recipe: Recipe) -> None:
    """Prepare a source into the folder `place`, which is there once it is whole. Raises
    UserError."""
    new = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        new.mkdir()
        with open(new / "tokens.bin", "wb") as stream:
            about, table, digests = tokenise(source, recipe, stream)
        np.save(new / "table.npy", table)
        np.save(new / "digests.npy", digests)
        (new / "about.json").write_text(json.dumps(about), encoding="utf-8")
        sums = [f"{data.sha256(new / name)}  {name}\n" for name in FILES]
        (new / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
        runs.replace_folder(new, place)
    except OSError as error:
        advice = "--no_cache goes without, CLEANSFT_CACHE=DIR puts it elsewhere"
        raise UserError(f"cache {place.parent}: {error.strerror}; {advice}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Inside, no other process prepares the same: it waits, then finds it done."""
    with open(f"{place}.lock", "ab") as stream:
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("cache another process prepares the same data; waiting for it", flush=True)
                fcntl.flock(stream, fcntl.LOCK_EX)
            for old in place.parent.glob(f"{place.name}.*.tmp"):  # of a process that was killed
                shutil.rmtree(old, ignore_errors=True)
        except OSError:
            pass  # a file system without locks: both prepare, each in a folder of its own
        yield


def prepared_source(source: data.Source, recipe: Recipe) -> tuple[tuple, int]:
    """-> about, tokens, table, digests; and the bytes that the cache keeps of them."""
    key = cache_key(source, recipe) if recipe.cache else None
    if key is None:
        stream = io.BytesIO()
        about, *arrays = tokenise(source, recipe, stream)
        return (about, np.frombuffer(stream.getbuffer(), "<i4"), *arrays), 0
    place = recipe.cache / key
    with alone(place):
        found = read_cache(place)
        if not found:
            write_cache(place, source, recipe)
            found = read_cache(place)
    return found, sum((place / name).stat().st_size for name in FILES)


def load(specs: Sequence[str], recipe: Recipe, quiet: bool = False) -> list[Prepared]:
    """SPECs -> their datasets (each SPEC may give several), with distinct labels. What was left out
    or cut is printed, and the size of the cache. Raises UserError."""
    result, kept = [], 0
    for spec in specs:
        source = data.find_source(spec, recipe.column, recipe.seed, recipe.split)
        (about, tokens, table, digests), size = prepared_source(source, recipe)
        kept += size
        for one in about:
            own, table = table[: one["examples"]].copy(), table[one["examples"] :]
            rows, digests = digests[: one["size"]], digests[one["size"] :]
            own["dataset"] = len(result)
            counts = one["left_out"], one["unused"]
            examples = Examples([tokens], own)
            result.append(Prepared(source.name(one["group"]), examples, rows, *counts))
            if not quiet:
                counts = len(examples), examples.response_lengths.sum()
                print(data.summary(result[-1], recipe.split, *counts))
    data.check_labels([dataset.label for dataset in result])
    if kept and not quiet:
        files = [file for file in recipe.cache.rglob("*") if file.is_file()]
        total = sum(file.stat().st_size for file in files)
        print(f"cache {recipe.cache}: {kept / 1e6:,.1f} MB of this data, {total / 1e6:,.1f} in all")
    return result
