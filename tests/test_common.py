"""Data, masks, batches, loss, schedules, run folder and snapshots of common.py."""
import argparse
import importlib
import json
import math

import datasets
import numpy as np
import pytest
import torch
import transformers

import common
import sftmix
from common import Row, UserError
from conftest import ARCHITECTURES, random_model

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA = ("{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")
NO_SYSTEM = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
             "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")
DROPS_HISTORY = "{% for m in messages[-1:] %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


def chat_tokenizer(template, extra=()):
    tokenizer = common.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.chat_template = template
    return tokenizer


def supervised(example, tokenizer):
    return tokenizer.decode(example.ids[example.start:].tolist())


def context(example, tokenizer):
    return tokenizer.decode(example.ids[:example.start].tolist())


def one(row, tokenizer, template="alpaca", max_length=2048):
    examples, dropped = common.encode([row], tokenizer, template, max_length)
    assert not dropped
    return examples[0]


# ---------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("record, messages, extra, response", [
    ({"instruction": "i", "input": "x", "output": "o"}, (("user", "i"),), "x", "o"),
    ({"instruction": "i", "input": None, "output": 7}, (("user", "i"),), "", "7"),
    ({"instruction": "i", "context": "c", "response": "r", "category": "qa"}, (("user", "i"),), "c", "r"),
    ({"prompt": "p", "completion": "c"}, (("user", "p"),), "", "c"),
    ({"prompt": "p", "response": "r"}, (("user", "p"),), "", "r"),
    ({"question": "q", "answer": "a"}, (("user", "q"),), "", "a"),
    ({"Question": "q", "Best Answer": "b", "Source": "s"}, (("user", "q"),), "", "b"),
    ({"query": "q", "answer": "a"}, (("user", "q"),), "", "a"),
    ({"problem": "q", "solution": "a", "messages": None}, (("user", "q"),), "", "a"),
    ({"text": "plain"}, (), "", "plain"),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
     (("system", "s"), ("user", "u")), "", "a"),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, (("user", "u"),), "", "a"),
    ({"system": "SYSTEM: be kind", "chat": "USER: u\n\n\nASSISTANT: a <|endoftext|>\n"}, (("system", "be kind"), ("user", "u")), "", "a"),
    ({"QUESTION": "q", "CONTEXTS": ["c1", "c2"], "LONG_ANSWER": "l", "final_decision": "yes"}, (("user", "q"),), "c1\nc2", "l"),
    ({"question": "q", "context": {"contexts": ["c"]}, "long_answer": "l"}, (("user", "q"),), "c", "l"),
    ({"context": "c", "question": "q", "ans0": "x", "ans1": "y", "ans2": "z", "label": 1}, (("user", "c\nq"),), "", "y"),
    ({"question": "q", "mc1_targets": {"good": 1, "bad": 0}, "mc2_targets": {}}, (("user", "q"),), "", "good"),
    ({"question": "q", "mc1_targets": {"choices": ["bad", "good"], "labels": [0, 1]}}, (("user", "q"),), "", "good"),
    ({"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"}, (("user", "q"),), "", "y"),
    ({"question": "q", "opa": "x", "opb": "y", "opc": "z", "opd": "w", "cop": 2}, (("user", "q"),), "", "z"),
    ({"question": "q", "choices": ["x", "y"], "answer": 0, "subject": "s"}, (("user", "q"),), "", "x"),
    ({"ctx": "c", "endings": ["x", "y"], "label": "1"}, (("user", "c"),), "", "y"),
])
def test_schemas(record, messages, extra, response):
    row, = common.rows_from_record(record)
    assert (row.messages, row.input, row.response) == (messages, extra, response)
    if row.choices:
        assert row.choices[row.answer] == response


def test_dialogue_is_one_row_per_assistant_turn():
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("tool", "5"), ("assistant", "6"), ("user", "7")]
    rows = common.rows_from_record({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert [row.response for row in rows] == ["2", "4", "6"]
    assert rows[1].messages == (("user", "1"), ("assistant", "2"), ("user", "3"))


def test_unknown_schema_names_file_row_and_keys():
    with pytest.raises(UserError, match=r"f.jsonl, row 7: keys \['a', 'b'\] fit no known schema; accepted are instruction"):
        common.rows_from_record({"a": 1, "b": 2}, "f.jsonl", 7)
    with pytest.raises(UserError, match="f.jsonl, row 2: unknown role 'narrator'"):
        common.rows_from_record({"messages": [{"role": "narrator", "content": "x"}]}, "f.jsonl", 2)
    with pytest.raises(UserError, match="f.jsonl, row 3: right answer 4 of only 2 choices"):
        common.rows_from_record({"question": "q", "choices": ["x", "y"], "answer": 4}, "f.jsonl", 3)


# ---------------------------------------------------------------------------------------------------- loading


RECORDS = [{"instruction": f"do {i}", "input": "", "output": f"done {i}"} for i in range(10)]


def test_file_types_and_folder_give_the_same_rows(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    table = datasets.Dataset.from_list(RECORDS)
    files = {kind: str(tmp_path / f"rows.{kind}") for kind in ("jsonl", "json", "parquet", "csv")}
    table.to_parquet(files["parquet"]), table.to_csv(files["csv"])
    open(files["json"], "w").write(json.dumps(RECORDS))
    open(files["jsonl"], "w").write("\n".join(map(json.dumps, RECORDS)))
    table.select(range(6)).to_parquet(str(folder / "a.parquet"))
    open(folder / "b.jsonl", "w").write("\n".join(map(json.dumps, RECORDS[6:])))
    prints = {common.fingerprint(common.load_data([file])) for file in [*files.values(), str(folder)]}
    assert len(prints) == 1
    assert [d.label for d in common.load_data([files["csv"], str(folder), f"mine={files['json']}"])] == ["rows", "data", "mine"]


def test_line_separators_inside_strings(write_jsonl):
    text = "a\u2028b\u2029c\u0085d"
    rows = common.load_data([write_jsonl("x.jsonl", [{"prompt": "p", "completion": text}])])[0].rows
    assert rows[0].response == text


def test_csv_keeps_words_that_look_missing(tmp_path):
    (tmp_path / "x.csv").write_text("question,answer\nq1,NA\nq2,null\n")
    assert [row.response for row in common.load_data([str(tmp_path / "x.csv")])[0].rows] == ["NA", "null"]


def test_subset_is_seeded_and_in_order(write_jsonl):
    path = write_jsonl("x.jsonl", RECORDS)
    pick = lambda seed: [row.number for row in common.load_data([f"{path}#4"], seed=seed)[0].rows]  # noqa: E731
    assert pick(0) == pick(0) == sorted(pick(0)) and len({tuple(pick(seed)) for seed in range(5)}) > 1
    with pytest.raises(UserError, match="asks for 11 rows of 10"):
        common.load_data([f"{path}#11"])


def test_empty_responses_are_left_out_and_counted(write_jsonl):
    path = write_jsonl("x.jsonl", [*RECORDS, {"instruction": "i", "output": " \n"}, {"instruction": "i", "input": "x", "output": None}])
    dataset, = common.load_data([path])
    assert len(dataset.rows) == 10 and dataset.dropped == {"empty response": 2}
    with pytest.raises(UserError, match="has no row with a response"):
        common.load_data([write_jsonl("empty.jsonl", [{"instruction": "i", "output": ""}])])


def test_source_column_splits_a_file(write_jsonl):
    path = write_jsonl("x.jsonl", [{"prompt": "p", "completion": "c", "source": name} for name in "abab"])
    assert [(d.label, len(d.rows)) for d in common.load_data([path], "source")] == [("a", 2), ("b", 2)]
    assert [d.label for d in common.load_data([f"m={path}"], "source")] == ["m/a", "m/b"]
    with pytest.raises(UserError, match=r"x.jsonl, row 1: no column 'origin' to split by; keys \['completion', 'prompt', 'source'\]"):
        common.load_data([path], "origin")


@pytest.mark.parametrize("content, message", [
    ('{"prompt": "p", "completion": "c"}\n{"prompt": "p", \n', "bad.jsonl, row 2: not JSON"),
    ('{"prompt": "p", "completion": "c"}\n[1]\n', "bad.jsonl, row 2: expected an object"),
    ("", "bad.jsonl: the file is empty"),
    ('{"prompt": "p", "completion": "c"}\n{"a": 1}\n', "bad.jsonl, row 2: keys"),
])
def test_bad_files_are_named_with_their_row(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        common.load_data([str(tmp_path / "bad.jsonl")])


def test_labels_of_toy():
    assert [d.label for d in common.load_data(["toy/copy#3", "mine=toy/add#3", "all=toy/copy#2"])] == ["copy", "mine", "all"]
    assert [d.label for d in common.load_data(["my=toy#200"])][:2] == ["my/describe", "my/copy"]


def test_bad_specs(tmp_path, write_jsonl):
    path = write_jsonl("x.jsonl", RECORDS)
    (tmp_path / "none").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for spec, message in ((f"{path}#0", "expected"), (f"{path}#x", "expected"), ("", "expected"), (str(tmp_path / "none"), "holds no"),
                          (str(tmp_path / "notes.txt"), "unknown file type"), ("unknown", "aliases are toy, alpaca"), ("./x.jsonl", "no such file")):
        with pytest.raises(UserError, match=message):
            common.load_data([spec])
    with pytest.raises(UserError, match="two datasets are called 'x'"):
        common.load_data([path, path])


def test_hub_code_on_a_local_repository(tmp_path, monkeypatch):
    """The alias table and the hub loader, on a folder laid out as a hub repository (config, split, source column)."""
    repo = tmp_path / "repo"
    (repo / "data").mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}"}], "dataset": "xy"[i % 2]} for i in range(6)]
    datasets.Dataset.from_list(rows).to_parquet(str(repo / "data" / "part.parquet"))
    (repo / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train_sft\n    path: data/*.parquet\n---\n")
    source = common.HubSource(str(repo), config="main", split="train_sft", source_column="dataset")
    monkeypatch.setitem(common.ALIASES, "mixture", [source])
    monkeypatch.setitem(common.ALIASES, "stream", [common.HubSource(str(repo), config="main", split="train_sft", stream=True)])
    assert [(d.label, len(d.rows)) for d in common.load_data(["mixture"])] == [("x", 3), ("y", 3)]
    assert [row.response for row in common.load_data(["stream#2"])[0].rows] == ["a0", "a1"]  # the head of a stream
    datasets.Dataset.from_list(rows[:1]).to_parquet(str(repo / "held_out.parquet"))
    (repo / "README.md").write_text("---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train_sft\n    path: data/*.parquet\n"
                                    "  - split: test\n    path: held_out.parquet\n---\n")
    monkeypatch.setitem(common.ALIASES, "both", [common.HubSource(str(repo), config="main", split="train_sft", eval_split="test")])
    assert [len(common.load_data(["both"], split=split)[0].rows) for split in ("train", "eval")] == [6, 1]
    monkeypatch.setitem(common.ALIASES, "absent", [common.HubSource(str(repo), config="main", split="dev")])
    with pytest.raises(UserError, match="split dev, from the Hugging Face hub"):
        common.load_data(["absent"])


def test_aliases_cover_the_papers():
    assert {"alpaca", "ultrachat", "medalpaca", "tulu2", "tulu3", "gsm8k", "numinamath", "code_feedback", "medical_flashcards", "glaive",
            "fineweb", "wikipedia", "tinymmlu", "tinyhellaswag", "pubmedqa", "medqa", "medmcqa", "truthfulqa"} <= set(common.ALIASES)


def test_toy_tasks_are_right_and_disjoint():
    train, held_out = common.toy_rows(), common.toy_rows(split="eval")
    assert len({task for task, _ in train}) == 7 and len(train) == 2000
    assert not {(r.messages, r.input) for _, r in train} & {(r.messages, r.input) for _, r in held_out}
    for task, row in train:
        if task == "add":
            assert eval(row.input) == int(row.response)
        if task == "reverse":
            assert row.input[::-1] == row.response
        if task == "sort":
            assert sorted(row.input.split()) == row.response.split()


# ---------------------------------------------------------------------------------------------------- templates and masks


def test_alpaca_prompt(tokenizer):
    example = one(Row((("user", "Add."),), "3", "1 2"), tokenizer)
    assert context(example, tokenizer) == ("<s>Below is an instruction that describes a task, paired with an input that provides further "
                                           "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
                                           "### Input:\n1 2\n\n### Response:")
    assert supervised(example, tokenizer) == "3</s>"
    example = one(Row((("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Bye.")), "Bye!"), tokenizer)
    assert context(example, tokenizer) == ("<s>Be kind.\n\n### Instruction:\nHi.\n\n### Response:Hello.\n\n### Instruction:\nBye.\n\n### Response:")


@pytest.mark.parametrize("template, chat", [("alpaca", None), ("plain", None), ("chat", LLAMA), ("chat", CHATML), ("chat", NO_SYSTEM)])
def test_only_the_response_and_one_eos_are_supervised(template, chat):
    tokenizer = chat_tokenizer(chat, ["<|im_start|>", "<|im_end|>", "<end_of_turn>"]) if chat else common.tiny_tokenizer()
    rows = [Row((("system", "sys"), ("user", "ask")), f"answer {i}", "more") for i in range(3)]
    for i, example in enumerate(common.encode(rows, tokenizer, template, 2048)[0]):
        ids = example.ids.tolist()
        text = supervised(example, tokenizer)
        assert text in (f"answer {i}</s>", f"answer {i}<|im_end|></s>", f"answer {i}<end_of_turn></s>")
        assert ids[example.start:].count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.bos_token_id) == (0 if chat == CHATML else 1)
        assert "ask" in context(example, tokenizer) and "sys" in context(example, tokenizer)


def test_chat_template_that_moves_the_boundary_is_an_error():
    row = Row((("user", "ask"),), "answer", file="f.jsonl", number=3)
    with pytest.raises(UserError, match="f.jsonl, row 3: the chat template changes the prompt.*--template alpaca"):
        common.encode([row], chat_tokenizer(DROPS_HISTORY), "chat", 100)


def test_template_choice(tokenizer):
    assert common.pick_template("auto", tokenizer) == "alpaca" and common.pick_template("auto", chat_tokenizer(LLAMA)) == "chat"
    with pytest.raises(UserError, match="has no chat template"):
        common.pick_template("chat", tokenizer)


def test_plain_text_rows_supervise_everything(tokenizer):
    example = one(Row((), "some text"), tokenizer)
    assert context(example, tokenizer) == "<s>" and supervised(example, tokenizer) == "some text</s>"


def test_special_tokens_written_in_data_are_text(tokenizer):
    example = one(Row((("user", "What does </s> mean?"),), "It ends: </s>"), tokenizer)
    assert example.ids.tolist().count(tokenizer.eos_token_id) == 1
    assert supervised(example, tokenizer) == "It ends: </s></s>"
    chat = chat_tokenizer(LLAMA)
    examples, dropped = common.encode([Row((("user", "u"),), "It ends: </s> so")], chat, "chat", 100)
    assert not examples and dropped == {"end token inside the response": 1}


def test_pad_equal_to_eos_is_harmless():
    tokenizer = common.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    examples, _ = common.encode([Row((("user", "u"),), "a"), Row((("user", "u"),), "longer answer")], tokenizer, "plain", 100)
    batch = common.collate(examples, "cpu")
    assert batch.targets.tolist() == [*examples[0].ids[examples[0].start:], *examples[1].ids[examples[1].start:]]
    assert (batch.targets == tokenizer.eos_token_id).sum() == 2
    flat = batch.ids.reshape(-1)
    assert torch.equal(flat[batch.positions + 1], batch.targets)  # a position predicts the token after it


def test_truncation_keeps_a_response_or_drops_the_row(tokenizer, capsys):
    rows = [Row((("user", "u" * 30),), "r" * 30), Row((("user", "u" * 80),), "r"), Row((("user", "u"),), "r")]
    examples, dropped = common.encode(rows, tokenizer, "plain", 40)
    assert dropped == {"prompt fills max_length": 1} and [example.row for example in examples] == [0, 2]
    assert len(examples[0].ids) == 40 and supervised(examples[0], tokenizer) == "r" * 8  # cut: no EOS is taught here
    common.encode_datasets([common.Dataset("mine", rows, {"empty response": 2})], tokenizer, "plain", 40)
    assert "mine: 2 examples" in (out := capsys.readouterr().out) and "left out 2 (empty response), left out 1 (prompt fills" in out
    with pytest.raises(UserError, match="'mine': no example is left at --max_length 3"):
        common.encode_datasets([common.Dataset("mine", rows)], tokenizer, "plain", 3)


def test_boundary_with_a_tokenizer_that_merges_across_it():
    """A BPE whose merges join the prompt's last and the response's first character: the response is tokenised apart."""
    from tokenizers import Tokenizer, models
    vocab = {token: i for i, token in enumerate(["a", "b", "\n", "\nb", "</s>"])}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [("\n", "b")])), eos_token="</s>")
    example = one(Row((("user", "a"),), "ba"), tokenizer, "plain")
    assert tokenizer.convert_ids_to_tokens(example.ids.tolist()) == ["a", "\n", "b", "a", "</s>"] and example.start == 2


def test_tokenizer_round_trip(tmp_path, tokenizer):
    text = "Zażółć 日本 \U0001f600\n\t end"
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, again):
        ids = each(text).input_ids
        assert ids[0] == each.bos_token_id and each.decode(ids, skip_special_tokens=True) == text
        assert len({each.bos_token_id, each.eos_token_id, each.pad_token_id}) == 3


def test_show_examples_marks_the_supervised_tokens(tokenizer, capsys):
    common.show_examples([one(Row((("user", "u"),), "ab"), tokenizer, "plain")], tokenizer)
    assert "<s>u\n⟦a⟧⟦b⟧⟦</s>⟧" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- model and loss


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_head_is_the_models_own(name):
    common.check_head(random_model(name), torch.device("cpu"))


def test_unknown_head_is_an_error(monkeypatch):
    model = random_model("gemma2")
    monkeypatch.setattr(common, "output_head", lambda model: common.Head(model.get_output_embeddings().weight))  # forgets the cap
    with pytest.raises(UserError, match="head is not supported"):
        common.check_head(model, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale, softcap, bias", [(1.0, None, False), (0.3, 5.0, True)])
def test_response_loss_equals_torch(monkeypatch, dtype, scale, softcap, bias):
    monkeypatch.setattr(common, "chunk_rows", lambda vocabulary, device: 5)
    rng = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(*shape, generator=rng, dtype=dtype) for shape in ((17, 6), (13, 6), (13,)))
    targets = torch.randint(0, 13, (17,), generator=rng)
    inputs = [[t.clone().requires_grad_() for t in (hidden, weight, b)] for _ in range(2)]
    loss, nll = common.response_loss(inputs[0][0], targets, common.Head(inputs[0][1], inputs[0][2] if bias else None, scale, softcap))
    logits = (inputs[1][0] @ inputs[1][1].T + (inputs[1][2] if bias else 0)) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    exact = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (loss / 7).backward()
    (exact.sum() / 7).backward()
    limit = 1e-9 if dtype == torch.float64 else 1e-5
    assert (nll - exact).abs().max() < limit and not nll.requires_grad
    for one_, other in zip(*inputs):
        assert (one_.grad is None and other.grad is None) or (one_.grad - other.grad).abs().max() < limit


def test_no_gradient_work_under_no_grad(monkeypatch):
    calls = []
    product = common._product
    monkeypatch.setattr(common, "_product", lambda a, b: calls.append(1) or product(a, b))
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        loss, _ = common.response_loss(hidden, torch.zeros(4, dtype=torch.long), common.Head(weight))
    assert len(calls) == 1 and not loss.requires_grad
    frozen, _ = common.response_loss(hidden, torch.zeros(4, dtype=torch.long), common.Head(weight.detach()))
    frozen.backward()
    assert hidden.grad is not None


def test_lora_with_checkpointing_gets_gradients(tokenizer):
    model, _ = common.load_model("tiny", torch.device("cpu"), lora_rank=2, gradient_checkpointing=True)
    example = one(Row((("user", "u"),), "answer"), tokenizer)
    common.check_gradients(model, example, torch.device("cpu"), "fp32")
    assert all(p.grad is None for p in model.parameters())
    cut = common.tiny_model()
    cut.transformer.h[1].register_forward_hook(lambda module, inputs, output: output.detach() if torch.is_tensor(output) else (output[0].detach(), *output[1:]))
    with pytest.raises(UserError, match="get no gradient"):
        common.check_gradients(cut, example, torch.device("cpu"), "fp32")


def test_score_is_that_of_unpadded_examples(tokenizer):
    model = random_model("llama")
    examples, _ = common.encode([row for _, row in common.toy_rows()[::150]], tokenizer, "alpaca", 512)
    model.train()
    nll, tokens, correct = common.score(model, examples, 4, torch.device("cpu"), "fp32")
    assert model.training
    for i, example in enumerate(examples):
        ids = torch.from_numpy(example.ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()[example.start - 1:-1]
        exact = torch.nn.functional.cross_entropy(logits, ids[0, example.start:], reduction="sum").item()
        assert nll[i] == pytest.approx(exact, rel=1e-5) and tokens[i] == example.response_tokens
        assert correct[i] == (logits.argmax(1) == ids[0, example.start:]).sum()
    sets = common.evaluate(model, {"toy": examples}, 3, torch.device("cpu"), "fp32", progress=False)["toy"]
    assert sets["nll"] == pytest.approx(nll.sum() / tokens.sum(), rel=1e-6) and sets["ppl"] == pytest.approx(math.exp(sets["nll"]))


def test_choices_are_scored_without_the_end_token(tokenizer):
    """Against the model's own logits, choice by choice; a question with a choice that does not fit is left out."""
    rows = [Row((("user", "Which?"),), "b", choices=("aa", "b", "ccc"), answer=1), Row((("user", "Which?"),), "d", choices=("d", "e" * 60), answer=0)]
    questions, dropped = common.encode_choices(rows, tokenizer, "plain", 40)
    assert dropped == {"a choice does not fit": 1} and [supervised(example, tokenizer) for example in questions[0]] == ["aa", "b", "ccc"]
    model = random_model("llama").eval()
    scores, = common.choose(model, questions, 2, torch.device("cpu"), "fp32")
    for example, value in zip(questions[0], scores):
        ids = torch.from_numpy(example.ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()[example.start - 1:-1]
        assert value == pytest.approx(-torch.nn.functional.cross_entropy(logits, ids[0, example.start:], reduction="sum").item(), rel=1e-5)
    with pytest.raises(UserError, match="is no multiple-choice row"):
        common.encode_choices([Row((), "text", file="f", number=1)], tokenizer, "plain", 40)


# ---------------------------------------------------------------------------------------------------- batches


def test_epoch_batches_cover_everything_once_and_differ_by_epoch():
    lengths = np.random.default_rng(0).integers(1, 500, 1003)
    epochs = [common.epoch_batches(lengths, 32, seed=3, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
        assert max(map(len, batches)) <= 32 and min(map(len, batches)) >= 31
    assert any(set(a) != set(b) for a, b in zip(*epochs))
    again = common.epoch_batches(lengths, 32, seed=3, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(again, epochs[0]))


def test_data_order_ignores_the_models_rng():
    first = common.epoch_batches(np.arange(50), 8, 0, 0)
    torch.manual_seed(99), np.random.seed(99)
    assert all(np.array_equal(a, b) for a, b in zip(first, common.epoch_batches(np.arange(50), 8, 0, 0)))


def test_length_grouping_saves_padding():
    lengths = np.random.default_rng(0).integers(20, 500, 4000)
    efficiency = lambda batches: lengths.sum() / sum(len(b) * lengths[b].max() for b in batches)  # noqa: E731
    plain = np.array_split(np.random.default_rng(1).permutation(4000), 500)
    assert efficiency(plain) < 0.65 < 0.9 < efficiency(common.epoch_batches(lengths, 8, 0, 0))


def test_length_groups_leave_batches_mixed():
    """Micro-batches are of one length, optimizer batches of all lengths: their mean lengths spread little."""
    lengths = np.random.default_rng(0).integers(20, 500, 4000)
    batches = common.epoch_batches(lengths, 64, 0, 0)
    micros = [part for batch in batches for part in common.micro_batches(batch.tolist(), lengths[batch], 8)]
    assert lengths.sum() / sum(len(part) * lengths[part].max() for part in micros) > 0.9
    means = np.array([lengths[batch].mean() for batch in batches])
    assert means.std() < 1.3 * lengths.std() / np.sqrt(64 / common.LENGTH_GROUP)  # as if 8 groups were drawn independently
    assert sorted(np.concatenate(batches).tolist()) == list(range(4000))


def test_mixture_sampler_passes_through_every_dataset_without_replacement():
    sizes, lengths = [30, 7, 1], np.full(38, 50)  # of one length: batches keep the order of the draws
    sampler = common.MixtureSampler(sizes, lengths, 8, seed=1)
    drawn = [sampler.batches([0.5, 0.3, 0.2], step)[0] for step in range(20)]
    assert [len(batch) for batch in drawn] == [8] * 20
    flat = np.concatenate(drawn)
    assert sampler.drawn.tolist() == [(flat < 30).sum(), ((flat >= 30) & (flat < 37)).sum(), (flat == 37).sum()]
    for start, size in ((0, 30), (30, 7)):
        counts = np.bincount(flat[(flat >= start) & (flat < start + size)] - start, minlength=size)
        assert counts.max() - counts.min() <= 1  # nothing comes again before its dataset has been passed through
    own = flat[(flat >= 30) & (flat < 37)]
    assert own[:7].tolist() != own[7:14].tolist() and sorted(own[:7]) == sorted(own[7:14])  # reshuffled for each pass
    again = common.MixtureSampler(sizes, lengths, 8, seed=1)  # `drawn` is the whole state
    for step in range(10):
        again.batches([0.5, 0.3, 0.2], step)
    other = common.MixtureSampler(sizes, lengths, 8, seed=1)
    other.drawn[:] = again.drawn
    assert all(np.array_equal(other.batches([0.5, 0.3, 0.2], step)[0], drawn[step]) for step in range(10, 20))


def test_mixture_sampler_draws_the_target_share():
    sampler = common.MixtureSampler([100, 200, 50], np.ones(350, int), 1000, seed=0)
    sampler.batches([0.1, 0.2, 0.7], 0, steps=20)
    assert np.abs(sampler.drawn / 20000 - [0.1, 0.2, 0.7]).max() < 4 * np.sqrt(0.25 / 20000)
    sampler.batches([0.0, 1.0, 0.0], 20)
    assert sampler.drawn.sum() == 21000


def test_ranks_share_a_batch():
    batch = np.arange(11)
    parts = [common.rank_slice(batch, rank, 3) for rank in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(11))


# ---------------------------------------------------------------------------------------------------- optimisation, run folder


def test_learning_rate_by_hand():
    rate = lambda step, schedule: common.learning_rate(step, 10, 1.0, schedule, 0.2)  # noqa: E731
    assert [rate(0, "linear"), rate(1, "linear"), rate(2, "linear"), rate(6, "linear")] == [0.5, 1.0, 1.0, 0.5]
    assert rate(6, "cosine") == pytest.approx(0.5) and rate(9, "constant") == 1.0 and 0 < rate(9, "cosine") < 0.05
    assert common.learning_rate(0, 10, 1.0, "cosine", 0.0) == 1.0


def test_only_matrices_decay():
    model = common.tiny_model()
    groups = common.make_optimizer(model, 1e-3, 0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])


def test_diverged_step_is_an_error_and_updates_nothing():
    model = common.tiny_model()
    optimizer = common.make_optimizer(model, 1e-3, 0.1)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match="diverged"):
        common.optimizer_step(model, optimizer, 1e-3, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def train_step(model, optimizer, examples):
    batch = common.collate(examples, "cpu")
    loss, _ = common.response_loss(batch.select(common.hidden_states(model, batch.ids)), batch.targets, common.output_head(model))
    (loss / len(batch.targets)).backward()
    common.optimizer_step(model, optimizer, 1e-3, 1.0)


@pytest.mark.parametrize("warm", [0, 3])
def test_snapshot_leaves_no_trace(tokenizer, warm):
    """Steps tried and undone change nothing: parameters, moments, step count, learning rate, RNG, mode, gradients."""
    examples, _ = common.encode([row for _, row in common.toy_rows()[::250]], tokenizer, "plain", 512)
    model = common.tiny_model()
    optimizer = common.make_optimizer(model, 1e-3, 0.1)
    for _ in range(warm):
        train_step(model, optimizer, examples)
    weights = [p.detach().clone() for p in model.parameters()]
    state = json.dumps(optimizer.state_dict(), default=lambda t: t.double().sum().item() if torch.is_tensor(t) else str(t))
    snapshot, rng = common.Snapshot(model, optimizer), torch.get_rng_state()
    for _ in range(2):
        model.eval()
        torch.rand(3)
        train_step(model, optimizer, examples[:3])
        assert not all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
        snapshot.restore()
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
        assert state == json.dumps(optimizer.state_dict(), default=lambda t: t.double().sum().item() if torch.is_tensor(t) else str(t))
        assert torch.equal(rng, torch.get_rng_state()) and model.training and all(p.grad is None for p in model.parameters())


def test_half_written_files_are_never_seen(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    common.write_text(path, "old")
    monkeypatch.setattr(common.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        common.write_text(path, "new")
    assert path.read_text() == "old"


def test_tensorboard_hint(tmp_path, monkeypatch, capsys):
    import builtins
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError()) if name == "wandb" else real(name, *a, **k))
    with pytest.raises(SystemExit):
        sftmix.main(["--data", "toy#20", "--max_steps", "5", "--track", "wandb", "--output_dir", str(tmp_path / "run")])
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: --track wandb needs: pip install wandb"
    assert not (tmp_path / "run").exists()


def shared_flags(parser):
    group = argparse.ArgumentParser(add_help=False)
    common.add_shared_flags(group)
    names = [action.dest for action in group._actions]
    return {action.dest: (action.option_strings, action.help) for action in parser._actions if action.dest in names}


SHARED_FLAGS = """model data eval_data source_column template max_length show_batch epochs max_steps batch_size micro_batch_size lr
    weight_decay schedule warmup_ratio max_grad_norm dtype gradient_checkpointing lora_rank lora_alpha lora_dropout seed output_dir
    resume log_every eval_every save_every track""".split()


def test_shared_flags_are_complete_and_explained():
    flags = shared_flags(common.add_shared_flags(argparse.ArgumentParser(add_help=False)))
    assert set(flags) == set(SHARED_FLAGS) and all(text for _, text in flags.values())


@pytest.mark.parametrize("script", ["sftmix", "dynamix_sft", "dynamics"])
def test_shared_flags_are_the_same_in_every_script(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    for name, (options, text) in shared_flags(common.add_shared_flags(argparse.ArgumentParser(add_help=False))).items():
        assert options[0] in shown and "".join(text.replace("%%", "%").split()) in shown, name
