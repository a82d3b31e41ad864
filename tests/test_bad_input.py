"""Bad input, kind by kind: exit status 2, one line `error: ...` on stderr, no folder.

A case is a script, its flags and words of the line. {name} in a flag is a file or folder that
FILES, FOLDERS or MODELS makes; {no} is a path where nothing is.
"""

import gzip
import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import time
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import random_model, to_jsonl
from safetensors.torch import load_file, save_file

import common
import data

SCRIPTS = ("sftmix", "dynamix_sft", "dynamics", "eval")
ROWS = [{"prompt": f"Say {i}.", "response": f"It is {i}."} for i in range(12)]
CHOICES = [{"question": f"Is it {i}?", "choices": ["yes", "no"], "answer": 0} for i in range(12)]

# ------------------------------------------------------------------------ flags that are numbers

POSITIVE = ["0", "-1", "1.5", "nan", "inf", "1e400", "ten", "", f"{10**30}", "9" * 5000]
COUNT = POSITIVE[1:]
POSITIVE_REAL = ["0", "-1", "nan", "inf", "-inf", "1e400", "1e300", "ten", "", "9" * 5000]
REAL = POSITIVE_REAL[1:]
SHARE = ["-0.1", "1.1", "nan", "inf", "1e400", "ten", "", f"{10**30}"]
SHARED = {
    "max_length": POSITIVE,
    "epochs": POSITIVE_REAL,
    "max_steps": [*POSITIVE, f"{10**18}", "20000000"],
    "batch_size": [*POSITIVE, f"{10**12}", "20000000"],
    "micro_batch_size": POSITIVE,
    "lr": POSITIVE_REAL,
    "weight_decay": REAL,
    "warmup_ratio": SHARE,
    "max_grad_norm": POSITIVE_REAL,
    "lora_rank": [*COUNT, "1000000"],
    "lora_alpha": POSITIVE_REAL,
    "lora_dropout": [*SHARE, "1"],
    "seed": COUNT,
    "log_every": POSITIVE,
    "eval_every": COUNT,
    "save_every": COUNT,
    "save_minutes": REAL,
}
NUMBERS = {
    "sftmix": {
        **SHARED,
        "alpha": POSITIVE_REAL,
        "mu": REAL,
        "num_checkpoints": POSITIVE,
        "select_n": POSITIVE,
    },
    "dynamix_sft": {
        **SHARED,
        "beta": REAL,
        "gamma": SHARE,
        "alpha": SHARE,
        "update_every": COUNT,
        "reward_batch_size": POSITIVE,
        "actor_lr": POSITIVE_REAL,
        "mc_passes": POSITIVE,
    },
    "dynamics": {
        **SHARED,
        "probe_steps": [*POSITIVE, "1000000"],
        "damping": [*SHARE, "1"],
        "target_mass": SHARE,
        "validation_fraction": SHARE,
        "max_cost": [*POSITIVE_REAL, "1", "0.5"],
        "eval_limit": POSITIVE,
    },
    "eval": {
        "shots": COUNT,
        "rounds": [*POSITIVE, "1000000"],
        "limit": POSITIVE,
        "max_length": POSITIVE,
        "max_new_tokens": POSITIVE,
        "batch_size": POSITIVE,
        "seed": COUNT,
    },
}
FLAGS = [(script, flag) for script in SCRIPTS for flag in NUMBERS[script]]

# ------------------------------------------------------------------------ files

JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
DEEP = "[" * 100_000 + "]" * 100_000
TURNS = '{"messages": [{"role": "user", "content": "Hi"}, '


def with_turn(turn):
    return (TURNS + turn + "]}\n").encode()


FILES = {
    "rows.jsonl": JSONL.encode(),
    "choices.jsonl": "".join(json.dumps(row) + "\n" for row in CHOICES).encode(),
    "one.jsonl": json.dumps(ROWS[0]).encode(),
    "two.jsonl": JSONL.encode()[: JSONL.index("\n", JSONL.index("\n") + 1)],
    "null.jsonl": b"null\n",
    "nulls.json": b"[null, null]",
    "number.jsonl": JSONL.encode() + b"3\n",
    "text.jsonl": b'"hello"\n',
    "list.jsonl": JSONL.encode() + b"[1, 2]\n",
    "scalar.json": b"3",
    "deep.jsonl": f'{{"prompt": "a", "response": {DEEP}}}\n'.encode(),
    "deep.json": f'[{{"prompt": "a", "response": {DEEP}}}]'.encode(),
    "nested.jsonl": f'{{"prompt": "a", "response": {DEEP[99_100:100_900]}}}\n'.encode(),
    "objects.jsonl": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "tools.jsonl": TURNS.encode()
    + b'{"role": "assistant", "content": "b"}], "tools": [{"a": '
    + DEEP[99_100:100_900].encode()
    + b"}]}",
    "truncated.jsonl": JSONL.encode()[:-9],
    "truncated.json": json.dumps(ROWS).encode()[:-9],
    "nan.jsonl": b'{"prompt": "a", "response": NaN}\n',
    "latin.jsonl": '{"prompt": "a", "response": "Grüße"}\n'.encode("latin-1"),
    "wide.jsonl": JSONL.encode("utf-16"),
    "wide.csv": "prompt,response\na,b\n".encode("utf-16"),
    "wide2.csv": "prompt,response\na,b\n".encode("utf-16-le"),
    "zeros.jsonl": bytes(100),
    "zeros.json": b'[{"prompt": "a\0", "response": "b"}]',
    "empty.jsonl": b"",
    "empty.csv": b"",
    "empty.parquet": b"",
    "blank.jsonl": b"\n \n",
    "nothing.json": b"[]",
    "header.csv": b"prompt,response\n",
    "semicolon.csv": b"prompt;response\na;b\n",
    "twice.csv": b"prompt,response,response\na,b,c\n",
    "short.csv": b"prompt,response\na,b\na\n",
    "long.csv": b"prompt,response\na,b\na,b,c\n",
    "quote.csv": b'prompt,response\na,"b\n',
    "columns.csv": b"left,right\na,b\n",
    "broken.parquet": b"PAR1 and nothing of it PAR1",
    "text.parquet": JSONL.encode(),
    "broken.arrow": b"ARROW1\0\0 and nothing of it",
    "broken.jsonl.gz": b"no gzip",
    "cut.jsonl.gz": gzip.compress(os.urandom(1000) + JSONL.encode())[:-200],
    "broken.jsonl.zst": b"no zstd",
    "rows.txt": JSONL.encode(),
    "rows.json.bz2": JSONL.encode(),
    "schema.jsonl": b'{"left": "a", "right": "b"}\n',
    "blanks.jsonl": b'{"prompt": "a", "response": " "}\n{"prompt": "b", "response": ""}\n',
    "object.jsonl": b'{"prompt": "a", "response": {"b": 1}}\n',
    "half.jsonl": rb'{"prompt": "a", "response": "\ud800"}',
    "role.jsonl": with_turn('{"role": "pirate", "content": "b"}'),
    "turn.jsonl": with_turn("7"),
    "weight.jsonl": with_turn('{"role": "assistant", "content": "b", "weight": 2}'),
    "call.jsonl": with_turn('{"role": "assistant", "tool_calls": [{"id": "1"}]}'),
    "calls.jsonl": with_turn('{"role": "assistant", "tool_calls": "["}'),
    "messages.jsonl": b'{"messages": "hello"}\n',
    "alone.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n',
    "answer.jsonl": b'{"question": "a", "choices": ["b", "c"], "answer": 7}\n',
    "no_answer.jsonl": b'{"question": "a", "choices": ["b", "c"], "answer": null}\n',
    "history.jsonl": b'{"prompt": "a", "response": "b", "history": [["c"]]}\n',
    # what other flags name
    "scores.jsonl": b"1\n" * 11,
    "scores2.jsonl": b"1\n" * 11 + b'{"score": "high"}\n',
    "scores3.jsonl": b"1\n" * 11 + b"[1]\n",
    "scores4.jsonl": b"1\n" * 11 + b"1e400\n",
    "own.jsonl": b'{"confidence": 1}\n' * 11,
    "own2.jsonl": b'{"confidence": 1}\n' * 13,
    "own3.jsonl": b'{"confidence": 1}\n' * 11 + b'{"confidence": "high"}\n',
    "own4.jsonl": b'{"index": 0, "confidence": 1}\n' * 12,
    "own5.jsonl": b"null\n" * 12,
    "own6.jsonl": b"{}\n" * 12,
    "foreign.jsonl": b'{"fingerprint": "abc", "rows": 12, "num_checkpoints": 1}\n',
    "list.json": b"[1]",
    "null.json": b"null",
    "huge.json": b'{"rows": 1e400}',
    "weights.json": b'{"rows": -1}',
    "weights2.json": b'{"rows": 0}',
    "weights3.json": b'{"rows": 1, "other": 1}',
    "weights4.json": b'{"other": 1}',
    "weights5.json": b'{"rows": "much"}',
    "levels.json": b'{"test": "low"}',
    "levels2.json": b'{"test": null}',
    "mc.jsonl": b'{"question": "a", "options": {"A": "b", "B": "c"}, "answer_idx": "A"}\n',
    "same_id.jsonl": b'{"question_id": 1, "turns": ["a"]}\n' * 2,
    "list_id.jsonl": b'{"question_id": [1], "turns": ["a"]}\n',
    "turns.jsonl": b'{"question_id": 1, "turns": [3]}\n',
    "turns2.jsonl": b'{"question_id": 1, "turns": 3}\n',
    "turns3.jsonl": b'{"question_id": 1, "turns": ["a"], "reference": 3}\n',
    # templates
    "broken.jinja": b"{% for m in messages %}{{ m.content }}",
    "answer.jinja": b"{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "question.jinja": b"{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
    "raises.jinja": b"{{ raise_exception('no, thanks') }}",
    "name.jinja": b"{{ messages[0].content.nothing.at_all }}",
    "macro.jinja": b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "include.jinja": b"{% include 'other.jinja' %}",
    "loop.jinja": b"{% for a in range(99999) %}" * 4 + b"{% endfor %}" * 4,
    "range.jinja": b"{% for a in range(10 ** 12) %}{% endfor %}",
    "power.jinja": b"{{ 9 ** 9 ** 9 ** 9 }}",
    "brackets.jinja": b"{{ " + b"(" * 100_000 + b")" * 100_000 + b" }}",
    "blocks.jinja": b"{% if true %}" * 100_000 + b"{% endif %}" * 100_000,
    "elif.jinja": b"{% if a %}" + b"{% elif a %}" * 20_000 + b"{% endif %}",
    "sum.jinja": b"{{ 1" + b" + 1" * 100_000 + b" }}",
    "private.jinja": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "latin.jinja": "Grüße {{ messages }}".encode("latin-1"),
    "clock.jinja": b"{{ strftime_now(messages[0].content) }}",
}


def tables(folder):
    """Parquet and Arrow files, whole ones and damaged ones."""
    table = pyarrow.table({"prompt": [f"Say {i}." for i in range(300)], "response": ["It."] * 300})
    pyarrow.parquet.write_table(table, folder / "whole.parquet")
    with pyarrow.ipc.new_file(folder / "whole.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("whole.parquet", "whole.arrow"):
        raw = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(raw[: len(raw) // 2])
    raw = bytearray((folder / "whole.arrow").read_bytes())
    at = raw.index(np.array([0, 6, 12, 18], np.int32).tobytes())  # where the first prompts begin
    raw[at + 800 : at + 804] = np.int32(2**31 - 2**20).tobytes()
    (folder / "offsets.arrow").write_bytes(raw)


def folders(folder):
    """Folders of data."""
    for name in ("vacant", "outer/inner", "loop", "round.json", "saved", "saved2", "dict", "tests"):
        (folder / name).mkdir(parents=True)
    (folder / "loop" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "loop" / "train").symlink_to(folder / "loop")
    (folder / "round.json" / "more.json").symlink_to(folder / "round.json")
    (folder / "circle.jsonl").symlink_to(folder / "circle2.jsonl")
    (folder / "circle2.jsonl").symlink_to(folder / "circle.jsonl")
    (folder / "saved" / "state.json").write_text("{")
    (folder / "saved2" / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    (folder / "dict" / "dataset_dict.json").write_text("[]")
    to_jsonl(folder / "tests" / "test.jsonl", ROWS)
    (folder / "locked.jsonl").write_text(JSONL)
    (folder / "locked.jsonl").chmod(0)


# ------------------------------------------------------------------------ models


class Payload:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def edited(folder, **changes):
    """Change a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoilt(folder, value):
    """Put a number into one of the model's weights."""
    state = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    state[name][3, 5] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def adapter(folder, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))


def pickled(folder, name, mark):
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": torch.zeros(1)}, folder / name)
    (folder / name).write_bytes(pickle.dumps(Payload(mark)))


def models(folder, tokenizer):
    """Folders of models, each spoilt in one way."""
    whole = folder / "whole"
    random_model("gpt2").save_pretrained(whole)
    tokenizer.save_pretrained(whole)

    def copied(name):
        return Path(shutil.copytree(whole, folder / name))

    (copied("no_config") / "config.json").unlink()
    bare = copied("no_tokenizer")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    spoilt(copied("nan"), float("nan"))
    spoilt(copied("inf"), float("inf"))
    cut = copied("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    (copied("no_weights") / "model.safetensors").unlink()
    pickled(copied("pickle"), "pytorch_model.bin", folder / "ran")
    edited(copied("bert"), model_type="bert", architectures=["BertModel"])
    edited(copied("unknown"), model_type="unheard_of")
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edited(copied("remote"), model_type="own_type", auto_map=code)
    (folder / "remote" / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    (copied("no_json") / "config.json").write_text("{")
    (copied("json_list") / "config.json").write_text("[]")
    (copied("bad_tokenizer") / "tokenizer.json").write_text('{"version": "1.0"}')
    (copied("zero_tokenizer") / "tokenizer.json").write_bytes(bytes(99))
    larger = copied("larger")
    big = transformers.AutoTokenizer.from_pretrained(whole)
    big.add_tokens([f"<{i}>" for i in range(50)])
    big.save_pretrained(larger)
    endless = transformers.AutoTokenizer.from_pretrained(whole)
    endless.eos_token = None
    endless.save_pretrained(copied("no_eos"))
    edited(copied("vocabulary"), vocab_size=999)
    edited(copied("layers"), n_layer=3)
    edited(copied("heads"), n_head=5)
    (copied("card") / "cleansft.json").write_text("[1]")
    adapter(folder / "pickled", base_model_name_or_path=str(whole))
    tokenizer.save_pretrained(folder / "pickled")
    (folder / "pickled" / "adapter_model.bin").write_bytes(pickle.dumps(Payload(folder / "ran")))
    named = copied("remote_tokenizer") / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    named.write_text(json.dumps(own))
    shutil.copy(folder / "remote" / "own.py", folder / "remote_tokenizer")
    adapter(folder / "orphan", base_model_name_or_path=str(folder / "gone"))
    adapter(folder / "nameless")
    adapter(folder / "itself", base_model_name_or_path=str(folder / "itself"))
    adapter(folder / "hub_base", base_model_name_or_path="nobody/nothing")
    adapter(folder / "no_weights_adapter", base_model_name_or_path=str(whole))
    tokenizer.save_pretrained(folder / "no_weights_adapter")
    (folder / "no_json_adapter").mkdir()
    (folder / "no_json_adapter" / "adapter_config.json").write_text("{")
    (folder / "bad.gguf").write_bytes(b"GGUF and nothing of it")
    (folder / "hollow").mkdir()


@pytest.fixture(scope="session")
def places(tmp_path_factory, tokenizer):
    """{name: path}"""
    transformers.logging.disable_progress_bar()
    files, spoiled = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("models")
    for name, content in FILES.items():
        (files / name).write_bytes(content)
    tables(files)
    folders(files)
    models(spoiled, tokenizer)
    found = {path.name: str(path) for path in [*files.iterdir(), *spoiled.iterdir()]}
    return {**found, "no": str(files / "no"), "ran": str(spoiled / "ran")}


# ------------------------------------------------------------------------ the cases

START = {
    "sftmix": "--data {rows.jsonl} --max_steps 4 --num_checkpoints 2 --template plain",
    "dynamix_sft": "--data {rows.jsonl} --max_steps 4 --template plain",
    "dynamics": "--data {rows.jsonl} --eval_data test={rows.jsonl} --targets test --max_steps 12 "
    "--template plain",
    "eval": "--eval_data {rows.jsonl} --template plain",
}
CASES = []  # (script, flags, words of the line)


def cases(text):
    """Lines `script flags | word | word`; the script * is each in turn."""
    for line in filter(None, map(str.strip, text.splitlines())):
        start, *words = line.split(" | ")
        script, _, flags = start.partition(" ")
        script = SCRIPTS[len(CASES) % 3] if script == "*" else script
        CASES.append((script, flags, words))


# files of --data
cases("""
* --data {null.jsonl} | null.jsonl, row 1: expected an object, found null
* --data {nulls.json} | nulls.json, row 1: | expected an object
* --data {number.jsonl} | number.jsonl, row 13: | expected an object
* --data {text.jsonl} | text.jsonl, row 1: | expected an object
* --data {list.jsonl} | list.jsonl, row 13: | expected an object
* --data {scalar.json} | scalar.json, row 1: | expected an object
* --data {deep.jsonl} | deep.jsonl, row 1: | nested too deeply
* --data {deep.json} | deep.json, row 1: | nested too deeply
* --data {nested.jsonl} | nested.jsonl, row 1:
* --data {objects.jsonl} | objects.jsonl, row 1: | nested too deeply
* --data {tools.jsonl} | tools.jsonl, row 1: | nested too deeply
* --data {truncated.jsonl} | truncated.jsonl, row 12: not JSON
* --data {truncated.json} | truncated.json, line 1: not JSON
* --data {nan.jsonl} | nan.jsonl, row 1: not JSON: NaN is not JSON
* --data {latin.jsonl} | latin.jsonl: not UTF-8 (byte 31) | save it as UTF-8
* --data {wide.jsonl} | wide.jsonl: not UTF-8 | UTF-16
* --data {wide.csv} | wide.csv: not UTF-8 | UTF-16
* --data {wide2.csv} | wide2.csv: | NUL | UTF-16
* --data {zeros.jsonl} | zeros.jsonl: | NUL
* --data {zeros.json} | zeros.json, line 1: not JSON
* --data {empty.jsonl} | empty.jsonl: the file is empty
* --data {empty.csv} | empty.csv: the file is empty
* --data {empty.parquet} | empty.parquet: the file is empty
* --data {blank.jsonl} | blank.jsonl: no rows
* --data {nothing.json} | nothing.json: no rows
* --data {header.csv} | header.csv: no rows
* --data {semicolon.csv} | semicolon.csv: its columns are separated by ';'
* --data {twice.csv} | twice.csv: two columns have the same name
* --data {short.csv} | short.csv, row 2: 1 cells, the header names 2
* --data {long.csv} | long.csv, row 2: 3 cells, the header names 2
* --data {quote.csv} | quote.csv, row 1: not CSV
* --data {columns.csv} | columns.csv, row 1: keys ['left', 'right'] fit no known schema
* --data {broken.parquet} | broken.parquet: cannot be read as parquet
* --data {text.parquet} | text.parquet: cannot be read as parquet
* --data {cut_whole.parquet} | cut_whole.parquet: cannot be read as parquet
* --data {broken.arrow} | broken.arrow: cannot be read as arrow
* --data {cut_whole.arrow} | cut_whole.arrow: cannot be read as arrow
* --data {offsets.arrow} | offsets.arrow: cannot be read as arrow
* --data {broken.jsonl.gz} | broken.jsonl.gz: cannot be read
* --data {cut.jsonl.gz} | cut.jsonl.gz: cannot be read
* --data {broken.jsonl.zst} | broken.jsonl.zst: cannot be read
* --data {rows.txt} | rows.txt: unknown file type '.txt'; expected one of .json
* --data {rows.json.bz2} | rows.json.bz2: unknown file type '.bz2'
* --data {schema.jsonl} | schema.jsonl, row 1: keys ['left', 'right'] fit no known schema
* --data {blanks.jsonl} | blanks.jsonl: | no row with a response (empty response: 2)
* --data {object.jsonl} | object.jsonl, row 1: expected text, found dict
* --data {half.jsonl} | half.jsonl, row 1: | half of a character
* --data {role.jsonl} | role.jsonl, row 1: unknown role 'pirate'; known are
* --data {turn.jsonl} | turn.jsonl, row 1: expected a turn with role and content
* --data {weight.jsonl} | weight.jsonl, row 1: a turn's weight is '2'; it can be 0 or 1
* --data {call.jsonl} | call.jsonl, row 1: a tool call without a name
* --data {calls.jsonl} | calls.jsonl, row 1: tool_calls is a text that is not JSON
* --data {messages.jsonl} | messages.jsonl, row 1: messages is a text that is not JSON
* --data {alone.jsonl} | alone.jsonl: | no assistant turn: 1
* --data {answer.jsonl} | answer.jsonl, row 1: right answer 7 of only 2 choices
* --data {no_answer.jsonl} | no_answer.jsonl, row 1: | none of the 2 options
* --data {history.jsonl} | history.jsonl, row 1: history holds list
eval --eval_data {null.jsonl} | null.jsonl, row 1: expected an object
eval --eval_data {wide.jsonl} | wide.jsonl: not UTF-8
eval --eval_data {empty.jsonl} | the file is empty
eval --eval_data {nested.jsonl} | nested.jsonl, row 1
sftmix --eval_data {role.jsonl} | role.jsonl, row 1: unknown role
dynamix_sft --eval_data {schema.jsonl} | schema.jsonl, row 1: | no known schema
""")
# folders and sources
cases("""
* --data {vacant} | vacant: the folder holds no .json
* --data {outer} | outer: the folder holds no .json | give one of its folders: inner
* --data {loop} | loop: | holds itself
* --data {round.json} | round.json: | holds itself
* --data {circle.jsonl} | circle.jsonl: no such file or folder
* --data {saved} | state.json: is not what save_to_disk writes
* --data {saved2} | a.arrow: cannot be read
* --data {dict} | dataset_dict.json: is not what save_to_disk writes
* --data {tests} | tests: holds no training split, only test.jsonl; give one of them
* --data {no}.jsonl | no.jsonl: no such file or folder
* --data {no}/ | no/: no such file or folder
* --data /dev/null | /dev/null: no such file or folder
* --data {rows.jsonl}#0 | is no dataset; expected [label=]SOURCE[#N] with N at least 1
* --data {rows.jsonl}#-1 | is no dataset; expected
* --data {rows.jsonl}#x | is no dataset; expected
* --data {rows.jsonl}#13 | asks for 13 rows of 12
* --data {rows.jsonl}#99999999999999999999 | asks for 99999999999999999999 rows of 12
* --data {rows.jsonl}#NINES | is no dataset; expected
* --data '' | '' is no dataset; expected
* --data = | =: no such file, folder or alias
* --data a= | a=: no such file, folder or alias
* --data # | is no dataset; expected
* --data {rows.jsonl} {rows.jsonl} | two datasets are called 'rows'; name them with label=SOURCE
* --data a={rows.jsonl} a=toy/copy | two datasets are called 'a'
* --data toy/nothing | toy/nothing: no such task; there are describe
* --data toy/ toy | two datasets are called
* --data nothing | nothing: no such file, folder or alias; aliases are toy
* --data nobody/nothing | cannot load nobody/nothing | from the Hugging Face hub
* --data alpaca | cannot load tatsu-lab/alpaca | from the Hugging Face hub
* --data fineweb | cannot load HuggingFaceFW/fineweb | from the Hugging Face hub
* --data {rows.jsonl} --source_column kind | rows.jsonl, row 1: no column 'kind' to split by
* --data | expected at least one argument
sftmix --eval_data {rows.jsonl} {rows.jsonl} | two datasets are called 'rows'
eval --eval_data {rows.jsonl} {rows.jsonl} | two datasets are called 'rows'
eval --eval_data nobody/nothing | cannot load nobody/nothing
""")
# models
cases("""
* --model {no} | no: no such folder
* --model {no}.gguf | no.gguf: no such file
* --model '' | --model : no such folder
* --model {rows.jsonl} | rows.jsonl: is a file; give a model's folder
* --model {hollow} | hollow: the folder holds no config.json
* --model {no_config} | no_config: the folder holds no config.json
* --model {no_tokenizer} | no_tokenizer: holds no tokenizer
* --model {nan} | nan: 1 of | tensors hold NaN or infinite values, the first is transformer.h.1
* --model {inf} | inf: 1 of | tensors hold NaN or infinite values, the first is transformer.h.1
* --model {cut} | cut: cannot be loaded
* --model {no_weights} | no_weights: cannot be loaded | model.safetensors
* --model {pickle} | pickle: cannot be loaded: its weights are a pickle | save them as safetensors
* --model {bert} | bert:
* --model {unknown} | unknown: cannot be loaded | unheard_of
* --model {remote} | remote: needs code of its own | which is never run
* --model {no_json} | no_json: cannot be loaded
* --model {json_list} | json_list: cannot be loaded
* --model {bad_tokenizer} | bad_tokenizer:
* --model {zero_tokenizer} | zero_tokenizer:
* --model {larger} | larger: the tokenizer has 309 tokens, the model embeds only 259
* --model {no_eos} | the tokenizer has no EOS token
* --model {vocabulary} | vocabulary:
* --model {layers} | layers: 12 missing tensors for GPT2LMHeadModel
* --model {heads} | heads: cannot be loaded
* --model {pickled} | pickled: cannot be loaded: its weights are a pickle
* --model {remote_tokenizer} | the tokenizer has no EOS token
* --model {orphan} | adapter_config.json: its base | is not there
* --model {nameless} | adapter_config.json: names no base
* --model {itself} | itself: is an adapter on itself
* --model {hub_base} | hub_base: cannot be loaded
* --model {no_weights_adapter} | no_weights_adapter: cannot be loaded
* --model {no_json_adapter} | no_json_adapter: cannot be loaded
* --model {bad.gguf} | bad.gguf: cannot be loaded
* --model nobody/nothing | nobody/nothing: cannot be loaded
* --model nothing | nothing: cannot be loaded
eval --model {nan} | nan: 1 of | NaN
eval --model {remote} | remote: needs code of its own
eval --model {no_tokenizer} | no_tokenizer: holds no tokenizer
eval --model {pickle} | pickle: cannot be loaded
eval --model {orphan} | its base
eval --model {larger} | the tokenizer has 309 tokens
eval --model {no} | no: no such folder
eval --model {whole} --base {no} | no: no such folder
sftmix --ref_model {nan} | nan: 1 of | NaN
sftmix --ref_model {remote} | remote: needs code of its own
sftmix --ref_model {no} | no: no such folder
sftmix --ref_model {pickle} | pickle: cannot be loaded
""")
# templates
cases("""
* --template {no} | no: expected auto, alpaca, chat, plain or a Jinja file
* --template '' | --template : expected auto
* --template {vacant} | vacant: expected auto
* --template chat | this tokenizer has no chat template; use --template alpaca or plain
* --template {broken.jinja} | broken.jinja: cannot be used | try --template alpaca
* --template {answer.jinja} | answer.jinja: cannot be used: | leaves out the assistant turn's text
* --template {question.jinja} | question.jinja: cannot be used: the chat template leaves out
* --template {raises.jinja} | raises.jinja: cannot be used | no, thanks
* --template {name.jinja} | name.jinja: cannot be used
* --template {macro.jinja} | macro.jinja: cannot be used | recursion
* --template {include.jinja} | include.jinja: cannot be used
* --template {loop.jinja} | loop.jinja: cannot be used | seconds
* --template {range.jinja} | range.jinja: cannot be used
* --template {power.jinja} | power.jinja: cannot be used
* --template {brackets.jinja} | brackets.jinja: cannot be used
* --template {blocks.jinja} | blocks.jinja: cannot be used
* --template {elif.jinja} | elif.jinja: cannot be used
* --template {sum.jinja} | sum.jinja: cannot be used
* --template {private.jinja} | private.jinja: cannot be used
* --template {latin.jinja} | latin.jinja: expected auto
* --template {clock.jinja} | clock.jinja: cannot be used
eval --template {loop.jinja} | loop.jinja: cannot be used
eval --template {no} | no: expected auto
eval --template {answer.jinja} | leaves out
""")
# sftmix.py's own flags
cases("""
sftmix --confidence {no} | --confidence | no: cannot be read
sftmix --confidence {vacant} | vacant: cannot be read
sftmix --confidence {own.jsonl} | own.jsonl, row 11: the file ends after 11 of 12 rows
sftmix --confidence {own2.jsonl} | own2.jsonl, row 13: index 12 is none of the data's rows
sftmix --confidence {own3.jsonl} | own3.jsonl, row 12: expected "confidence", a number
sftmix --confidence {own4.jsonl} | own4.jsonl, row 2: index 0 stands there twice
sftmix --confidence {own5.jsonl} | own5.jsonl, row 1: expected an object
sftmix --confidence {own6.jsonl} | own6.jsonl, row 1: expected an object
sftmix --confidence {foreign.jsonl} | foreign.jsonl, row 1: was computed for other rows | --data
sftmix --confidence {truncated.jsonl} | truncated.jsonl, row 12: is not JSON
sftmix --confidence {wide.jsonl} | wide.jsonl: cannot be read
sftmix --confidence {empty.jsonl} | empty.jsonl, row 1: is not JSON
sftmix --confidence {deep.json} | deep.json, row 1: is not JSON
sftmix --confidence {own.jsonl} --partition random | --confidence takes the place of
sftmix --select {no} | --select | no: cannot be read
sftmix --select {scores.jsonl} | scores.jsonl: has 11 scores for 12 rows
sftmix --select {scores2.jsonl} --select_n 4 | scores2.jsonl, row 12: | is no number
sftmix --select {scores3.jsonl} --select_n 4 | scores3.jsonl, row 12: | is no number
sftmix --select longest --select_n 13 | --select_n 13: only 12 rows can be chosen from
sftmix --select longest | --select_n 1000: only 12 rows can be chosen from
sftmix --num_checkpoints 5 | --num_checkpoints 5: the reference trains for only 4 steps
sftmix --partition source | --partition source needs two datasets; --data gives 1
sftmix --partition quality | invalid choice: 'quality'
sftmix --batch_size 7 | --batch_size 7: must be even
sftmix --micro_batch_size 1 | --micro_batch_size 1: must be even
sftmix --mu 0 --ntp_on none | leaves no loss
sftmix --split thirds --ntp_on confident | --split thirds goes with --ntp_on full
sftmix --epochs 2 | not allowed with argument
sftmix --data {one.jsonl} | --split halves
sftmix --data {two.jsonl} --split thirds | --split thirds
sftmix --data {two.jsonl} --split thirds --partition random | --split thirds
sftmix --data NINES | File name too long
sftmix --model NINES | File name too long
sftmix --template NINES | --template
sftmix --confidence NINES | --confidence
sftmix --nothing 2 | unrecognized arguments
sftmix --lr | expected one argument
sftmix --schedule square | invalid choice: 'square'
sftmix --dtype fp8 | invalid choice: 'fp8'
sftmix --track paper | invalid choice: 'paper'
sftmix --resume {no} | no
sftmix --max_length 3 | no example is left at --max_length 3
""")
# dynamix_sft.py's
cases("""
dynamix_sft --sampling all | --sampling all: expected dynamix, proportional, uniform, multidds
dynamix_sft --sampling {scalar.json} | --sampling | expected {label: weight} for rows
dynamix_sft --sampling {deep.json} | --sampling | expected {label: weight} for rows
dynamix_sft --sampling {no}.json | --sampling | expected {label: weight} for rows
dynamix_sft --sampling multidds --data {rows.jsonl} {one.jsonl} | 'one' has one row
dynamix_sft --sampling multiuat --data {one.jsonl} | 'one' has one row
dynamix_sft --sampling multiuat --uncertainty joy | invalid choice: 'joy'
dynamix_sft --init proportional | --init proportional goes with --no-prior and a positive --beta
dynamix_sft --init proportional --no-prior --beta 1e-7 | --beta 1e-07: | divides by it
dynamix_sft --lookahead first_order --reward entropy | --lookahead first_order goes with
dynamix_sft --reward joy | invalid choice: 'joy'
dynamix_sft --max_length 1 | no example is left at --max_length 1
dynamix_sft --max_steps 5 --epochs 1 | not allowed with argument
dynamix_sft --seed | expected one argument
""")
# dynamics.py's
cases("""
dynamics --targets nothing | --targets nothing: no such label in --eval_data; there are test
dynamics --constraints nothing | --constraints nothing: no such label in --eval_data
dynamics --accuracy nothing | --accuracy nothing: no such label in --eval_data
dynamics --constraints test | 'test' is both in --targets and in --constraints
dynamics --targets | expected at least one argument
dynamics --eval_data toy/copy | --targets test: no such label in --eval_data; there are copy
dynamics --accuracy test | rows.jsonl, row | is no multiple-choice row
dynamics --eval_data test={one.jsonl} | 1 prompts cannot be split into validation and test rows
dynamics --validation_fraction 0 | cannot be split into validation and test rows by 0
dynamics --validation_fraction 1 | cannot be split into validation and test rows by 1
dynamics --reference test=1 | --reference test: is no constraint; constraints are none
dynamics --reference test | --reference test: expected LABEL=NUMBER
dynamics --reference test=low | --reference test=low: expected a level like 1.25
dynamics --reference test=nan | --reference test=nan: expected a level
dynamics --eval_data test={rows.jsonl} c=toy/copy --constraints c --reference c=9e999 | too large
dynamics --eval_data test={rows.jsonl} c=toy/copy --constraints c --reference c=+9NINES% | too large
dynamics --reference {no}.json | no.json: expected LABEL=NUMBER
dynamics --reference {list.json} | list.json: expected LABEL=NUMBER
dynamics --reference {null.json} | null.json: expected LABEL=NUMBER
dynamics --reference {levels.json} | --reference test=low: expected a level
dynamics --reference {levels2.json} | --reference test=None: expected a level
dynamics --reference {wide.jsonl} | wide.jsonl: expected LABEL=NUMBER
dynamics --reference {deep.json} | deep.json: expected LABEL=NUMBER
dynamics --reference test=9NINES | --reference
dynamics --mixture {no}.json | no.json: expected {label: weight} for rows
dynamics --mixture {list.json} | list.json: expected {label: weight} for rows
dynamics --mixture {deep.json} | deep.json: expected {label: weight} for rows
dynamics --mixture {weights.json} | weights.json: weights must be at least 0
dynamics --mixture {weights2.json} | weights2.json: weights must be at least 0, and not all 0
dynamics --mixture {weights3.json} | weights3.json: 'other' is no label of --data; there are rows
dynamics --mixture {weights4.json} | weights4.json: expected {label: weight} for rows
dynamics --mixture {weights5.json} | weights5.json: expected {label: weight} for rows
dynamics --mixture {huge.json} | huge.json: weights must be
dynamics --mixture {rows.txt} | expected dynamics, gradient, uniform, proportional or a .json file
dynamics --mixture uniform --target_mass 0.5 | --target_mass 0.5: no dataset serves a target
dynamics --target_mass 0.5 | --target_mass goes with --mixture uniform or proportional
dynamics --target_data rows | --target_data goes with --target_mass
dynamics --mixture uniform --damping 0.5 | --damping goes with --mixture dynamics or gradient
dynamics --mixture gradient --accuracy test | --mixture gradient needs differentiable metrics
dynamics --updates often | --updates 'often' is neither none, light, dense nor a list of steps
dynamics --updates 0,12 | --updates '0,12' has a step outside of 0 .. 11
dynamics --updates=-1,2 | --updates '-1,2' has a step outside of 0 .. 11
dynamics --updates 0,NINES | --updates
dynamics --updates '' | --updates
dynamics --mixture uniform --target_mass 0.5 --target_data no | --target_data no: no such label
""")
# eval.py's
cases("""
eval --eval_data toy/copy --tasks '' | --tasks
eval --tasks medqa5 | medqa5: is not on the hub in loadable form; give its rows: medqa5=FILE
eval --tasks medqa={no}.jsonl | no.jsonl: no such file or folder
eval --tasks medqa={rows.jsonl} | rows.jsonl, row 1: | medqa
eval --tasks medqa={null.jsonl} | null.jsonl, row 1:
eval --tasks medqa={deep.jsonl} | deep.jsonl, row 1:
eval --tasks medqa={mc.jsonl} | mc.jsonl, row 1: has 2 options, medqa has 4
eval --tasks medqa={choices.jsonl} | choices.jsonl, row 1: has 2 options, medqa has 4
eval --tasks pubmedqa={choices.jsonl} | choices.jsonl, row 1: is no row of pubmedqa
eval --tasks bbq={choices.jsonl} | choices.jsonl, row 1: is no row of bbq
eval --tasks truthfulqa_mc2={choices.jsonl} | choices.jsonl, row 1: is no row of truthfulqa_mc2
eval --tasks truthfulqa_mc1={rows.jsonl} | rows.jsonl, row 1: is no row of truthfulqa_mc1
eval --tasks mine={choices.jsonl} --shots 13 | are too few for 13 shots
eval --tasks mine={rows.jsonl} | rows.jsonl, row 1: mine needs options of which one is right
eval --tasks medqa=toy | toy holds no benchmark's rows; give it with --eval_data
eval --tasks medqa={rows.jsonl},{no}.jsonl | no.jsonl: no such file or folder
eval --tasks medqa | medqa: cannot load its rows from the Hugging Face hub
eval --tasks mt_bench={schema.jsonl} | schema.jsonl, row 1: no question | turns
eval --tasks mt_bench={null.jsonl} | null.jsonl, row 1:
eval --tasks mt_bench={nested.jsonl} | nested.jsonl
eval --tasks mt_bench={same_id.jsonl} | mt_bench: two questions have the same question_id
eval --tasks mt_bench={list_id.jsonl} | list_id.jsonl, row 1:
eval --tasks mt_bench={turns.jsonl} | turns.jsonl, row 1: no question
eval --tasks mt_bench={turns2.jsonl} | turns2.jsonl, row 1: no question
eval --tasks mt_bench={turns3.jsonl} | turns3.jsonl, row 1:
eval --tasks alpaca_eval | cannot load hf://datasets/tatsu-lab/alpaca_eval
eval --tasks bbq={vacant} | vacant: the folder holds no .json
eval --judge gpt | --judge grades mt_bench, which is not among the --tasks
eval --tasks mt_bench={turns3.jsonl} --judge gpt | turns3.jsonl
eval --tasks rows | --tasks rows: neither one of eval.py's
eval --tasks mt_bench={turns3.jsonl} --judge_prompts x | turns3.jsonl
eval --tasks humaneval | humaneval: runs the model's code; add --allow_code
eval --tasks gsm8k={no}.jsonl | no.jsonl: no such file or folder
eval --tasks gsm8k={null.jsonl} | null.jsonl, row 1:
eval --tasks gsm8k={rows.jsonl} | rows.jsonl, row 1: gsm8k needs columns
eval --tasks hellaswag={rows.jsonl} | hellaswag
eval --model NINES | File name too long
eval --tasks bbq=NINES.jsonl | File name too long
eval --max_length 2 | no example is left at --max_length 2
""")


def command(script, flags, places):
    """The arguments of a case, before --output_dir."""
    words = shlex.split(f"{START[script]} {flags}")
    filled = [re.sub(r"{([\w./]+)}", lambda found: places[found[1]], word) for word in words]
    return [word.replace("NINES", "9" * 5000) for word in filled]


def refused(script, argv, folder, capfd):
    """main() refuses these arguments -> the line on stderr, which is alone."""
    main = importlib.import_module(script).main
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)  # Python shows none of these
        main([*argv, "--output_dir", str(folder / "run")])
    assert not [warning.message for warning in heard]
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not (folder / "run").exists()
    return lines[0]


@pytest.mark.parametrize("script, flag", FLAGS)
def test_a_number_out_of_range_is_refused(tmp_path, places, capfd, script, flag):
    start = command(script, "", places)
    if flag == "epochs":
        start = start[: start.index("--max_steps")]
    for value in NUMBERS[script][flag]:
        line = refused(script, [*start, f"--{flag}={value}"], tmp_path, capfd)
        assert f"--{flag}" in line
        assert len(line) < 200


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_is_a_number_is_in_the_table(monkeypatch, script):
    found = []

    def keep(parser, argv):
        found.extend(action.dest for action in parser._actions if action.type)
        raise SystemExit

    monkeypatch.setattr(common.ArgumentParser, "parse_args", keep)
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args([])
    assert sorted(found) == sorted(NUMBERS[script])


@pytest.mark.parametrize("script, flags, words", CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_bad_input_is_one_line(tmp_path, places, capfd, monkeypatch, script, flags, words):
    monkeypatch.setattr(data, "TEMPLATE_SECONDS", 1)
    if re.search("--tasks (?!mt_bench|alpaca_eval)", flags):
        pytest.importorskip("lm_eval")
    if "bad.gguf" in flags:
        pytest.importorskip("gguf")
    line = refused(script, command(script, flags, places), tmp_path, capfd)
    for word in words:
        assert word in line
    assert len(line) < 1000 or "NINES" in flags
    assert not Path(places["ran"]).exists()


@pytest.mark.parametrize("flag", ["--data", "--model"])
def test_a_hub_that_cannot_be_reached(tmp_path, places, capfd, monkeypatch, flag):
    """Without HF_HUB_OFFLINE the libraries try several times, with a report of each."""
    tries = []
    monkeypatch.setattr(time, "sleep", tries.append)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    argv = [*command("sftmix", "", places), flag, "nobody/nothing"]
    line = refused("sftmix", argv, tmp_path, capfd)
    assert tries
    assert "nobody/nothing" in line
    assert "network" in line or "internet connection" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path, places, capfd):
    argv = command("sftmix", "--data {locked.jsonl}", places)
    assert "locked.jsonl: cannot be read" in refused("sftmix", argv, tmp_path, capfd)


def test_a_card_that_is_none_of_ours_is_no_card(places):
    assert common.read_card(places["card"]) == {}
