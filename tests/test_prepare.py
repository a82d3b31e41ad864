"""Preparation and its cache: the same examples as by encode(), with a cache, without, and by
several processes; a cache that is not what was written is made again; one process prepares."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import records as logged
from conftest import same, weights

import common
import data
import dynamics
import dynamix_sft
import prepare
import sftmix
from data import Examples, UserError

ROOT = Path(__file__).parents[1]


def records(count):
    """Rows of two topics; every third is a dialogue of two answers, every seventh has none."""
    result = []
    for i in range(count):
        row = {"prompt": f"Question {i}?", "completion": f"Answer {i * i}."}
        if i % 3 == 2:
            turns = [
                ("user", f"Say {i}."),
                ("assistant", f"{i}"),
                ("user", "More."),
                ("assistant", "No"),
            ]
            row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        elif i % 7 == 6:
            row["completion"] = " "
        result.append({**row, "topic": "ab"[i % 5 == 0], "id": i})
    return result


@pytest.fixture
def recipe(tokenizer, tmp_path):
    template = data.with_template(tokenizer, "plain")
    return prepare.Recipe(template, 40, seed=0, column="topic", cache=tmp_path)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records(60)))
    return str(path)


def shown(examples):
    return [(e.ids.tolist(), e.start, e.row, e.dataset, bool(e.cut)) for e in examples]


def content(sets):
    """All that a run takes from its datasets."""
    return [
        (s.label, s.size, s.left_out, s.unused, shown(s.examples), s.digests.tobytes())
        for s in sets
    ]


def by_rows(spec, recipe):
    """The same by data.load_data and data.encode, without a cache and without prepare."""
    sets = data.load_data([spec], recipe.column, recipe.seed)
    parts = data.encode_datasets(sets, recipe.tokenizer, recipe.max_length, quiet=True)
    return [
        (s.label, s.size, s.left_out, s.unused, shown(part), s.digests.tobytes())
        for s, part in zip(sets, parts)
    ]


def folders(place):
    return [path for path in place.iterdir() if path.is_dir()]


# ------------------------------------------------------------------------ the same examples


def test_examples_are_a_sequence():
    examples = [data.Example(np.arange(n), 1, n, n % 2, n == 3) for n in (2, 3, 4)]
    packed = Examples.of(examples)
    assert shown(packed) == shown(examples)
    assert shown([packed[1], packed[-1]]) == shown([examples[1], examples[2]])
    assert packed[0].ids.dtype == np.int64
    both = Examples.join([packed[1:], packed.take(np.array([0, 2]))])
    assert shown(both) == shown([examples[i] for i in (1, 2, 0, 2)])
    assert both.lengths.tolist() == [3, 4, 2, 4]
    assert both.response_lengths.tolist() == [2, 3, 1, 3]
    with pytest.raises(IndexError):
        packed[3]
    again = Examples.join([Examples.of([examples[i]]) for i in (1, 2, 0, 2)])
    assert again.fingerprint() == both.fingerprint()  # wherever the tokens lie


def test_the_fingerprint_sees_ids_boundaries_and_order():
    def one(*examples):
        return Examples.of([data.Example(np.array(ids), s, 0) for ids, s in examples]).fingerprint()

    prints = [one(([1, 2, 3], 1), ([4, 5], 1)), one(([1, 2, 3], 2), ([4, 5], 1))]
    prints += [one(([1, 2], 1), ([3, 4, 5], 1)), one(([4, 5], 1), ([1, 2, 3], 1))]
    prints += [one(([1, 2, 4], 1), ([4, 5], 1)), one(([1, 2, 3], 1))]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("column", ["topic", None])
@pytest.mark.parametrize("spec", ["{}", "mine={}", "{}#17"])
@pytest.mark.parametrize("few", [False, True])
def test_prepared_is_what_encode_gives(recipe, file, monkeypatch, spec, column, few):
    """Without a cache, when it is written, when it is read; by two processes in small chunks."""
    if few:
        monkeypatch.setattr(prepare, "RECORDS", 3)
        monkeypatch.setattr(prepare, "processes", lambda: 2)
    spec, recipe = spec.format(file), dataclasses.replace(recipe, column=column)
    right = by_rows(spec, recipe)
    assert content(prepare.load([spec], dataclasses.replace(recipe, cache=None))) == right
    assert content(prepare.load([spec], recipe)) == right
    monkeypatch.setattr(data, "read_rows", None)  # from here on nothing is read
    assert content(prepare.load([spec], recipe)) == right
    assert len(folders(recipe.cache)) == 1


def test_many_files_and_toy(recipe, file):
    """Several SPECs: datasets are numbered through; toy is never kept."""
    recipe = dataclasses.replace(recipe, column=None, max_length=200)
    for _ in range(2):
        sets = prepare.load([file, "toy#90"], recipe)
        assert sets[0].label == "rows"
        assert {e.dataset for each in sets for e in each.examples} == set(range(len(sets)))
        examples, rows = prepare.pool(sets)
        assert len(examples) == sum(len(each.examples) for each in sets)
        assert rows[-1] == sum(each.size for each in sets) - 1
        assert len(folders(recipe.cache)) == 1
    with pytest.raises(UserError, match="two datasets are called 'rows'"):
        prepare.load([file, file], recipe)


def test_some_rows_are_kept(recipe, file):
    (whole,) = prepare.load([file], dataclasses.replace(recipe, column=None, max_length=14))
    assert len(whole.examples) < whole.size  # some rows have no example
    chosen = np.arange(whole.size) % 3 == 1
    kept = whole.keep(chosen, 4)
    assert kept.digests.tobytes() == whole.digests[chosen].tobytes()
    right = [e for e in whole.examples if chosen[e.row]]
    assert [e.ids.tolist() for e in kept.examples] == [e.ids.tolist() for e in right]
    assert [e.row for e in kept.examples] == [e.row // 3 for e in right]
    assert {e.dataset for e in kept.examples} == {4}
    assert {e.dataset for e in whole.examples} == {0}


def test_what_is_wrong_is_said_each_time(recipe, file, tmp_path):
    """A refused dataset leaves nothing in the cache."""
    with pytest.raises(UserError, match="dataset 'a': no example is left at --max_length 2"):
        prepare.load([f"{file}#20"], dataclasses.replace(recipe, max_length=2))
    with pytest.raises(UserError, match="asks for 62 rows of 60"):
        prepare.load([f"{file}#62"], recipe)
    with open(file, "a") as stream:
        stream.write('{"prompt": "p", "completion": {"a": 1}, "topic": "a"}\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"rows.jsonl, row 61: expected text"):
            prepare.load([file], recipe)
    assert not folders(tmp_path)


def test_an_error_of_another_process_is_one_line_too(recipe, file, monkeypatch):
    monkeypatch.setattr(prepare, "RECORDS", 3)
    monkeypatch.setattr(prepare, "processes", lambda: 2)
    with open(file, "a") as stream:
        stream.write("[1]\n")
    with pytest.raises(UserError, match=r"rows.jsonl, row 61: expected an object, found list"):
        prepare.load([file], recipe)


def test_a_process_that_is_killed_is_one_line(recipe, file, monkeypatch):
    """As by a system that is out of memory: nobody waits for it for ever."""
    monkeypatch.setattr(prepare, "RECORDS", 3)
    monkeypatch.setattr(prepare, "processes", lambda: 2)
    parent, read = os.getpid(), data.read_rows

    def killed(*record):
        if os.getpid() != parent and record[1] == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*record)

    monkeypatch.setattr(data, "read_rows", killed)
    with pytest.raises(UserError, match="one of 2 processes that prepare data ended"):
        prepare.load([file], recipe)
    assert not folders(recipe.cache)


# ------------------------------------------------------------------------ the key


def test_the_key_holds_all_that_tokens_depend_on(recipe, file, tmp_path, monkeypatch):
    """Each change is another key; label, place and time stamp of a file are not."""

    def key(spec=file, recipe=recipe, column="topic"):
        return prepare.cache_key(data.find_source(spec, column, recipe.seed, recipe.split), recipe)

    first = key()
    with_seed = dataclasses.replace(recipe, seed=1)
    assert key(f"mine={file}") == first == key(recipe=with_seed)  # no row is drawn
    (tmp_path / "moved").mkdir()
    copy = tmp_path / "moved" / "other.jsonl"
    copy.write_bytes(Path(file).read_bytes())
    assert key(str(copy)) == first
    assert key("toy/copy") is None
    keys = [
        first,
        key(column=None),
        key(f"{file}#9"),
        key(f"{file}#9", with_seed),
        key(f"{file}#8"),
    ]
    keys.append(key(recipe=dataclasses.replace(recipe, max_length=41)))
    other = data.with_template(recipe.tokenizer, "alpaca")
    keys.append(key(recipe=dataclasses.replace(recipe, tokenizer=other)))
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%Y') }}" + data.PLAIN)
    for day in ("2024-01-01", "2025-01-01"):
        other = data.with_template(recipe.tokenizer, str(dated), day)
        keys.append(key(recipe=dataclasses.replace(recipe, tokenizer=other)))
    other = common.tiny_tokenizer()
    other.add_tokens(["Question"])
    other = data.with_template(other, "plain")
    keys.append(key(recipe=dataclasses.replace(recipe, tokenizer=other)))
    for name in ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setattr(prepare.importlib.metadata, "version", lambda asked, n=name: asked == n)
            keys.append(key())
    for module in (data, prepare):  # the code that reads is part of the key
        changed = tmp_path / f"{module.__name__}.py"
        changed.write_text(Path(module.__file__).read_text() + "\n# changed\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            keys.append(key())
    with open(copy, "a") as stream:
        stream.write(" ")
    keys.append(key(str(copy)))
    csv = tmp_path / "other.csv"
    csv.write_bytes(copy.read_bytes())
    keys.append(key(str(csv)))
    assert len(set(keys)) == len(keys)


def test_a_repository_of_the_hub_is_kept(recipe, tmp_path, monkeypatch):
    """Of JSON files by their bytes, else by what `datasets` calls this version; splits apart."""
    for kind in ("json", "table"):
        repo = tmp_path / kind
        repo.mkdir()
        for split, rows in (("train", records(9)), ("test", records(4))):
            rows = [{"prompt": f"{i}", "completion": split} for i in range(len(rows))]
            if kind == "json":
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (repo / f"{split}.jsonl").write_text(lines)
            else:
                datasets.Dataset.from_list(rows).to_parquet(str(repo / f"{split}.parquet"))
        source = data.HubSource(str(repo), eval_split="test")
        monkeypatch.setitem(data.ALIASES, kind, [source])
        recipe = dataclasses.replace(recipe, column=None)
        evaluation = dataclasses.replace(recipe, split="eval")
        before = len(folders(recipe.cache))
        for _ in range(2):
            assert [s.size for s in prepare.load([kind], recipe)] == [9]
            assert [s.size for s in prepare.load([kind], evaluation)] == [4]
        assert len(folders(recipe.cache)) == before + 2


# ------------------------------------------------------------------------ never believed


@pytest.mark.parametrize("name", [*prepare.FILES, "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_cache_is_made_again(recipe, file, capsys, name, damage):
    right = content(prepare.load([file], recipe))
    (folder,) = folders(recipe.cache)
    path = folder / name
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
    path.write_bytes({"cut": raw[: len(raw) // 2], "empty": b""}.get(damage, raw))
    if damage == "gone":
        path.unlink()
    capsys.readouterr()
    assert content(prepare.load([file], recipe)) == right
    assert "; made again" in capsys.readouterr().out
    assert content(prepare.load([file], recipe)) == right
    assert "made again" not in capsys.readouterr().out
    assert folders(recipe.cache) == [folder]


def test_what_a_killed_process_left_is_removed(recipe, file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "rmtree", lambda *_, **__: None)  # as SIGKILL: no clean-up
        patch.setattr(prepare.np, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.load([file], recipe)
    assert len(folders(recipe.cache)) == 1
    assert content(prepare.load([file], recipe)) == by_rows(file, recipe)
    (folder,) = folders(recipe.cache)
    assert folder.suffix == ""


def test_a_full_disk_is_one_line(recipe, file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.np, "save", full)
    with pytest.raises(
        UserError, match=r"cache .*: No space left on device; --no_cache goes without"
    ):
        prepare.load([file], recipe)
    assert not folders(recipe.cache)


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLEANSFT_CACHE", str(tmp_path / "file" / "cache"))
    assert prepare.cache_folder() is None
    assert "warning: no cache in" in capsys.readouterr().out
    monkeypatch.setenv("CLEANSFT_CACHE", str(tmp_path / "new" / "cache"))
    assert prepare.cache_folder() == tmp_path / "new" / "cache"


PREPARE = """
import sys, time
import common, data, prepare
from pathlib import Path
file, cache, slow = sys.argv[1:]
read = data.read_rows
def slowly(*record):
    time.sleep(float(slow))
    return read(*record)
data.read_rows = slowly
template = data.with_template(common.tiny_tokenizer(), "plain")
recipe = prepare.Recipe(template, 40, 0, column="topic", cache=Path(cache))
print("ready", flush=True)
print(*[len(one.examples) for one in prepare.load([file], recipe)], flush=True)
"""


def prepare_process(file, recipe, slow):
    command = [sys.executable, "-c", PREPARE, file, str(recipe.cache), str(slow)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_one_process_prepares_and_the_others_wait(recipe, file):
    right = by_rows(file, recipe)
    source = data.find_source(file, "topic", 0, "train")
    place = recipe.cache / prepare.cache_key(source, recipe)
    with prepare.alone(place):
        other = prepare_process(file, recipe, 1000)  # would never end if it had to read
        assert "waiting for it" in other.stdout.readline()
        prepare.write_cache(place, source, recipe)
        assert other.poll() is None
    output = other.communicate(timeout=60)[0]
    assert output.endswith(" ".join(str(len(one[4])) for one in right) + "\n")


def test_without_locks_nobody_removes_what_another_writes(recipe, file, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(prepare.fcntl, "flock", no_locks)
    key = prepare.cache_key(data.find_source(file, "topic", 0, "train"), recipe)
    other = recipe.cache / f"{key}.1.tmp"
    other.mkdir()
    assert content(prepare.load([file], recipe)) == by_rows(file, recipe)
    assert other.exists()


def test_a_kill_while_it_is_written_costs_nothing(recipe, file):
    killed = prepare_process(file, recipe, 0.05)
    while not list(recipe.cache.glob("*.tmp/tokens.bin")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (left,) = folders(recipe.cache)
    assert left.suffix == ".tmp"
    assert content(prepare.load([file], recipe)) == by_rows(file, recipe)
    assert [folder.suffix for folder in folders(recipe.cache)] == [""]


def test_workers_do_not_outlive_their_parent(recipe, file, monkeypatch):
    """After SIGKILL nobody ends them."""
    code = PREPARE.replace(
        "import sys, time", "import sys, time\nimport prepare as p\np.RECORDS = 3"
    )
    code = code.replace('print("ready"', 'prepare.processes = lambda: 2\nprint("ready"')
    command = [sys.executable, "-c", code, file, str(recipe.cache), "0.5"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc")
    while len(children.read_text().split()) < 2:
        time.sleep(0.05)
    workers = [Path("/proc", pid) for pid in children.read_text().split()]
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while any(worker.exists() for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(worker.exists() for worker in workers)


# ------------------------------------------------------------------------ the scripts

ARMS = [{"prompt": f"{i} + 1?", "completion": f"{i + 1}"} for i in range(24)]


FLAGS = ["--template", "plain", "--lr", "1e-3", "--batch_size", "4", "--max_steps", "3"]
SCRIPTS = {
    sftmix: ["--num_checkpoints", "2"],
    dynamix_sft: ["--update_every", "1", "--reward_batch_size", "2"],
    dynamics: ["--probe_steps", "1", "--targets", "c", "--updates", "0,2"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_same_bits_with_and_without_a_cache(script, tmp_path, monkeypatch, write_jsonl):
    """Not used, written, read: the same run; after the first start no training row is read."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("CLEANSFT_CACHE", str(cache))
    more = [{**row, "prompt": f"Is it {row['prompt']}"} for row in ARMS]
    specs = ["--data", write_jsonl("a.jsonl", ARMS), write_jsonl("b.jsonl", more)]
    held_out = [{**row, "completion": "x"} for row in more[:20]]
    flags = [*FLAGS, *SCRIPTS[script], *specs, "--eval_data", write_jsonl("c.jsonl", held_out)]
    seen, read = [], data.read_rows
    monkeypatch.setattr(data, "read_rows", lambda *record: seen.append(record) or read(*record))
    counts, found = [], []
    for name, flag in (("none", ["--no_cache"]), ("written", []), ("read", [])):
        folder = tmp_path / name
        seen.clear()
        script.main([*flags, *flag, "--output_dir", str(folder)])
        counts.append(len(seen))
        config = json.loads((folder / "config.json").read_text())
        kept = {key: value for key, value in config.items() if "fingerprint" in key}
        found.append([weights(folder), logged(folder), kept, config["datasets"]])
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    rows_alone = len(held_out) if script is dynamics else 0  # it splits evaluation sets by row
    assert counts == [68, 68, rows_alone]
    assert len(folders(cache)) == (2 if script is dynamics else 3)
