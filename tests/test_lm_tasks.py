"""Multiple choice by lm-eval's definitions over local rows: columns, prompts, shots, numbers."""

import json
import runpy
from pathlib import Path

import datasets
import pytest
import torch
from conftest import random_model

import common
import eval as evaluation
import lm_tasks
from common import UserError
from test_eval import fails, lines, medqa_rows, run, truthful_rows

lm_eval = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")


def bbq_rows(count):
    """Rows in the columns of BBQ; the right answer cycles, the third is that it is not known."""
    answers = {"ans0": "the older man", "ans1": "the younger man", "ans2": "Not known"}
    info = {"ans0": ["old", "old"], "ans1": ["nonOld", "nonOld"], "ans2": ["unknown", "unknown"]}
    rows = []
    for i in range(count):
        row = {"context": f"Two men met on day {i}.", "question": f"Who forgot {i}?", **answers}
        row |= {"answer_info": info, "label": i % 3, "category": "Age", "question_polarity": "neg"}
        row["context_condition"] = ("ambig", "disambig")[i % 2]
        row["additional_metadata"] = {"subcategory": "None", "stereotyped_groups": ["old"]}
        rows.append(row)
    return rows


def pubmedqa_rows(count):
    rows = []
    for i in range(count):
        row = {"QUESTION": f"Does it help {i}?", "CONTEXTS": ["First.", f"Then {i}."]}
        row |= {"LONG_ANSWER": "It may.", "final_decision": ("yes", "no", "maybe")[i % 3]}
        rows.append(row)
    return rows


def medmcqa_rows(count):
    rows = []
    for i in range(count):
        options = {f"op{letter}": f"drug {i}{letter}" for letter in "abcd"}
        rows.append({"question": f"Which drug for {i}?", **options, "cop": i % 4})
    return rows


ROWS = {
    "medqa": medqa_rows(8),
    "medqa5": medqa_rows(8, "ABCDE"),
    "medmcqa": medmcqa_rows(8),
    "pubmedqa": pubmedqa_rows(8),
    "bbq": bbq_rows(6),
    "truthfulqa_mc1": truthful_rows(5),
    "truthfulqa_mc2": truthful_rows(5),
    "mine": [{"question": f"{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(6)],
}


@pytest.fixture()
def specs(write_jsonl):
    """--tasks arguments over ROWS."""
    return [f"{name}={write_jsonl(name + '.jsonl', rows)}" for name, rows in ROWS.items()]


def read(name, record):
    return lm_tasks.local_record(name, "file.jsonl", 4, record)


def test_official_and_rehosted_columns_are_the_same_question():
    official = {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2}
    options = {"A": "w", "B": "x", "C": "y", "D": "z"}
    hosted = {"question": "Q?", "options": options, "answer_idx": "C", "answer": "y"}
    assert read("medmcqa", official | {"exp": "because y"}) == official
    assert read("medmcqa", hosted | {"realidx": "1"}) == official
    ends = {"ending0": "w", "ending1": "x", "ending2": "y", "ending3": "z"}
    swag = {"sent1": "Q?", **ends, "label": 2}
    assert read("medqa", hosted) == read("medqa", swag | {"id": "1", "sent2": ""}) == swag
    listed = {"question": "Q?", "choices": ["w", "x", "y", "z"], "answer": 2}
    assert read("mine", hosted) == read("mine", official) == read("mine", listed) == listed
    contexts, decision = ["First.", "Second."], {"final_decision": "maybe"}
    github = {"QUESTION": "Does it?", "CONTEXTS": contexts}
    hub = {"question": "Does it?", "context": {"contexts": contexts, "labels": ["A", "B"]}}
    for row in (github, hub | {"pubid": 1, "long_answer": "Perhaps."}):
        assert read("pubmedqa", row | decision) == github | decision
    keys = {"question": "What?", "mc2_targets": {"f": 0, "t": 1, "u": 1, "of another row": None}}
    both = {"choices": ["t", "u", "f"], "labels": [1, 1, 0]}
    assert read("truthfulqa_mc2", keys) == {"question": "What?", "mc2_targets": both}


def test_wrong_rows_name_file_and_row():
    choices = {"question": "Q?", "choices": ["a", "b"], "answer": "A"}
    for name, record, message in (
        ("medqa", medqa_rows(1, "ABCDE")[0], "has 5 options, medqa has 4; the five-option variant"),
        ("medqa5", medqa_rows(1)[0], "has 4 options, medqa5 has 5; the four-option variant"),
        ("pubmedqa", pubmedqa_rows(1)[0] | {"final_decision": "perhaps"}, "yes, no or maybe"),
        ("medmcqa", medmcqa_rows(1)[0] | {"cop": -1}, "right answer -1"),
        ("truthfulqa_mc2", {"question": "Q?"}, "is no row of truthfulqa_mc2"),
        ("truthfulqa_mc1", truthful_rows(1)[0] | {"mc1_targets": {"a": 0}}, "holds true (1) and"),
        ("bbq", choices, "is no row of bbq"),
        ("bbq", bbq_rows(1)[0] | {"ans2": "a third man"}, "one answer says that it is not known"),
        ("mine", {"question": "Q?", "answer": "A"}, "needs options"),
    ):
        with pytest.raises(UserError, match="file.jsonl, row 4") as error:
            read(name, record)
        assert message in str(error.value)


TRUTH = {  # what a question says -> its true options, by its number
    "Which sign": lambda i, prompt: [f" {'ABCDE'[i % (5 if 'E. ' in prompt else 4)]}"],
    "Which drug": lambda i, _: [f" {'ABCD'[i % 4]}"],
    "Does it help": lambda i, _: [f" {('yes', 'no', 'maybe')[i % 3]}"],
    "Who forgot": lambda i, _: [f" {('the older man', 'the younger man', 'Not known')[i % 3]}"],
    "is known about": lambda i, _: [f" true {i}", f" also true {i}"],
    "Question: ": lambda i, _: [f" {'AB'[i % 2]}"],
}


def by_truth(sign):
    """In place of HFLM.loglikelihood: the most for a true option where sign is 1, the least where
    it is -1."""

    def score(prompt, option):
        question = prompt.rsplit("\n\n", 1)[-1]
        number = int(question.split("?")[0].rsplit(" ", 1)[-1])
        kind = next(kind for kind in TRUTH if kind in question)
        return sign * 50.0 * (option in TRUTH[kind](number, question))

    return lambda self, requests, **_: [(score(*request.args), False) for request in requests]


@pytest.mark.parametrize("sign, value", [(1, 1.0), (-1, 0.0)])
def test_right_and_wrong_answers_score_one_and_zero(tmp_path, specs, monkeypatch, sign, value):
    monkeypatch.setattr(huggingface.HFLM, "loglikelihood", by_truth(sign))
    result = run(tmp_path / "run", "--tasks", *specs)["tiny"]
    assert set(result) == set(ROWS)  # our names
    for name, row in result.items():
        assert row["acc"] == pytest.approx(value, abs=1e-9), name
        assert row["n"] == len(ROWS[name])
        assert row["acc_low"] <= row["acc"] <= row["acc_high"]
    assert result["bbq"]["accuracy_amb"] == result["bbq"]["accuracy_disamb"] == value
    assert "nan" not in (tmp_path / "run" / "results.json").read_text().lower()
    rounds = {name: (row["rounds"], row["shots"]) for name, row in result.items()}
    medical = dict.fromkeys(("medqa", "medqa5", "medmcqa", "pubmedqa", "mine"), (3, 3))
    assert rounds == medical | dict.fromkeys(set(ROWS) - set(medical), (1, 0))
    assert result["medqa"]["acc_std"] == 0.0


def test_rounds_have_other_shots_and_no_question_its_own(tmp_path, specs, monkeypatch):
    monkeypatch.setattr(huggingface.HFLM, "loglikelihood", by_truth(1))
    run(tmp_path / "run", "--tasks", *specs, "--shots", "2")
    run(tmp_path / "again", "--tasks", *specs, "--shots", "2")
    run(tmp_path / "seed", "--tasks", *specs, "--shots", "2", "--seed", "1")
    folder = Path("predictions") / "tiny"
    for name in ROWS:
        rows = lines(tmp_path / "run" / folder / f"{name}.jsonl")
        assert len(rows) == 3 * len(ROWS[name])
        by_round = [[row["prompt"] for row in rows if row["round"] == i] for i in range(3)]
        assert len({tuple(prompts) for prompts in by_round}) == 3
        for prompt in sum(by_round, []):
            question = prompt.rsplit("\n\n", 1)[-1]
            assert question not in prompt.removesuffix(question)
        same = lines(tmp_path / "again" / folder / f"{name}.jsonl")
        assert same == rows
        other = lines(tmp_path / "seed" / folder / f"{name}.jsonl")
        assert [row["prompt"] for row in other] != [row["prompt"] for row in rows]


def test_shots_come_from_the_second_file(tmp_path, write_jsonl, monkeypatch, capsys):
    monkeypatch.setattr(huggingface.HFLM, "loglikelihood", by_truth(1))
    test, solved = write_jsonl("test.jsonl", medqa_rows(4)), medqa_rows(9)[4:]
    solved = [{**row, "question": f"T {row['question']}"} for row in solved]
    train = write_jsonl("train.jsonl", solved)
    run(tmp_path / "run", f"--tasks medqa={test},{train}")
    for row in lines(tmp_path / "run" / "predictions" / "tiny" / "medqa.jsonl"):
        assert row["prompt"].count("Question: T Which") == 3 and row["prompt"].count("Which") == 4
    assert "too few" in fails(capsys, tmp_path / "few", f"--tasks medqa={test} --shots 4")
    assert "too few" in fails(capsys, tmp_path / "few", f"--tasks medqa={test},{train} --shots 6")


def test_own_files_and_medqa5_are_asked_as_medqa(tmp_path, write_jsonl):
    """The definition for any number of options is lm-eval's of medqa where there are four."""
    rows = write_jsonl("rows.jsonl", medqa_rows(6))
    result = run(tmp_path / "run", f"--tasks medqa={rows} mine={rows}")["tiny"]
    medqa, mine = (lines(tmp_path / f"run/predictions/tiny/{n}.jsonl") for n in ("medqa", "mine"))
    for one, other in zip(medqa, mine, strict=True):
        assert one | {"task": "mine"} == other
    assert "A. sign 0A\nB. sign 0B\nC. sign 0C\nD. sign 0D\nAnswer:" in medqa[0]["prompt"]
    versions = [result[name].pop("versions") for name in ("medqa", "mine")]
    assert result["medqa"] == result["mine"]
    assert versions[0]["definitions"] != versions[1]["definitions"]


@pytest.mark.parametrize("name", ["medmcqa", "medqa5", "truthfulqa_mc2", "bbq"])
def test_numbers_are_those_of_lm_evals_own_command(tmp_path, write_jsonl, model_folder, name):
    """To the last digit: same rows, shots and prompts, by lm-eval on eval.py's definition file."""
    model = model_folder("llama")
    rows = write_jsonl("rows.jsonl", ROWS[name])
    flags = f"--model {model} --tasks {name}={rows} --rounds 1 --max_length 512 --batch_size 4"
    own = run(tmp_path / "run", flags)[model][name]
    task = str(tmp_path / "run" / "lm_eval" / f"{name}.yaml")
    how = {"model": "hf", "model_args": f"pretrained={model},dtype=float32,max_length=512"}
    theirs = lm_eval.simple_evaluate(tasks=[task], batch_size=4, device="cpu", **how)
    found = {key.split(",")[0]: value for key, value in theirs["results"][name].items()}
    for metric in ("acc", "acc_norm", "accuracy_amb"):
        assert own.get(metric) == found.get(metric)
    assert "acc" in own
    predictions = lines(next((tmp_path / "run" / "predictions").rglob(f"{name}.jsonl")))
    samples = theirs["samples"][name]
    for line, sample in zip(predictions, samples, strict=True):
        assert line["prompt"] == sample["arguments"][0][0]
        assert line["loglikelihood"] == [value for value, _ in sample["filtered_resps"]]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_log_likelihoods_equal_a_plain_computation(tmp_path, write_jsonl, name, tokenizer):
    """Every option alone, unpadded, through the whole model; the same for every batch size."""
    model, folder = random_model(name).eval(), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = ("bbq", "medqa5")
    tasks = [f"{task}={write_jsonl(f'{task}.jsonl', ROWS[task])}" for task in names]
    flags = ["--model", str(folder), "--tasks", *tasks, "--shots", "0"]
    one = run(tmp_path / "one", *flags, "--batch_size", "1")[str(folder)]
    many = run(tmp_path / "many", *flags, "--batch_size", "7")[str(folder)]
    for task in one:
        assert one[task]["acc"] == pytest.approx(many[task]["acc"], abs=1e-4)
        file = f"predictions/*/{task}.jsonl"
        both = [lines(next((tmp_path / size).rglob(file))) for size in ("one", "many")]
        for row, other in zip(*both, strict=True):
            assert row["loglikelihood"] == pytest.approx(other["loglikelihood"], abs=1e-4)
            prompt = tokenizer(row["prompt"]).input_ids
            for choice, value in zip(row["choices"], row["loglikelihood"], strict=True):
                ids = tokenizer(row["prompt"] + choice).input_ids
                with torch.no_grad():
                    logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
                places = range(len(prompt), len(ids))
                plain = sum(logits[t - 1, ids[t]].item() for t in places)
                assert value == pytest.approx(plain, abs=1e-5 * len(ids))


def test_prompts_that_are_cut_are_counted(tmp_path, write_jsonl):
    rows = medqa_rows(4) + [medqa_rows(1)[0] | {"question": "long " * 200}]
    flags = f"--tasks medqa={write_jsonl('rows.jsonl', rows)} --shots 0 --max_length 400"
    result = run(tmp_path / "run", flags)["tiny"]["medqa"]
    assert result["prompts_cut"] == 1 and result["n"] == 5


def test_a_model_that_learnt_one_letter(tmp_path, write_jsonl, tokenizer):
    """A few steps of training towards B: the accuracy is the share of rows whose answer is B."""
    model = common.tiny_model(0)
    rows = medqa_rows(12)
    texts = []
    for row in rows:
        listed = "".join(f"{key}. {value}\n" for key, value in row["options"].items())
        texts.append(f"Question: {row['question']}\n{listed}Answer: B")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(12):
        for text in texts:
            ids = torch.tensor([tokenizer(text).input_ids])
            logits = model(ids).logits[0, -2]
            torch.nn.functional.cross_entropy(logits[None], ids[0, -1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    flags = f"--model {name} --tasks medqa={write_jsonl('rows.jsonl', rows)} --shots 0"
    result = run(tmp_path / "run", flags)[name]["medqa"]
    predictions = lines(next((tmp_path / "run").rglob("predictions/*/medqa.jsonl")))
    best = [line["loglikelihood"].index(max(line["loglikelihood"])) for line in predictions]
    assert set(best) == {1}
    assert result["acc"] == pytest.approx(3 / 12)
    assert result["rounds"] == 1


def test_a_template_wraps_the_prompts(tmp_path, write_jsonl):
    rows = write_jsonl("rows.jsonl", medqa_rows(5))
    result = run(tmp_path / "run", f"--tasks medqa={rows} --shots 1 --rounds 1 --template alpaca")
    line = lines(next((tmp_path / "run").rglob("predictions/*/medqa.jsonl")))[0]
    assert "### Instruction:" in line["prompt"] and "### Response:" in line["prompt"]
    assert result["tiny"]["medqa"]["versions"]["template"] != "plain"


def test_definitions_differ_by_what_they_say_alone(tmp_path, write_jsonl):
    rows = write_jsonl("rows.jsonl", medqa_rows(6))
    found = []
    for folder, flags in (("a", "--shots 1"), ("b", "--shots 2 --rounds 1")):
        result = run(tmp_path / folder, f"--tasks medqa={rows} {flags}")["tiny"]["medqa"]
        found.append(result["versions"]["definitions"]["medqa"])
    assert found[0] == found[1]


def test_a_name_of_lm_eval_is_no_own_file(tmp_path, write_jsonl, capsys):
    rows = write_jsonl("rows.jsonl", medqa_rows(6))
    assert "take local rows" in fails(capsys, tmp_path / "run", f"--tasks hellaswag={rows}")
    assert "mine=FILE" in fails(capsys, tmp_path / "run", "--tasks mine")
    assert not (tmp_path / "run").exists()
    assert evaluation.CHAT_TASKS.keys().isdisjoint(lm_tasks.CHOICES)


def test_a_definition_file_changes_rows_and_shots_alone(tmp_path, write_jsonl):
    run(tmp_path / "run", f"--tasks medmcqa={write_jsonl('r.jsonl', medmcqa_rows(5))} --shots 1")
    spec = json.loads((tmp_path / "run" / "lm_eval" / "medmcqa.yaml").read_text())
    rows = ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split")
    expected = {"include", "task", *rows, "test_split", "fewshot_split", "num_fewshot"}
    assert set(spec) == expected and spec["num_fewshot"] == 1
    assert spec["include"].endswith("tasks/medmcqa/medmcqa.yaml")


def test_the_hubs_rows_go_by_lm_evals_own_splits(tmp_path, monkeypatch, capsys):
    """Shots come from the train split where a definition has one, else from other rows."""
    asked = []

    def load_dataset(path, name=None, **_):
        asked.append(path)
        splits = {"medmcqa": ("train", "validation"), "bbq": ("test",)}
        task = next((task for task in splits if task in path), "truthfulqa_mc1")
        rows = [lm_tasks.local_record(task, "hub", 1, row) for row in ROWS[task]]
        found = {}
        for split in splits.get(task, ("validation",)):
            found[split] = datasets.Dataset.from_list(rows)
        if "train" in found:
            mark = [f"T {row['question']}" for row in rows]
            found["train"] = found["train"].remove_columns("question").add_column("question", mark)
        return datasets.DatasetDict(found)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface.HFLM, "loglikelihood", by_truth(1))
    names = ("medmcqa", "bbq", "truthfulqa_mc1")
    result = run(tmp_path / "run", "--tasks", *names, "--shots 1 --rounds 1")["tiny"]
    assert {"openlifescienceai/medmcqa", "oskarvanderwal/bbq", "truthfulqa/truthful_qa"} == set(
        asked
    )
    for name in names:
        assert result[name]["acc"] == 1.0
        for row in lines(tmp_path / "run" / "predictions" / "tiny" / f"{name}.jsonl"):
            *shots, question = row["prompt"].split("\n\n")
            assert not any(question.removesuffix("A:") in shot for shot in shots)
            assert (name == "medmcqa") == ("Question: T Which" in row["prompt"])


def test_a_definitions_digest_is_of_its_text(tmp_path):
    """lm-eval leaves a filter's function as it is: where it lies in memory is no part of it."""

    def version(source):
        path = tmp_path / f"utils{len(list(tmp_path.iterdir()))}.py"
        path.write_text(source)
        own = runpy.run_path(str(path))["build"]
        config = {"task": "t", "filter_list": [{"filter": [{"filter_fn": own}]}]}
        return evaluation.definition_version({"configs": {"t": config}, "versions": {"t": 1}}, "t")

    source = "def build(resps, docs):\n    return resps\n"
    assert version(source) == version(source)
    assert version(source) != version(source.replace("return resps", "return docs"))
