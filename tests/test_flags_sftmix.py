"""Every flag of sftmix.py, bound to what it does: what reaches the loss, which rows, which halves.

The runs are seen from outside (traced.py). What they should have done is computed here in float64
from the texts of the rows, by other means than the script's.
"""

import numpy as np
import pytest
import torch
import transformers
from conftest import own_nll, read_json, read_jsonl, records, same, to_jsonl, values, weights

import data
import sftmix
from traced import TOKENIZER, traced

# Twelve rows. Their three perplexities rank them otherwise by mean than by median, by any single
# one, by the mean of the logarithms, and than by their place in the data.
WORDS = np.random.default_rng(0)
LENGTHS = [3, 9, 5, 1, 7, 4, 8, 2, 6, 5, 3, 9]
ROWS = []
for number, size in enumerate(LENGTHS):
    word = "".join(WORDS.choice(list("abcdefghijklmnopqrstuvwxyz"), size))
    ROWS.append({"prompt": f"say {'very ' * (number % 3)}{number}", "response": word})
TEXTS = [row["response"] for row in ROWS]
PERPLEXITY = np.random.default_rng(30).lognormal(2.0, 1.0, (3, len(ROWS)))
QUICK = ["--template", "plain", "--batch_size", "6", "--micro_batch_size", "4", "--log_every", "1"]


def ranked(numbers):
    """Texts by rising number (perplexity: the most confident first)."""
    return [TEXTS[i] for i in sorted(range(len(numbers)), key=lambda i: numbers[i])]


MOST_CONFIDENT_FIRST = ranked(sum(PERPLEXITY))
CONFIDENT, UNCONFIDENT = set(MOST_CONFIDENT_FIRST[:6]), set(MOST_CONFIDENT_FIRST[6:])


def write_confidence(path, file, perplexity):
    """A confidence file by hand for the rows of `file`, the last row first, nan ones missing."""
    count, rows = perplexity.shape
    fingerprint = data.fingerprint(data.load_data([file]))
    lines = [{"fingerprint": fingerprint, "rows": rows, "num_checkpoints": count}]
    for i in reversed(np.flatnonzero(np.isfinite(perplexity).all(0)).tolist()):
        lines.append({"index": i, "perplexity": perplexity[:, i].tolist()})
    return to_jsonl(path, lines)


@pytest.fixture(scope="module")
def files(tmp_path_factory, model_folder):
    """Flags by name: the model and the rows; and the same with our confidences."""
    folder = tmp_path_factory.mktemp("rows")
    rows = to_jsonl(folder / "rows.jsonl", ROWS)
    split = write_confidence(folder / "confidence.jsonl", rows, PERPLEXITY)
    plain = [*QUICK, "--model", model_folder("llama"), "--data", rows]
    return {"plain": plain, "split": [*plain, "--confidence", split], "folder": folder}


def run(folder, *flags):
    """-> the steps of a run"""
    return traced("sftmix", *flags, "--output_dir", str(folder))


def test_the_rows_tell_the_rankings_apart():
    others = [np.median(PERPLEXITY, 0), np.log(PERPLEXITY).sum(0), PERPLEXITY.max(0)]
    others += [*PERPLEXITY, range(12), LENGTHS]
    for other in others:
        assert set(ranked(other)[:6]) not in (CONFIDENT, UNCONFIDENT)
    assert len(set(TEXTS)) == 12


# ------------------------------------------------------------------------ the recipe

RECIPE = dict(
    model="tiny",
    data=["toy"],
    eval_data=[],
    source_column=None,
    template="auto",
    max_length=None,
    show_batch=False,
    save_dtype="auto",
    no_cache=False,
    epochs=3.0,
    max_steps=None,
    batch_size=32,
    micro_batch_size=8,
    lr=2e-6,
    weight_decay=0.1,
    schedule="cosine",
    warmup_ratio=0.1,
    max_grad_norm=1.0,
    dtype="auto",
    gradient_checkpointing=False,
    lora_rank=0,
    lora_alpha=None,
    lora_dropout=0.0,
    seed=0,
    output_dir=None,
    resume=None,
    log_every=10,
    eval_every=0,
    save_every=500,
    save_minutes=15.0,
    keep_checkpoint=False,
    track=None,
    alpha=0.5,
    mu=0.2,
    num_checkpoints=5,
    ref_model=None,
    confidence=None,
    partition="confidence",
    split="halves",
    ntp_on="full",
    mixup_norm="batch",
    select=None,
    select_n=1000,
)


def test_the_papers_recipe():
    """§4.1, as it stands after parsing; a flag that is new belongs here, too."""
    assert vars(sftmix.parse_args([])) == {**RECIPE, "given": {}}
    assert vars(sftmix.parse_args(["--max_steps", "7"])) == {
        **RECIPE,
        "max_steps": 7,
        "epochs": None,
        "given": {"max_steps": 7},
    }


def test_conflicting_flags_are_refused(capsys):
    cases = {
        "leaves no loss": ["--mu", "0", "--ntp_on", "none"],
        "goes with --ntp_on full": ["--split", "thirds", "--ntp_on", "confident"],
        "batch_size 7: must be even": ["--batch_size", "7"],
        "micro_batch_size 3: must be even": ["--micro_batch_size", "3"],
        "takes the place of --ref_model and --partition": ["--confidence", "f", "--ref_model", "m"],
        "place of --ref_model and": ["--confidence", "f", "--partition", "random"],
    }
    for message, flags in cases.items():
        with pytest.raises(SystemExit):
            sftmix.parse_args(flags)
        assert message in capsys.readouterr().err
    sftmix.parse_args(["--mu", "0", "--batch_size", "7", "--micro_batch_size", "1"])


# ------------------------------------------------------------------------ what reaches the loss


def own_states(model, response):
    """Z (n, H) that predict a row's response, end token included, and its tokens (n,)."""
    (row,) = [row for row in ROWS if row["response"] == response]
    prompt, answer = TOKENIZER([row["prompt"] + "\n", response], add_special_tokens=False).input_ids
    ids = torch.tensor([TOKENIZER.bos_token_id, *prompt, *answer, TOKENIZER.eos_token_id])
    states = model.model(ids[None]).last_hidden_state[0]
    return states[len(prompt) : -1], ids[len(prompt) + 1 :]


def by_hand(folder, pairs, ntp_on, mu, rule):
    """§3.3 in float64 on the model of a folder. pairs: [(confident, unconfident, λ)], of which ""
    is nobody; ntp_on: the texts that get NTP -> metrics as they are logged, gradients by name."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double()
    head, eye = model.lm_head.weight, torch.eye(259, dtype=torch.float64)
    entropy = torch.nn.functional.cross_entropy
    ntp = mixup = torch.zeros((), dtype=torch.float64)
    tokens = scored = positions = 0
    for confident, unconfident, lam in pairs:
        sides = [own_states(model, side) for side in (confident, unconfident) if side]
        for side, (states, targets) in zip((s for s in (confident, unconfident) if s), sides):
            tokens += len(targets)
            if side in ntp_on:
                scored += len(targets)
                ntp = ntp + entropy(states @ head.T, targets, reduction="sum")
        if mu and len(sides) == 2:
            (z_c, y_c), (z_u, y_u) = sides
            n = min(len(y_c), len(y_u))
            z = lam * z_c[:n] + (1 - lam) * z_u[:n]
            y = lam * eye[y_c[:n]] + (1 - lam) * eye[y_u[:n]]
            positions += n
            mixup = mixup + entropy(z @ head.T, y, reduction="sum")
    if rule == "batch":
        loss = (ntp + mu * mixup) / tokens
    else:
        loss = (ntp / scored if scored else 0.0) + (mu * mixup / positions if positions else 0.0)
    loss.backward()
    metrics = {"loss": loss.item()}
    if scored:
        metrics["ntp"] = ntp.item() / scored
    if positions:
        metrics["mixup"] = mixup.item() / positions
    gradients = {name: p.grad for name, p in model.named_parameters()}
    metrics["grad_norm"] = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    return metrics, gradients


BOTH = CONFIDENT | UNCONFIDENT
# flags -> who gets NTP, μ, the rule of the normalisers
EQUATIONS = [
    ("", BOTH, 0.2, "batch"),
    ("--mu 0.7", BOTH, 0.7, "batch"),
    ("--mixup_norm mean", BOTH, 0.2, "mean"),
    ("--ntp_on confident", CONFIDENT, 0.2, "batch"),
    ("--ntp_on unconfident", UNCONFIDENT, 0.2, "batch"),
    ("--ntp_on none --mu 1", set(), 1.0, "batch"),
    ("--ntp_on confident --mixup_norm mean", CONFIDENT, 0.2, "mean"),
    ("--ntp_on none --mixup_norm mean", set(), 0.2, "mean"),
    ("--split thirds", BOTH, 0.2, "batch"),
    ("--split thirds --mixup_norm mean", BOTH, 0.2, "mean"),
    ("--mu 0", BOTH, 0.0, "batch"),
    ("--mu 0 --ntp_on full --mixup_norm mean", BOTH, 0.0, "mean"),
    ("--mu 0 --ntp_on confident", CONFIDENT, 0.0, "batch"),
    ("--mu 0 --ntp_on unconfident", UNCONFIDENT, 0.0, "batch"),
]


@pytest.mark.parametrize("flags, ntp_on, mu, rule", EQUATIONS)
def test_loss_and_gradient_of_the_first_step(
    tmp_path, files, model_folder, flags, ntp_on, mu, rule
):
    """The pairs and λ that reached the loss, put into §3.3 by hand, give the logged metrics and
    the gradient, over several micro-batches."""
    steps = run(tmp_path / "run", *files["split"], "--max_steps", "2", *flags.split())
    first = steps[0]
    assert len(first.losses) > 1
    metrics, gradients = by_hand(model_folder("llama"), first.pairs, ntp_on, mu, rule)
    logged = {"step": 1, **{f"train/{key}": value for key, value in metrics.items()}}
    record = records(tmp_path / "run")[0]
    others = {"train/lr", "epoch", "examples", "tokens"}
    assert {key: record[key] for key in record if key not in others} == pytest.approx(logged, 1e-4)
    for name, gradient in gradients.items():
        limit = 1e-4 * gradient.abs().max()
        assert (first.gradients[name] - gradient).abs().max() < limit, name
    assert first.norm == pytest.approx(metrics["grad_norm"], 1e-4)


def check_pairs(steps, confident, unconfident, rest=()):
    """Over an epoch every text comes once; pairs are of one confident and one unconfident text, as
    many in every batch as there can be; the rest is alone."""
    seen = []
    for step in steps:
        couples = [(c, u) for c, u, _ in step.pairs if c and u]
        alone = [c or u for c, u, _ in step.pairs if not (c and u)]
        assert {c for c, _ in couples} <= set(confident)
        assert {u for _, u in couples} <= set(unconfident)
        assert len(couples) * len(steps) == pytest.approx(len(unconfident), abs=len(steps) - 1)
        assert set(alone) <= set(rest) | set(confident) - {c for c, _ in couples}
        seen += [text for pair in couples for text in pair] + alone
    assert sorted(seen) == sorted([*confident, *unconfident, *rest])


def test_pairs_of_both_halves(tmp_path, files):
    """--confidence: upper with lower half by the mean of its perplexities, every example once an
    epoch, otherwise paired in the next."""
    steps = run(tmp_path / "run", *files["split"], "--epochs", "2")
    assert [len(step.texts) for step in steps] == [6] * 4
    epochs = [set(), set()]
    for epoch, couples in enumerate(epochs):
        part = steps[2 * epoch : 2 * epoch + 2]
        check_pairs(part, CONFIDENT, UNCONFIDENT)
        couples.update((c, u) for step in part for c, u, _ in step.pairs)
    assert epochs[0] != epochs[1]
    assert not values(tmp_path / "run", "reference/loss")  # no reference was trained
    assert {loss.mu for step in steps for loss in step.losses} == {0.2}


def test_thirds_mix_top_with_bottom(tmp_path, files):
    steps = run(tmp_path / "run", *files["split"], "--epochs", "1", "--split=thirds")
    top, middle, bottom = np.split(np.array(MOST_CONFIDENT_FIRST), 3)
    check_pairs(steps, top, bottom, middle)


@pytest.mark.parametrize("half", ["confident", "unconfident"])
def test_without_mixup_only_one_half_is_trained_on(tmp_path, files, half):
    flags = ["--mu", "0", "--ntp_on", half, "--epochs", "2", "--batch_size", "3"]
    steps = run(tmp_path / "run", *files["split"], *flags)
    assert [len(step.texts) for step in steps] == [3] * 4
    expected = CONFIDENT if half == "confident" else UNCONFIDENT
    for part in (steps[:2], steps[2:]):
        assert sorted(part[0].texts + part[1].texts) == sorted(expected)


def test_an_odd_row_is_confident_and_alone(tmp_path, files):
    """11 rows: six in the upper half, of which one gets NTP without Mixup."""
    rows = to_jsonl(tmp_path / "odd.jsonl", ROWS[:11])
    scores = write_confidence(tmp_path / "odd-confidence.jsonl", rows, PERPLEXITY[:, :11])
    order = [text for text in MOST_CONFIDENT_FIRST if text != TEXTS[11]]
    flags = [*files["plain"], "--data", rows, "--confidence", scores, "--epochs", "1"]
    steps = run(tmp_path / "run", *flags)
    check_pairs(steps, order[:6], order[6:])
    lone = [c for step in steps for c, u, _ in step.pairs if not u]
    assert len(lone) == 1
    assert set(lone) <= set(order[:6])


OWN = [-value for value in sum(PERPLEXITY)]  # scores that rank as the mean perplexities do


@pytest.mark.parametrize("form", ["in order", "by index"])
def test_own_scores_are_confidences(tmp_path, files, form):
    """--confidence with a user's own scores: the upper half is the confident one, whatever the
    order of lines that say their index."""
    lines = [{"confidence": value} for value in OWN]
    if form == "by index":
        lines = [{"note": "mine", "index": i, **line} for i, line in enumerate(lines)][::-1]
    scores = to_jsonl(tmp_path / "own.jsonl", lines)
    steps = run(tmp_path / "run", *files["plain"], "--confidence", scores, "--epochs", "1")
    check_pairs(steps, CONFIDENT, UNCONFIDENT)


def test_a_confidence_file_must_be_whole(tmp_path, files):
    """What is cut off, doubled, foreign or no number is refused by its line."""
    rows = files["plain"][files["plain"].index("--data") + 1]
    fingerprint = data.fingerprint(data.load_data([rows]))
    manifest = {"fingerprint": fingerprint, "rows": 12, "num_checkpoints": 2, "lines": 3}
    own = [manifest] + [{"index": i, "perplexity": [2, 3.0 + i]} for i in (1, 0, 7)]
    simple = [{"confidence": i} for i in range(12)]
    cases = {
        "row 3: the file ends after 2 of 3 rows": own[:3],
        "row 5: index 0 stands there twice": [*own, own[2]],
        "row 6: expected an object with": [*own[:4], {**own[1], "index": 5}, manifest],
        "row 2: index 12 is none of the data's rows, 0 to 11": [manifest, {**own[1], "index": 12}],
        "row 2: index True is none": [manifest, {**own[1], "index": True}],
        "row 2: index None is none": [manifest, {"perplexity": [1, 2]}],
        'row 2: expected "index" and "perplexity", a list of 2': [manifest, {"perplexity": [1]}],
        "row 3: expected": [*own[:2], {"index": 0, "perplexity": [1, float("nan")]}],
        "row 4: expected": [*own[:3], {"index": 0, "perplexity": [1, "2"]}],
        "row 1: num_checkpoints is 0, it must be at least 1": [manifest | {"num_checkpoints": 0}],
        "row 1: was computed for other rows": [manifest | {"fingerprint": "0"}, *own[1:]],
        "row 1: was computed for other rows (13 of": [manifest | {"rows": 13}, *own[1:]],
        "row 11: the file ends after 11 of 12 rows": simple[:11],
        "row 13: index 12 is none": [*simple, simple[0]],
        "row 1: expected an object with": [0.5] * 12,
        "row 2: index 0 stands there twice": [{"index": 0, **line} for line in simple],
        "row 12: expected": [*simple[:11], {"confidence": None}],
    }
    for message, lines in cases.items():
        path = to_jsonl(tmp_path / "bad.jsonl", lines)
        with pytest.raises(data.UserError) as error:
            sftmix.read_confidence(path, fingerprint, 12)
        assert f"--confidence {path}, {message}" in str(error.value)
    whole = sftmix.read_confidence(to_jsonl(tmp_path / "own.jsonl", own), fingerprint, 12)
    assert np.isfinite(whole).sum() == 6
    assert whole[:, [0, 1, 7]].tolist() == [[2, 2, 2], [3, 4, 10]]


def lambdas(steps):
    return np.array([[lam for _, _, lam in step.pairs] for step in steps])


def test_lambda_is_beta_distributed(tmp_path, files):
    """One λ a pair, Beta(α, α): its cumulative distribution is 2/π asin(sqrt λ) at the paper's α =
    0.5, 1/2 ± 0.01 for a large α, and 0 or 1 for a small one."""
    flags = [*files["split"], "--batch_size", "12", "--micro_batch_size", "12"]
    paper = lambdas(run(tmp_path / "paper", *flags, "--max_steps", "80"))
    assert paper.shape == (80, 6)
    ordered = np.sort(paper.ravel())
    assert len(set(ordered)) == 480  # new ones for every pair of every step
    share = (np.arange(480) + 0.5) / 480
    assert np.abs(2 / np.pi * np.arcsin(np.sqrt(ordered)) - share).max() < 0.062  # KS test at 5 %

    large = lambdas(run(tmp_path / "large", *flags, "--max_steps=2", "--alpha=1e5"))
    assert np.abs(large - 0.5).max() < 0.01
    small = lambdas(run(tmp_path / "small", *flags, "--max_steps=3", "--alpha=1e-4"))
    assert np.abs(small - small.round()).max() < 1e-6
    assert set(small.round().ravel()) == {0.0, 1.0}


def test_seed_decides_on_lambda_and_pairs(tmp_path, files, model_folder):
    """... and neither the micro-batches nor the model do."""
    runs = {}
    cases = {
        "first": [],
        "again": ["--micro_batch_size", "2", "--model", model_folder("gpt2")],
        "other": ["--seed", "1"],
    }
    for name, flags in cases.items():
        steps = run(tmp_path / name, *files["split"], "--max_steps", "3", *flags)
        runs[name] = [sorted(step.pairs) for step in steps]
    assert runs["first"] == runs["again"]
    first, other = ([[pair[:2] for pair in step] for step in runs[n]] for n in ("first", "other"))
    assert first != other
    found = {name: {lam for step in run for *_, lam in step} for name, run in runs.items()}
    assert not found["first"] & found["other"]


def test_logged_losses_are_means_over_the_window(tmp_path, files):
    """train/loss between two lines of metrics.jsonl: all sums of the steps by all divisors, not
    the mean of means."""
    flags = ["--max_steps", "5", "--log_every", "3", "--mixup_norm", "mean", "--lr", "1e-2"]
    steps = run(tmp_path / "run", *files["split"], *flags)
    rows = []
    for step in steps:
        ntp, mixup = (sum(loss.sums[i] for loss in step.losses) for i in (1, 2))
        tokens = sum(len(text) + 1 for text in step.texts)
        positions = sum(min(len(c), len(u)) + 1 for c, u, _ in step.pairs)
        rows.append([ntp, tokens, mixup, positions])
    logged = [record for record in records(tmp_path / "run") if "train/loss" in record]
    assert [record["step"] for record in logged] == [1, 3, 5]
    for record in logged:
        window = np.array(rows[max(0, record["step"] - 3) : record["step"]])
        ntp, tokens, mixup, positions = window.sum(0)
        assert record["train/ntp"] == pytest.approx(ntp / tokens, 1e-6)
        assert record["train/mixup"] == pytest.approx(mixup / positions, 1e-6)
        loss = window[:, 0] + 0.2 * window[:, 2] * window[:, 1] / window[:, 3]
        assert record["train/loss"] == pytest.approx(loss.sum() / tokens, 1e-6)
    total = [len(text) + 1 for step in steps for text in step.texts]
    assert [logged[-1][key] for key in ("step", "examples", "tokens")] == [5, 30, sum(total)]
    assert [record["epoch"] for record in logged] == [0.5, 1.5, 2.5]


# ------------------------------------------------------------------------ which halves


def test_partition_by_source(tmp_path, files, model_folder):
    """Of two datasets the first is the confident half, whatever their names and sizes; what is left
    over of the larger one is not mixed."""
    first = to_jsonl(tmp_path / "z.jsonl", ROWS[:5])
    second = to_jsonl(tmp_path / "a.jsonl", ROWS[5:])
    flags = [*files["plain"], "--data", first, second, "--partition", "source", "--epochs", "1"]
    steps = run(tmp_path / "run", *flags)
    assert [text for step in steps for _, text, _ in step.pairs].count("") == 0
    for step in steps:
        assert {c for c, _, _ in step.pairs if c} <= set(TEXTS[:5])
        assert {u for _, u, _ in step.pairs} <= set(TEXTS[5:])
    assert sorted(text for step in steps for text in step.texts) == sorted(TEXTS)
    assert not (tmp_path / "run" / "confidence.jsonl").exists()
    flags += ["--mu", "0", "--ntp_on", "confident"]
    (step,) = run(tmp_path / "one", *flags)
    assert sorted(step.texts) == sorted(TEXTS[:5])


def test_partition_at_random(tmp_path, files):
    """Halves of equal size that --seed draws; each seed others."""
    halves, flags = [], [*files["plain"], "--partition", "random", "--epochs", "1"]
    for seed in "001":
        steps = run(tmp_path / f"{len(halves)}", *flags, "--seed", seed)
        confident = {c for step in steps for c, _, _ in step.pairs}
        check_pairs(steps, confident, BOTH - confident)
        halves.append(confident)
    assert len(halves[0]) == 6
    assert halves[0] == halves[1] != halves[2]
    assert set(TEXTS[:6]) not in halves
    assert not (tmp_path / "0" / "confidence.jsonl").exists()


def test_batches_follow_seed_and_epoch():
    """Both halves, and what has no partner, are dealt anew in every epoch and under every seed, and
    again the same."""
    halves = sftmix.Halves(np.arange(24), np.arange(24, 48), np.arange(48, 72))

    def dealt(seed, epoch):
        batches = sftmix.paired_batches(halves, 24, seed, epoch)
        found = [np.split(batch, [8], 1) for batch in batches]  # 8 pairs and 8 alone
        sides = [(*map(sorted, pairs), sorted(alone[0])) for pairs, alone in found]
        return [[str(part) for part in parts] for parts in zip(*sides)]

    cases = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for side in zip(*(dealt(*case) for case in cases)):
        assert len(set(map(str, side))) == 4
    assert [dealt(*case) for case in cases] == [dealt(*case) for case in cases]


def test_ntp_batches_follow_seed_and_epoch():
    """Plain batches of the examples given, alone in the upper row."""
    cases, found = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1)], []
    for case in cases:
        batches = sftmix.ntp_batches(np.arange(100, 124), 8, *case)
        assert [batch.shape for batch in batches] == [(2, 8)] * 3
        upper, lower = np.concatenate(batches, 1)
        assert sorted(upper) == list(range(100, 124))
        assert set(lower) == {-1}
        found.append(str(upper))
    assert len(set(found)) == 4


# ------------------------------------------------------------------------ which rows

SELECT = ["--mu", "0", "--epochs", "1", "--batch_size", "32"]


def trained_texts(tmp_path, files, *flags):
    (step,) = run(tmp_path / "run", *files["plain"], *SELECT, *flags)
    return sorted(step.texts)


def test_select_longest(tmp_path, files):
    """The longest responses in tokens (bytes here), not in characters or with their prompts; of
    equally long ones the first."""
    texts = ["éééé", "sevenxx", "abc", "sevenyy", "sixsix", "sevenzz", "é"]
    rows = [{"prompt": "p" * (20 * (text == "abc")), "response": text} for text in texts]
    file = to_jsonl(tmp_path / "select.jsonl", rows)
    found = trained_texts(tmp_path, files, "--data", file, "--select", "longest", "--select_n", "3")
    assert found == sorted(["éééé", "sevenxx", "sevenyy"])
    assert read_json(tmp_path / "run" / "config.json")["datasets"] == {"select": 3}


def test_select_by_scores(tmp_path, files):
    """The highest scores, of equal ones the first; numbers and objects; over all datasets."""
    scores = [0.5, {"score": 2}, -1, 7, {"score": 7.0}, 1e2, 2, 0, 2, -3, {"score": "3"}, 2]
    file = to_jsonl(tmp_path / "scores.jsonl", scores)
    first = to_jsonl(tmp_path / "first.jsonl", ROWS[:5])
    second = to_jsonl(tmp_path / "second.jsonl", ROWS[5:])
    found = trained_texts(
        tmp_path, files, "--data", first, second, "--select", file, "--select_n", "6"
    )
    assert found == sorted(TEXTS[i] for i in (5, 3, 4, 10, 1, 6))
    assert read_json(tmp_path / "run" / "config.json")["datasets"] == {"first": 3, "second": 3}


def test_select_keeps_rows_with_their_source_and_confidence(tmp_path, files):
    """Index, label and perplexity of a row that is kept are still those of this row."""
    file = to_jsonl(tmp_path / "scores.jsonl", [i % 3 for i in range(12)])  # keeps 2, 5, 8, 11
    first = to_jsonl(tmp_path / "first.jsonl", ROWS[:7])
    second = to_jsonl(tmp_path / "second.jsonl", ROWS[7:])
    select = ["--select", file, "--select_n", "4", "--epochs", "1", "--batch_size", "4"]
    flags = [*files["plain"], *select]
    sources = ["--data", first, second, "--partition", "source"]
    (step,) = run(tmp_path / "source", *flags, *sources)
    assert {c for c, _, _ in step.pairs} == {TEXTS[2], TEXTS[5]}
    assert {u for _, u, _ in step.pairs} == {TEXTS[8], TEXTS[11]}
    kept = to_jsonl(tmp_path / "kept.jsonl", [ROWS[i] for i in (2, 5, 8, 11)])
    scores = write_confidence(tmp_path / "split.jsonl", kept, np.array([[4.0, 1.0, 3.0, 2.0]]))
    (step,) = run(tmp_path / "split", *flags, "--confidence", scores)
    assert {c for c, _, _ in step.pairs} == {TEXTS[5], TEXTS[11]}


def test_rows_without_a_confidence_are_left_out(tmp_path, files):
    file = files["plain"][files["plain"].index("--data") + 1]
    holes = PERPLEXITY.copy()
    holes[1, 4] = np.nan
    scores = write_confidence(tmp_path / "holes.jsonl", file, holes)
    steps = run(tmp_path / "run", *files["plain"], "--confidence", scores, "--epochs=1")
    order = [text for text in MOST_CONFIDENT_FIRST if text != TEXTS[4]]
    check_pairs(steps, order[:6], order[6:])


def test_rows_that_are_skipped_keep_their_place(tmp_path, files):
    """A row whose prompt fills --max_length has no example: those after it keep their own index,
    source and confidence."""
    long = {"prompt": "p" * 40, "response": "none"}
    file = to_jsonl(tmp_path / "long.jsonl", [*ROWS[:4], long, *ROWS[4:]])
    flags = [*files["plain"], "--data", file, "--max_length", "40", "--max_steps", "2"]
    steps = run(tmp_path / "run", *flags, "--num_checkpoints", "1")
    rows = read_jsonl(tmp_path / "run" / "confidence.jsonl")[1:]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, *range(5, 13)]
    order = ranked([-row["confidence"] for row in rows])
    check_pairs(steps[2:], order[:6], order[6:])


# ------------------------------------------------------------------------ the reference


def perplexities(folder, state):
    """exp(mean NLL) of every row under weights, by the model's own logits, without dropout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.load_state_dict(state, strict=False)
    rows = [data.rows_from_record(row)[0] for row in ROWS]
    examples, _ = data.encode(rows, data.with_template(TOKENIZER, "plain"), 512)
    return [float(np.exp(own_nll(model, e) / (len(e.ids) - e.start))) for e in examples]


def check_confidence_file(folder, model, reference, points):
    """confidence.jsonl holds the perplexities after these steps of the reference, and minus their
    mean -> the texts, the most confident first"""
    manifest, *rows = read_jsonl(folder / "confidence.jsonl")
    assert manifest["steps"] == points
    assert manifest["num_checkpoints"] == len(points)
    expected = np.array([perplexities(model, reference[point - 1].after) for point in points])
    found = np.array([row["perplexity"] for row in rows])
    assert found == pytest.approx(expected.T, rel=1e-4)
    confidence = [row["confidence"] for row in rows]
    assert confidence == pytest.approx(-found.mean(1), rel=1e-9)
    return ranked([-number for number in confidence])


@pytest.mark.parametrize("count, points", [("3", [2, 3, 5]), ("1", [5]), ("5", [1, 2, 3, 4, 5])])
def test_num_checkpoints(tmp_path, files, model_folder, count, points):
    """C points of the reference's training, evenly spaced, the last at its end; the target starts
    afresh and is trained on the halves that they give. GPT-2, whose dropout is off when
    perplexities are taken."""
    model = model_folder("gpt2")
    flags = ["--model", model, "--num_checkpoints", count, "--max_steps", "5", "--lr", "1e-2"]
    steps = run(tmp_path / "run", *files["plain"], *flags)
    reference, target = steps[:5], steps[5:]
    assert len(values(tmp_path / "run", "reference/loss")) == len(target) == 5
    assert {loss.mu for step in reference for loss in step.losses} == {0.0}
    order = check_confidence_file(tmp_path / "run", model, reference, points)
    check_pairs(target[:2], order[:6], order[6:])
    assert same(target[0].before, reference[0].before)
    epoch = sorted(reference[0].texts + reference[1].texts)
    assert epoch == sorted(TEXTS)  # plain NTP on everything


def test_reference_is_plain_training(tmp_path, files):
    """The reference takes the NTP baseline's steps, whatever is asked of the target."""
    flags = ["--num_checkpoints", "2", "--max_steps", "2", "--lr", "1e-3"]
    baseline = run(tmp_path / "baseline", *files["plain"], *flags, "--mu", "0")
    others = ["--ntp_on", "confident", "--mu", "0.9", "--mixup_norm", "mean", "--alpha", "2"]
    steps = run(tmp_path / "run", *files["plain"], *flags, *others)
    for one, other in zip(baseline, steps[:2]):
        assert one.texts == other.texts
        assert same(one.after, other.after)
    assert len(baseline) == 2
    metrics = values(tmp_path / "run", "reference/loss")
    assert metrics == values(tmp_path / "baseline", "train/loss")


def test_ref_model(tmp_path, files, model_folder):
    """Another model takes the place of the reference: it is trained, its perplexities split the
    rows, and the target is the model of --model."""
    ref, model = model_folder("gpt2"), model_folder("llama")
    flags = ["--ref_model", ref, "--num_checkpoints", "2", "--max_steps", "2", "--lr", "1e-2"]
    steps = run(tmp_path / "run", *files["plain"], *flags)
    reference, target = steps[:2], steps[2:]
    assert "transformer.wte.weight" in reference[0].before
    assert "transformer.wte.weight" not in target[0].before
    order = check_confidence_file(tmp_path / "run", ref, reference, [1, 2])
    check_pairs(target, order[:6], order[6:])
    assert read_jsonl(tmp_path / "run" / "confidence.jsonl")[0]["model"] == ref
    fresh = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert same(target[0].before, {key: fresh[key] for key in target[0].before})
    assert same(weights(tmp_path / "run"), {**fresh, **target[-1].after})
