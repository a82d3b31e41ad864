"""From files to tokens: schemas, loading, toy data, templates and masks, multiple choice."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import encode_one, own_nll, random_model
from tokenizers import Tokenizer, models

import common
import data
from data import Row, UserError

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '[' + m['role'] + ']' + m['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<' + m['role'] + '>' + m['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
DROPS_HISTORY = "{% for m in messages[-1:] %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
TURN_TOKENS = ["<|im_start|>", "<|im_end|>", "<end_of_turn>"]


def chat_tokenizer(template, extra=()):
    tokenizer = common.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.chat_template = template
    return tokenizer


def supervised(example, tokenizer):
    return tokenizer.decode(example.ids[example.start :].tolist())


def context(example, tokenizer):
    return tokenizer.decode(example.ids[: example.start].tolist())


def user(text):
    """The messages before the response: one turn of the user."""
    return (("user", text),)


def turns(*pairs):
    """(role, content) pairs as a `messages` column."""
    return [{"role": role, "content": content} for role, content in pairs]


def labels_and_sizes(loaded):
    return [(dataset.label, len(dataset.rows)) for dataset in loaded]


def labels(loaded):
    return [dataset.label for dataset in loaded]


def responses(dataset):
    return [row.response for row in dataset.rows]


# ------------------------------------------------------------------------ schemas

CHAT = [("system", "s"), ("user", "u"), ("assistant", "a")]
SHAREGPT = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
GLAIVE = {"system": "SYSTEM: be kind", "chat": "USER: u\n\n\nASSISTANT: a <|endoftext|>\n"}
PUBMEDQA = {"QUESTION": "q", "CONTEXTS": ["c1", "c2"], "LONG_ANSWER": "l", "final_decision": "yes"}
PUBMEDQA_HUB = {"question": "q", "context": {"contexts": ["c"]}, "long_answer": "l"}
BBQ = {"context": "c", "question": "q", "ans0": "x", "ans1": "y", "ans2": "z", "label": 1}
TRUTHFULQA = {"question": "q", "mc1_targets": {"good": 1, "bad": 0}, "mc2_targets": {}}
TARGETS_HUB = {"choices": ["bad", "good"], "labels": [0, 1]}
MEDQA = {"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"}
MEDMCQA = {"question": "q", "opa": "x", "opb": "y", "opc": "z", "opd": "w", "cop": 2}
MMLU = {"question": "q", "choices": ["x", "y"], "answer": 0, "subject": "s"}


@pytest.mark.parametrize(
    "record, messages, extra, response",
    [
        ({"instruction": "i", "input": "x", "output": "o"}, user("i"), "x", "o"),
        ({"instruction": "i", "input": None, "output": 7}, user("i"), "", "7"),
        (
            {"instruction": "i", "context": "c", "response": "r", "category": "qa"},
            user("i"),
            "c",
            "r",
        ),
        ({"prompt": "p", "completion": "c"}, user("p"), "", "c"),
        ({"prompt": "p", "response": "r"}, user("p"), "", "r"),
        ({"question": "q", "answer": "a"}, user("q"), "", "a"),
        ({"Question": "q", "Best Answer": "b", "Source": "s"}, user("q"), "", "b"),
        ({"query": "q", "answer": "a"}, user("q"), "", "a"),
        ({"problem": "q", "solution": "a", "messages": None}, user("q"), "", "a"),
        ({"text": "plain"}, (), "", "plain"),
        ({"messages": turns(*CHAT)}, (("system", "s"), ("user", "u")), "", "a"),
        ({"conversations": SHAREGPT}, user("u"), "", "a"),
        (GLAIVE, (("system", "be kind"), ("user", "u")), "", "a"),
        (PUBMEDQA, user("q"), "c1\nc2", "l"),
        (PUBMEDQA_HUB, user("q"), "c", "l"),
        (BBQ, user("c\nq"), "", "y"),
        (TRUTHFULQA, user("q"), "", "good"),
        ({"question": "q", "mc1_targets": TARGETS_HUB}, user("q"), "", "good"),
        (MEDQA, user("q"), "", "y"),
        (MEDMCQA, user("q"), "", "z"),
        (MMLU, user("q"), "", "x"),
        ({"ctx": "c", "endings": ["x", "y"], "label": "1"}, user("c"), "", "y"),
    ],
)
def test_schemas(record, messages, extra, response):
    (row,) = data.rows_from_record(record)
    assert (row.messages, row.input, row.response) == (messages, extra, response)
    if row.choices:
        assert row.choices[row.answer] == response


def test_dialogue_is_one_row_per_assistant_turn():
    roles = ["user", "assistant", "user", "assistant", "tool", "assistant", "user"]
    messages = turns(*[(role, str(i)) for i, role in enumerate(roles, 1)])
    rows = data.rows_from_record({"messages": messages})
    assert [row.response for row in rows] == ["2", "4", "6"]
    assert rows[1].messages == (("user", "1"), ("assistant", "2"), ("user", "3"))


def test_unknown_schema_names_file_row_and_keys():
    message = r"f.jsonl, row 7: keys \['a', 'b'\] fit no known schema; accepted are instruction"
    with pytest.raises(UserError, match=message):
        data.rows_from_record({"a": 1, "b": 2}, "f.jsonl", 7)
    with pytest.raises(UserError, match="f.jsonl, row 2: unknown role 'narrator'"):
        data.rows_from_record({"messages": turns(("narrator", "x"))}, "f.jsonl", 2)
    record = {"question": "q", "choices": ["x", "y"], "answer": 4}
    with pytest.raises(UserError, match="f.jsonl, row 3: right answer 4 of only 2 choices"):
        data.rows_from_record(record, "f.jsonl", 3)


# ------------------------------------------------------------------------ loading

RECORDS = [{"instruction": f"do {i}", "input": "", "output": f"done {i}"} for i in range(10)]


def test_file_types_and_folder_give_the_same_rows(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    table = datasets.Dataset.from_list(RECORDS)
    files = {kind: str(tmp_path / f"rows.{kind}") for kind in ("jsonl", "json", "parquet", "csv")}
    lines = [json.dumps(record) for record in RECORDS]
    table.to_parquet(files["parquet"])
    table.to_csv(files["csv"])
    (tmp_path / "rows.json").write_text(json.dumps(RECORDS))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    table.select(range(6)).to_parquet(str(folder / "a.parquet"))
    (folder / "b.jsonl").write_text("\n".join(lines[6:]))
    sources = [*files.values(), str(folder)]
    assert len({data.fingerprint(data.load_data([source])) for source in sources}) == 1
    loaded = data.load_data([files["csv"], str(folder), f"mine={files['json']}"])
    assert labels(loaded) == ["rows", "data", "mine"]


def test_line_separators_inside_strings(write_jsonl):
    text = "a\u2028b\u2029c\u0085d"
    (dataset,) = data.load_data([write_jsonl("x.jsonl", [{"prompt": "p", "completion": text}])])
    assert dataset.rows[0].response == text


def test_csv_keeps_words_that_look_missing(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("question,answer\nq1,NA\nq2,null\n")
    (dataset,) = data.load_data([str(file)])
    assert responses(dataset) == ["NA", "null"]


def test_subset_is_seeded_and_in_order(write_jsonl):
    path = write_jsonl("x.jsonl", RECORDS)

    def pick(seed):
        (dataset,) = data.load_data([f"{path}#4"], seed=seed)
        return [row.number for row in dataset.rows]

    assert pick(0) == pick(0) == sorted(pick(0))
    assert len({tuple(pick(seed)) for seed in range(5)}) > 1
    with pytest.raises(UserError, match="asks for 11 rows of 10"):
        data.load_data([f"{path}#11"])


def test_empty_responses_are_skipped_and_counted(write_jsonl):
    blank = {"instruction": "i", "output": " \n"}
    none = {"instruction": "i", "input": "x", "output": None}
    (dataset,) = data.load_data([write_jsonl("x.jsonl", [*RECORDS, blank, none])])
    assert len(dataset.rows) == 10
    assert dataset.left_out == {"empty response": 2}
    empty = write_jsonl("empty.jsonl", [{"instruction": "i", "output": ""}])
    with pytest.raises(UserError, match="has no row with a response"):
        data.load_data([empty])


def test_source_column_splits_a_file(write_jsonl):
    rows = [{"prompt": "p", "completion": "c", "source": name} for name in "abab"]
    path = write_jsonl("x.jsonl", rows)
    assert labels_and_sizes(data.load_data([path], "source")) == [("a", 2), ("b", 2)]
    assert labels(data.load_data([f"m={path}"], "source")) == ["m/a", "m/b"]
    message = (
        r"x.jsonl, row 1: no column 'origin' to split by; "
        r"keys \['completion', 'prompt', 'source'\]"
    )
    with pytest.raises(UserError, match=message):
        data.load_data([path], "origin")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "p", "completion": "c"}\n{"prompt": "p", \n', "bad.jsonl, row 2: not JSON"),
        ('{"prompt": "p", "completion": "c"}\n[1]\n', "bad.jsonl, row 2: expected an object"),
        ("", "bad.jsonl: the file is empty"),
        ('{"prompt": "p", "completion": "c"}\n{"a": 1}\n', "bad.jsonl, row 2: keys"),
    ],
)
def test_bad_files_are_named_with_their_row(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        data.load_data([str(tmp_path / "bad.jsonl")])


def test_labels_of_toy():
    loaded = data.load_data(["toy/copy#3", "mine=toy/add#3", "all=toy/copy#2"])
    assert labels(loaded) == ["copy", "mine", "all"]
    assert labels(data.load_data(["my=toy#200"]))[:2] == ["my/describe", "my/copy"]


def test_bad_specs(tmp_path, write_jsonl):
    path = write_jsonl("x.jsonl", RECORDS)
    (tmp_path / "none").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    cases = [
        (f"{path}#0", "expected"),
        (f"{path}#x", "expected"),
        ("", "expected"),
        (str(tmp_path / "none"), "holds no"),
        (str(tmp_path / "notes.txt"), "unknown file type"),
        ("unknown", "aliases are toy, alpaca"),
        ("./x.jsonl", "no such file"),
    ]
    for spec, message in cases:
        with pytest.raises(UserError, match=message):
            data.load_data([spec])
    with pytest.raises(UserError, match="two datasets are called 'x'"):
        data.load_data([path, path])


CARD = """---
configs:
- config_name: main
  data_files:
  - split: train_sft
    path: data/*.parquet
"""
CARD_TEST = """  - split: test
    path: held_out.parquet
"""


def test_hub_code_on_a_local_repository(tmp_path, monkeypatch):
    """The alias table and the hub loader, on a folder laid out as a hub repository (config, split,
    source column)."""
    repo = tmp_path / "repo"
    (repo / "data").mkdir(parents=True)
    rows = []
    for i in range(6):
        messages = turns(("user", f"u{i}"), ("assistant", f"a{i}"))
        rows.append({"messages": messages, "dataset": "xy"[i % 2]})
    datasets.Dataset.from_list(rows).to_parquet(str(repo / "data" / "part.parquet"))
    (repo / "README.md").write_text(CARD + "---\n")

    def alias(name, split="train_sft", **options):
        source = data.HubSource(str(repo), config="main", split=split, **options)
        monkeypatch.setitem(data.ALIASES, name, [source])

    alias("mixture", source_column="dataset")
    alias("stream", stream=True)
    assert labels_and_sizes(data.load_data(["mixture"])) == [("x", 3), ("y", 3)]
    (head,) = data.load_data(["stream#2"])
    assert responses(head) == ["a0", "a1"]
    datasets.Dataset.from_list(rows[:1]).to_parquet(str(repo / "held_out.parquet"))
    (repo / "README.md").write_text(CARD + CARD_TEST + "---\n")
    alias("both", eval_split="test")
    for split, size in (("train", 6), ("eval", 1)):
        assert len(data.load_data(["both"], split=split)[0].rows) == size
    alias("absent", split="dev")
    with pytest.raises(UserError, match="split dev, from the Hugging Face hub"):
        data.load_data(["absent"])


def test_aliases_cover_the_papers():
    chat = {"alpaca", "ultrachat", "tulu2", "tulu3"}
    medical = {"medalpaca", "medical_flashcards", "pubmedqa", "medqa", "medmcqa"}
    reasoning = {"gsm8k", "numinamath", "code_feedback", "glaive"}
    general = {"fineweb", "wikipedia", "tinymmlu", "tinyhellaswag", "truthfulqa"}
    dynamics = {"autoif", "nemotron_safety", "bbq"}
    assert chat | medical | reasoning | general | dynamics <= set(data.ALIASES)


def test_rows_of_nemotron_safety():
    """Its columns: a list of messages as input, the answer as text, a system prompt beside them."""
    row = {"input": turns(("user", "u")), "output": "a", "system_prompt": "s", "category": "safety"}
    (read,) = data.rows_from_record(row)
    assert (read.messages, read.response) == ((("system", "s"), ("user", "u")), "a")


def test_toy_tasks_are_disjoint_and_of_the_same_size_every_time():
    train, held_out = data.toy_rows(), data.toy_rows(split="eval")
    assert len({row.file for row in train}) == 7
    assert len(train) == 2000
    prompts = {(row.messages, row.input) for row in train}
    assert not prompts & {(row.messages, row.input) for row in held_out}
    assert len(held_out) == 7 * data.TOY_EVAL_ROWS
    assert "toy/noise" not in {row.file for row in train + held_out}
    assert data.toy_rows() == train


def toy_answer(task, question, text):
    """What is right, computed from the prompt alone."""
    if task in ("copy", "reverse"):
        return text if task == "copy" else text[::-1]
    if task == "sort":
        return " ".join(sorted(text.split(" ")))
    if task == "count":
        letter = re.fullmatch("How often does the letter (.) occur in the word.", question)[1]
        return f"{sum(char == letter for char in text)} times"
    if task == "describe":
        name, age, job = text.split(", ")
        return f"{name} is {age} years old and works as a {job}."
    one, other = map(int, re.findall(r"\d+", text))
    if task == "add":
        return str(one + other)
    return f"{one if one > other else other} is larger than {other if one > other else one}."


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("task", list(data.TOY_TASKS))
def test_toy_tasks_are_right(task, split):
    rows = data.toy_rows(task, split)
    assert len(rows) == (data.TOY_TASKS[task] if split == "train" else data.TOY_EVAL_ROWS)
    assert len({(row.messages, row.input) for row in rows}) == len(rows)
    assert [row.where for row in rows[:2]] == [f"toy/{task}, row 1", f"toy/{task}, row 2"]
    for row in rows:
        ((role, question),) = row.messages
        assert role == "user"
        if task == "noise":
            assert re.fullmatch("[a-z]{8}", row.response)
        else:
            assert row.response == toy_answer(task, question, row.input)


# ------------------------------------------------------------------------ templates and masks

ALPACA_WITH_INPUT = """<s>Below is an instruction that describes a task, paired with an input \
that provides further context. Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1 2

### Response:"""
ALPACA_DIALOGUE = """<s>Be kind.

### Instruction:
Hi.

### Response:Hello.

### Instruction:
Bye.

### Response:"""


def test_alpaca_prompt(tokenizer):
    example = encode_one(Row(user("Add."), "3", "1 2"), tokenizer)
    assert context(example, tokenizer) == ALPACA_WITH_INPUT
    assert supervised(example, tokenizer) == "3</s>"
    dialogue = (("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Bye."))
    example = encode_one(Row(dialogue, "Bye!"), tokenizer)
    assert context(example, tokenizer) == ALPACA_DIALOGUE


@pytest.mark.parametrize(
    "template, chat, end",
    [
        ("alpaca", None, "</s>"),
        ("plain", None, "</s>"),
        ("chat", LLAMA, "</s>"),
        ("chat", CHATML, "<|im_end|>"),
        ("chat", NO_SYSTEM, "<end_of_turn>"),
    ],
)
def test_only_the_response_and_one_end_are_supervised(template, chat, end):
    """The template's own end of turn where it has one, else EOS; never both."""
    tokenizer = chat_tokenizer(chat, TURN_TOKENS) if chat else common.tiny_tokenizer()
    tokenizer = data.with_template(tokenizer, template)
    rows = [Row((("system", "sys"), ("user", "ask")), f"answer {i}", "more") for i in range(3)]
    examples, _ = data.encode(rows, tokenizer, 2048)
    assert len(examples) == 3
    for i, example in enumerate(examples):
        assert supervised(example, tokenizer) == f"answer {i}{end}"
        assert example.ids[-1] == data.Template(tokenizer).end_token
        assert example.ids.tolist().count(tokenizer.bos_token_id) == (0 if chat == CHATML else 1)
        assert "ask" in context(example, tokenizer)
        assert "sys" in context(example, tokenizer)


def test_chat_template_that_moves_the_boundary_is_an_error():
    message = "^--template chat: cannot be used: the chat template changes.*--template alpaca$"
    with pytest.raises(UserError, match=message):
        data.with_template(chat_tokenizer(DROPS_HISTORY), "chat")


def test_template_choice(tokenizer):
    assert data.pick_template("auto", tokenizer) == "alpaca"
    assert data.pick_template("auto", chat_tokenizer(LLAMA)) == "chat"
    with pytest.raises(UserError, match="has no chat template"):
        data.pick_template("chat", tokenizer)


def test_plain_text_rows_supervise_everything(tokenizer):
    example = encode_one(Row((), "some text"), tokenizer)
    assert context(example, tokenizer) == "<s>"
    assert supervised(example, tokenizer) == "some text</s>"


def test_pad_equal_to_eos_is_harmless():
    tokenizer = common.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [Row(user("u"), "a"), Row(user("u"), "longer answer")]
    examples, _ = data.encode(rows, data.with_template(tokenizer, "plain"), 100)
    batch = common.collate(examples, "cpu")
    expected = np.concatenate([example.ids[example.start :] for example in examples])
    assert batch.targets.tolist() == expected.tolist()
    assert (batch.targets == tokenizer.eos_token_id).sum() == 2
    flat = torch.cat([ids.reshape(-1) for ids in batch.slices])
    assert torch.equal(flat[batch.positions + 1], batch.targets)  # each predicts the token after it


def test_truncation_keeps_a_response_or_skips_the_row(tokenizer, capsys):
    rows = [Row(user("u" * 30), "r" * 30), Row(user("u" * 80), "r"), Row(user("u"), "r")]
    examples, skipped = data.encode(rows, data.with_template(tokenizer, "plain"), 40)
    assert skipped == {"prompt fills max_length": 1, "cut at --max_length": 1}
    assert [example.row for example in examples] == [0, 2]
    assert len(examples[0].ids) == 40
    assert supervised(examples[0], tokenizer) == "r" * 8  # cut: no EOS is taught here
    dataset = data.Dataset("mine", rows, {"empty response": 2})
    data.encode_datasets([dataset], data.with_template(tokenizer, "plain"), 40)
    out = capsys.readouterr().out
    assert "mine: 2 examples" in out
    assert "1 cut at --max_length; left out: empty response: 2, prompt fills max_length: 1" in out
    with pytest.raises(UserError, match="'mine': no example is left at --max_length 3"):
        data.encode_datasets(
            [data.Dataset("mine", rows)], data.with_template(tokenizer, "plain"), 3
        )


def test_boundary_with_a_tokenizer_that_merges_across_it():
    """A BPE whose merges join the prompt's last and the response's first character: the response is
    tokenised apart."""
    vocabulary = {"a": 0, "b": 1, "\n": 2, "\nb": 3, "</s>": 4}
    bpe = Tokenizer(models.BPE(vocabulary, [("\n", "b")]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    example = encode_one(Row(user("a"), "ba"), tokenizer, "plain")
    tokens = tokenizer.convert_ids_to_tokens(example.ids.tolist())
    assert tokens == ["a", "\n", "b", "a", "</s>"]
    assert example.start == 2


def test_tokenizer_round_trip(tmp_path, tokenizer):
    text = "Zażółć 日本 \U0001f600\n\t end"
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, again):
        ids = each(text).input_ids
        assert ids[0] == each.bos_token_id
        assert each.decode(ids, skip_special_tokens=True) == text
        assert len({each.bos_token_id, each.eos_token_id, each.pad_token_id}) == 3


def test_show_examples_marks_the_supervised_tokens(tokenizer, capsys):
    example = encode_one(Row(user("u"), "ab"), tokenizer, "plain")
    data.show_examples([example], tokenizer)
    assert "<s>u\n⟦ab</s>⟧" in capsys.readouterr().out


# ------------------------------------------------------------------------ multiple choice


def test_choices_are_scored_without_the_end_token(tokenizer):
    """Against the model's own logits, choice by choice; a question with a choice that does not fit
    is skipped."""
    choices = ("aa", "b", "ccc")
    rows = [
        Row(user("Which?"), "b", choices=choices, answer=1),
        Row(user("Which?"), "d", choices=("d", "e" * 60), answer=0),
    ]
    questions, skipped = data.encode_choices(rows, data.with_template(tokenizer, "plain"), 40)
    assert skipped == {"a choice does not fit": 1}
    assert len(questions) == 1
    assert [supervised(example, tokenizer) for example in questions[0]] == list(choices)
    model = random_model("llama").eval()
    nll, _, _ = common.score(model, questions[0], 2, "fp32")
    assert -nll == pytest.approx([-own_nll(model, e) for e in questions[0]], rel=1e-5)
    with pytest.raises(UserError, match="is no multiple-choice row"):
        data.encode_choices(
            [Row((), "text", file="f", number=1)], data.with_template(tokenizer, "plain"), 40
        )
