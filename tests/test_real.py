"""benchmarks/real.py: rows are cut without overlap, the NTP arm is SFTMix's reference, what is
finished is not run twice, and the numbers of its tables by hand."""

import contextlib
import io
import json

import numpy as np
import pytest
from conftest import to_jsonl
from scipy import stats

import sftmix
from test_run_sh import benchmark, printed


@pytest.fixture(scope="module")
def real():
    return benchmark("real")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """24 training and 8 held-out rows."""
    folder = tmp_path_factory.mktemp("rows")
    found = []
    for i in range(32):
        found.append({"instruction": f"Say {i}.", "output": "word " * (i % 5 + 1) + str(i)})
    to_jsonl(folder / "train.jsonl", found[:24])
    to_jsonl(folder / "test.jsonl", found[24:])
    return folder


@pytest.fixture(scope="module")
def flags(rows, tmp_path_factory):
    sets = ["--data", f"{rows}/train.jsonl", "--held_out", f"{rows}/test.jsonl"]
    folder = tmp_path_factory.mktemp("real")
    own = ["--dtype", "fp32", "--seeds", "1", "--output_dir", str(folder), "--no_cache"]
    return folder, ["--model", "tiny", *sets, *own]


def test_cut(real, tmp_path, capsys):
    records = []
    for i in range(60):
        text = "x" * (200 * (i % 2))  # every other row is long
        records.append({"source": "ab"[i % 4 // 2], "instruction": f"{i} {text}", "output": "y"})
    for i in range(14):  # one less than three times what is held out
        records.append({"source": "c", "instruction": f"c {i}", "output": "y"})
    records += records[:10]  # twice the same text
    path = to_jsonl(tmp_path / "all.jsonl", records)
    flags = ["cut", "--rows", str(path), "--characters", "150", "--train", "12", "--test", "5"]
    real.main([*flags, "--source_column", "source", "--output_dir", str(tmp_path / "out")])
    train = lines(tmp_path / "out" / "train.jsonl")
    tests = {name: lines(tmp_path / "out" / f"test-{name}.jsonl") for name in "ab"}
    assert len(train) == 12
    for name, own in tests.items():
        assert len(own) == 5 and {row["source"] for row in own} == {name}
    everything = [row["instruction"] for row in [*train, *tests["a"], *tests["b"]]]
    assert len(set(everything)) == 22
    assert all(len(text) < 10 for text in everything)
    assert {row["source"] for row in train} == {"a", "b"}
    assert "'c' is left out: 14 rows are fewer than 3 x --test 5" in capsys.readouterr().out
    assert not (tmp_path / "out" / "test-c.jsonl").exists()


def test_flags_of_the_scripts_pass_through(real):
    """--reference is dynamics.py's, and no short form of --references."""
    needed = ["--model", "tiny", "--data", "a", "--held_out", "b"]
    args = real.parse_args(["constraints", *needed, "--reference", "code=-10%"])
    assert args.flags == ["--reference", "code=-10%"]


def test_the_ntp_arm_is_the_reference(real, flags, tmp_path):
    """Its perplexities on the way, and its losses, are those of SFTMix's own reference."""
    folder, given = flags
    cell = ["--lr", "1e-3", "--epochs", "3", "--variants", "NTP", "SFTMix", "random halves"]
    printed(real.main, "arms", *given, *cell)
    own = tmp_path / "own"
    shared = ["--dtype", "fp32", "--batch_size", "16", "--max_length", "512", "--no_cache"]
    recipe = ["--lr", "1e-3", "--epochs", "3", "--seed", "0", *shared, "--output_dir", str(own)]
    with contextlib.redirect_stdout(io.StringIO()):
        sftmix.main(["--model", "tiny", "--data", given[3], "--eval_data", given[5], *recipe])
    (kept,) = folder.glob("NTP-*.confidence.jsonl")
    one, other = lines(kept)[1:], lines(own / "confidence.jsonl")[1:]
    assert len(one) == 24
    assert [line["perplexity"] for line in one] == [line["perplexity"] for line in other]
    results = {line["name"].split("-lr")[0]: line for line in lines(folder / "results.jsonl")}
    summary = json.loads((own / "summary.json").read_text(encoding="utf-8"))
    assert results["SFTMix"]["summary"]["eval"] == summary["eval"]
    # the losses of rows, of which the run's own loss is the mean
    for line in (results["NTP"], results["SFTMix"]):
        nll = line["summary"]["eval"]["test"]["nll"]
        assert real.mean_loss(line, "held_out") == pytest.approx(nll, abs=1e-6)
    assert results["SFTMix"]["held_out"] != results["random-halves"]["held_out"]
    # seen for free: each row once an epoch
    (seen,) = folder.glob("NTP-*.seen.jsonl")
    indices = [index for line in lines(seen) for index in line["index"]]
    assert sorted(indices) == sorted([*range(24)] * 3)
    # before its last step a row's loss is above that of the model that it ended with, on average
    last = [nll for line in lines(seen)[-2:] for nll in line["nll"]]
    assert np.mean(last) > np.mean(results["NTP"]["train"]["nll"])


def test_what_is_finished_is_not_run_again(real, flags, monkeypatch):
    folder, given = flags
    cell = ["--lr", "1e-3", "--epochs", "3", "--variants", "NTP", "SFTMix", "random halves"]
    text = printed(real.main, "arms", *given, *cell)

    def fails(*_):
        pytest.fail("a run was made again")

    monkeypatch.setattr(real.shared, "run", fails)
    assert printed(real.main, "arms", *given, *cell) == text
    assert not list(folder.glob("*/final"))
    assert (folder / "arms.png").stat().st_size > 5000
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
        real.main(["arms", *given, *cell, "--weight_decay", "0.5"])
    assert "was run with other flags" in error.getvalue()


def line_of(nll, tokens):
    return {"held_out": {"nll": nll, "tokens": tokens}}


def test_numbers_of_the_tables(real):
    assert real.mean_loss(line_of([1.0, 4.0], [3, 1]), "held_out") == 1.75
    values = [0.1, 0.3, 0.8]
    mean, low, high = real.t_interval(values)
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (low, high) == pytest.approx(expected) and mean == pytest.approx(0.4)
    one = [line_of([1.0, 2.0], [1, 1]), line_of([3.0, 1.0], [1, 1])]
    other = [line_of([0.5, 2.0], [1, 1]), line_of([3.0, 2.0], [1, 1])]
    assert real.differences(one, other) == [0.25, -0.5]
    assert real.differences(one, other, {0: [0], 1: [1]}) == [0.5, -1.0]


def test_quartiles_are_of_the_other_seeds(real):
    """Rows by the perplexity under the NTP models of the other seeds; of one seed, the base's."""
    lines = [line_of(list(nll), [1] * 4) for nll in ([4, 3, 2, 1], [1, 2, 3, 4])]
    base = line_of([2, 1, 4, 3], [1] * 4)
    found = real.quartiles(base, lines)
    assert [quarter[0].tolist() for quarter in found] == [[0], [1], [2], [3]]
    assert [quarter[1].tolist() for quarter in found] == [[3], [2], [1], [0]]
    alone = real.quartiles(base, lines[:1])
    assert [quarter[0].tolist() for quarter in alone] == [[1], [0], [3], [2]]


def test_a_run_needs_its_flags(real):
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
        real.main(["grid", "--model", "tiny"])
    assert "grid needs --data" in error.getvalue()


def test_losses_by_domain(real):
    def line(math, code):
        targets = {"math": {"before": 2.0, "after": math}}
        held = {"code": {"before": 3.0, "after": code, "reference": 2.7, "violation": 0}}
        return {"summary": {"report": {"targets": targets, "constraints": held}}}

    rows = real.domain_rows({"one": [line(1.0, 2.5), line(1.5, 2.6)], "two": [line(1.2, 2.8)]})
    assert rows[0] == ["before training", "2.0000", "3.0000"]
    assert rows[1] == ["level", "-", "2.7000"]
    assert rows[2:] == [["one", "1.2500", "2.5500"], ["two", "1.2000", "2.8000"]]
