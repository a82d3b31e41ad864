"""What a file says is what is trained: every kind of row, with the text and the tokens that are
right for it. Inputs are made here; each test is a rule of data.py's reading or of its templates."""

import csv
import datetime
import gzip
import io
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
import data
from data import Row, UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# knows tools, calls and reasoning; earlier answers lose their think block
THINKING = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% set text, thought = m.content, m.reasoning_content or '' %}"
    "{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ text }}"
    "{% for call in m.tool_calls or [] %}{{ '[' + call.function.name + ' ' }}"
    "{{ call.function.arguments | tojson }}{{ ']' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_TOOL_TURN = (
    "{% for m in messages %}{% if m.role != 'tool' %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKERS = ["<|im_start|>", "<|im_end|>", "<|end|>"]


def tokenizer_with(template, name="chat"):
    tokenizer = common.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.chat_template = template
    return data.with_template(tokenizer, name)


S, Q, P = map(tokenizer_with, (CHATML, THINKING, NO_TOOL_TURN))
ALPACA = data.with_template(common.tiny_tokenizer(), "alpaca")
PLAIN = data.with_template(common.tiny_tokenizer(), "plain")
EVERY = {"S": S, "Q": Q, "P": P, "alpaca": ALPACA, "plain": PLAIN}


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def rows_of(*records):
    return [
        row for i, record in enumerate(records, 1) for row in data.rows_from_record(record, "f", i)
    ]


def shown(rows, tokenizer, length=4096):
    """[(context, what is supervised)] as text."""
    examples, left_out = data.encode(rows, tokenizer, length)
    assert not left_out
    decode = tokenizer.decode
    return [(decode(e.ids[: e.start]), decode(e.ids[e.start :])) for e in examples]


def supervised(rows, tokenizer=S):
    return [text for _, text in shown(rows, tokenizer)]


def left_out(*records):
    state = [data.read_record(record)[1].left_out for record in records]
    return {reason: n for each in state for reason, n in each.items()}


# ------------------------------------------------------------------------ from bytes to text


def load(path, **options):
    (dataset,) = data.load_data([str(path)], **options)
    return dataset


def responses(path):
    return [row.response for row in load(path).rows]


ODD = ["1987-02-03", "2020-01-02T03:04:05Z", "007", "2.50", "true", "NaN", "1e5", "", " x ", "a\tb"]
ODD += [
    "a\u2028b\u2029c\u0085d",
    "[1, 2]",
    '{"a": 1}',
    "null",
    "\ufeffx",
    "é\U0001f600",
    "-0",
    "x\r\ny",
]


def answers(texts=ODD):
    return [{"question": f"q{i}", "answer": text} for i, text in enumerate(texts)]


KINDS = ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz", "csv.gz", "jsonl.zst"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_string_arrives_character_by_character(kind, tmp_path):
    path, records = tmp_path / f"x.{kind}", answers()
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    if kind == "json":
        text = json.dumps(records, indent=1, ensure_ascii=False)
    if kind.startswith("csv"):
        stream = io.StringIO()
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(records)
        text = stream.getvalue()
    table = pyarrow.Table.from_pylist(records)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        raw = gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode()
        packed = "zstd" if kind.endswith(".zst") else None
        with pyarrow.output_stream(str(path), compression=packed) as stream:
            stream.write(raw)
    dataset = load(path)
    assert dataset.label == "x"
    assert [row.response for row in dataset.rows] == [text for text in ODD if text.strip()]
    assert dataset.left_out == {"empty response": 1}


def test_numbers_in_json_are_the_text_in_the_file(tmp_path):
    texts = ["4", "1.50", "1E3", "-0", "123456789012345678901234567890", "0.1000", "true", "false"]
    lines = [f'{{"question": "q", "answer": {text}}}' for text in texts]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert responses(tmp_path / "x.jsonl") == texts
    (tmp_path / "y.json").write_text(f"[{','.join(lines)}]")
    assert responses(tmp_path / "y.json") == texts
    (tmp_path / "z.jsonl").write_text('{"question": "q", "answer": NaN}')
    with pytest.raises(UserError, match="z.jsonl, row 1: not JSON: NaN is not JSON"):
        load(tmp_path / "z.jsonl")


def test_types_that_change_down_the_file(tmp_path):
    """A column null for long and set later, an id that is a number, then a text, then a list."""
    ids = [1, "x", [1], None]
    records = [{"question": "q", "answer": "a", "id": ids[i % 4], "late": None} for i in range(40)]
    records.append({"question": "q", "answer": "a", "late": {"set": 1}})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    dataset = load(tmp_path / "x.jsonl")
    assert len(dataset.rows) == 41
    assert dataset.unused == ["id", "late"]


def test_rows_of_jsonl_end_at_newline_alone(tmp_path):
    lines = [
        json.dumps({"question": "q", "answer": f"a{c}b"}, ensure_ascii=False) for c in "\u2028\x85"
    ]
    (tmp_path / "x.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines) + "\n\n{").encode())
    with pytest.raises(UserError, match="x.jsonl, row 4: not JSON"):  # row 3 is empty
        load(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "text, message",
    [
        ("instruction;output\na;b\n", "separated by ';'; expected ','"),
        ("instruction\toutput\na\tb\n", r"separated by '\\t'; expected ','"),
        ("instruction,output\na,b\nc\n", "row 2: 1 cells, the header names 2"),
        ('instruction,output\na,"b\n', "row 1: not CSV: unexpected end of data"),
        ("output,output\na,b\n", "two columns have the same name"),
        ("instruction,output\na,\udcff\n", "not UTF-8"),
        ("", "the file is empty"),
    ],
)
def test_bad_csv_is_one_line(text, message, tmp_path):
    (tmp_path / "x.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"x.csv.*{message}"):
        load(tmp_path / "x.csv")


def test_csv_with_bom_and_quoted_newline(tmp_path):
    (tmp_path / "x.csv").write_bytes('\ufeffinstruction,output\r\n"a ""b"",\nc",d\r\n'.encode())
    (row,) = load(tmp_path / "x.csv").rows
    assert (row.messages, row.response) == ((("user", 'a "b",\nc'),), "d")


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "a b.jsonl", "a::b.jsonl", "a*.jsonl", "a=b#3.jsonl"]
)
def test_names_with_odd_characters(name, tmp_path):
    (tmp_path / name).write_text(json.dumps({"question": "q", "answer": "a"}))
    assert responses(tmp_path / name) == ["a"]
    records = answers(["p"])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / f"{name}.parquet")
    assert responses(tmp_path / f"{name}.parquet") == ["p"]


def test_what_datasets_saves_is_read(tmp_path):
    train, test = (datasets.Dataset.from_list(answers(texts)) for texts in (["a", "b"], ["c"]))
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    assert responses(tmp_path / "one") == responses(tmp_path / "both") == ["a", "b"]
    assert [row.response for row in load(tmp_path / "both", split="eval").rows] == ["c"]


def test_hub_clone_is_read_by_split(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for name, text in (
        ("train-00000-of-00002", "a"),
        ("train-00001-of-00002", "b"),
        ("test-0", "c"),
    ):
        table = pyarrow.Table.from_pylist(answers([text]))
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{name}.parquet")
    assert responses(tmp_path) == ["a", "b"]
    assert (
        "2 of 3 files or splits, by name: train-00000-of-00002.parquet" in capsys.readouterr().out
    )
    assert [row.response for row in load(tmp_path, split="eval").rows] == ["c"]
    for file in (tmp_path / "data").glob("train*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no training split, only test-0.parquet"):
        load(tmp_path)


def test_hub_json_and_csv_are_read_as_text(tmp_path):
    """A repository of JSON or CSV files goes through our reader, not through datasets' types."""
    for kind in ("csv", "jsonl"):
        (tmp_path / kind).mkdir()
    (tmp_path / "csv" / "train.csv").write_text("question,answer\nq,007\nq,1987-02-03\n")
    lines = ['{"question": "q", "answer": "1987-02-03"}', '{"question": "q", "answer": 1.50}']
    (tmp_path / "jsonl" / "train.jsonl").write_text("\n".join(lines))
    for kind, right in (("csv", ["007", "1987-02-03"]), ("jsonl", ["1987-02-03", "1.50"])):
        records = data.load_hub(data.HubSource(str(tmp_path / kind)), None)
        assert [record["answer"] for _, _, record in records] == right


def test_half_a_character_is_refused():
    with pytest.raises(UserError, match=r"f, row 1: \\ud83d is half of a character"):
        rows_of({"question": "q", "answer": "\ud83d"})


# ------------------------------------------------------------------------ structure


def test_text_parts_are_joined():
    part = {"type": "text", "text": "Name a planet."}
    user = [part, {"type": "text", "text": "One word.", "image_url": None}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": [part]}]
    (row,) = rows_of({"messages": messages})
    assert row.messages == (("user", "Name a planet.\nOne word."),)
    assert row.response == "Name a planet."
    user[1]["type"] = "image"
    with pytest.raises(UserError, match="f, row 1: expected text .*found a list with image"):
        rows_of({"messages": messages})


def test_messages_in_prompt_and_completion():
    prompt = turns(("system", "Short."), ("user", "Sky?"), ("assistant", "Hm."), ("user", "Well?"))
    (row,) = rows_of({"prompt": prompt, "completion": turns(("assistant", "Blue."))})
    roles = [message[0] for message in row.messages]
    assert (roles, row.response) == (["system", "user", "assistant", "user"], "Blue.")
    (row,) = rows_of({"prompt": prompt[1:2], "completion": "Blue."})
    assert (row.messages, row.response) == ((("user", "Sky?"),), "Blue.")


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, b"a", datetime.date(1987, 2, 3)])
def test_structure_is_never_training_text(value):
    for column in ("question", "answer"):
        record = {"question": "q", "answer": "a", column: value}
        with pytest.raises(UserError, match="f, row 1: .*found"):
            rows_of(record)
    with pytest.raises(UserError, match="f, row 1: .*found"):
        rows_of({"messages": turns(("user", value), ("assistant", "a"))})


def test_messages_as_json_text():
    messages = turns(("user", "u"), ("assistant", "a"))
    assert rows_of({"messages": json.dumps(messages)}) == rows_of({"messages": messages})
    with pytest.raises(UserError, match="row 1: messages is a text that is not JSON"):
        rows_of({"messages": "Hello"})


# ------------------------------------------------------------------------ every key of a row


def test_weights_of_turns():
    messages = turns(("user", "1+1?"), ("assistant", "3"), ("user", "No."), ("assistant", "2"))
    for keys in ({"weight": 0}, {"train": False}, {"weight": 0.0}):
        marked = [messages[0], messages[1] | keys, messages[2], messages[3] | {"weight": 1}]
        (row,) = rows_of({"messages": marked})
        assert (row.response, row.messages[1]) == ("2", ("assistant", "3"))
        assert left_out({"messages": marked}) == {"turn of weight 0": 1}
    for keys in ({"weight": 0.5}, {"weight": 2}, {"train": "maybe"}):
        with pytest.raises(UserError, match="f, row 1: a turn's (weight|train) is"):
            rows_of({"messages": [messages[0], messages[1] | keys]})
    with pytest.raises(UserError, match="a user turn's train is True; only answers"):
        rows_of({"messages": [messages[0] | {"train": True}, messages[1]]})


def test_assistant_turns():
    two = turns(("user", "Facts?"), ("assistant", "One."), ("assistant", "Two."))
    first = turns(
        ("system", "Greet."), ("assistant", "Welcome!"), ("user", "Hi"), ("assistant", "Yes?")
    )
    alone = turns(("user", "Anyone?"))
    bare = turns(("assistant", "Hello!"), ("user", "Hi"), ("assistant", "Yes?"))
    rows = rows_of(*({"messages": each} for each in (two, first, alone, bare)))
    assert [row.response for row in rows] == ["One.", "Two.", "Welcome!", "Yes?", "Yes?"]
    assert rows[1].messages == (("user", "Facts?"), ("assistant", "One."))
    assert left_out({"messages": alone}) == left_out({"messages": []}) == {"no assistant turn": 1}
    assert left_out({"messages": bare}) == {"assistant turn with nothing before it": 1}
    for tokenizer in (S, P, ALPACA):
        context, text = shown(rows[1:2], tokenizer)[0]
        assert "One." in context
        assert text.startswith("Two.")
    assert supervised(rows[1:2], Q) == ["<think>\n\n</think>\n\nTwo.<|im_end|>"]


def test_system_and_history_columns():
    history = [["Capital of Peru?", "Lima."], ["Of Chile?", "Santiago."]]
    record = {"instruction": "Of Cuba?", "output": "Havana.", "history": history}
    before = [("user", "Capital of Peru?"), ("assistant", "Lima.")]
    before += [("user", "Of Chile?"), ("assistant", "Santiago."), ("user", "Of Cuba?")]
    for column in ("system", "system_prompt"):
        (row,) = rows_of({**record, column: "Teach."})
        assert row.messages == (("system", "Teach."), *before)
    (row,) = rows_of({**record, "history": [], "system": ""})
    assert row.messages == (("user", "Of Cuba?"),)
    sharegpt = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    (row,) = rows_of({"conversations": sharegpt, "system": "Sing.", "tools": "[]"})
    assert (row.messages, row.tools) == ((("system", "Sing."), ("user", "u")), "")
    own = [{"from": "system", "value": "Sing."}, *sharegpt]
    assert rows_of({"conversations": own, "system": "Sing."}) == [row]
    with pytest.raises(UserError, match="a system column and another system turn"):
        rows_of({"conversations": own, "system": "Cry."})
    with pytest.raises(UserError, match="history holds .*; expected"):
        rows_of({**record, "history": [["only one"]]})


def test_developer_is_system_and_users_may_follow_each_other():
    pairs = ("developer", "D"), ("user", "One."), ("user", "Two."), ("assistant", "a")
    (row,) = rows_of({"messages": turns(*pairs)})
    assert row.messages == (("system", "D"), ("user", "One."), ("user", "Two."))
    for tokenizer in EVERY.values():
        ((context, _),) = shown([row], tokenizer)
        assert context.index("D") < context.index("One.") < context.index("Two.")


def test_unused_columns_are_named(write_jsonl, capsys):
    records = [{"prompt": "p", "completion": "c", "id": 3, "topic": "x", "note": None, "input": ""}]
    records.append(
        {"messages": [*turns(("user", "u")), {"role": "assistant", "content": "a", "mood": 1}]}
    )
    dataset = load(write_jsonl("x.jsonl", records))
    assert dataset.unused == ["id", "topic", "mood (of a turn)"]
    data.encode_datasets([dataset], PLAIN, 512)
    assert "columns not used: id, topic, mood (of a turn)" in capsys.readouterr().out
    split = data.load_data([write_jsonl("y.jsonl", records[:1])], "topic")
    assert split[0].unused == ["id"]


# ------------------------------------------------------------------------ tools and reasoning

TOOL = {"type": "function", "function": {"name": "get_wind", "parameters": {"x": {"minimum": 1}}}}
CALL = {"name": "get_wind", "arguments": '{"town": "Bergen", "hour": 5}'}
ASKED = [("user", "Windy?"), ("assistant", "")]
REPLY = turns(("tool", "9 m/s"), ("assistant", "Yes."))


@pytest.mark.parametrize("form", ["tool_calls", "arrow", "bare", "function_call"])
def test_tool_calls_are_rendered_and_supervised(form):
    keys = {"tool_calls": [{"id": "c", "type": "function", "function": CALL}]}
    if form == "arrow":  # a table fills the keys that other calls have
        keys["tool_calls"][0] |= {"index": None}
    if form == "bare":
        keys = {"tool_calls": [{**CALL, "arguments": {"town": "Bergen", "hour": 5}}]}
    if form == "function_call":
        keys = {"function_call": CALL}
    messages = turns(*ASKED)
    messages[1] |= keys
    rows = rows_of({"messages": messages + REPLY, "tools": json.dumps([TOOL])})
    calls = '[get_wind {"town": "Bergen", "hour": 5}]'
    texts = shown(rows, Q)
    assert [text for _, text in texts] == [
        f"<think>\n\n</think>\n\n{calls}<|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]
    assert all('"minimum": 1' in context for context, _ in texts)
    assert calls in texts[1][0]
    for tokenizer in (S, P, ALPACA, PLAIN):
        with pytest.raises(
            UserError, match="f, row 1: the chat template leaves out the tool get_wind"
        ):
            data.encode(rows, tokenizer, 4096)
    no_tools = [data.replace(row, tools="") for row in rows]
    with pytest.raises(UserError, match="row 1: the chat template leaves out the call of get_wind"):
        data.encode(no_tools[:1], S, 4096)
    with pytest.raises(UserError, match="row 1: the chat template leaves out the call of get_wind"):
        data.encode(no_tools[1:], S, 4096)


def test_calls_in_a_table(tmp_path):
    """Arrow gives every call the arguments of all, null where it has none."""
    records = []
    for arguments in ({"a": 1}, {"b": "x"}):
        call = {"function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "u"}]
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        records.append({"messages": messages})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet")
    calls = [json.loads(row.keys)["tool_calls"][0] for row in load(tmp_path / "x.parquet").rows]
    assert [call["function"]["arguments"] for call in calls] == [{"a": 1}, {"b": "x"}]


def test_tool_columns():
    record = {"messages": turns(("user", "u"), ("assistant", "a"))}
    (row,) = rows_of({**record, "functions": [{"name": "f1"}]})
    assert json.loads(row.tools) == [{"type": "function", "function": {"name": "f1"}}]
    assert [row.tools for row in rows_of({**record, "tools": None}, {**record, "tools": "[]"})] == [
        "",
        "",
    ]
    for bad in ("f1", {"name": "f1"}, ["f1"]):
        with pytest.raises(UserError, match="f, row 1: (tools is a text|expected)"):
            rows_of({**record, "tools": bad})


def test_tool_turn_that_a_template_leaves_out():
    rows = rows_of({"messages": turns(("user", "T?"), ("assistant", "Wait."), *ASKED) + REPLY})
    with pytest.raises(
        UserError, match="f, row 1: the chat template leaves out the tool turn's text"
    ):
        data.encode(rows[-1:], P, 4096)
    assert supervised(rows[-1:], S) == ["Yes.<|im_end|>"]


def test_a_left_out_turn_is_found_though_its_text_stands_elsewhere():
    messages = (("user", "Is it 4?"), ("assistant", "4"), ("tool", "4"))
    with pytest.raises(UserError, match="leaves out the tool turn's text"):
        data.encode([Row(messages, "4")], P, 512)


def test_reasoning():
    answer = {"role": "assistant", "content": "63", "reasoning_content": "7*9 = 63."}
    rows = rows_of({"messages": [*turns(("user", "7*9?")), answer]})
    assert supervised(rows, Q) == ["<think>\n7*9 = 63.\n</think>\n\n63<|im_end|>"]
    with pytest.raises(UserError, match="f, row 1: the chat template leaves out the reasoning"):
        data.encode(rows, S, 4096)
    (row,) = rows_of({"messages": [*turns(("user", "7*9?")), answer | {"reasoning_content": 63}]})
    assert json.loads(row.keys) == {"reasoning_content": "63"}
    with pytest.raises(UserError, match="f, row 1: expected text, found dict"):
        rows_of({"messages": [*turns(("user", "u")), answer | {"reasoning_content": {"a": 1}}]})


def test_each_turn_trains_its_own_thoughts():
    thought = "<think>\n{}\n</think>\n\n{}"
    pairs = [("user", "2+2?"), ("assistant", thought.format("add", "4"))]
    pairs += [("user", "+1?"), ("assistant", thought.format("more", "5"))]
    first, second = shown(rows_of({"messages": turns(*pairs)}), Q)
    assert first[1] == "<think>\nadd\n</think>\n\n4<|im_end|>"
    assert second[1] == "<think>\nmore\n</think>\n\n5<|im_end|>"
    assert "add" not in second[0]
    assert "assistant\n4<|im_end|>" in second[0]


# ------------------------------------------------------------------------ templates


def test_templates_that_cannot_be_used_are_refused_by_name():
    thinks_first = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    drops_user = "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}"
    fails = "{{ raise_exception('only parts') }}"
    for template, why in (
        (thinks_first, "changes the prompt"),
        (drops_user, "leaves out the user turn"),
        (fails, "only parts"),
    ):
        with pytest.raises(
            UserError, match=f"^--template chat: cannot be used: .*{why}.*--template alpaca"
        ):
            tokenizer_with(template)


def test_which_token_ends_a_turn():
    """The first added token after an answer (Phi-3 writes EOS behind it); the last of its kind,
    where a template ends the reasoning by the same one."""
    closing = NO_TOOL_TURN + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    row = Row((("user", "u"),), "a")
    assert supervised([row], tokenizer_with(closing)) == ["a<|end|>"]
    thinks = "{{ (m.reasoning_content + '<|end|>') if m.reasoning_content }}{{ m.content"
    thinks = NO_TOOL_TURN.replace("'|>' + m.content", "'|>' }}" + thinks)
    row = data.replace(row, keys='{"reasoning_content": "why"}')
    assert supervised([row], tokenizer_with(thinks)) == ["why<|end|>a<|end|>"]


def test_what_a_user_wrote_is_not_stripped():
    """Only an answer's think block may go from the history."""
    strips = tokenizer_with(CHATML.replace("m.content +", "m.content.split('</think>')[-1] +"))
    shown([Row((("user", "u"), ("assistant", "<think>x</think>y"), ("user", "z")), "a")], strips)
    with pytest.raises(UserError, match="leaves out the user turn's text"):
        data.encode([Row((("user", "x</think>y"),), "a")], strips, 512)


def test_template_from_a_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    tokenizer = data.with_template(common.tiny_tokenizer(), str(file))
    assert shown([Row((("user", "u"),), "a")], tokenizer) == [("[user] u\n[assistant] ", "a</s>")]
    with pytest.raises(UserError, match="--template missing: expected auto, alpaca"):
        data.with_template(common.tiny_tokenizer(), "missing")


def test_the_date_of_a_template_is_fixed():
    clock = "{{ strftime_now('%d %B %Y') }}" + CHATML
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template = clock
    assert data.template_date("chat", tokenizer, "1987-02-03") == "1987-02-03"
    assert data.template_date("chat", tokenizer) == datetime.date.today().isoformat()
    assert data.template_date("alpaca", tokenizer) is None
    fixed = data.with_template(tokenizer, "chat", "1987-02-03")
    assert shown([Row((("user", "u"),), "a")], fixed)[0][0].startswith("03 February 1987<|im")
    assert "strftime_now" not in fixed.chat_template
    assert tokenizer.chat_template == clock
    tokenizer.chat_template = "{% set form = '%Y' %}{{ strftime_now(form) }}" + CHATML
    with pytest.raises(UserError, match="--template chat: cannot be used: its strftime_now"):
        data.with_template(tokenizer, "chat")


@pytest.mark.parametrize("name", ["S", "Q", "P", "alpaca", "plain"])
def test_ids_are_those_of_apply_chat_template(name):
    """Every row without a marker in its text: the whole rendering up to the end of turn; and the
    prompt's alone."""
    tokenizer, pairs = (
        EVERY[name],
        [("user", "What is 1+1?\n"), ("assistant", "Two"), ("user", " é\u2028 ")],
    )
    messages, answer = turns(*pairs), turns(("assistant", "Three\n\nlines."))
    ((prompt, response),) = data.Template(tokenizer).ids([Row(tuple(pairs), "Three\n\nlines.")])
    render = tokenizer.apply_chat_template
    options = {"tokenize": True, "return_dict": False}
    assert prompt == render(messages, add_generation_prompt=True, **options)
    whole = render(messages + answer, **options)
    assert prompt + response == whole[: len(prompt + response)]
    assert tokenizer.decode(whole[len(prompt + response) :]).strip() == ""


def test_what_is_saved_renders_what_was_trained(tmp_path):
    import transformers

    row = Row((("system", "s"), ("user", "u")), "a")
    for name, tokenizer in EVERY.items():
        tokenizer.save_pretrained(tmp_path / name)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        again = data.with_template(again, data.pick_template("auto", again))
        assert shown([row], again) == shown([row], tokenizer)


@pytest.mark.parametrize("name", ["S", "alpaca", "plain"])
def test_special_tokens_in_a_text_are_text(name):
    tokenizer = EVERY[name]
    eos, end = tokenizer.eos_token, data.Template(tokenizer).end_token
    written = f"<|im_end|>\n<|im_start|>assistant\nOK {eos}<s>"
    clean = data.Template(tokenizer).ids([Row((("user", "u"),), "a")])[0]
    for row in (Row((("user", written),), "a"), Row((("user", "u"),), written), Row((), written)):
        ((prompt, response),) = data.Template(tokenizer).ids([row])
        if row.messages:
            for token in data.Template(tokenizer).special.values():
                assert prompt.count(token) == clean[0].count(token)
            assert tokenizer.decode(prompt).count(written) == (row.response == "a")
        last = end if row.messages else tokenizer.eos_token_id
        assert response[-1] == last
        assert not set(response[:-1]) & set(data.Template(tokenizer).special.values())
        assert tokenizer.decode(response[:-1]) == row.response


def test_special_tokens_beyond_ascii():
    """DeepSeek writes its markers with full-width bars; a row may spell them out too."""
    tokenizer, mark = common.tiny_tokenizer(), "<｜end▁of▁turn｜>"
    tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
    tokenizer.chat_template = NO_TOOL_TURN.replace("<|end|>", mark)
    template = data.Template(data.with_template(tokenizer, "chat"))
    ((prompt, response),) = template.ids([Row((("user", f"What is {mark}?"),), f"It is {mark}.")])
    assert prompt.count(template.end_token) == response.count(template.end_token) == 1
    assert tokenizer.decode(response) == f"It is {mark}.{mark}"
    assert f"What is {mark}?{mark}" in tokenizer.decode(prompt)


def test_white_space_that_a_token_swallows():
    """Phi-3's <|end|> takes the newline after it: the same in rows with a marker in their text."""
    from tokenizers import AddedToken

    tokenizer = common.tiny_tokenizer()
    end = AddedToken("<|end|>", rstrip=True, special=True, normalized=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = NO_TOOL_TURN
    template = data.Template(data.with_template(tokenizer, "chat"))
    (plain, _), (marked, _) = template.ids([Row((("user", t),), "a") for t in ("x", "x<s>")])
    assert marked == plain[: plain.index(ord_of(tokenizer, "x")) + 1] + [
        *(ord_of(tokenizer, c) for c in "<s>"),
        *plain[plain.index(ord_of(tokenizer, "x")) + 1 :],
    ]


def ord_of(tokenizer, char):
    return tokenizer.convert_tokens_to_ids(char)


def test_plain_text_begins_with_bos_only_where_the_tokenizer_adds_one():
    tokenizer = common.tiny_tokenizer()
    assert shown([Row((), "text")], data.with_template(tokenizer, "plain")) == [("<s>", "text</s>")]
    tokenizer._tokenizer.post_processor = None
    none = data.with_template(tokenizer, "plain")
    (example,), _ = data.encode([Row((), "text")], none, 512)
    assert none.decode(example.ids) == "text</s>"
    assert example.start == 1


def test_cut_and_left_out_are_counted_everywhere(tmp_path, write_jsonl, capsys):
    """In the dataset's line, in config.json and in summary.json."""
    import sftmix

    records = [
        {"prompt": "Write.", "completion": "word " * 60},
        {"prompt": "Say b.", "completion": "b"},
    ]
    records += [{"prompt": "p" * 200, "completion": "b"}, {"prompt": "p", "completion": " "}]
    path, run = write_jsonl("x.jsonl", records), tmp_path / "run"
    flags = f"--data {path} --eval_data {path} --max_length 128 --template plain --mu 0"
    flags += " --ntp_on full --max_steps 1"
    sftmix.main([*flags.split(), "--output_dir", str(run), "--batch_size", "2"])
    assert "1 cut at --max_length; left out: empty response: 1, prompt fills max_length: 1" in (
        capsys.readouterr().out
    )
    counted = {"x": {"cut at --max_length": 1, "empty response": 1, "prompt fills max_length": 1}}
    counted = {"data": counted, "eval_data": counted}
    for file in ("config.json", "summary.json"):
        assert json.loads((run / file).read_text())["left_out"] == counted


# ------------------------------------------------------------------------ multiple choice


@pytest.mark.parametrize(
    "options, answer, right",
    [
        (["zero", "one"], "b", "one"),
        (["zero", "one"], "B", "one"),
        (["zero", "one"], 1, "one"),
        (["Rome", "Paris"], "Paris", "Paris"),
        ({"A": "x", "B": "y"}, "a", "x"),
        ({"A": "x", "B": "y"}, "y", "y"),
        (["5", "6"], "6", "6"),
        (["x", "y"], "1", "y"),  # CSV has no numbers
        (["a", "b"], "", None),
        (["a", "b"], None, None),
        (["a", "b"], " ", None),
        (["a", "b"], "c", None),
        (["A", "b"], "a", "A"),  # the letter A, which is also that option
        (["B", "A"], "A", None),  # the letter of one, the text of the other
        (["x", "y"], 2, None),
        (["x", "y"], -1, None),
        (["x", "y"], True, None),
        ({"A": "x", "B": "y"}, "", None),
    ],
)
def test_answers_of_multiple_choice(options, answer, right):
    column = "answer_idx" if isinstance(options, dict) else "answer"
    choices = "options" if isinstance(options, dict) else "choices"
    record = {"question": "Which?", choices: options, column: answer}
    if right is None:
        with pytest.raises(UserError, match="f, row 1: (right )?answer"):
            rows_of(record)
    else:
        (row,) = rows_of(record)
        assert row.response == row.choices[row.answer] == right


# ------------------------------------------------------------------------ any text, any schema

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
PIECES = st.sampled_from(
    [*MARKERS, "<s>", "</s>", "\n", " ", "### Response:", "<think>", "\ue000", "{{"]
)
ANY = st.lists(st.one_of(TEXT, PIECES), min_size=1, max_size=4).map("".join)


def record_of(schema, question, answer):
    if schema == "messages":
        return {"messages": turns(("user", question), ("assistant", answer))}
    if schema == "conversations":
        pairs = ("human", question), ("gpt", answer)
        return {"conversations": [{"from": who, "value": text} for who, text in pairs]}
    if schema == "parts":
        parts = [[{"type": "text", "text": text}] for text in (question, answer)]
        return {"messages": turns(("user", parts[0]), ("assistant", parts[1]))}
    if schema == "text":
        return {"text": answer}
    return dict(zip(schema.split("/"), (question, answer)))


SCHEMAS = [
    "instruction/output",
    "prompt/completion",
    "question/answer",
    "messages",
    "conversations",
]
SCHEMAS += ["parts", "text", "problem/solution"]


@pytest.mark.parametrize("name", list(EVERY))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    schema=st.sampled_from(SCHEMAS),
    question=ANY,
    answer=ANY,
    kind=st.sampled_from(["jsonl", "csv"]),
)
def test_any_text_arrives(name, schema, question, answer, kind, tmp_path_factory):
    """Through a file: what is supervised decodes to the response and one end of turn, nothing of
    the prompt, and no row vanishes uncounted."""
    tokenizer, record = EVERY[name], record_of(schema, question, answer)
    path = tmp_path_factory.mktemp("any") / f"x.{kind}"
    if kind == "csv":
        stream = io.StringIO()
        cells = [v if isinstance(v, str) else json.dumps(v) for v in record.values()]
        csv.writer(stream).writerows([list(record), cells])
        path.write_bytes(stream.getvalue().encode())
    else:
        path.write_bytes((json.dumps(record, ensure_ascii=False) + "\n").encode())
    try:
        dataset = load(path)
    except UserError as error:
        assert not answer.strip()
        assert "empty response: 1" in str(error)
        return
    examples, counted = data.encode(dataset.rows, tokenizer, 4096)
    assert len(examples) + sum(counted.values()) == 1
    template = data.Template(tokenizer)
    for example in examples:
        prompt, response = example.ids[: example.start], example.ids[example.start :]
        end = template.end_token if dataset.rows[0].messages else tokenizer.eos_token_id
        assert response[-1] == end
        assert not np.isin(response[:-1], list(template.special.values())).any()
        if name == "Q" and schema != "text":
            body = tokenizer.decode(response[:-1])
            assert body.startswith("<think>\n")
            assert answer.split("</think>")[-1].strip() in body
        else:
            assert tokenizer.decode(response[:-1]) == answer
        if schema != "text":
            assert question.strip() in tokenizer.decode(prompt)
