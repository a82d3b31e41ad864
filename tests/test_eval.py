"""eval.py: statistics by hand, log-likelihoods against a plain computation, right and
wrong answers, resume, judge."""

import email.utils
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import alpaca_text, plain, random_model

import common
import data
import eval as evaluation
import sandbox
import sftmix
from common import UserError

QUICK = ["--max_length", "400"]


def run(folder, *flags):
    """flags: words, or several words in one string. -> results.json."""
    evaluation.main([*" ".join(flags).split(), "--output_dir", str(folder)])
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
    """Rows in the columns of MedQA; the right letter cycles unless answer is given."""
    rows = []
    for i in range(count):
        options = {letter: f"sign {i}{letter}" for letter in letters}
        row = {"question": f"Which sign belongs to disease {i}?", "options": options}
        row |= {"answer_idx": answer or letters[i % len(letters)], "answer": ""}
        rows.append(row | {"meta_info": "step1"})
    return rows


def truthful_rows(count):
    rows = []
    for i in range(count):
        mc1 = {f"true {i}": 1, f"false {i}": 0, f"wrong {i}": 0}
        mc2 = {f"true {i}": 1, f"also true {i}": 1, f"false {i}": 0}
        rows.append(
            {"question": f"What is known about {i}?", "mc1_targets": mc1, "mc2_targets": mc2}
        )
    return rows


SUM, ONE = ["What is 2 + 3?", "Double it."], ["Only one question here, longer: so padding matters."]
CHAT = [
    {"question_id": 7, "category": "writing", "turns": ["Write a line.", "Again, shorter."]},
    {"question_id": 9, "category": "math", "turns": SUM, "reference": ["five", "ten"]},
    {"question_id": 12, "category": "generic", "turns": ONE},
]


# --------------------------------------------------------------------------------------- statistics


def test_statistics_by_hand():
    assert evaluation.perplexity_reduction(math.log(8.0), math.log(10.0)) == pytest.approx(20.0)
    assert evaluation.mc2(np.log([0.1, 0.2, 0.3]), [True, False, True]) == pytest.approx(0.4 / 0.6)
    assert evaluation.mc2([-1000.0, -1001.0], [False, True]) == pytest.approx(1 / (1 + math.e))
    assert evaluation.pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert evaluation.pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert evaluation.parse_score("SCORE: 3\nno\nSCORE: **7.5**") == 7.5
    assert evaluation.parse_score("SCORE: 11") is None and evaluation.parse_score("seven") is None


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 900)
    samples = evaluation.bootstrap_ratios([values], [np.ones(900)], range(900))
    low, high = evaluation.interval(samples[:, 0])
    error = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_bootstrap_is_weighted_clustered_and_paired():
    rng = np.random.default_rng(1)
    tokens, noise = rng.integers(1, 50, 300), rng.normal(0, 1, 300)
    one = (2.0 + noise) * tokens
    other = (1.9 + noise) * tokens  # the same noise: paired, the difference is exact
    samples = evaluation.bootstrap_ratios([one, other], [tokens, tokens], range(300))
    assert np.allclose(samples[:, 0] - samples[:, 1], 0.1) and samples[:, 0].std() > 0.01
    rows = np.arange(300)
    once = evaluation.bootstrap_ratios([one], [tokens], rows)[:, 0]
    four, four_tokens = [np.tile(one, 4)], [np.tile(tokens, 4)]  # turns of a dialogue, all alike
    copies = evaluation.bootstrap_ratios(four, four_tokens, np.tile(rows, 4))[:, 0]
    assert np.allclose(once, copies)  # as many independent units as before
    apart = evaluation.bootstrap_ratios(four, four_tokens, range(1200))[:, 0]
    assert apart.std() < 0.6 * once.std()
    ratios = evaluation.bootstrap_ratios([[1.0, 9.0]], [[1.0, 3.0]], [0, 0])
    assert ratios.tolist() == [[2.5]] * 2000  # Σ sums / Σ weights, not a mean of ratios


def test_names_are_safe_and_unique():
    names = ["runs/a/final", "runs/b/final", "runs-a-final", "meta/Llama 3", "../..", "tiny"]
    safe = evaluation.unique_names(names)
    assert len({name.lower() for name in safe}) == len(names)
    assert safe[1] == "runs-b-final"
    assert safe[5] == "tiny"
    assert all("/" not in name and name.strip(".") and " " not in name for name in safe)


# ------------------------------------------------------------------------------------------ domains


def test_domain_is_what_the_scripts_report(tmp_path, tokenizer):
    flags = "--eval_data toy/copy#24 mine=toy/add#9 --batch_size 5"
    result, _cpu = run(tmp_path / "run", flags)["tiny"], torch.device("cpu")
    for label, source in (("copy", "toy/copy#24"), ("mine", "toy/add#9")):
        datasets = common.load_data([source], split="eval")
        examples = common.encode_datasets(
            datasets, data.with_template(tokenizer, "alpaca"), 2048, quiet=True
        )[0]
        model, sets = common.tiny_model(0), {label: examples}
        own = common.evaluate(model, sets, 8, "fp32", False)[label]
        for key in ("nll", "ppl", "accuracy", "tokens"):
            assert result[label][key] == pytest.approx(own[key], rel=1e-6)
        assert result[label]["nll_low"] < result[label]["nll"] < result[label]["nll_high"]
    written = lines(tmp_path / "run" / "predictions" / "tiny" / "copy.jsonl")
    assert len(written) == 24 == result["copy"]["n"]


def test_an_adapter_scores_as_in_the_run_that_saved_it(tmp_path, model_folder):
    name, folder = model_folder("llama"), tmp_path / "run"
    flags = f"--model {name} --eval_data toy/copy#12 --data toy/add#8 --max_steps 3 --batch_size 8"
    flags += f" --mu 0 --lora_rank 4 --lr 1e-2 --output_dir {folder}"
    sftmix.main(flags.split())
    trained = json.loads((folder / "summary.json").read_text())["eval"]["copy"]
    adapter = str(folder / "final")
    result = run(tmp_path / "eval", f"--model {name} {adapter} --eval_data toy/copy#12")
    assert Path(adapter, "adapter_config.json").exists()
    assert result[adapter]["copy"]["nll"] == pytest.approx(trained["nll"], rel=1e-5)
    assert abs(result[adapter]["copy"]["nll"] - result[name]["copy"]["nll"]) > 0.01


def test_two_models_are_compared(tmp_path, model_folder, capsys):
    torch.manual_seed(1)
    better = common.tiny_model(0)
    with torch.no_grad():
        better.transformer.wte.weight *= 0.1  # nearer to uniform: a lower loss than the random one
    better.save_pretrained(tmp_path / "better")
    common.tiny_tokenizer().save_pretrained(tmp_path / "better")
    name = str(tmp_path / "better")
    flags = f"--model {name} --base tiny --eval_data toy/copy --limit 20"
    result = run(tmp_path / "run", flags)
    row, base = result[name]["copy"], result["tiny"]["copy"]
    assert row["versus"] == "tiny"
    assert row["nll_diff"] == pytest.approx(row["nll"] - base["nll"])
    assert "versus" not in base
    assert row["ppl_reduction"] == pytest.approx(100 * (1 - row["ppl"] / base["ppl"]))
    assert row["ppl_reduction_low"] < row["ppl_reduction"] < row["ppl_reduction_high"]
    assert row["n"] == 20
    assert row["nll_diff_low"] < row["nll_diff"] < row["nll_diff_high"] < 0  # and the sign is right
    assert (tmp_path / "run" / "results.png").stat().st_size > 1000
    assert "Δ" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- multiple choice


def test_official_and_rehosted_columns_are_the_same_question():
    def read(name, record):
        return evaluation.read_question(name, 3, "f", 1, record)

    row = {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2}
    official = read("medmcqa", row | {"exp": "because y"})
    options = {"A": "w", "B": "x", "C": "y", "D": "z"}
    row = {"question": "Q?", "options": options, "answer_idx": "C", "answer": "y", "realidx": "1"}
    hosted = read("medmcqa", row)
    assert official == hosted
    assert official.options == ("w", "x", "y", "z")
    assert official.true == (False, False, True, False)
    contexts, decision = ["First.", "Second."], {"final_decision": "maybe"}
    row = {"QUESTION": "Does it?", "CONTEXTS": contexts, "LONG_ANSWER": "Perhaps."}
    github = read("pubmedqa", row | decision)
    row = {"pubid": 1, "question": "Does it?", "long_answer": "Perhaps."}
    context = {"contexts": contexts, "labels": ["A", "B"]}
    hub = read("pubmedqa", row | {"context": context} | decision)
    assert github == hub
    assert github.true == (False, False, True)
    assert "Perhaps" not in github.text
    assert "First. Second." in github.text
    choices = {"question": "What?"}
    choices["mc2_targets"] = {"choices": ["t", "u", "f"], "labels": [1, 1, 0]}
    keys = {"question": "What?", "mc2_targets": {"t": 1, "u": 1, "f": 0, "of another row": None}}
    assert read("truthfulqa_mc2", choices) == read("truthfulqa_mc2", keys)
    row = {"context": "C.", "question": "Who?", "ans0": "a", "ans1": "b", "ans2": "c", "label": 1}
    bbq = read("bbq", row | {"context_condition": "ambig"})
    assert bbq.options == ("a", "b", "c")
    assert bbq.true == (False, True, False)
    assert bbq.group == "ambig"


def test_wrong_rows_name_file_and_row():
    medqa5, other = medqa_rows(1, "ABCDE")[0], "the five-option variant is medqa5"
    perhaps = {"question": "Q?", "context": ["c"], "final_decision": "perhaps"}
    no_answer = {"question": "Q?", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": -1}
    for name, record, message in (
        ("medqa", medqa5, f"has 5 options, medqa has 4; {other}"),
        ("pubmedqa", perhaps, "is no row of pubmedqa"),
        ("medmcqa", no_answer, "right answer -1"),
        ("truthfulqa_mc2", {"question": "Q?"}, "is no row of truthfulqa_mc2"),
        ("bbq", {"question": "Q?", "answer": "A"}, "needs options"),
    ):
        with pytest.raises(UserError, match="file.jsonl, row 4") as error:
            evaluation.read_question(name, 3, "file.jsonl", 4, record)
        assert message in str(error.value)


def test_nothing_leaks_into_a_prompt():
    """A question's prompt is the same whichever option is true; true answers are at every place."""
    for name in ("medqa", "truthfulqa_mc1", "pubmedqa"):
        task = evaluation.CHOICE_TASKS[name]
        shots = [evaluation.Question(9, "Shot?", ("s", "t", "u"), (False, True, False))]
        prompts = set()
        for k in range(3):
            true = tuple(i == k for i in range(3))
            question = evaluation.Question(0, "Text?", ("x", "y", "z"), true)
            prompts.add(evaluation.choice_prompt(task, question, shots))
        assert len(prompts) == 1 and prompts.pop().endswith("\nAnswer:")
    read, rows = evaluation.read_question, truthful_rows(300)
    questions = [read("truthfulqa_mc1", i, "f", i, row) for i, row in enumerate(rows)]
    places = [question.true.index(True) for question in questions]
    assert all(70 < places.count(place) < 130 for place in range(3))


def test_a_scorer_without_preference_is_at_chance(tmp_path, write_jsonl, monkeypatch):
    """Every option ties: argmax takes the first, not to be the true one by the source's order."""

    def ties(model, questions, *_):
        return [np.zeros(len(question)) for question in questions]

    monkeypatch.setattr(evaluation, "option_scores", ties)
    rows = write_jsonl("truthful.jsonl", truthful_rows(300))
    flags = f"--tasks truthfulqa_mc1={rows} truthfulqa_mc2={rows}"
    result = run(tmp_path / "run", flags)["tiny"]
    assert 0.23 < result["truthfulqa_mc1"]["accuracy"] < 0.43
    assert result["truthfulqa_mc2"]["mc2"] == pytest.approx(2 / 3)


def test_shots_are_solved_disjoint_and_change_with_the_round(write_jsonl):
    def prepare(spec, *flags):
        return evaluation.prepare(evaluation.parse_args(["--tasks", spec, *flags]))[0]

    test = write_jsonl("test.jsonl", medqa_rows(20))
    solved = [row | {"question": "Train " + row["question"]} for row in medqa_rows(9)]
    train = write_jsonl("train.jsonl", solved)
    task = prepare(f"medqa={test}")
    shown = [shot.index for shots in task.shots for shot in shots]
    assert len(task.shots) == 3
    assert len(set(shown)) == 9
    assert not set(shown) & {question.index for question in task.rows}
    assert len(task.rows) == 11
    assert prepare(f"medqa={test}") == task
    assert prepare(f"medqa={test}", "--seed", "1").shots != task.shots
    task = prepare(f"medqa={test},{train}", "--rounds", "5")
    assert len(task.rows) == 20
    assert len({tuple(shot.text for shot in shots) for shots in task.shots}) == 5
    for shots in task.shots:  # 15 shots of 9: rounds share some, none is repeated within one
        assert len({shot.index for shot in shots}) == 3
        assert all(shot.text.startswith("Train") for shot in shots)
    prompt = evaluation.choice_prompt(evaluation.CHOICE_TASKS["medqa"], task.rows[0], task.shots[0])
    for shot in task.shots[0]:
        letter = "ABCD"[shot.true.index(True)]
        assert f"{letter}. {shot.options[shot.true.index(True)]}" in prompt
        assert f"Answer:\n{letter}\n\n" in prompt
    truthful = write_jsonl("truthful.jsonl", truthful_rows(9))
    assert len(prepare(f"truthfulqa_mc2={truthful},{truthful}", "--shots", "2").shots) == 3
    with pytest.raises(UserError, match="too few"):
        prepare(f"medqa={write_jsonl('small.jsonl', medqa_rows(8))}")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "cohere", "phi"])
def test_log_likelihoods_equal_a_plain_computation(name, tokenizer):
    """Every option alone, unpadded, through the whole model: equal for every batch size and style,
    to 1e-9 in float64 and to 1e-5 a token in fp32."""
    model, exact = random_model(name).eval(), random_model(name).eval().double()
    rows = {"medqa": medqa_rows(5), "truthfulqa_mc1": truthful_rows(5), "pubmedqa": []}
    for i in range(5):
        row = {"question": f"Is {i}?", "context": ["word " * (1 + 5 * i)], "final_decision": "no"}
        rows["pubmedqa"].append(row)
    read = evaluation.read_question
    for task_name, records in rows.items():
        task = evaluation.CHOICE_TASKS[task_name]
        questions = [read(task_name, i, "f", i, record) for i, record in enumerate(records)]
        shots, questions = questions[:1], questions[1:]
        encoded = evaluation.encode_questions(task, questions, shots, plain(tokenizer), 500)
        alone, tokens = {model: [], exact: []}, []
        for question in questions:
            prompt = tokenizer(evaluation.choice_prompt(task, question, shots) + "\n").input_ids
            for answer in evaluation.scored_answers(question, task.style):
                ids = torch.tensor([prompt + tokenizer(answer, add_special_tokens=False).input_ids])
                tokens.append(ids.shape[1] - len(prompt))
                for lm in alone:
                    with torch.no_grad():
                        logits = torch.log_softmax(lm(input_ids=ids).logits[0].double(), -1)
                    places = range(len(prompt), ids.shape[1])
                    alone[lm].append(sum(logits[t - 1, ids[0, t]].item() for t in places))
        options = [examples for examples, _ in encoded.values()]
        for batch_size in (1, 3, 64):
            for lm, tolerance in ((model, 1e-5), (exact, 1e-9)):
                scores = evaluation.option_scores(lm, options, batch_size, "fp32")
                assert list(encoded) == [0, 1, 2, 3]
                error = np.abs(np.concatenate(scores) - alone[lm])
                assert (error < tolerance * np.array(tokens)).all()


def test_right_and_wrong_answers_score_one_and_zero(tmp_path, write_jsonl, monkeypatch):
    rows = {"medqa": medqa_rows(13), "medqa5": medqa_rows(14, "ABCDE")}
    rows |= {"truthfulqa_mc1": truthful_rows(4), "truthfulqa_mc2": truthful_rows(4)}
    rows |= {"medmcqa": [], "pubmedqa": [], "bbq": []}
    for i in range(12):
        row = {"question": f"{i}?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": i % 4}
        rows["medmcqa"].append(row)
        row = {"QUESTION": f"{i}?", "CONTEXTS": ["c"], "LONG_ANSWER": "l"}
        rows["pubmedqa"].append(row | {"final_decision": ("yes", "no", "maybe")[i % 3]})
    for i in range(6):
        row = {"context": "c", "question": f"{i}?", "ans0": "a", "ans1": "b", "ans2": "c"}
        condition = ("ambig", "disambig")[i % 2]
        rows["bbq"].append(row | {"label": i % 3, "context_condition": condition})
    tasks = [f"{name}={write_jsonl(name + '.jsonl', records)}" for name, records in rows.items()]
    original = evaluation.encode_questions
    for sign, value in ((1, 1.0), (-1, 0.0)):
        truth = []

        def remember(task, questions, *rest, truth=truth, sign=sign):
            result = original(task, questions, *rest)
            truth[:] = [sign * np.where(questions[i].true, 50.0, 0.0) for i in result]
            return result

        monkeypatch.setattr(evaluation, "encode_questions", remember)
        monkeypatch.setattr(evaluation, "option_scores", lambda *_, truth=truth: truth)
        result = run(tmp_path / str(sign), "--tasks", *tasks)["tiny"]
        assert set(result) == set(rows)
        for name, row in result.items():
            key = "mc2" if name == "truthfulqa_mc2" else "accuracy"
            assert row[key] == pytest.approx(value, abs=1e-9)
        assert result["bbq"]["accuracy_ambig"] == result["bbq"]["accuracy_disambig"] == value
        assert result["medqa5"]["n"] == 5


def test_a_model_that_learnt_one_letter(tmp_path, write_jsonl, tokenizer):
    """A few steps of training towards B: the accuracy is the share of rows whose answer is B."""
    model = common.tiny_model(0)
    rows = medqa_rows(12)
    task = evaluation.CHOICE_TASKS["medqa"]
    questions = [evaluation.read_question("medqa", i, "f", i, row) for i, row in enumerate(rows)]
    encoded = evaluation.encode_questions(task, questions, [], plain(tokenizer), 400)
    examples = [options[1] for options, _ in encoded.values()]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(6):
        batch = common.collate(examples, "cpu")
        hidden, head = common.response_states(model, batch, "fp32")
        common.response_loss(hidden, batch.targets, head)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    flags = f"--model {name} --tasks medqa={write_jsonl('rows.jsonl', rows)} --shots 0"
    result = run(tmp_path / "run", flags)[name]["medqa"]
    folder = tmp_path / "run" / "predictions" / evaluation.safe_name(name)
    predictions = lines(folder / "medqa.jsonl")
    assert {line["prediction"][-1] for line in predictions} == {"B"}
    assert result["accuracy"] == pytest.approx(3 / 12)
    assert result["rounds"] == 1


def test_shots_that_do_not_fit_are_skipped(tmp_path, write_jsonl, tokenizer):
    rows = medqa_rows(4) + [medqa_rows(1)[0] | {"question": "long " * 200}]
    task = evaluation.CHOICE_TASKS["medqa"]
    questions = [evaluation.read_question("medqa", i, "f", i, row) for i, row in enumerate(rows)]
    shots, questions = questions[:3], questions[3:]
    encoded = evaluation.encode_questions(task, questions, shots, plain(tokenizer), 400)
    assert encoded[0][1] == 2  # 3 shots are too long,
    assert 1 not in encoded  # and the last question alone is
    text = tokenizer.decode(encoded[0][0][0].ids.tolist())
    assert "disease 0" not in text and "disease 1" in text and "disease 2" in text
    flags = f"--tasks medqa={write_jsonl('rows.jsonl', rows)} --shots 0 --max_length 400"
    result = run(tmp_path / "run", flags)["tiny"]["medqa"]
    assert result["skipped"] == 1 and result["n"] == 4


# -------------------------------------------------------------------------------------------- state


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt])
def test_interrupted_and_continued_is_the_same(
    tmp_path, write_jsonl, monkeypatch, model_folder, how
):
    monkeypatch.setattr(evaluation, "BLOCK", 4)
    medqa, chat = write_jsonl("medqa.jsonl", medqa_rows(21)), write_jsonl("chat.jsonl", CHAT)
    flags = f"--model {model_folder('gpt2')} --eval_data toy/copy --tasks medqa={medqa}"
    flags += f" mt_bench={chat} --limit 10 --shots 1 --max_new_tokens 8 --batch_size 1"
    first, second = tmp_path / "whole", tmp_path / "cut"
    whole = run(first, flags)
    add, calls = evaluation.Predictions.add, []

    def interrupt(self, rows):
        add(self, rows)
        calls.append(len(rows))
        if len(calls) in (2, 6, 14):  # in the domain, in a round of medqa, between chat questions
            with open(self.part, "ab") as stream:
                stream.write(b'{"index": 3, "half a li')
            raise how

    monkeypatch.setattr(evaluation.Predictions, "add", interrupt)
    for _ in range(3):
        with pytest.raises((how, SystemExit)):
            run(second, flags)
        assert not (second / "results.json").exists()
    assert len(list((second / "predictions").rglob("*.part"))) == 1
    again = run(second, flags)
    for path in first.rglob("*.jsonl"):
        one, other = lines(path), lines(second / path.relative_to(first))
        for line in one + other:
            line.pop("tstamp", None)
        assert one == other
    assert again == whole and sum(calls) == 10 + 30 + 3  # every row once

    def load(*_, **__):
        raise AssertionError("everything is there: no model is needed")

    monkeypatch.setattr(common, "load_model", load)
    assert run(second, flags) == whole


def test_continued_in_the_middle_of_a_block_is_the_same(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 8)
    monkeypatch.setattr(time, "time", lambda: 1e9)  # of an answer
    rows = write_jsonl("mc.jsonl", truthful_rows(20))
    chat = [{"question_id": i, "turns": [f"Say {'so ' * i}{i}.", "More."]} for i in range(7)]
    chat = write_jsonl("chat.jsonl", chat)
    flags = f"--eval_data toy/copy --tasks truthfulqa_mc2={rows} mt_bench={chat} --batch_size 3"
    flags += " --limit 20 --max_new_tokens 8 --template plain"
    whole, asked, generate = run(tmp_path / "whole", flags), [], evaluation.generate

    def counted(model, tokenizer, prompts, *how):
        asked.append(len(prompts))
        return generate(model, tokenizer, prompts, *how)

    monkeypatch.setattr(evaluation, "generate", counted)
    for kept in (0, 1, 5, 10):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(tmp_path / "whole", cut)
        (cut / "results.json").unlink()
        for path in (cut / "predictions").rglob("*.jsonl"):
            lines = path.read_bytes().splitlines(keepends=True)
            if len(lines) > kept:
                path.unlink()
                part = b"".join(lines[:kept]) + lines[kept][:20]  # the last one half written
                path.with_name(path.name + ".part").write_bytes(part)
        asked.clear()
        assert run(cut, flags) == whole
        for path in (tmp_path / "whole").rglob("*.json*"):
            assert path.read_bytes() == (cut / path.relative_to(tmp_path / "whole")).read_bytes()
        # batches of 3, 3 and 1 conversations of two turns, each whole or not at all
        assert asked == {0: [3, 3, 3, 3, 1, 1], 1: [3, 3, 3, 3, 1, 1], 5: [3, 3, 1, 1]}.get(
            kept, []
        )


def second_of(change):
    """-> function(lines of a file) -> them with another second one."""
    return lambda lines: [lines[0], json.dumps({**json.loads(lines[1]), **change}), *lines[2:]]


DAMAGE = [
    (lambda lines: lines[:-2], "is cut after line 10"),
    (lambda lines: lines[:1], "is cut after line 1"),
    (lambda lines: [*lines[:-1], lines[-1][:9]], "line 12: is no JSON"),
    (lambda lines: [*lines, lines[0]], "line 13: is a row that an earlier line holds"),
    (lambda lines: [lines[0], *lines[:-1]], "line 2: is a row that an earlier line holds"),
    (lambda lines: [lines[0], "\0" * 40, *lines[2:]], "line 2: is no JSON"),
    (lambda lines: [lines[0], "", *lines[2:]], "line 2: is no JSON"),
    (lambda lines: [lines[0], "[" * 100000, *lines[2:]], "line 2: is no JSON"),
    (lambda lines: [lines[0], "null", *lines[2:]], "line 2: is no row of this task"),
    (lambda lines: [lines[0], "[1]", *lines[2:]], "line 2: is no row of this task"),
    (lambda lines: [lines[0], '{"index": [1]}', *lines[2:]], "line 2: is no row of this task"),
    (second_of({"index": 12}), "line 2: is no row of this task"),
    (second_of({"index": "1"}), "line 2: is no row of this task"),
    (second_of({"nll": None}), "line 2: has no good 'nll'"),
    (second_of({"tokens": "3"}), "line 2: has no good 'tokens'"),
]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with predictions of 12 rows of a domain."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    run(folder, "--eval_data toy/copy --limit 12")
    return folder


@pytest.mark.parametrize("damage, message", DAMAGE)
def test_only_the_tasks_rows_are_believed(tmp_path, evaluated, capsys, damage, message):
    flags, folder = ["--eval_data", "toy/copy", "--limit", "12"], tmp_path / "run"
    shutil.copytree(evaluated, folder)
    path = folder / "predictions" / "tiny" / "copy.jsonl"
    before = path.read_bytes()
    bad = "".join(line + "\n" for line in damage(before.decode().splitlines()))
    path.write_text(bad)
    error = fails(capsys, folder, *flags)
    assert str(path) in error and message in error and "delete the file" in error
    assert path.read_text() == bad
    path.unlink()
    run(folder, *flags)
    assert path.read_bytes() == before
    if "line" not in message.split()[0]:  # a file that is only cut may go on
        return
    os.replace(path, f"{path}.part")
    Path(f"{path}.part").write_text(bad)
    assert message in fails(capsys, folder, *flags)


def test_other_damaged_files_are_named(tmp_path, evaluated, capsys):
    flags, folder = ["--eval_data", "toy/copy", "--limit", "12"], tmp_path / "run"
    shutil.copytree(evaluated, folder)
    for name in ("manifest.json", "results.json"):
        whole = (folder / name).read_bytes()
        for bad in (b"", whole[:-9], b"[]", b"null", b"\xff\xfe"):
            (folder / name).write_bytes(bad)
            assert f"{name}: is damaged" in fails(capsys, folder, *flags)
        (folder / name).write_bytes(whole)
    path = folder / "predictions" / "tiny" / "copy.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # a complete file is not cut to whole lines
    assert "is cut after line 11" in fails(capsys, folder, *flags)
    path.write_bytes((evaluated / "predictions" / "tiny" / "copy.jsonl").read_bytes() + b"{")
    assert "is cut after line 12" in fails(capsys, folder, *flags)


def test_one_process_writes_a_folder(tmp_path, evaluated, capsys):
    flags, folder = ["--eval_data", "toy/copy", "--limit", "12"], tmp_path / "run"
    shutil.copytree(evaluated, folder)
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    hold += "; print('held', flush=True); sys.stdin.read()"
    command, pipe = [sys.executable, "-c", hold, str(folder / ".lock")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"held\n"
        before = sorted(folder.rglob("*"))
        assert f"{folder}: another process writes into this folder" in fails(capsys, folder, *flags)
        assert sorted(folder.rglob("*")) == before
        other.communicate()
    assert run(folder, *flags) == run(folder, *flags)  # given up at the command's end


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
    one = run(tmp_path / "more", f"--model tiny --tasks medqa={rows}", *QUICK)
    both = run(tmp_path / "more", f"--model tiny {name} --tasks medqa={rows}", *QUICK)
    assert both["tiny"] == one["tiny"]  # a model is added to a folder
    assert both[name]["medqa"]["accuracy"] == result[name]["medqa"]["accuracy"]
    more = run(tmp_path / "more", "--eval_data", "toy/add#3")["tiny"]
    assert set(more) == {"add", "medqa"}  # and a task; what was there stays


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, write_jsonl, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    rows, chat = write_jsonl("medqa.jsonl", medqa_rows(14)), write_jsonl("chat.jsonl", CHAT)
    empty = write_jsonl("empty.jsonl", [{"question_id": 1, "turns": []}])
    for flags, message in (
        ("", "nothing to do"),
        ("--tasks medqa5", "medqa5=FILE"),
        (f"--tasks medqa={rows}x", "no such file"),
        (f"--tasks medqa={rows} medqa={rows}", "two tasks"),
        (f"--tasks mt_bench={rows}", "row 1: no question"),
        (f"--tasks medqa={rows} --judge x", "not among"),
        (f"--tasks mt_bench={chat} --judge x", "OPENAI_API_KEY"),
        (f"--model {tmp_path / 'none'} --tasks medqa={rows}", "no such folder"),
        (f"--tasks mt_bench={empty}", "row 1: no question"),
    ):
        assert message in fails(capsys, tmp_path / "run", flags)
        assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------- chat


def prompt_ids(question, tokenizer):
    return data.Template(tokenizer).prompt_ids(data.Row((("user", question),), ""))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_batched_answers_are_the_greedy_ones(name, tokenizer):
    """Left-padded batches against the model's own argmax, by token, without padding or cache."""
    alpaca = data.with_template(tokenizer, "alpaca")
    model = random_model(name).eval()
    model.config.use_cache = False
    texts = ("Hi.", "A longer question, so that the first is padded.", "Third")
    prompts = [prompt_ids(text, alpaca) for text in texts]
    answers = evaluation.generate(model, alpaca, prompts, 12, "fp32")
    for prompt, (answer, cut) in zip(prompts, answers):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
        assert not cut
    [(_, cut)] = evaluation.generate(model, alpaca, [list(range(5)) * 150], 12, "fp32")
    assert cut  # longer than 512 - 12


def test_answers_end_at_the_end_token(tokenizer):
    tokenizer = data.with_template(tokenizer, "plain")
    model, calls = common.tiny_model(0).eval(), []
    prompts = [prompt_ids("x" * n, tokenizer) for n in (3, 30)]

    def head(states):
        """Three times the letter a, then the end for the first prompt and b for the second, which
        ends two tokens later."""
        calls.append(1)
        names = ["a", "a"] if len(calls) < 4 else ["</s>", "b"] if len(calls) < 6 else ["b", "</s>"]
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(names))
        return 1e4 * torch.nn.functional.one_hot(ids, 259).float()[:, None]

    model.lm_head.forward = head
    answers = evaluation.generate(model, tokenizer, prompts, 10, "fp32")
    assert answers == [("aaa", False), ("aaabb", False)]
    assert len(calls) == 6


def test_formats_history_and_templates(tmp_path, write_jsonl, monkeypatch, model_folder):
    chat = write_jsonl("chat.jsonl", CHAT)
    rows = [{"instruction": "Name a tree.", "dataset": "koala"}]
    rows.append({"question_id": 3, "turns": ["And a bush?"]})
    alpaca, seen = write_jsonl("alpaca.jsonl", rows), []

    def answer(model, tokenizer, prompts, *_):
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [(f"answer {len(seen) - len(prompts) + i}", False) for i in range(len(prompts))]

    monkeypatch.setattr(evaluation, "generate", answer)
    run(tmp_path / "run", f"--tasks mt_bench={chat} alpaca_eval={alpaca} --batch_size 3")
    first, second, third = lines(tmp_path / "run" / "mt_bench" / "tiny.jsonl")
    assert set(first) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert first["model_id"] == "tiny"
    assert first["question_id"] == 7
    assert first["choices"] == [{"index": 0, "turns": ["answer 0", "answer 3"]}]
    assert third["choices"][0]["turns"] == ["answer 2"]
    assert len({line["answer_id"] for line in (first, second, third)}) == 3
    assert len(seen) == 7
    assert seen[4].index("2 + 3") < seen[4].index("answer 1") < seen[4].index("Double it.")
    assert "answer 0" not in seen[4]
    first = common.Row((("user", "Write a line."),), "")
    assert seen[0] == "<s>" + alpaca_text(first)  # a base model: Alpaca's template
    outputs = json.loads((tmp_path / "run" / "alpaca_eval" / "tiny.json").read_text())
    tree = {"instruction": "Name a tree.", "output": "answer 5", "dataset": "koala"}
    bush = {"instruction": "And a bush?", "output": "answer 6", "dataset": "alpaca"}
    both = {"generator": "tiny", "datasplit": "eval"}
    assert outputs == [tree | both, bush | both]
    tokenizer = common.tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    folder = tmp_path / "chat"
    common.tiny_model(0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run(tmp_path / "own", "--model", str(folder), "--tasks", f"mt_bench={chat}", "--limit", "1")
    assert seen[-1] == "[user]Write a line.[assistant]answer 7[user]Again, shorter.[assistant]"


# -------------------------------------------------------------------------------------------- judge


@pytest.fixture()
def endpoint(monkeypatch):
    """A server that speaks the protocol here -> (requests, faults to serve first)."""
    requests, faults, lock = [], [], threading.Lock()

    def completion(text):
        return json.dumps({"choices": [{"message": {"content": text}}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                fault = faults.pop(0) if faults else None
            headers, status, reply = {}, 200, completion("Fine.\nSCORE: 8")
            if fault == "timeout":
                time.sleep(0.5)
            elif fault == "malformed":
                reply = b'{"choices": [{"mess'
            elif fault == "empty":
                reply = b'{"choices": []}'
            elif fault == "cut":
                headers["Content-Length"] = "10000"
            elif fault == "unscored":
                reply = completion("I would rather not say.")
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
    assert len(requests) == 3
    assert requests[0]["path"] == "/v1/chat/completions"
    assert requests[0]["key"] == "Bearer secret"


def test_waits_double_or_follow_the_server(endpoint):
    requests, faults = endpoint
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    later = [{"Retry-After": value} for value in ("7", soon, "soon")]
    faults += [500, (429, later[0]), (429, later[1]), (503, later[2])]
    waits = []
    evaluation.ask("judge", [], os.environ["OPENAI_BASE_URL"], None, sleep=waits.append)
    assert waits[0] == 0.01
    assert waits[1] == 7.0
    assert 25 < waits[2] <= 30
    assert waits[3] == 0.08
    assert requests[0]["key"] is None


def test_refused_requests_are_not_repeated(endpoint):
    requests, faults = endpoint
    faults += [401]
    with pytest.raises(UserError, match="HTTP 401.*busy"):
        evaluation.ask("judge", [], os.environ["OPENAI_BASE_URL"], "wrong")
    assert len(requests) == 1
    faults += [500] * evaluation.ATTEMPTS
    with pytest.raises(UserError, match=f"no answer in {evaluation.ATTEMPTS} tries.*HTTP 500"):
        evaluation.ask("judge", [], os.environ["OPENAI_BASE_URL"], "secret", sleep=lambda _: None)


ADDRESSES = [
    ("nonsense", "no http:// or https:// address"),
    ("file:///etc/passwd", "no http:// or https:// address"),
    ("ftp://host/v1", "no http:// or https:// address"),
    ("http://", "no http:// or https:// address"),
    ("http://:80/v1", "no http:// or https:// address"),
    ("http://host:port/v1", "no http:// or https:// address"),
    ("http://[::1/v1", "no http:// or https:// address"),
    ("http://ho st/v1", "no http:// or https:// address"),
    ("http://h\u00f6st/v1", "no http:// or https:// address"),
    ("http://me:hunter2@127.0.0.1:9/v1", "holds a user, a password"),
    ("http://hunter2@127.0.0.1:9/v1", "holds a user, a password"),
    ("http://127.0.0.1:9/v1?key=hunter2", "holds a user, a password"),
]


@pytest.mark.parametrize("address, message", ADDRESSES)
def test_judge_addresses_are_checked_first(
    tmp_path, write_jsonl, monkeypatch, capsys, address, message
):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    flags = ["--tasks", f"mt_bench={write_jsonl('chat.jsonl', CHAT)}", "--judge", "judge"]
    error = fails(capsys, tmp_path / "run", *flags)
    assert "OPENAI_BASE_URL: " in error and message in error
    assert "hunter2" not in error and "sk-secret" not in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    error = fails(capsys, tmp_path / "run", *flags)
    assert "OPENAI_API_KEY: holds" in error and "sk-secret" not in error


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target", ["http://localhost:{}/x", "file:///etc/me:hunter2@x", "http://["]
)
def test_redirects_are_not_followed(endpoint, code, target):
    requests, faults = endpoint
    port = os.environ["OPENAI_BASE_URL"].split(":")[2].split("/")[0]
    faults += [(code, {"Location": target.format(port)})]
    with pytest.raises(UserError, match=f"HTTP {code} redirects to .*not followed") as error:
        evaluation.ask("judge", [], os.environ["OPENAI_BASE_URL"], "secret")
    assert len(requests) == 1
    assert "hunter2" not in str(error.value) and "secret" not in str(error.value)


def test_nothing_is_judged_twice(tmp_path, write_jsonl, endpoint, monkeypatch, capsys):
    requests, faults = endpoint
    chat = write_jsonl("chat.jsonl", CHAT)
    flags = ["--tasks", f"mt_bench={chat}", "--max_new_tokens", "4", "--judge", "judge/x"]
    monkeypatch.setattr(evaluation, "JUDGE_THREADS", 1)

    def generate(model, tokenizer, prompts, *_):
        return [(f"text {len(prompt)}", False) for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate", generate)
    faults += [None] * 9 + [400]  # the tenth request is refused: the command stops
    assert "HTTP 400" in fails(capsys, tmp_path / "run", *flags)
    assert len(requests) in (10, 11)  # one may have been on its way
    assert not (tmp_path / "run" / "results.json").exists()
    # one judgement stays without a score, one gets it at the second asking
    faults += ["unscored", "unscored", "unscored", None]
    result = run(tmp_path / "run", *flags)["tiny"]["mt_bench"]
    judged = lines(tmp_path / "run" / "judgements" / "judge-x" / "tiny.jsonl")
    keys = {line["key"] for line in judged}
    assert len(judged) == len(keys) == 25  # (2 + 2 + 1) answers x 5 rounds
    # each once; the refused one; one more for each of the two without a score at first
    assert len(requests) == 25 + 1 + 2
    assert result["score"] == 8.0
    assert result["rounds"] == 5
    assert result["unscored"] == 1
    assert result["judge"] == "judge/x"
    assert result["score_turn2"] == 8.0
    before = len(requests)
    assert run(tmp_path / "run", *flags)["tiny"]["mt_bench"] == result and len(requests) == before
    assert run(tmp_path / "run", *flags, "--rounds", "6")["tiny"]["mt_bench"]["rounds"] == 6
    assert len(requests) == before + 5
    assert {(request["model"], request["temperature"]) for request in requests} == {("judge/x", 0)}
    texts = {request["messages"][1]["content"] for request in requests}
    with_reference = [text for text in texts if "[reference" in text]
    assert len(with_reference) == 2  # both turns of the math question, no other
    assert all("2 + 3" in text for text in with_reference)
    second = next(text for text in with_reference if "to the second message" in text)
    assert "ten" in second
    assert "five" not in second
    answers = [second.index(f"[assistant, answer {i}]") for i in (1, 2)]
    assert answers[0] < second.index("Double it.") < answers[1]


def test_scores_by_turn_and_round():
    grades = [(1, 0, 0, 4.0), (1, 0, 1, 6.0), (1, 1, 0, 1.0), (1, 1, 1, 3.0)]
    grades += [(2, 0, 0, 10.0), (2, 0, 1, None)]
    keys = ("question_id", "turn", "round", "score")
    lines = [dict(zip(keys, values)) | {"judge": "j"} for values in grades]
    answers = [{"answers": ["a", "bcd"], "prompt_cut": True}]
    metrics, rows = evaluation.summarise_chat(None, answers, lines)
    assert metrics["score_turn1"] == pytest.approx(20 / 3)
    assert metrics["score_turn2"] == 2.0
    assert metrics["score"] == pytest.approx(24 / 5)
    assert metrics["score_std"] == pytest.approx(np.std([5.0, 4.5], ddof=1))
    assert metrics["unscored"] == 1
    assert metrics["prompts_cut"] == 1
    assert rows["score"] == {1: (14.0, 4, 1), 2: (10.0, 1, 2)}
    assert metrics["answer_characters"] == 2.0


# ----------------------------------------------------------------------------------- generated code


def no_box():
    raise UserError("neither works here")


def test_code_eval_speaks_the_metrics_protocol(monkeypatch):
    tests, programs = ["assert f(2) == 3"], [["def f(x): return x + 1", "def f(x): return x"]]
    metric = evaluation.CodeEval()
    monkeypatch.setattr(evaluation.CodeEval, "box", sandbox.unsafe)
    values, passed = metric.compute(references=tests, predictions=programs, k=[1, 2])
    assert values == {"pass@1": 0.5, "pass@2": 1.0} and passed == [[True, False]]


# ------------------------------------------------------------------------------------------ lm-eval


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
    rows, solved = [], [{"question": f"Train {i}?", "answer": f"So.\n#### {i}"} for i in range(5)]
    for i in range(6):
        rows.append({"question": f"What is {i} + 1?", "answer": f"Count on.\n#### {i + 1}"})
    test, train, stop = write_jsonl("test.jsonl", rows), write_jsonl("train.jsonl", solved), []
    bad = write_jsonl("bad.jsonl", [{"q": "1", "answer": "2"}])

    def answer(prompt):
        number = int(prompt.rsplit("What is ", 1)[1].split()[0])
        if number == 4 and not stop:
            stop.append(1)
            raise KeyboardInterrupt
        if number < 3:
            return f" I count.\n#### {number + 1}"
        return f" It is {number + 1}" if number == 3 else " No idea"

    prompts = answers_of(monkeypatch, answer)
    flags = ["--tasks", f"gsm8k={test},{train}"]
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *flags)
    asked = len(prompts)
    part = tmp_path / "run" / "predictions" / "tiny" / "gsm8k.jsonl.part"
    part.parent.mkdir(parents=True)
    part.write_text('{"task": "gsm8k", "from": "a command killed before it renamed this"}\n')
    result = run(tmp_path / "run", *flags)["tiny"]["gsm8k"]
    assert asked == 5
    assert len(prompts) == 5 + 2  # what was answered before the interrupt came from the cache
    assert result["exact_match,strict-match"] == 0.5
    assert result["exact_match,flexible-extract"] == pytest.approx(4 / 6)
    assert result["n"] == 6
    assert all(prompt.count("Train") == 5 for prompt in prompts)  # five shots, from the second file
    assert len(lines(tmp_path / "run" / "predictions" / "tiny" / "gsm8k.jsonl")) == 12
    assert result["exact_match,strict-match_low"] < 0.5
    before = len(prompts)
    run(tmp_path / "held", "--tasks", f"gsm8k={test}", "--shots", "2")
    assert len(prompts) == before + 4
    for prompt in prompts[before:]:
        shots, question = prompt.rsplit("Question:", 1)
        assert question not in shots
    assert "needs columns" in fails(capsys, tmp_path / "bad", "--tasks", f"gsm8k={bad}")
    assert "take local rows" in fails(capsys, tmp_path / "bad", "--tasks", f"drop={test}")
    assert "neither" in fails(capsys, tmp_path / "bad", "--tasks", "no_such_task")
    assert not (tmp_path / "bad").exists()


def test_humaneval_over_local_rows(tmp_path, write_jsonl, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    rows = []
    for i in range(4):
        row = {"task_id": f"T/{i}", "prompt": f"def add{i}(x):\n", "entry_point": f"add{i}"}
        row["canonical_solution"] = f"    return x + {i}\n"
        row["test"] = f"def check(candidate):\n    assert candidate(1) == {1 + i}\n"
        rows.append(row)
    path = write_jsonl("code.jsonl", rows)
    assert "add --allow_code" in fails(capsys, tmp_path / "run", "--tasks", f"humaneval={path}")
    assert not (tmp_path / "run").exists()
    solutions = {row["prompt"]: row["canonical_solution"] for row in rows}
    solutions |= {row["prompt"]: "    raise SystemExit(0)\n" for row in rows[::2]}
    answers_of(monkeypatch, lambda prompt: solutions[prompt])
    flags, boxes = ["--tasks", f"humaneval={path}", "--allow_code"], []
    monkeypatch.setattr(sandbox, "find_box", no_box)
    assert "neither works here" in fails(capsys, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
    result = run(tmp_path / "run", *flags, "unsafe")["tiny"]["humaneval"]
    assert result["pass@1,create_test"] == 0.5 and result["n"] == 4

    def box(folder):
        boxes.append(folder)
        return []

    monkeypatch.setattr(sandbox, "find_box", lambda: box)
    assert run(tmp_path / "boxed", *flags)["tiny"]["humaneval"] == result
    assert len(boxes) >= 4  # every program ran in it


def test_ifeval_over_local_rows(tmp_path, write_jsonl, monkeypatch):
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("langdetect")
    # these rows need no sentence splitter
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    monkeypatch.setattr(evaluation, "check_punkt", lambda: None)
    first = {"key": 1, "prompt": "No commas.", "kwargs": [{}]}
    first["instruction_id_list"] = ["punctuation:no_comma"]
    second = {"key": 2, "prompt": "Say tree twice, no commas."}
    second["kwargs"] = [{"keyword": "tree", "frequency": 2, "relation": "at least"}, {}]
    second["instruction_id_list"] = ["keywords:frequency", "punctuation:no_comma"]
    flags = f"--tasks ifeval={write_jsonl('rows.jsonl', [first, second])}"
    wrong = {False: "a, b", True: "tree and tree, yes"}
    answers_of(monkeypatch, lambda prompt: wrong["twice" in prompt])
    result = run(tmp_path / "run", flags)["tiny"]["ifeval"]
    assert result["prompt_level_strict_acc"] == 0.0
    assert result["inst_level_strict_acc"] == pytest.approx(1 / 3)
    answers_of(monkeypatch, lambda prompt: "tree tree")
    result = run(tmp_path / "right", flags)["tiny"]["ifeval"]
    assert result["prompt_level_strict_acc"] == result["inst_level_strict_acc"] == 1.0


def test_popqa_definition(tmp_path, write_jsonl, monkeypatch):
    pytest.importorskip("lm_eval")
    rows = []
    for i in range(6):
        answers = json.dumps([f"Town {i}", f"City {i}"])
        row = {"question": f"Where is {i}?", "obj": f"Town {i}", "possible_answers": answers}
        rows.append(row)
    file, said = write_jsonl("popqa.jsonl", rows), {True: " in city 1", False: " Town 0"}
    prompts = answers_of(monkeypatch, lambda prompt: said[prompt.endswith("1?\nA:")])
    result = run(tmp_path / "run", f"--tasks popqa={file},{file} --shots 2")["tiny"]["popqa"]
    assert result["accuracy"] == pytest.approx(2 / 6)
    assert all(prompt.count("Q: ") == 3 for prompt in prompts)


def test_the_ten_benchmarks_exist():
    pytest.importorskip("lm_eval")
    known = evaluation.task_manager().task_index
    names = [name.removeprefix("lm_eval/") for name in evaluation.DYNAMIXSFT]
    assert len(names) == 10
    assert [name for name in names if name not in known] == ["popqa"]


def test_lm_eval_is_asked_for_only_when_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    error = fails(capsys, tmp_path / "run", "--tasks", "gsm8k")
    assert "pip install 'lm_eval[ifeval,math]'" in error
