"""eval.py: statistics by hand, domains, resume, chat, lm-eval's generating tasks. Multiple choice
is in test_lm_tasks.py, the judge in test_judge.py."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import alpaca_text, random_model

import common
import data
import eval as evaluation
import intervals
import lm_tasks
import plots
import predictions
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
    assert intervals.perplexity_reduction(math.log(8.0), math.log(10.0)) == pytest.approx(20.0)
    assert sandbox.pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert sandbox.pass_at_k(5, 2, 3) == pytest.approx(0.9)


def test_intervals_at_the_edges():
    """Wilson's interval by hand, and where it takes the bootstrap's place."""
    low, high = intervals.wilson(0.0, 4)
    assert low == 0.0 and high == pytest.approx(1.959964**2 / (4 + 1.959964**2))
    assert intervals.wilson(1.0, 4) == pytest.approx((1 - high, 1.0))
    low, high = intervals.wilson(0.4, 100)  # a solution of (p - 0.4)² = z² p (1 - p) / n
    for end in (low, high):
        assert (end - 0.4) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 100)

    def confidence(*sums, weights=1, clusters=None):
        rows = {i: (total, weights, i) for i, total in enumerate(sums)}
        return intervals.confidence(rows)

    assert confidence(0, 0, 0, 0) == intervals.wilson(0.0, 4)
    assert confidence(1, 0, 0, 1) == intervals.wilson(0.5, 4)
    assert confidence(3, 3, 3, weights=3) == intervals.wilson(1.0, 3)  # three rounds of three rows
    assert confidence(2, 1, 3, weights=3) == intervals.wilson(2 / 3, 3)
    rows = {i: (0, 1 + i, i) for i in range(5)}  # no token right of 15
    assert intervals.confidence(rows) == intervals.wilson(0.0, 5)
    turns = {i: (1, 1, i // 2) for i in range(8)}  # two turns a dialogue
    assert intervals.confidence(turns) == intervals.wilson(1.0, 4)
    low, high = confidence(0.2, 0.9, 0.4)  # MC2 is no count
    assert 0.2 <= low < 0.5 < high <= 0.9
    low, high = confidence(4, 9, weights=5)  # grades are none
    assert (low, high) == (0.8, 1.8)


def test_a_difference_without_spread_is_not_certain():
    wrong, right = ({i: (hit, 1, i) for i in range(4)} for hit in (0, 1))
    room = intervals.wilson(0.0, 4)[1]
    both = intervals.difference("acc", wrong, wrong, 0)
    assert both == {"acc_diff": 0.0, "acc_diff_low": -room, "acc_diff_high": room}
    better = intervals.difference("acc", right, wrong, 0)
    assert better == {"acc_diff": 1.0, "acc_diff_low": 1.0 - room, "acc_diff_high": 1.0}
    losses = {i: (2.5, 1, i) for i in range(4)}
    equal = intervals.difference("nll", losses, losses, 0)
    assert equal["nll_diff_low"] == equal["nll_diff_high"] == 0.0


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 900)
    samples = intervals.bootstrap_ratios([values], [np.ones(900)], range(900))
    low, high = intervals.interval(samples[:, 0])
    error = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_bootstrap_is_weighted_clustered_and_paired():
    rng = np.random.default_rng(1)
    tokens, noise = rng.integers(1, 50, 300), rng.normal(0, 1, 300)
    one = (2.0 + noise) * tokens
    other = (1.9 + noise) * tokens  # the same noise: paired, the difference is exact
    samples = intervals.bootstrap_ratios([one, other], [tokens, tokens], range(300))
    assert np.allclose(samples[:, 0] - samples[:, 1], 0.1) and samples[:, 0].std() > 0.01
    rows = np.arange(300)
    once = intervals.bootstrap_ratios([one], [tokens], rows)[:, 0]
    four, four_tokens = [np.tile(one, 4)], [np.tile(tokens, 4)]  # turns of a dialogue, all alike
    copies = intervals.bootstrap_ratios(four, four_tokens, np.tile(rows, 4))[:, 0]
    assert np.allclose(once, copies)  # as many independent units as before
    apart = intervals.bootstrap_ratios(four, four_tokens, range(1200))[:, 0]
    assert apart.std() < 0.6 * once.std()
    ratios = intervals.bootstrap_ratios([[1.0, 9.0]], [[1.0, 3.0]], [0, 0])
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


# -------------------------------------------------------------------------------------------- state


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt])
def test_interrupted_and_continued_is_the_same(
    tmp_path, write_jsonl, monkeypatch, model_folder, how
):
    monkeypatch.setattr(evaluation, "BLOCK", 4)
    flags = f"--model {model_folder('gpt2')} --eval_data toy/copy toy/add --limit 10"
    flags += (
        f" --tasks mt_bench={write_jsonl('chat.jsonl', CHAT)} --max_new_tokens 8 --batch_size 1"
    )
    first, second = tmp_path / "whole", tmp_path / "cut"
    whole = run(first, flags)
    add, calls = predictions.Predictions.add, []

    def interrupt(self, rows):
        add(self, rows)
        calls.append(len(rows))
        if len(calls) in (2, 5, 8):  # in a domain, in another, between chat questions
            with open(self.part, "ab") as stream:
                stream.write(b'{"index": 3, "half a li')
            raise how

    monkeypatch.setattr(predictions.Predictions, "add", interrupt)
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
    assert again == whole and sum(calls) == 10 + 10 + 3  # every row once

    def load(*_, **__):
        raise AssertionError("everything is there: no model is needed")

    monkeypatch.setattr(common, "load_model", load)
    assert run(second, flags) == whole


def test_continued_in_the_middle_of_a_block_is_the_same(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 8)
    monkeypatch.setattr(time, "time", lambda: 1e9)  # of an answer
    chat = [{"question_id": i, "turns": [f"Say {'so ' * i}{i}.", "More."]} for i in range(7)]
    chat = write_jsonl("chat.jsonl", chat)
    flags = f"--eval_data toy/copy --tasks mt_bench={chat} --batch_size 3"
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
    pytest.importorskip("lm_eval")
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
    assert both[name]["medqa"]["acc"] == result[name]["medqa"]["acc"]
    more = run(tmp_path / "more", "--eval_data", "toy/add#3")["tiny"]
    assert set(more) == {"add", "medqa"}  # and a task; what was there stays


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, write_jsonl, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
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
        (f"--tasks mt_bench={chat} --judge_prompts x", "--judge_prompts: are for --judge"),
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


def test_scores_by_turn_and_round():
    grades = [(1, 0, 0, 4.0), (1, 0, 1, 6.0), (1, 1, 0, 1.0), (1, 1, 1, 3.0)]
    grades += [(2, 0, 0, 10.0), (2, 0, 1, None)]
    keys = ("question_id", "turn", "round", "score")
    made = {"judge": "j", "prompts": "ours"}
    lines = [dict(zip(keys, values)) | made for values in grades]
    answers = [{"answers": ["a", "bcd"], "prompt_cut": True}]
    metrics, rows = evaluation.summarise_chat(None, answers, lines)
    assert metrics["score_turn1"] == pytest.approx(20 / 3)
    assert metrics["score_turn2"] == 2.0
    assert metrics["score"] == pytest.approx(24 / 5)
    assert metrics["score_std"] == pytest.approx(np.std([5.0, 4.5], ddof=1))
    assert metrics["unscored"] == 1
    assert metrics["judge_prompts"] == "ours"
    assert metrics["prompts_cut"] == 1
    assert rows["score"] == {1: (14.0, 4, 1), 2: (10.0, 1, 2)}
    assert metrics["answer_characters"] == 2.0


def test_fastchats_ids_are_exported(tmp_path, write_jsonl, monkeypatch):
    """The hub's copy of MT-Bench has ids of its own; FastChat's are found by a question's text."""
    first = "Compose an engaging travel blog post about a recent trip to Hawaii, and more."
    last = "Suggest five award-winning documentary films  with brief background descriptions."
    rows = [
        {"prompt": [text, "Shorter."], "prompt_id": i * 10**6}
        for i, text in ((3, last), (7, first))
    ]
    rows.append({"prompt": ["None of FastChat's questions."], "prompt_id": 5})
    rows.append({"turns": [first], "question_id": 9})  # who says an id means it
    monkeypatch.setattr(evaluation, "generate", lambda *args: [("a", False)] * len(args[2]))
    run(tmp_path / "run", f"--tasks mt_bench={write_jsonl('hub.jsonl', rows)}")
    exported = lines(tmp_path / "run" / "mt_bench" / "tiny.jsonl")
    assert [line["question_id"] for line in exported] == [160, 81, 5, 9]
    assert len(set(evaluation.MT_BENCH)) == 80


def test_alpaca_evals_command_has_a_folder_a_model(tmp_path, write_jsonl, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "generate", lambda *args: [("a", False)] * len(args[2]))
    rows = write_jsonl("rows.jsonl", [{"instruction": "Name a tree."}])
    run(tmp_path / "run", f"--tasks alpaca_eval={rows}")
    folder = tmp_path / "run" / "alpaca_eval"
    command = f"alpaca_eval --model_outputs {folder}/tiny.json --output_path {folder}/tiny "
    assert f"{command}--is_overwrite_leaderboard" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- versions


def test_versions_are_kept_and_compared(tmp_path, evaluated, monkeypatch, capsys):
    flags, folder = ["--eval_data", "toy/copy", "--limit", "12"], tmp_path / "run"
    shutil.copytree(evaluated, folder)
    versions = run(folder, *flags)["tiny"]["copy"]["versions"]
    assert versions["torch"] == torch.__version__ and len(versions["template"]) == 8
    documented = tmp_path / "documented.json"
    monkeypatch.setattr(evaluation, "DOCUMENTED", documented)
    there = {**versions, "torch": torch.__version__.split("+")[0]}
    documented.write_text(json.dumps({**there, "definitions": {"gsm8k": "3.0 abc"}}))
    capsys.readouterr()
    run(folder, *flags)
    assert "warning" not in capsys.readouterr().out
    documented.write_text(json.dumps({**versions, "torch": "1.0", "definitions": {}}))
    run(folder, *flags)  # nothing is computed: they are those that the predictions were made with
    assert f"torch {versions['torch']} (there 1.0)" in capsys.readouterr().out
    row = {"versions": {"lm_eval": "1", "definitions": {"gsm8k": "3.0 def"}}}
    documented.write_text(json.dumps({"lm_eval": "1", "definitions": {"gsm8k": "3.0 abc"}}))
    evaluation.warn_of_versions({"tiny": {"gsm8k": row}})
    assert "gsm8k 3.0 def (there 3.0 abc)" in capsys.readouterr().out


def test_models_are_named_shortly(tmp_path, model_folder, capsys):
    names = {"runs/ntp/final": "ntp", "runs/sftmix/final/": "sftmix", "meta/Llama-3": "Llama-3"}
    assert plots.short_names(names) == names
    same = {"a/x/final": "a/x", "b/x/final": "b/x", "c/y": "c/y"}
    assert plots.short_names(same) == same
    assert plots.short_names(["tiny"]) == {"tiny": "tiny"}
    name = model_folder("gpt2")
    run(tmp_path / "run", f"--model tiny {name} --eval_data toy/copy --limit 4")
    header = capsys.readouterr().out.split("task ")[1].split("\n")[0]
    assert header.split()[-2:] == ["tiny", Path(name).name]


# ----------------------------------------------------------------------------------- generated code


def no_box():
    raise UserError("neither works here")


def test_code_eval_speaks_the_metrics_protocol(monkeypatch):
    tests, programs = ["assert f(2) == 3"], [["def f(x): return x + 1", "def f(x): return x"]]
    metric = sandbox.CodeEval()
    monkeypatch.setattr(sandbox.CodeEval, "box", sandbox.unsafe)
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
    assert len(prompts) == before + 6  # every row, by shots of the others
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
    monkeypatch.setattr(lm_tasks, "check_needs", lambda *_: None)
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
    known = lm_tasks.index_of(True).task_index
    assert len(lm_tasks.DYNAMIXSFT) == 10
    assert [name for name in lm_tasks.DYNAMIXSFT if name not in known] == ["popqa"]
    assert all(base in known for base, *_ in lm_tasks.CHOICES.values())


def test_lm_eval_is_asked_for_only_when_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    lm_tasks.index_of.cache_clear()
    for task in ("gsm8k", "medqa", "mine=rows.jsonl"):
        error = fails(capsys, tmp_path / "run", "--tasks", task)
        assert "pip install 'lm_eval[ifeval,math]'" in error
