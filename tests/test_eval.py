"""eval.py: statistics by hand, log-likelihoods against a plain computation, right and wrong answers, resume, judge, sandbox."""
import email.utils
import json
import math
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import eval as evaluation
import sftmix
from common import UserError
from conftest import random_model

QUICK = ["--max_length", "400"]


def run(folder, *flags):
    evaluation.main([*flags, "--output_dir", str(folder)])
    return json.loads((Path(folder) / "results.json").read_text())


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def fails(capsys, folder, *flags):
    """-> the one line on stderr."""
    with pytest.raises(SystemExit) as exit:
        run(folder, *flags)
    error = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]
    assert exit.value.code == 2 and error.startswith("error: ")
    return error


def medqa_rows(count, letters="ABCD", answer=None):
    """Rows in the columns of MedQA: four or five options, the right letter cycles unless answer is given."""
    return [{"question": f"Which sign belongs to disease {i}?", "options": {letter: f"sign {i}{letter}" for letter in letters},
             "answer_idx": answer or letters[i % len(letters)], "answer": "", "meta_info": "step1"} for i in range(count)]


def truthful_rows(count):
    return [{"question": f"What is known about {i}?", "mc1_targets": {f"true {i}": 1, f"false {i}": 0, f"wrong {i}": 0},
             "mc2_targets": {f"true {i}": 1, f"also true {i}": 1, f"false {i}": 0}} for i in range(count)]


CHAT = [{"question_id": 7, "category": "writing", "turns": ["Write a line.", "Again, shorter."]},
        {"question_id": 9, "category": "math", "turns": ["What is 2 + 3?", "Double it."], "reference": ["five", "ten"]},
        {"question_id": 12, "category": "generic", "turns": ["Only one question here, and a longer one so that padding matters."]}]


# ---------------------------------------------------------------------------------------------------- statistics


def test_statistics_by_hand():
    assert evaluation.perplexity_reduction(math.log(8.0), math.log(10.0)) == pytest.approx(20.0)
    assert evaluation.mc2(np.log([0.1, 0.2, 0.3]), [True, False, True]) == pytest.approx(0.4 / 0.6)
    assert evaluation.mc2([-1000.0, -1001.0], [False, True]) == pytest.approx(1 / (1 + math.e))
    assert evaluation.pass_at_k(5, 2, 1) == pytest.approx(0.4) and evaluation.pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert evaluation.parse_score("SCORE: 3\nno\nSCORE: **7.5**") == 7.5
    assert evaluation.parse_score("SCORE: 11") is None and evaluation.parse_score("seven") is None


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 900)
    low, high = evaluation.interval(evaluation.bootstrap_ratios([values], [np.ones(900)], range(900))[:, 0])
    error = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error) and high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_bootstrap_is_weighted_clustered_and_paired():
    rng = np.random.default_rng(1)
    tokens, noise = rng.integers(1, 50, 300), rng.normal(0, 1, 300)
    one, other = (2.0 + noise) * tokens, (1.9 + noise) * tokens  # the same noise: paired, the difference is exact
    samples = evaluation.bootstrap_ratios([one, other], [tokens, tokens], range(300))
    assert np.allclose(samples[:, 0] - samples[:, 1], 0.1) and samples[:, 0].std() > 0.01
    rows = np.arange(300)
    once = evaluation.bootstrap_ratios([one], [tokens], rows)[:, 0]
    copies = evaluation.bootstrap_ratios([np.tile(one, 4)], [np.tile(tokens, 4)], np.tile(rows, 4))[:, 0]  # four turns a dialogue, all alike
    assert np.allclose(once, copies)  # as many independent units as before
    apart = evaluation.bootstrap_ratios([np.tile(one, 4)], [np.tile(tokens, 4)], range(1200))[:, 0]
    assert apart.std() < 0.6 * once.std()
    assert evaluation.bootstrap_ratios([[1.0, 9.0]], [[1.0, 3.0]], [0, 0]).tolist() == [[2.5]] * 2000  # Σ sums / Σ weights, not a mean of ratios


def test_names_are_safe_and_unique():
    names = ["runs/a/final", "runs/b/final", "runs-a-final", "meta/Llama 3", "../..", "tiny"]
    safe = evaluation.unique_names(names)
    assert len({name.lower() for name in safe}) == len(names) and safe[1] == "runs-b-final" and safe[5] == "tiny"
    assert all("/" not in name and name.strip(".") and " " not in name for name in safe)


# ---------------------------------------------------------------------------------------------------- domains


def test_domain_is_what_the_scripts_report(tmp_path, tokenizer):
    result = run(tmp_path / "run", "--eval_data", "toy/copy#24", "mine=toy/add#9", "--batch_size", "5")["tiny"]
    for label, source in (("copy", "toy/copy#24"), ("mine", "toy/add#9")):
        datasets = common.load_data([source], split="eval")
        examples = common.encode_datasets(datasets, tokenizer, "alpaca", 2048, quiet=True)[0]
        own = common.evaluate(common.tiny_model(0), {label: examples}, 8, torch.device("cpu"), "fp32", False)[label]
        assert all(result[label][key] == pytest.approx(own[key], rel=1e-6) for key in ("nll", "ppl", "accuracy", "tokens"))
        assert result[label]["nll_low"] < result[label]["nll"] < result[label]["nll_high"]
    assert len(lines(tmp_path / "run" / "predictions" / "tiny" / "copy.jsonl")) == 24 == result["copy"]["n"]


def test_an_adapter_scores_as_in_the_run_that_saved_it(tmp_path, model_folder):
    sftmix.main(["--model", model_folder("llama"), "--eval_data", "toy/copy#12", "--data", "toy/add#8", "--max_steps", "3", "--batch_size", "8", "--mu", "0", "--lora_rank", "4", "--lr", "1e-2",
                 "--output_dir", str(tmp_path / "run")])
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["copy"]
    adapter = str(tmp_path / "run" / "final")
    result = run(tmp_path / "eval", "--model", model_folder("llama"), adapter, "--eval_data", "toy/copy#12")
    assert Path(adapter, "adapter_config.json").exists() and result[adapter]["copy"]["nll"] == pytest.approx(trained["nll"], rel=1e-5)
    assert abs(result[adapter]["copy"]["nll"] - result[model_folder("llama")]["copy"]["nll"]) > 0.01


def test_two_models_are_compared(tmp_path, model_folder, capsys):
    torch.manual_seed(1)
    better = common.tiny_model(0)
    with torch.no_grad():
        better.transformer.wte.weight *= 0.1  # nearer to uniform: a lower loss than the random model's
    better.save_pretrained(tmp_path / "better")
    common.tiny_tokenizer().save_pretrained(tmp_path / "better")
    name = str(tmp_path / "better")
    result = run(tmp_path / "run", "--model", name, "--base", "tiny", "--eval_data", "toy/copy", "--limit", "20")
    row, base = result[name]["copy"], result["tiny"]["copy"]
    assert row["versus"] == "tiny" and row["nll_diff"] == pytest.approx(row["nll"] - base["nll"]) and "versus" not in base
    assert row["ppl_reduction"] == pytest.approx(100 * (1 - row["ppl"] / base["ppl"]))
    assert row["ppl_reduction_low"] < row["ppl_reduction"] < row["ppl_reduction_high"] and row["n"] == 20
    assert row["nll_diff_low"] < row["nll_diff"] < row["nll_diff_high"] < 0  # and the sign is right
    assert (tmp_path / "run" / "results.png").stat().st_size > 1000 and "Δ" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- multiple choice


def test_official_and_rehosted_columns_are_the_same_question():
    read = evaluation.read_question
    official = read("medmcqa", 0, "f", 1, {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2, "exp": "because y"})
    hosted = read("medmcqa", 0, "f", 1, {"question": "Q?", "options": {"A": "w", "B": "x", "C": "y", "D": "z"}, "answer_idx": "C", "answer": "y", "realidx": "1"})
    assert official == hosted and official.options == ("w", "x", "y", "z") and official.true == (False, False, True, False)
    github = read("pubmedqa", 0, "f", 1, {"QUESTION": "Does it?", "CONTEXTS": ["First.", "Second."], "final_decision": "maybe", "LONG_ANSWER": "Perhaps."})
    hub = read("pubmedqa", 0, "f", 1, {"pubid": 1, "question": "Does it?", "context": {"contexts": ["First.", "Second."], "labels": ["A", "B"]},
                                       "long_answer": "Perhaps.", "final_decision": "maybe"})
    assert github == hub and github.true == (False, False, True) and "Perhaps" not in github.text and "First. Second." in github.text
    choices = {"question": "What?", "mc2_targets": {"choices": ["t", "u", "f"], "labels": [1, 1, 0]}}
    keys = {"question": "What?", "mc2_targets": {"t": 1, "u": 1, "f": 0, "of another row": None}}
    assert read("truthfulqa_mc2", 3, "f", 1, choices) == read("truthfulqa_mc2", 3, "f", 1, keys)
    bbq = read("bbq", 0, "f", 1, {"context": "C.", "question": "Who?", "ans0": "a", "ans1": "b", "ans2": "c", "label": 1, "context_condition": "ambig"})
    assert bbq.options == ("a", "b", "c") and bbq.true == (False, True, False) and bbq.group == "ambig"


def test_wrong_rows_name_file_and_row():
    for name, record, message in (("medqa", medqa_rows(1, "ABCDE")[0], "has 5 options, medqa has 4; the five-option variant is medqa5"),
                                  ("pubmedqa", {"question": "Q?", "context": ["c"], "final_decision": "perhaps"}, "is no row of pubmedqa"),
                                  ("medmcqa", {"question": "Q?", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": -1}, "right answer -1"),
                                  ("truthfulqa_mc2", {"question": "Q?"}, "is no row of truthfulqa_mc2"),
                                  ("bbq", {"question": "Q?", "answer": "A"}, "needs options")):
        with pytest.raises(UserError, match="file.jsonl, row 4") as error:
            evaluation.read_question(name, 3, "file.jsonl", 4, record)
        assert message in str(error.value)


def test_nothing_leaks_into_a_prompt():
    """The prompt of a question is the same whichever of its options is true; true answers come at every place of the order."""
    for name in ("medqa", "truthfulqa_mc1", "pubmedqa"):
        task, shots = evaluation.CHOICE_TASKS[name], [evaluation.Question(9, "Shot?", ("s", "t", "u"), (False, True, False))]
        prompts = {evaluation.choice_prompt(task, evaluation.Question(0, "Text?", ("x", "y", "z"), tuple(i == k for i in range(3))), shots) for k in range(3)}
        assert len(prompts) == 1 and prompts.pop().endswith("\nAnswer:")
    places = [evaluation.read_question("truthfulqa_mc1", i, "f", i, row).true.index(True) for i, row in enumerate(truthful_rows(300))]
    assert all(70 < places.count(place) < 130 for place in range(3))


def test_a_scorer_without_preference_is_at_chance(tmp_path, write_jsonl, monkeypatch):
    """Every option ties: argmax takes the first, which must not be the true one by the source's order."""
    monkeypatch.setattr(evaluation, "option_scores", lambda model, questions, *_: [np.zeros(len(question)) for question in questions])
    rows = write_jsonl("truthful.jsonl", truthful_rows(300))
    result = run(tmp_path / "run", "--tasks", f"truthfulqa_mc1={rows}", f"truthfulqa_mc2={rows}")["tiny"]
    assert 0.23 < result["truthfulqa_mc1"]["accuracy"] < 0.43 and result["truthfulqa_mc2"]["mc2"] == pytest.approx(2 / 3)


def test_shots_are_solved_disjoint_and_change_with_the_round(write_jsonl):
    def prepare(spec, *flags):
        return evaluation.prepare(evaluation.parse_args(["--tasks", spec, *flags]))[0]

    test, train = write_jsonl("test.jsonl", medqa_rows(20)), write_jsonl("train.jsonl", [row | {"question": "Train " + row["question"]} for row in medqa_rows(9)])
    task = prepare(f"medqa={test}")
    shown = [shot.index for shots in task.shots for shot in shots]
    assert len(task.shots) == 3 and len(set(shown)) == 9 and not set(shown) & {question.index for question in task.rows}
    assert len(task.rows) == 11 and prepare(f"medqa={test}") == task and prepare(f"medqa={test}", "--seed", "1").shots != task.shots
    task = prepare(f"medqa={test},{train}", "--rounds", "5")  # 15 shots of 9: rounds share some, none is repeated within one
    assert len(task.rows) == 20 and len({tuple(shot.text for shot in shots) for shots in task.shots}) == 5
    assert all(shot.text.startswith("Train") and len({s.index for s in shots}) == 3 for shots in task.shots for shot in shots)
    prompt = evaluation.choice_prompt(evaluation.CHOICE_TASKS["medqa"], task.rows[0], task.shots[0])
    for shot in task.shots[0]:
        letter = "ABCD"[shot.true.index(True)]
        assert f"{letter}. {shot.options[shot.true.index(True)]}" in prompt and f"Answer:\n{letter}\n\n" in prompt
    truthful = write_jsonl("truthful.jsonl", truthful_rows(9))
    assert len(prepare(f"truthfulqa_mc2={truthful},{truthful}", "--shots", "2").shots) == 3
    with pytest.raises(UserError, match="too few"):
        prepare(f"medqa={write_jsonl('small.jsonl', medqa_rows(8))}")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "cohere", "phi"])
def test_log_likelihoods_equal_a_plain_computation(name, tokenizer):
    """Every option alone, unpadded, through the whole model: equal for every batch size and style, to 1e-9 in float64 and to 1e-5 a
    token in fp32."""
    model, exact = random_model(name).eval(), random_model(name).eval().double()
    for task_name, records in (("medqa", medqa_rows(5)), ("truthfulqa_mc1", truthful_rows(5)),
                               ("pubmedqa", [{"question": f"Is {i}?", "context": ["word " * (1 + 5 * i)], "final_decision": "no"} for i in range(5)])):
        task = evaluation.CHOICE_TASKS[task_name]
        questions = [evaluation.read_question(task_name, i, "f", i, record) for i, record in enumerate(records)]
        shots, questions = questions[:1], questions[1:]
        encoded = evaluation.encode_questions(task, questions, shots, tokenizer, "plain", 500)
        plain, tokens = {model: [], exact: []}, []
        for question in questions:
            prompt = tokenizer(evaluation.choice_prompt(task, question, shots) + "\n").input_ids
            for answer in evaluation.scored_answers(question, task.style):
                ids = torch.tensor([prompt + tokenizer(answer, add_special_tokens=False).input_ids])
                tokens.append(ids.shape[1] - len(prompt))
                for lm in plain:
                    with torch.no_grad():
                        logits = torch.log_softmax(lm(input_ids=ids).logits[0].double(), -1)
                    plain[lm].append(sum(logits[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.shape[1])))
        for batch_size in (1, 3, 64):
            for lm, tolerance in ((model, 1e-5), (exact, 1e-9)):
                scores = evaluation.option_scores(lm, [examples for examples, _ in encoded.values()], batch_size, torch.device("cpu"), "fp32")
                assert list(encoded) == [0, 1, 2, 3] and (np.abs(np.concatenate(scores) - plain[lm]) < tolerance * np.array(tokens)).all()


def test_right_and_wrong_answers_score_one_and_zero(tmp_path, write_jsonl, monkeypatch):
    rows = {"medqa": medqa_rows(13), "medqa5": medqa_rows(14, "ABCDE"), "truthfulqa_mc1": truthful_rows(4), "truthfulqa_mc2": truthful_rows(4),
            "medmcqa": [{"question": f"{i}?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": i % 4} for i in range(12)],
            "pubmedqa": [{"QUESTION": f"{i}?", "CONTEXTS": ["c"], "final_decision": ("yes", "no", "maybe")[i % 3], "LONG_ANSWER": "l"} for i in range(12)],
            "bbq": [{"context": "c", "question": f"{i}?", "ans0": "a", "ans1": "b", "ans2": "c", "label": i % 3, "context_condition": ("ambig", "disambig")[i % 2]}
                    for i in range(6)]}
    tasks = [f"{name}={write_jsonl(name + '.jsonl', records)}" for name, records in rows.items()]
    original = evaluation.encode_questions
    for sign, value in ((1, 1.0), (-1, 0.0)):
        truth = []

        def remember(task, questions, *rest):
            result = original(task, questions, *rest)
            truth[:] = [sign * np.where(questions[i].true, 50.0, 0.0) for i in result]
            return result

        monkeypatch.setattr(evaluation, "encode_questions", remember)
        monkeypatch.setattr(evaluation, "option_scores", lambda *_: truth)
        result = run(tmp_path / str(sign), "--tasks", *tasks)["tiny"]
        assert set(result) == set(rows)
        for name, row in result.items():
            assert row["mc2" if name == "truthfulqa_mc2" else "accuracy"] == pytest.approx(value, abs=1e-9)
        assert result["bbq"]["accuracy_ambig"] == result["bbq"]["accuracy_disambig"] == value and result["medqa5"]["n"] == 5


def test_a_model_that_learnt_one_letter(tmp_path, write_jsonl, tokenizer):
    """A few steps of training towards B: the command's accuracy is the share of rows whose answer is B."""
    model = common.tiny_model(0)
    rows = medqa_rows(12)
    task = evaluation.CHOICE_TASKS["medqa"]
    questions = [evaluation.read_question("medqa", i, "f", i, row) for i, row in enumerate(rows)]
    examples = [question[1] for question, _ in evaluation.encode_questions(task, questions, [], tokenizer, "plain", 400).values()]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(6):
        batch = common.collate(examples, "cpu")
        common.response_loss(batch.select(common.hidden_states(model, batch.ids)), batch.targets, common.output_head(model))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    result = run(tmp_path / "run", "--model", name, "--tasks", f"medqa={write_jsonl('rows.jsonl', rows)}", "--shots", "0")[name]["medqa"]
    predictions = lines(tmp_path / "run" / "predictions" / evaluation.safe_name(name) / "medqa.jsonl")
    assert {line["prediction"][-1] for line in predictions} == {"B"} and result["accuracy"] == pytest.approx(3 / 12) and result["rounds"] == 1


def test_shots_that_do_not_fit_are_left_out(tmp_path, write_jsonl, tokenizer):
    rows = medqa_rows(4) + [medqa_rows(1)[0] | {"question": "long " * 200}]
    task = evaluation.CHOICE_TASKS["medqa"]
    questions = [evaluation.read_question("medqa", i, "f", i, row) for i, row in enumerate(rows)]
    encoded = evaluation.encode_questions(task, questions[3:], questions[:3], tokenizer, "plain", 400)
    assert encoded[0][1] == 2 and 1 not in encoded  # 3 shots are too long, and the last question alone is
    text = tokenizer.decode(encoded[0][0][0].ids.tolist())
    assert "disease 0" not in text and "disease 1" in text and "disease 2" in text
    result = run(tmp_path / "run", "--tasks", f"medqa={write_jsonl('rows.jsonl', rows)}", "--shots", "0", "--max_length", "400")["tiny"]["medqa"]
    assert result["left_out"] == 1 and result["n"] == 4


# ---------------------------------------------------------------------------------------------------- state


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt])
def test_interrupted_and_continued_is_the_same(tmp_path, write_jsonl, monkeypatch, model_folder, how):
    monkeypatch.setattr(evaluation, "BLOCK", 4)
    flags = ["--model", model_folder("gpt2"), "--eval_data", "toy/copy", "--tasks", f"medqa={write_jsonl('medqa.jsonl', medqa_rows(21))}", f"mt_bench={write_jsonl('chat.jsonl', CHAT)}",
             "--limit", "10", "--shots", "1", "--max_new_tokens", "8", "--batch_size", "1"]
    whole = run(tmp_path / "whole", *flags)
    add, calls = evaluation.Predictions.add, []

    def interrupt(self, rows):
        add(self, rows)
        calls.append(len(rows))
        if len(calls) in (2, 6, 14):  # in the domain, in a round of medqa, between two questions of mt_bench
            with open(self.part, "ab") as stream:
                stream.write(b'{"index": 3, "half a li')
            raise how

    monkeypatch.setattr(evaluation.Predictions, "add", interrupt)
    for _ in range(3):
        with pytest.raises((how, SystemExit)):
            run(tmp_path / "cut", *flags)
        assert not (tmp_path / "cut" / "results.json").exists()
    assert len(list((tmp_path / "cut" / "predictions").rglob("*.part"))) == 1
    again = run(tmp_path / "cut", *flags)
    for path in (tmp_path / "whole").rglob("*.jsonl"):
        one, other = ([{key: value for key, value in line.items() if key != "tstamp"} for line in lines(root / path.relative_to(tmp_path / "whole"))]
                      for root in (tmp_path / "whole", tmp_path / "cut"))
        assert one == other
    assert again == whole and sum(calls) == 10 + 30 + 3  # every row once

    def load(*_, **__):
        raise AssertionError("everything is there: no model is needed")

    monkeypatch.setattr(common, "load_model", load)
    assert run(tmp_path / "cut", *flags) == whole


def test_other_settings_data_or_models_are_refused(tmp_path, write_jsonl, model_folder, capsys):
    rows, name = write_jsonl("medqa.jsonl", medqa_rows(14)), model_folder("gpt2")
    flags = ["--model", name, "--tasks", f"medqa={rows}", *QUICK]
    result = run(tmp_path / "run", *flags)
    before = (tmp_path / "run" / "results.json").read_bytes()
    assert "seed 0, now it is 1" in fails(capsys, tmp_path / "run", *flags, "--seed", "1")
    assert "with shots 3, now it is 2" in fails(capsys, tmp_path / "run", *flags, "--shots", "2")
    write_jsonl("medqa.jsonl", medqa_rows(15))
    assert "with data" in fails(capsys, tmp_path / "run", *flags)
    write_jsonl("medqa.jsonl", medqa_rows(14))
    config = Path(name) / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    assert "its files have changed" in fails(capsys, tmp_path / "run", *flags)
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "holds other files" in fails(capsys, tmp_path / "other", *flags)
    both = run(tmp_path / "more", "--model", "tiny", "--tasks", f"medqa={rows}", *QUICK), run(tmp_path / "more", "--model", "tiny", name, "--tasks", f"medqa={rows}", *QUICK)
    assert both[1]["tiny"] == both[0]["tiny"] and both[1][name]["medqa"]["accuracy"] == result[name]["medqa"]["accuracy"]  # a model is added to a folder
    assert set(run(tmp_path / "more", "--eval_data", "toy/add#3")["tiny"]) == {"add", "medqa"}  # and a task, what was there stays


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, write_jsonl, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    rows, chat = write_jsonl("medqa.jsonl", medqa_rows(14)), write_jsonl("chat.jsonl", CHAT)
    for flags, message in (([], "nothing to do"), (["--tasks", "medqa5"], "medqa5=FILE"), (["--tasks", f"medqa={rows}x"], "no such file"),
                           (["--tasks", f"medqa={rows}", f"medqa={rows}"], "two tasks"), (["--tasks", f"mt_bench={rows}"], "row 1: no question"),
                           (["--tasks", f"medqa={rows}", "--judge", "x"], "not among"), (["--tasks", f"mt_bench={chat}", "--judge", "x"], "OPENAI_API_KEY"),
                           (["--model", str(tmp_path / "none"), "--tasks", f"medqa={rows}"], "no such folder"),
                           (["--tasks", f"mt_bench={write_jsonl('empty.jsonl', [{'question_id': 1, 'turns': []}])}"], "row 1: no question")):
        assert message in fails(capsys, tmp_path / "run", *flags)
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_batched_answers_are_the_greedy_ones(name, tokenizer):
    """Left-padded batches against the model's own argmax, token by token, without padding or cache."""
    model = random_model(name).eval()
    model.config.use_cache = False
    prompts = [evaluation.prompt_ids([("user", text)], tokenizer, "alpaca") for text in ("Hi.", "A longer question, so that the first is padded.", "Third")]
    answers = evaluation.generate(model, tokenizer, prompts, 12, torch.device("cpu"), "fp32")
    for prompt, (answer, cut) in zip(prompts, answers):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(ids[len(prompt):], skip_special_tokens=True).strip() and not cut
    assert evaluation.generate(model, tokenizer, [list(range(5)) * 150], 12, torch.device("cpu"), "fp32")[0][1]  # longer than 512 - 12: cut


def test_answers_end_at_the_end_token(tokenizer):
    model, calls = common.tiny_model(0).eval(), []
    prompts = [evaluation.prompt_ids([("user", "x" * n)], tokenizer, "plain") for n in (3, 30)]

    def head(states):
        """Three times the letter a, then the end for the first prompt and b for the second, which has an end two tokens later."""
        calls.append(1)
        names = ["a", "a"] if len(calls) < 4 else ["</s>", "b"] if len(calls) < 6 else ["b", "</s>"]
        return 1e4 * torch.nn.functional.one_hot(torch.tensor(tokenizer.convert_tokens_to_ids(names)), 259).float()[:, None]

    model.lm_head.forward = head
    assert evaluation.generate(model, tokenizer, prompts, 10, torch.device("cpu"), "fp32") == [("aaa", False), ("aaabb", False)]
    assert len(calls) == 6


def test_formats_history_and_templates(tmp_path, write_jsonl, monkeypatch, model_folder):
    chat, alpaca = write_jsonl("chat.jsonl", CHAT), write_jsonl("alpaca.jsonl", [{"instruction": "Name a tree.", "dataset": "koala"}, {"question_id": 3, "turns": ["And a bush?"]}])
    seen = []

    def answer(model, tokenizer, prompts, *_):
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [(f"answer {len(seen) - len(prompts) + i}", False) for i in range(len(prompts))]

    monkeypatch.setattr(evaluation, "generate", answer)
    run(tmp_path / "run", "--tasks", f"mt_bench={chat}", f"alpaca_eval={alpaca}", "--batch_size", "3")
    first, second, third = lines(tmp_path / "run" / "mt_bench" / "tiny.jsonl")
    assert set(first) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} and first["model_id"] == "tiny" and first["question_id"] == 7
    assert first["choices"] == [{"index": 0, "turns": ["answer 0", "answer 3"]}] and third["choices"][0]["turns"] == ["answer 2"]
    assert len({line["answer_id"] for line in (first, second, third)}) == 3
    assert len(seen) == 7 and seen[4].index("2 + 3") < seen[4].index("answer 1") < seen[4].index("Double it.") and "answer 0" not in seen[4]
    assert seen[0] == "<s>" + common.alpaca_prompt(common.Row((("user", "Write a line."),), ""))  # a base model: Alpaca's template
    outputs = json.loads((tmp_path / "run" / "alpaca_eval" / "tiny.json").read_text())
    assert outputs == [{"instruction": "Name a tree.", "output": "answer 5", "generator": "tiny", "dataset": "koala", "datasplit": "eval"},
                       {"instruction": "And a bush?", "output": "answer 6", "generator": "tiny", "dataset": "alpaca", "datasplit": "eval"}]
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    folder = tmp_path / "chat"
    common.tiny_model(0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run(tmp_path / "own", "--model", str(folder), "--tasks", f"mt_bench={chat}", "--limit", "1")
    assert seen[-1] == "[user]Write a line.[assistant]answer 7[user]Again, shorter.[assistant]"


# ---------------------------------------------------------------------------------------------------- judge


@pytest.fixture()
def endpoint(monkeypatch):
    """A server that speaks the protocol on this machine -> (list of requests, list of faults to serve first)."""
    requests, faults, lock = [], [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                fault = faults.pop(0) if faults else None
            headers, status, reply = {}, 200, json.dumps({"choices": [{"message": {"content": "Fine.\nSCORE: 8"}}]}).encode()
            if fault == "timeout":
                time.sleep(0.5)
            elif fault == "malformed":
                reply = b'{"choices": [{"mess'
            elif fault == "empty":
                reply = b'{"choices": []}'
            elif fault == "cut":
                headers["Content-Length"] = "10000"
            elif fault == "unscored":
                reply = json.dumps({"choices": [{"message": {"content": "I would rather not say."}}]}).encode()
            elif fault:
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                reply = b'{"error": {"message": "busy"}}'
            try:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(reply)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(reply)
            except OSError:
                pass  # the client gave up

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(evaluation, "FIRST_WAIT", 0.01)
    yield requests, faults
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", [429, 500, 503, "timeout", "malformed", "empty", "cut"])
def test_faults_are_tried_again(endpoint, monkeypatch, fault):
    requests, faults = endpoint
    faults += [fault, fault]
    monkeypatch.setattr(evaluation, "TIMEOUT", 0.3)
    assert "SCORE: 8" in evaluation.ask("judge", [], os.environ["OPENAI_BASE_URL"], "secret")
    assert len(requests) == 3 and requests[0]["path"] == "/v1/chat/completions" and requests[0]["key"] == "Bearer secret"


def test_waits_double_or_follow_the_server(endpoint):
    requests, faults = endpoint
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    faults += [500, (429, {"Retry-After": "7"}), (429, {"Retry-After": soon}), (503, {"Retry-After": "soon"})]
    waits = []
    evaluation.ask("judge", [], os.environ["OPENAI_BASE_URL"], None, sleep=waits.append)
    assert waits[0] == 0.01 and waits[1] == 7.0 and 25 < waits[2] <= 30 and waits[3] == 0.08 and requests[0]["key"] is None


def test_refused_requests_are_not_repeated(endpoint):
    requests, faults = endpoint
    faults += [401]
    with pytest.raises(UserError, match="HTTP 401.*busy"):
        evaluation.ask("judge", [], os.environ["OPENAI_BASE_URL"], "wrong")
    assert len(requests) == 1
    faults += [500] * evaluation.ATTEMPTS
    with pytest.raises(UserError, match=f"no answer in {evaluation.ATTEMPTS} tries.*HTTP 500"):
        evaluation.ask("judge", [], os.environ["OPENAI_BASE_URL"], "secret", sleep=lambda _: None)


def test_nothing_is_judged_twice(tmp_path, write_jsonl, endpoint, monkeypatch, capsys):
    requests, faults = endpoint
    chat = write_jsonl("chat.jsonl", CHAT)
    flags = ["--tasks", f"mt_bench={chat}", "--max_new_tokens", "4", "--judge", "judge/x"]
    monkeypatch.setattr(evaluation, "JUDGE_THREADS", 1)
    monkeypatch.setattr(evaluation, "generate", lambda model, tokenizer, prompts, *_: [(f"text {len(prompt)}", False) for prompt in prompts])
    faults += [None] * 9 + [400]  # the tenth request is refused: the command stops
    assert "HTTP 400" in fails(capsys, tmp_path / "run", *flags)
    assert len(requests) in (10, 11) and not (tmp_path / "run" / "results.json").exists()  # one may have been on its way
    faults += ["unscored", "unscored", "unscored", None]  # one judgement stays without a score, one gets it at the second asking
    result = run(tmp_path / "run", *flags)["tiny"]["mt_bench"]
    judged = lines(tmp_path / "run" / "judgements" / "judge-x" / "tiny.jsonl")
    assert len(judged) == len({line["key"] for line in judged}) == 25  # (2 + 2 + 1) answers x 5 rounds
    assert len(requests) == 25 + 1 + 2  # each once; the refused one; one more for each of the two without a score at first
    assert result["score"] == 8.0 and result["rounds"] == 5 and result["unscored"] == 1 and result["judge"] == "judge/x" and result["score_turn2"] == 8.0
    before = len(requests)
    assert run(tmp_path / "run", *flags)["tiny"]["mt_bench"] == result and len(requests) == before
    assert run(tmp_path / "run", *flags, "--rounds", "6")["tiny"]["mt_bench"]["rounds"] == 6 and len(requests) == before + 5
    assert all(request["model"] == "judge/x" and request["temperature"] == 0 for request in requests)
    with_reference = {request["messages"][1]["content"] for request in requests if "[reference" in request["messages"][1]["content"]}
    assert len(with_reference) == 2 and all("2 + 3" in text for text in with_reference)  # both turns of the math question, no other
    second = next(text for text in with_reference if "to the second message" in text)
    assert "ten" in second and "five" not in second and second.index("[assistant, answer 1]") < second.index("Double it.") < second.index("[assistant, answer 2]")


def test_scores_by_turn_and_round():
    lines = [{"question_id": q, "turn": t, "round": r, "score": score, "judge": "j"} for q, t, r, score in
             ((1, 0, 0, 4.0), (1, 0, 1, 6.0), (1, 1, 0, 1.0), (1, 1, 1, 3.0), (2, 0, 0, 10.0), (2, 0, 1, None))]
    metrics, rows = evaluation.summarise_chat(None, [{"answers": ["a", "bcd"], "prompt_cut": True}], lines)
    assert metrics["score_turn1"] == pytest.approx(20 / 3) and metrics["score_turn2"] == 2.0 and metrics["score"] == pytest.approx(24 / 5)
    assert metrics["score_std"] == pytest.approx(np.std([5.0, 4.5], ddof=1)) and metrics["unscored"] == 1 and metrics["prompts_cut"] == 1
    assert rows["score"] == {1: (14.0, 4, 1), 2: (10.0, 1, 2)} and metrics["answer_characters"] == 2.0


# ---------------------------------------------------------------------------------------------------- generated code


@pytest.mark.parametrize("program, passes", [
    ("x = 1 + 1\nassert x == 2", True), ("assert 1 == 2", False), ("import sys; sys.exit(0)", False), ("import os; os._exit(0)", False),
    ("def f(:", False), ("while True: pass", False), ("x = bytearray(2 ** 34)", False), ("import time; time.sleep(60)", False),
    ("print('noise'); import sys; sys.stderr.write('noise')", True), ("open('big', 'w').write('x' * 2 ** 24)", False),
    ("import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])", True),
    ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(20)", False),  # holds the pipe: given up
    ("import os; assert 'OPENAI_API_KEY' not in os.environ and os.listdir('.') == ['program.py']", True)])
def test_programs_run_in_limits(program, passes, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    started = time.perf_counter()
    assert evaluation.run_program(program, seconds=2) is passes
    assert time.perf_counter() - started < 20


def test_code_eval_speaks_the_metrics_protocol():
    values, passed = evaluation.CodeEval().compute(references=["assert f(2) == 3"], predictions=[["def f(x): return x + 1", "def f(x): return x"]], k=[1, 2])
    assert values == {"pass@1": 0.5, "pass@2": 1.0} and passed == [[True, False]]


# ---------------------------------------------------------------------------------------------------- lm-eval


def answers_of(monkeypatch, answer):
    """lm-eval with answer(prompt) in place of the model's generation -> the prompts it asked."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    prompts = []

    def generate(self, requests, **_):
        result = []
        for request in requests:
            prompts.append(request.args[0])
            result.append(answer(request.args[0]))
            self.cache_hook.add_partial("generate_until", request.args, result[-1])
        return result

    monkeypatch.setattr(huggingface.HFLM, "generate_until", generate)
    return prompts


def test_gsm8k_over_local_rows(tmp_path, write_jsonl, monkeypatch, capsys):
    test = write_jsonl("test.jsonl", [{"question": f"What is {i} + 1?", "answer": f"Count on.\n#### {i + 1}"} for i in range(6)])
    train = write_jsonl("train.jsonl", [{"question": f"Train {i}?", "answer": f"So.\n#### {i}"} for i in range(5)])
    stop = []

    def answer(prompt):
        number = int(prompt.rsplit("What is ", 1)[1].split()[0])
        if number == 4 and not stop:
            stop.append(1)
            raise KeyboardInterrupt
        return f" I count.\n#### {number + 1}" if number < 3 else f" It is {number + 1}" if number == 3 else " No idea"

    prompts = answers_of(monkeypatch, answer)
    flags = ["--tasks", f"gsm8k={test},{train}"]
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *flags)
    asked = len(prompts)
    part = tmp_path / "run" / "predictions" / "tiny" / "gsm8k.jsonl.part"
    part.parent.mkdir(parents=True)
    part.write_text('{"task": "gsm8k", "from": "a command killed before it renamed this"}\n')
    result = run(tmp_path / "run", *flags)["tiny"]["gsm8k"]
    assert asked == 5 and len(prompts) == 5 + 2  # what was answered before the interrupt came from the cache
    assert result["exact_match,strict-match"] == 0.5 and result["exact_match,flexible-extract"] == pytest.approx(4 / 6) and result["n"] == 6
    assert all(prompt.count("Train") == 5 for prompt in prompts)  # five shots, from the second file
    assert len(lines(tmp_path / "run" / "predictions" / "tiny" / "gsm8k.jsonl")) == 12 and result["exact_match,strict-match_low"] < 0.5
    before = len(prompts)
    run(tmp_path / "held", "--tasks", f"gsm8k={test}", "--shots", "2")
    assert len(prompts) == before + 4 and not any(prompt.rsplit("Question:", 1)[1] in prompt.rsplit("Question:", 1)[0] for prompt in prompts[before:])
    assert "needs columns" in fails(capsys, tmp_path / "bad", "--tasks", f"gsm8k={write_jsonl('bad.jsonl', [{'q': '1', 'answer': '2'}])}")
    assert "take local rows" in fails(capsys, tmp_path / "bad", "--tasks", f"drop={test}")
    assert "neither" in fails(capsys, tmp_path / "bad", "--tasks", "no_such_task") and not (tmp_path / "bad").exists()


def test_humaneval_over_local_rows(tmp_path, write_jsonl, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    rows = [{"task_id": f"T/{i}", "prompt": f"def add{i}(x):\n", "canonical_solution": f"    return x + {i}\n", "entry_point": f"add{i}",
             "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n"} for i in range(4)]
    path = write_jsonl("code.jsonl", rows)
    assert "add --allow_code" in fails(capsys, tmp_path / "run", "--tasks", f"humaneval={path}") and not (tmp_path / "run").exists()
    solutions = {row["prompt"]: row["canonical_solution"] if i % 2 else "    raise SystemExit(0)\n" for i, row in enumerate(rows)}
    answers_of(monkeypatch, lambda prompt: solutions[prompt])
    result = run(tmp_path / "run", "--tasks", f"humaneval={path}", "--allow_code")["tiny"]["humaneval"]
    assert result["pass@1,create_test"] == 0.5 and result["n"] == 4


def test_ifeval_over_local_rows(tmp_path, write_jsonl, monkeypatch):
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("langdetect")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)  # these rows need no sentence splitter
    monkeypatch.setattr(evaluation, "check_punkt", lambda: None)
    rows = [{"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {"key": 2, "prompt": "Say tree twice, no commas.", "instruction_id_list": ["keywords:frequency", "punctuation:no_comma"],
             "kwargs": [{"keyword": "tree", "frequency": 2, "relation": "at least"}, {}]}]
    answers_of(monkeypatch, lambda prompt: "a, b" if "twice" not in prompt else "tree and tree, yes")
    result = run(tmp_path / "run", "--tasks", f"ifeval={write_jsonl('rows.jsonl', rows)}")["tiny"]["ifeval"]
    assert result["prompt_level_strict_acc"] == 0.0 and result["inst_level_strict_acc"] == pytest.approx(1 / 3)
    answers_of(monkeypatch, lambda prompt: "tree tree")
    result = run(tmp_path / "right", "--tasks", f"ifeval={write_jsonl('rows.jsonl', rows)}")["tiny"]["ifeval"]
    assert result["prompt_level_strict_acc"] == result["inst_level_strict_acc"] == 1.0


def test_popqa_definition(tmp_path, write_jsonl, monkeypatch):
    pytest.importorskip("lm_eval")
    rows = write_jsonl("popqa.jsonl", [{"question": f"Where is {i}?", "obj": f"Town {i}", "possible_answers": json.dumps([f"Town {i}", f"City {i}"])} for i in range(6)])
    prompts = answers_of(monkeypatch, lambda prompt: " in city 1" if prompt.endswith("1?\nA:") else " Town 0")
    result = run(tmp_path / "run", "--tasks", f"popqa={rows},{rows}", "--shots", "2")["tiny"]["popqa"]
    assert result["accuracy"] == pytest.approx(2 / 6) and all(prompt.count("Q: ") == 3 for prompt in prompts)


def test_the_ten_benchmarks_exist():
    pytest.importorskip("lm_eval")
    known = evaluation.task_manager().task_index
    assert len(evaluation.DYNAMIXSFT) == 10 and [name for name in evaluation.DYNAMIXSFT if name.removeprefix("lm_eval/") not in known] == ["popqa"]


def test_lm_eval_is_asked_for_only_when_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'lm_eval[ifeval,math]'" in fails(capsys, tmp_path / "run", "--tasks", "gsm8k")
