"""SFTMix: equations by hand and against full logits in float64, batches, resume, the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    adamw,
    error_line,
    killed_at,
    leaves,
    own_nll,
    plain_step,
    random_model,
    read_json,
    read_jsonl,
    records,
    same,
    values,
    weights,
    windowed,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import common
import data
import sftmix

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------ Step 1


def test_confidence_by_hand():
    perplexity = [[2.0, 4.0, 1.0], [4.0, 8.0, 1.5]]
    assert sftmix.confidence(perplexity).tolist() == [-3.0, -6.0, -1.25]
    with pytest.raises(ValueError):
        sftmix.confidence([[1.0, float("inf")]])


def test_partition_by_hand():
    confident, unconfident = sftmix.partition([-3.0, -6.0, -1.0, -2.0, -9.0])
    assert confident.tolist() == [2, 3, 0]
    assert unconfident.tolist() == [1, 4]
    confident, unconfident = sftmix.partition([-1.0] * 4)  # ties keep the order of the data
    assert confident.tolist() == [0, 1]
    assert unconfident.tolist() == [2, 3]
    parts = sftmix.partition_thirds([-5.0, -4.0, -3.0, -2.0, -1.0, -6.0, -7.0])
    assert [part.tolist() for part in parts] == [[4, 3], [2, 1, 0], [5, 6]]


# ------------------------------------------------------------------------ Steps 2 and 3


def test_mixup_rows_by_hand():
    # examples of 2, 3 | 4, 1 response tokens start at rows 0, 2, 5, 9
    confident, unconfident, pair, alone = sftmix.mixup_rows(np.array([2, 3, 4, 1]))
    assert confident.tolist() == [0, 1, 2]
    assert unconfident.tolist() == [5, 6, 9]
    assert pair.tolist() == [0, 0, 1]
    assert alone.tolist() == [3, 4, 7, 8]


def log_softmax(states, head):
    logits = states @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, -1)


def full_loss(hidden, targets, lengths, lam, head, ntp_weight):
    """§3.3 as it is written: mixed states, mixed one-hot targets, all logits, one pair and one
    token after the other -> NTP, Mixup."""
    one_hot = torch.nn.functional.one_hot(targets, len(head.weight)).to(hidden)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ntp = mixup = 0
    for i, length in enumerate(lengths):
        rows = slice(starts[i], starts[i] + length)
        ntp = ntp - ntp_weight[i] * (one_hot[rows] * log_softmax(hidden[rows], head)).sum()
    half = len(lengths) // 2
    for i in range(half):
        for n in range(min(lengths[i], lengths[i + half])):
            c, u = starts[i] + n, starts[i + half] + n
            z = lam[i] * hidden[c] + (1 - lam[i]) * hidden[u]
            y = lam[i] * one_hot[c] + (1 - lam[i]) * one_hot[u]
            mixup = mixup - (y * log_softmax(z, head)).sum()
    return ntp, mixup


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.5, 2.0)])
@pytest.mark.parametrize("ntp_weight", [None, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
def test_loss_equals_full_logits_in_float64(monkeypatch, bias, scale, softcap, ntp_weight):
    # many chunks, pairs and leftovers cut apart
    monkeypatch.setattr(common, "chunk_rows", lambda vocabulary, device: 4)
    rng = torch.Generator().manual_seed(0)
    lengths, lam, mu = np.array([3, 7, 1, 5, 2, 0]), np.array([0.3, 0.95, 0.5]), 0.7
    shapes = [(lengths.sum(), 6), (11, 6), (11,)] if bias else [(lengths.sum(), 6), (11, 6)]
    tensors = [torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes]
    targets = torch.randint(0, 11, (lengths.sum(),), generator=rng)
    targets[lengths[:3].sum()] = targets[0]  # a pair with the same target on both sides
    ours, exact = leaves(tensors), leaves(tensors)

    hidden, *head = ours
    options = dict(scale=scale, softcap=softcap, ntp_weight=ntp_weight)
    arguments = [hidden, targets, torch.from_numpy(lengths), lam, head[0], mu, *head[1:]]
    loss, ntp, mixup = sftmix.sftmix_loss(*arguments, **options)
    (loss / 13).backward()

    hidden, *head = exact
    head = common.Head(head[0], head[1] if bias else None, scale, softcap)
    exact_ntp, exact_mixup = full_loss(hidden, targets, lengths, lam, head, ntp_weight or [1.0] * 6)
    exact_loss = exact_ntp + mu * exact_mixup
    (exact_loss / 13).backward()

    assert abs(loss.item() - exact_loss.item()) < 1e-9
    assert abs(ntp.item() - exact_ntp.item()) < 1e-9
    assert abs(mixup.item() - exact_mixup.item()) < 1e-9
    for one, other in zip(ours, exact):
        assert (one.grad - other.grad).abs().max() < 1e-9


def test_fast_loss_equals_the_papers_formula(monkeypatch):
    """sftmix_loss interpolates logits, sftmix_loss_reference mixes states: they are equal in value
    and gradients, and equal to the full_loss of this file."""
    monkeypatch.setattr(common, "chunk_rows", lambda vocabulary, device: 4)
    rng = torch.Generator().manual_seed(4)
    lengths, lam, mu = [3, 7, 1, 5, 2, 4], [0.3, 0.95, 0.5], 0.7
    tensors = [torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (sum(lengths), 11)]
    targets = torch.randint(0, 11, (sum(lengths),), generator=rng)
    ours, paper = leaves(tensors), leaves(tensors)
    fast = sftmix.sftmix_loss(ours[0], targets, lengths, lam, ours[1], mu)
    slow = sftmix.sftmix_loss_reference(paper[0], targets, lengths, lam, paper[1], mu)
    fast[0].backward()
    slow[0].backward()
    own = full_loss(tensors[0], targets, lengths, lam, common.Head(tensors[1]), [1.0] * 6)
    for one, other in zip(fast, slow):
        assert one.item() == pytest.approx(other.item(), abs=1e-9)
    assert [slow[1].item(), slow[2].item()] == pytest.approx([part.item() for part in own])
    for one, other in zip(ours, paper):
        assert (one.grad - other.grad).abs().max() < 1e-9


def test_loss_passes_gradcheck():
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (9,), generator=rng)

    def loss(h, w):
        return sftmix.sftmix_loss(h, targets, [2, 3, 3, 1], [0.2, 0.6], w, 0.5, softcap=2.0)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_lambda_one_is_the_confident_side_alone():
    rng = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(8, 4, generator=rng), torch.randn(9, 4, generator=rng)
    targets = torch.randint(0, 9, (8,), generator=rng)
    _, _, mixup = sftmix.sftmix_loss(hidden, targets, [4, 4], [1.0], weight, 0.2)
    own, _ = common.response_loss(hidden[:4], targets[:4], common.Head(weight))
    assert mixup.item() == pytest.approx(own.item(), rel=1e-6)


def test_loss_rejects_lengths_that_do_not_fit():
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    targets = torch.zeros(4, dtype=torch.long)
    for lengths in ([2, 3], [2, 1, 1]):
        with pytest.raises(ValueError):
            sftmix.sftmix_loss(hidden, targets, lengths, [0.5], weight, 0.2)


def test_bf16_is_right_row_by_row():
    """Rows whose target has p ~ 0.9994, SFTMix's confident half: a global norm would hide that
    their gradient is lost."""
    rng = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(64, 16, generator=rng), torch.randn(500, 16, generator=rng)
    targets = torch.randint(0, 500, (64,), generator=rng)
    weight[targets] = weight[targets] * 0.1
    for row, target in enumerate(targets):  # push every second row's state towards its target
        if row % 2 == 0:
            hidden[row] = 40 * weight[target] / weight[target].norm() ** 2 * 0.6
    lam, lengths = np.array([0.4]), [32, 32]
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    narrow, exact = leaves([hidden, weight]), leaves([hidden.double(), weight.double()])
    loss, _, _ = sftmix.sftmix_loss(narrow[0], targets, lengths, lam, narrow[1], 0.2)
    loss.backward()
    ntp, mixup = full_loss(exact[0], targets, lengths, lam, common.Head(exact[1]), [1.0, 1.0])
    (ntp + 0.2 * mixup).backward()
    error = (narrow[0].grad.double() - exact[0].grad).norm(dim=1) / exact[0].grad.norm(dim=1)
    assert error.max() < 0.01  # bf16 storage of the gradient itself rounds by up to 0.4 %


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral", "qwen2", "gemma2", "cohere", "granite", "phi"]
)
def test_loss_is_that_of_the_models_own_logits(name, tokenizer):
    model = random_model(name).eval()
    texts = ("one", "two words", "3", "four more words")
    rows = [data.Row((("user", "Say it."),), text) for text in texts]
    examples, _ = data.encode(rows, data.with_template(tokenizer, "alpaca"), 512)
    batch = common.collate(examples, "cpu")
    hidden, head = common.response_states(model, batch, "fp32")
    lengths = batch.response_lengths
    arguments = [hidden, batch.targets, lengths, [0.5, 0.5], head.weight, 0.0, head.bias]
    loss, _, mixup = sftmix.sftmix_loss(*arguments, scale=head.scale, softcap=head.softcap)
    own = sum(own_nll(model, example) for example in examples)
    assert loss.item() == pytest.approx(own, rel=2e-5)
    assert mixup.item() == 0.0
    common.check_head(model)


# ------------------------------------------------------------------------ batches


def pairs_of(batches):
    """-> for each batch its pairs (confident, unconfident), None where there is no partner."""
    result = []
    for batch in batches:
        result.append([tuple(None if i < 0 else i for i in pair) for pair in batch.T.tolist()])
    return result


@pytest.mark.parametrize(
    "sizes",
    [(50, 50, 0), (26, 25, 0), (40, 39, 0), (33, 33, 35), (7, 90, 0), (31, 31, 2), (3, 2, 0)],
)
def test_paired_batches_use_every_example_once(sizes):
    total = sum(sizes)
    order = np.random.default_rng(1).permutation(total)
    halves = sftmix.Halves(*np.split(order, np.cumsum(sizes)[:-1]))
    batches = pairs_of(sftmix.paired_batches(halves, 8, seed=0, epoch=0))
    pairs = sum(batches, [])
    sides = sum(pairs, ())
    assert sorted(i for i in sides if i is not None) == list(range(total))
    confident, unconfident = set(halves.confident.tolist()), set(halves.unconfident.tolist())
    assert all(u is None or u in unconfident for _, u in pairs)
    assert all(c is None or c in confident or u is None for c, u in pairs)
    # nobody is unpaired who could have a partner: one of an odd number of halves
    assert sides.count(None) == total - 2 * min(sizes[:2])
    # as many batches as the NTP baseline's, near-equal, and what is unpaired is spread over them
    filled = [sum(i is not None for pair in batch for i in pair) for batch in batches]
    assert len(batches) == len(common.epoch_batches(total, 8, 0, 0))
    assert max(filled) <= 8
    assert max(filled) - min(filled) <= 3
    mixed = [sum(None not in pair for pair in batch) for batch in batches]
    assert max(mixed) - min(mixed) <= 1 + (2 * min(sizes[:2]) < total)
    assert pairs_of(sftmix.paired_batches(halves, 8, seed=0, epoch=0)) == batches
    assert pairs_of(sftmix.paired_batches(halves, 8, seed=0, epoch=1)) != batches


def equal_halves(count):
    """The first `count` examples are confident, as many others are not, and there is no rest."""
    return sftmix.Halves(np.arange(count), np.arange(count, 2 * count), np.zeros(0, np.int64))


def test_pairs_and_batches_are_drawn_uniformly():
    """Over many epochs any confident example is paired with any unconfident one as often, and
    shares a batch with any other confident one as often."""
    halves, epochs, paired, together = equal_halves(8), 2000, np.zeros((8, 8)), np.zeros((8, 8))
    for epoch in range(epochs):
        for confident, unconfident in sftmix.paired_batches(halves, 8, 0, epoch):
            paired[confident, unconfident - 8] += 1
            together[np.ix_(confident, confident)] += 1
    share = together[~np.eye(8, dtype=bool)] / epochs
    assert np.abs(paired / epochs - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / epochs)
    assert np.abs(share - 3 / 7).max() < 5 * np.sqrt(3 / 7 * 4 / 7 / epochs)


def test_pairs_do_not_know_lengths():
    """Correlation of the partners' log lengths: 0 up to chance (§3.3 step 3: randomly paired)."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 6000)
    pairs = np.concatenate(sftmix.paired_batches(equal_halves(3000), 32, 0, 0), 1)
    one, other = np.log(lengths[pairs])
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_the_unpaired_one_of_an_odd_number_changes():
    halves, lone = sftmix.Halves(np.arange(6), np.arange(6, 11), np.zeros(0, np.int64)), set()
    for epoch in range(40):
        pairs = np.concatenate(sftmix.paired_batches(halves, 4, 0, epoch), 1)
        (single,) = pairs[0, pairs[1] < 0]
        lone.add(int(single))
    assert lone == set(range(6))


# ------------------------------------------------------------------------ the command

GOLDEN = {
    "reference/ntp": [5.60149, 4.87646, 4.93268],
    "train/ntp": [5.57789, 4.94712, 4.64269],
    "train/mixup": [5.57315, 5.11207, 5.25805],
}
QUICK = ["--model", "tiny", "--template", "plain", "--lr", "1e-3", "--batch_size", "8"]
TOY = ["--data", "toy#80", "--eval_data", "toy/copy", "--max_steps", "10", "--log_every", "1"]


def run(folder, *flags):
    sftmix.main([*QUICK, "--output_dir", str(folder), *flags])
    return read_json(folder / "summary.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sftmix") / "run"
    return folder, run(folder, *TOY)


def test_run_folder(finished):
    folder, summary = finished
    files = {"config.json", "metrics.jsonl", "summary.json", "confidence.jsonl"}
    files.add("embeddings.jsonl")
    figures = {"confidence.png", "perplexity.png", "embeddings.png", "loss.png"}
    assert {path.name for path in folder.iterdir()} == files | figures | {".lock", "final"}
    assert summary["steps"] == 10
    assert summary["eval"]["copy"]["nll"] < 5.6
    assert summary["time"]["confidence"] > 0
    manifest, *rows = read_jsonl(folder / "confidence.jsonl")
    assert manifest["num_checkpoints"] == 5
    assert manifest["steps"] == [2, 4, 6, 8, 10]
    assert [row["index"] for row in rows] == list(range(80))
    assert {row["source"] for row in rows} >= {"copy", "describe"}
    for row in rows:
        assert row["confidence"] == pytest.approx(-np.mean(row["perplexity"]))
    reference = [record["step"] for record in records(folder) if "reference/ntp" in record]
    assert reference == list(range(1, 11))
    assert len(values(folder, "train/ntp")) == len(values(folder, "train/mixup")) == 10
    assert np.isfinite(values(folder, "train/ntp")).all()
    assert np.isfinite(values(folder, "train/mixup")).all()


def test_golden_first_losses(finished):
    """Recorded from this implementation on CPU: a change of data order, masks, initialisation or
    loss shows here."""
    folder, _ = finished
    for key, losses in GOLDEN.items():
        assert values(folder, key)[:3] == pytest.approx(losses, abs=2e-4), key


def test_confidence_is_that_of_the_saved_data(finished, tokenizer):
    """The last checkpoint's perplexity by another way: the model's own logits, one example at a
    time."""
    folder, _ = finished
    ntp = folder.parent / "ntp"
    run(ntp, "--data", "toy#80", "--max_steps", "10", "--mu", "0")  # the reference's training
    model = transformers.AutoModelForCausalLM.from_pretrained(ntp / "final").eval()
    rows = sum((dataset.rows for dataset in data.load_data(["toy#80"])), [])
    _, *lines = read_jsonl(folder / "confidence.jsonl")
    for i in (0, 17, 79):
        (example,), _ = data.encode([rows[i]], data.with_template(tokenizer, "plain"), 2048)
        perplexity = np.exp(own_nll(model, example) / example.response_length)
        assert lines[i]["perplexity"][-1] == pytest.approx(perplexity, rel=1e-5)


def test_ntp_baseline_is_plain_training(tmp_path, tokenizer):
    """--mu 0 --ntp_on full: the same weights, bit for bit, as a loop of a few lines that knows
    nothing of SFTMix."""
    run(tmp_path / "ntp", "--data", "toy/add#40", "--max_steps", "4", "--mu", "0")
    (dataset,) = data.load_data(["toy/add#40"])
    examples, _ = data.encode(dataset.rows, data.with_template(tokenizer, "plain"), 2048)
    model = common.tiny_model(0).train()
    optimizer = adamw(model)
    batches = common.epoch_batches(40, 8, 0, 0)
    for step in range(4):
        batch = [examples[i] for i in batches[step]]
        batch.sort(key=lambda example: -len(example.ids))
        lr = common.learning_rate(step, 4, sftmix.parse_args(QUICK))
        plain_step(model, optimizer, batch, lr)
    saved, own = weights(tmp_path / "ntp"), model.state_dict()
    assert same(saved, {key: own[key] for key in saved})


@pytest.mark.parametrize(
    "flags",
    [["--mu", "0"], [], ["--mixup_norm", "mean"], ["--ntp_on", "confident"], ["--split", "thirds"]],
)
def test_micro_batching_changes_nothing(tmp_path, monkeypatch, flags):
    """8x1, 4x2, 2x4 (a pair is never cut) and, without pairs, 1x8 give the same gradients:
    normalised once over the optimizer batch, Mixup included."""
    gradients = []

    def keep(model, optimizer, lr, max_grad_norm):
        gradients.append([p.grad.clone() for p in model.parameters()])
        raise data.UserError("enough")

    once = ["--data", "toy#30", "--partition", "random", "--max_steps", "1", "--max_length", "200"]
    monkeypatch.setattr(common, "optimizer_step", keep)
    for size in (8, 4, 1) if "--mu" in flags else (8, 4, 2):
        with pytest.raises(SystemExit):
            run(tmp_path / str(size), *once, *flags, "--micro_batch_size", str(size))
    whole, *others = gradients
    assert len(others) == 2
    limit = 1e-6 * max(1, max(g.abs().max() for g in whole))
    for other in others:
        assert max((a - b).abs().max() for a, b in zip(whole, other)) < limit


@pytest.mark.parametrize("stage, at", [("reference", 5), ("train", 7)])
def test_killed_and_resumed_is_bit_identical(tmp_path, finished, stage, at):
    folder, whole = tmp_path / "run", finished[0]
    flags = [*TOY, "--save_every", "3"]
    with killed_at(at, f"{stage}/ntp"):
        run(folder, *flags)
    torch.rand(100)  # another place in the model's RNG
    run(folder, *flags, "--resume")
    assert same(weights(folder), weights(whole))
    assert records(folder) == records(whole)
    scores = (folder / "confidence.jsonl").read_bytes()
    assert scores == (whole / "confidence.jsonl").read_bytes()


def test_resume_refuses_another_run(finished, capsys):
    folder, _ = finished
    before = (folder / "summary.json").read_bytes()
    flags = ["--data", "toy#80", "--eval_data", "toy/copy", "--max_steps", "10"]
    cases = [
        (["--seed", "1", "--resume"], "--resume: --seed was 0 and is now 1"),
        ([], "already holds a run"),
        (["--max_steps", "9", "--resume"], "--max_steps was 10 and is now 9"),
    ]
    for extra, message in cases:
        assert message in error_line(capsys, run, folder, *flags, *extra)
    run(folder, *flags, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    assert (folder / "summary.json").read_bytes() == before


def test_confidence_file_is_reused_and_checked(tmp_path, finished, capsys):
    folder, _ = finished
    scores = folder / "confidence.jsonl"
    run(tmp_path / "again", *TOY, "--confidence", str(scores))
    assert same(weights(tmp_path / "again"), weights(folder))  # the same split, so the same model
    assert not values(tmp_path / "again", "reference/ntp")
    other = tmp_path / "other"
    flags = ["--data", "toy#81", "--max_steps", "2", "--confidence", str(scores)]
    assert "computed for other rows" in error_line(capsys, run, other, *flags)
    assert not other.exists()
    broken = tmp_path / "broken.jsonl"
    broken.write_text(scores.read_text() + "{\n")
    flags = ["--data", "toy#80", "--max_steps", "2", "--confidence", str(broken)]
    assert f"{broken}, row 82" in error_line(capsys, run, other, *flags)


def save_weak_model(folder):
    """A one-layer GPT-2 with a BPE tokenizer of 400 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = dict(special_tokens=["<|end|>"], initial_alphabet=alphabet)
    texts = [row.response + row.input for row in data.toy_rows()]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, **special))
    ends = dict(eos_token="<|end|>", pad_token="<|end|>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(vocab_size=400, n_positions=512, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(folder)


def test_reference_with_another_tokenizer(tmp_path):
    """Confidences are per example: a weaker reference with its own tokenizer and fewer positions
    ranks the same rows."""
    weak = tmp_path / "weak"
    save_weak_model(weak)
    run(tmp_path / "run", "--data", "toy#40", "--ref_model", str(weak), "--max_steps", "5")
    manifest, *rows = read_jsonl(tmp_path / "run" / "confidence.jsonl")
    assert manifest["model"] == str(weak)
    assert len(rows) == 40


def test_logged_losses_are_means_over_the_last_steps(tmp_path):
    """... the first steps included; without weights and Mixup the loss is NTP's."""
    every, fourth = tmp_path / "every", tmp_path / "fourth"
    flags = ["--data", "toy#80", "--max_steps", "10", "--mu", "0"]
    run(every, *flags, "--log_every", "1")
    run(fourth, *flags, "--log_every", "4")
    assert values(fourth, "train/ntp") == pytest.approx(windowed(every, "train/ntp", 4))
    assert len(values(fourth, "train/ntp")) == 4
    for folder in (every, fourth):
        assert values(folder, "train/loss") == pytest.approx(values(folder, "train/ntp"))


VARIANT = ["--data", "toy#40", "--max_steps", "3", "--num_checkpoints", "2", "--log_every", "1"]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """The folder of a run with VARIANT's flags alone."""
    folder = tmp_path_factory.mktemp("sftmix") / "run"
    run(folder, *VARIANT)
    return folder


HALVES = "split by confidence: 20 confident, 20 unconfident"


@pytest.mark.parametrize(
    "flags, losses, examples, printed",
    [
        (["--ntp_on", "none", "--mu", "1"], {"mixup"}, 24, HALVES),
        (["--ntp_on", "confident", "--mu", "0"], {"ntp"}, 20, HALVES),
        (["--ntp_on", "unconfident"], {"ntp", "mixup"}, 24, HALVES),
        (["--split", "thirds"], {"ntp", "mixup"}, 24, "13 confident, 13 unconfident, 14 rest"),
        (
            ["--select", "longest", "--select_n", "20"],
            {"ntp", "mixup"},
            20,
            "10 confident, 10 unconfident",
        ),
    ],
)
def test_variants_run(tmp_path, ordinary, capsys, flags, losses, examples, printed):
    """Which losses there are, how many examples three steps take, how they are split; and that the
    flags lead to other weights."""
    folder = tmp_path / "run"
    summary = run(folder, *VARIANT, *flags)
    assert (summary["steps"], summary["examples"]) == (3, examples)
    assert printed in capsys.readouterr().out
    for key in ("loss", "ntp", "mixup"):
        logged = values(folder, f"train/{key}")
        assert len(logged) == (3 if key in losses | {"loss"} else 0)
        assert np.isfinite(logged).all()
    if losses == {"ntp"}:
        assert values(folder, "train/loss") == pytest.approx(values(folder, "train/ntp"))
    assert not same(weights(folder), weights(ordinary))


def test_select_longest_keeps_the_longest_responses(tmp_path):
    flags = ["--select", "longest", "--select_n", "20", "--mu", "0"]
    run(tmp_path / "run", *VARIANT, *flags)
    datasets = data.load_data(["toy#40"])
    lengths = sorted(len(row.response) for dataset in datasets for row in dataset.rows)
    assert lengths[19] < lengths[20]  # no tie
    for dataset in datasets:
        dataset.rows = [row for row in dataset.rows if len(row.response) >= lengths[20]]
    kept = [dataset for dataset in datasets if dataset.rows]
    fingerprint = read_json(tmp_path / "run" / "config.json")["data_fingerprint"]
    assert fingerprint == data.fingerprint(kept)


def test_lora_trains_the_adapter_alone(tmp_path):
    """Checkpointing changes nothing; all linear layers have an adapter, and all of them move."""
    adapters = []
    for name, flags in (("plain", []), ("checkpointing", ["--gradient_checkpointing"])):
        folder = tmp_path / name
        assert run(folder, *VARIANT, "--lora_rank", "2", *flags)["steps"] == 3
        adapters.append(load_file(folder / "final" / "adapter_model.safetensors"))
        files = {path.name for path in (folder / "final").iterdir()}
        assert "adapter_config.json" in files
        assert "model.safetensors" not in files
    one, other = adapters
    updated = [tensor for name, tensor in one.items() if "lora_B" in name]
    assert len(updated) == 16  # 4 layers of 4 matrices
    assert all(tensor.abs().max() > 0 for tensor in updated)  # B starts at 0
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_bf16_is_close_to_fp32(tmp_path, ordinary):
    folder = tmp_path / "run"
    assert run(folder, *VARIANT, "--dtype", "bf16")["steps"] == 3
    for key in ("reference/ntp", "train/ntp", "train/mixup"):
        narrow, exact = values(folder, key), values(ordinary, key)
        assert narrow == pytest.approx(exact, rel=0.01)
        assert narrow != exact
    assert all(tensor.dtype == torch.float32 for tensor in weights(folder).values())


def test_partition_by_source_pairs_the_two_datasets(tmp_path, capsys):
    flags = ["--partition", "source", "--max_steps", "3"]
    run(tmp_path / "run", "--data", "toy/copy#20", "toy/add#12", *flags)
    assert "split by source: 20 confident, 12 unconfident" in capsys.readouterr().out
    error = error_line(capsys, run, tmp_path / "other", "--data", "toy/copy#20", *flags)
    assert "needs two datasets" in error


def test_select_by_scores(tmp_path, capsys):
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({"score": i % 10}) + "\n" for i in range(40)))
    flags = ["--data", "toy/add#40", "--select", str(scores), "--max_steps", "2"]
    run(tmp_path / "run", *flags, "--select_n", "8", "--mu", "0")
    config = read_json(tmp_path / "run" / "config.json")
    assert config["datasets"] == {"add": 8}
    (dataset,) = data.load_data(["toy/add#40"])
    dataset.rows = [row for i, row in enumerate(dataset.rows) if i % 10 >= 8]  # scores 8 and 9
    assert config["data_fingerprint"] == data.fingerprint([dataset])
    scores.write_text("1\n" * 39)
    error = error_line(capsys, run, tmp_path / "other", *flags)
    assert "has 39 scores for 40 rows" in error
    scores.write_text("1\n" * 38 + '{"score": NaN}\n2\n')  # json.loads takes it: no order
    error = error_line(capsys, run, tmp_path / "other", *flags)
    assert f"--select {scores}, row 39: \"{{'score': nan}}\" is no number" in error


def test_low_learning_rate_moves_the_weights(tmp_path):
    """fp32 master weights under bf16 autocast: at the paper's lr 2e-6 bf16 weights would not move
    at all."""
    flags = ["--data", "toy/add#16", "--mu", "0", "--max_steps", "1", "--warmup_ratio", "0"]
    run(tmp_path / "run", *flags, "--lr", "2e-6", "--dtype", "bf16")
    before, after = common.tiny_model(0).state_dict(), weights(tmp_path / "run")
    matrices = [key for key in after if key.endswith("mlp.c_fc.weight")]
    moved = [(before[key] != after[key]).float().mean().item() for key in matrices]
    assert min(moved) > 0.99


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_other_architectures_train_and_reload(tmp_path, model_folder, name):
    run(tmp_path / "run", "--model", model_folder(name), "--data", "toy#30", "--max_steps", "5")
    final = tmp_path / "run" / "final"
    model = transformers.AutoModelForCausalLM.from_pretrained(final)
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    ids = tokenizer("Repeat the word.\nbalo\n", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert model.config.use_cache
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mu", "0", "--ntp_on", "none"], "--mu 0 --ntp_on none leaves no loss"),
        (["--split", "thirds", "--ntp_on", "none"], "--split thirds goes with --ntp_on full"),
        (["--batch_size", "7"], "--batch_size 7: must be even, a pair stays together"),
        (["--alpha", "0"], "argument --alpha: '0' is not a positive number"),
        (["--mu", "nan"], "argument --mu: 'nan' is not a number of at least 0"),
        (["--data", "none.jsonl"], "none.jsonl: no such file or folder"),
        (["--model", "./none"], "--model ./none: no such folder"),
        (["--data", "toy/nothing"], "toy/nothing: no such task; there are describe, copy"),
        (["--confidence", "x", "--ref_model", "y"], "--confidence takes the place of --ref_model"),
        (["--confidence", "none.jsonl"], "--confidence none.jsonl: cannot be read"),
        (["--select", "longest", "--select_n", "21"], "--select_n 21: only 20 rows can be chosen"),
        (
            ["--num_checkpoints", "50", "--max_steps", "3"],
            "--num_checkpoints 50: the reference trains for only 3 steps",
        ),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, message):
    start = ["--output_dir", str(tmp_path / "run"), "--data", "toy#20"]
    assert message in error_line(capsys, sftmix.main, [*start, *flags])
    assert not (tmp_path / "run").exists()


def shell(folder, *flags):
    """`python sftmix.py ...` from another folder."""
    command = [sys.executable, str(ROOT / "sftmix.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_command_from_the_shell(tmp_path):
    flags = ["--data", "toy#24", "--max_steps", "5", "--batch_size", "4", "--show_batch"]
    done = shell(tmp_path, *flags, "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "</s>⟧" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()
    bad = shell(tmp_path, "--data", "nowhere.jsonl")
    assert bad.returncode == 2
    assert bad.stderr == "error: nowhere.jsonl: no such file or folder\n"
