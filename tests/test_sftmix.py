"""SFTMix: equations against hand-derived values and a full-logits float64 computation, batches, resume, the command."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import common
import sftmix
from conftest import random_model

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------- Step 1


def test_confidence_by_hand():
    assert sftmix.confidence([[2.0, 4.0, 1.0], [4.0, 8.0, 1.5]]).tolist() == [-3.0, -6.0, -1.25]
    with pytest.raises(ValueError):
        sftmix.confidence([[1.0, float("inf")]])


def test_partition_by_hand():
    confident, unconfident = sftmix.partition([-3.0, -6.0, -1.0, -2.0, -9.0])
    assert confident.tolist() == [2, 3, 0] and unconfident.tolist() == [1, 4]
    confident, unconfident = sftmix.partition([-1.0] * 4)  # ties keep the order of the data
    assert confident.tolist() == [0, 1] and unconfident.tolist() == [2, 3]
    top, middle, bottom = sftmix.partition_thirds([-5.0, -4.0, -3.0, -2.0, -1.0, -6.0, -7.0])
    assert top.tolist() == [4, 3] and middle.tolist() == [2, 1, 0] and bottom.tolist() == [5, 6]


# ---------------------------------------------------------------------------------------------------- Steps 2 and 3


def test_mixup_pairs_by_hand():
    # examples of 2, 3 | 4, 1 response tokens start at rows 0, 2, 5, 9
    confident, unconfident, pair, alone = sftmix.mixup_pairs(np.array([2, 3, 4, 1]))
    assert confident.tolist() == [0, 1, 2] and unconfident.tolist() == [5, 6, 9]
    assert pair.tolist() == [0, 0, 1] and alone.tolist() == [3, 4, 7, 8]


def full_loss(hidden, targets, lengths, lam, weight, mu, bias, scale, softcap, ntp_weight):
    """§3.3 as it is written: mixed states, mixed one-hot targets, all logits, one pair and one token after the other."""
    def log_softmax(states):
        logits = (states @ weight.T + (0 if bias is None else bias)) * scale
        return torch.log_softmax(softcap * torch.tanh(logits / softcap) if softcap else logits, -1)

    one_hot = torch.nn.functional.one_hot(targets, len(weight)).to(hidden)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ntp = mixup = 0
    for i, length in enumerate(lengths):
        rows = slice(starts[i], starts[i] + length)
        ntp = ntp - ntp_weight[i] * (one_hot[rows] * log_softmax(hidden[rows])).sum()
    half = len(lengths) // 2
    for i in range(half):
        for n in range(min(lengths[i], lengths[i + half])):
            c, u = starts[i] + n, starts[i + half] + n
            z = lam[i] * hidden[c] + (1 - lam[i]) * hidden[u]
            y = lam[i] * one_hot[c] + (1 - lam[i]) * one_hot[u]
            mixup = mixup - (y * log_softmax(z)).sum()
    return ntp + mu * mixup, ntp, mixup


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.5, 2.0)])
@pytest.mark.parametrize("ntp_weight", [None, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
def test_loss_equals_full_logits_in_float64(monkeypatch, bias, scale, softcap, ntp_weight):
    monkeypatch.setattr(common, "chunk_rows", lambda vocabulary, device: 4)  # many chunks, pairs and leftovers cut apart
    rng = torch.Generator().manual_seed(0)
    lengths = np.array([3, 7, 1, 5, 2, 0])
    hidden = torch.randn(lengths.sum(), 6, generator=rng, dtype=torch.float64)
    weight, b = torch.randn(11, 6, generator=rng, dtype=torch.float64), torch.randn(11, generator=rng, dtype=torch.float64)
    targets = torch.randint(0, 11, (len(hidden),), generator=rng)
    targets[lengths[:3].sum()] = targets[0]  # a pair with the same target on both sides
    lam, mu = np.array([0.3, 0.95, 0.5]), 0.7
    inputs = [[t.clone().requires_grad_() for t in (hidden, weight, b)] for _ in range(2)]
    ours = sftmix.sftmix_loss(inputs[0][0], targets, torch.from_numpy(lengths), lam, inputs[0][1], mu, inputs[0][2] if bias else None,
                              scale=scale, softcap=softcap, ntp_weight=ntp_weight)
    exact = full_loss(inputs[1][0], targets, lengths, lam, inputs[1][1], mu, inputs[1][2] if bias else None, scale, softcap,
                      ntp_weight or [1.0] * 6)
    for one, other in zip(ours, exact):
        assert abs(one.item() - other.item()) < 1e-9
    (ours[0] / 13).backward()
    (exact[0] / 13).backward()
    for one, other in zip(*inputs):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert (one.grad - other.grad).abs().max() < 1e-9


def test_loss_passes_gradcheck():
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (9,), generator=rng)
    assert torch.autograd.gradcheck(lambda h, w: sftmix.sftmix_loss(h, targets, [2, 3, 3, 1], [0.2, 0.6], w, 0.5, softcap=2.0)[0], (hidden, weight))


def test_lambda_one_is_the_confident_side_alone():
    rng = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(8, 4, generator=rng), torch.randn(9, 4, generator=rng)
    targets = torch.randint(0, 9, (8,), generator=rng)
    _, _, mixup = sftmix.sftmix_loss(hidden, targets, [4, 4], [1.0], weight, 0.2)
    own, _ = common.response_loss(hidden[:4], targets[:4], common.Head(weight))
    assert mixup.item() == pytest.approx(own.item(), rel=1e-6)


def test_loss_rejects_lengths_that_do_not_fit():
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError):
        sftmix.sftmix_loss(hidden, torch.zeros(4, dtype=torch.long), [2, 3], [0.5], weight, 0.2)
    with pytest.raises(ValueError):
        sftmix.sftmix_loss(hidden, torch.zeros(4, dtype=torch.long), [2, 1, 1], [0.5], weight, 0.2)


def test_bf16_is_right_row_by_row():
    """Rows whose target has p ~ 0.9994, SFTMix's confident half: a global norm would hide that their gradient is lost."""
    rng = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(64, 16, generator=rng), torch.randn(500, 16, generator=rng)
    targets = torch.randint(0, 500, (64,), generator=rng)
    weight[targets] = weight[targets] * 0.1
    for row, target in enumerate(targets):  # push every second row's state towards its target
        if row % 2 == 0:
            hidden[row] = 40 * weight[target] / weight[target].norm() ** 2 * 0.6
    lam, lengths = np.array([0.4]), [32, 32]
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    narrow = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    sftmix.sftmix_loss(narrow[0], targets, lengths, lam, narrow[1], 0.2)[0].backward()
    full_loss(exact[0], targets, lengths, lam, exact[1], 0.2, None, 1.0, None, [1.0, 1.0])[0].backward()
    error = (narrow[0].grad.double() - exact[0].grad).norm(dim=1) / exact[0].grad.norm(dim=1)
    assert error.max() < 0.01  # bf16 storage of the gradient itself rounds by up to 0.4 %


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "gemma2", "cohere", "granite", "phi"])
def test_loss_is_that_of_the_models_own_logits(name, tokenizer):
    model = random_model(name).eval()
    rows = [common.Row((("user", "Say it."),), text) for text in ("one", "two words", "3", "four more words")]
    examples, _ = common.encode(rows, tokenizer, "alpaca", 512)
    batch, head = common.collate(examples, "cpu"), common.output_head(model)
    hidden = batch.select(common.hidden_states(model, batch.ids))
    loss, ntp, mixup = sftmix.sftmix_loss(hidden, batch.targets, batch.lengths, [0.5, 0.5], head.weight, 0.0, head.bias,
                                          scale=head.scale, softcap=head.softcap)
    own = 0.0
    for example in examples:  # one by one, unpadded, through the whole model
        ids = torch.from_numpy(example.ids)[None]
        logits = model(input_ids=ids).logits[0].double()
        own += torch.nn.functional.cross_entropy(logits[example.start - 1:-1], ids[0, example.start:], reduction="sum").item()
    assert loss.item() == pytest.approx(own, rel=2e-5) and mixup.item() == 0.0
    common.check_head(model, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("sizes", [(50, 50, 0), (26, 25, 0), (33, 33, 35), (7, 90, 0)])
def test_paired_batches_use_every_example_once(sizes):
    total = sum(sizes)
    lengths = np.random.default_rng(0).integers(5, 200, total)
    parts = np.split(np.random.default_rng(1).permutation(total), np.cumsum(sizes)[:-1])
    batches = sftmix.paired_batches(*parts, lengths, 8, seed=0, epoch=0)
    assert sorted(i for batch in batches for pair in batch for i in pair if i is not None) == list(range(total))
    confident, unconfident = set(parts[0].tolist()), set(parts[1].tolist())
    for batch in batches:
        assert all(u is None or u in unconfident for _, u in batch)
        assert all(c is None or c in confident or u is None for c, u in batch)
    if sizes == (50, 50, 0):
        assert all(None not in pair for batch in batches for pair in batch)  # half and half, all paired
    again = sftmix.paired_batches(*parts, lengths, 8, seed=0, epoch=0)
    other = sftmix.paired_batches(*parts, lengths, 8, seed=0, epoch=1)
    assert again == batches and other != batches


def test_pairs_are_random_within_a_batch():
    lengths = np.full(64, 10)
    epochs = [sftmix.paired_batches(np.arange(32), np.arange(32, 64), [], lengths, 8, 0, epoch) for epoch in range(3)]
    assert len({frozenset(pair for batch in batches for pair in batch) for batches in epochs}) == 3


def test_pairs_are_of_similar_length_unless_nothing_is_grouped():
    lengths = np.random.default_rng(0).integers(5, 500, 640)
    gap = lambda window: np.mean([abs(int(lengths[c]) - int(lengths[u])) for batch in sftmix.paired_batches(  # noqa: E731
        np.arange(320), np.arange(320, 640), [], lengths, 32, 0, 0, window) for c, u in batch])
    assert gap(16) < 50 < 130 < gap(1)  # two independent lengths are 165 apart on average


# ---------------------------------------------------------------------------------------------------- the command

GOLDEN = {"reference": [5.58239, 5.38757, 5.12653], "ntp": [5.61184, 4.91892, 5.54314], "mixup": [5.60933, 4.96423, 5.62372]}
QUICK = ["--model", "tiny", "--template", "plain", "--lr", "1e-3", "--batch_size", "8"]


def run(folder, *flags):
    sftmix.main([*QUICK, "--output_dir", str(folder), *flags])
    return json.loads((Path(folder) / "summary.json").read_text())


def records(folder):
    """metrics.jsonl without the timers."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in lines]


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "final").state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sftmix") / "run"
    return folder, run(folder, "--data", "toy#80", "--eval_data", "toy/copy", "--max_steps", "10", "--log_every", "1")


def test_run_folder(finished):
    folder, summary = finished
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "summary.json", "confidence.jsonl", "confidence.png",
                                                         "perplexity.png", "embeddings.png", "loss.png", "checkpoint", "final"}
    assert summary["steps"] == 10 and summary["eval"]["copy"]["nll"] < 5.6 and summary["time"]["confidence"] > 0
    manifest, *rows = [json.loads(line) for line in (folder / "confidence.jsonl").read_text().splitlines()]
    assert manifest["num_checkpoints"] == 5 and manifest["steps"] == [2, 4, 6, 8, 10]
    assert [row["index"] for row in rows] == list(range(80)) and {row["source"] for row in rows} >= {"copy", "describe"}
    assert all(row["confidence"] == pytest.approx(-np.mean(row["perplexity"])) for row in rows)
    log = records(folder)
    assert [r["step"] for r in log if "reference/ntp" in r] == list(range(1, 11))
    assert all(np.isfinite(r["train/ntp"] + r["train/mixup"]) for r in log if "train/ntp" in r)


def test_golden_first_losses(finished):
    """Recorded from this implementation on CPU: a change of data order, masks, initialisation or loss shows here."""
    log = records(finished[0])
    assert [r["reference/ntp"] for r in log if "reference/ntp" in r][:3] == pytest.approx(GOLDEN["reference"], abs=2e-4)
    assert [r["train/ntp"] for r in log if "train/ntp" in r][:3] == pytest.approx(GOLDEN["ntp"], abs=2e-4)
    assert [r["train/mixup"] for r in log if "train/mixup" in r][:3] == pytest.approx(GOLDEN["mixup"], abs=2e-4)


def test_confidence_is_that_of_the_saved_data(finished, tokenizer):
    """The last checkpoint's perplexity by another way: the model's own logits, one example at a time."""
    folder, _ = finished
    model = common.tiny_model(0)
    rows = [row for dataset in common.load_data(["toy#80"]) for row in dataset.rows]
    run_folder = folder.parent / "ntp"
    run(run_folder, "--data", "toy#80", "--max_steps", "10", "--mu", "0")  # bit for bit the reference's training
    model = transformers.AutoModelForCausalLM.from_pretrained(run_folder / "final").eval()
    lines = [json.loads(line) for line in (folder / "confidence.jsonl").read_text().splitlines()[1:]]
    for i in (0, 17, 79):
        example = common.encode([rows[i]], tokenizer, "plain", 2048)[0][0]
        ids = torch.from_numpy(example.ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        nll = torch.nn.functional.cross_entropy(logits[example.start - 1:-1], ids[0, example.start:])
        assert lines[i]["perplexity"][-1] == pytest.approx(nll.exp().item(), rel=1e-5)


def test_ntp_baseline_is_plain_training(tmp_path, tokenizer):
    """--mu 0 --ntp_on full: the same weights, bit for bit, as a loop of a few lines that knows nothing of SFTMix."""
    run(tmp_path / "ntp", "--data", "toy/add#40", "--max_steps", "4", "--mu", "0")
    examples, _ = common.encode(common.load_data(["toy/add#40"])[0].rows, tokenizer, "plain", 2048)
    model = common.tiny_model(0).train()
    optimizer, head = common.make_optimizer(model, 1e-3, 0.1), common.output_head(model)
    batches = common.epoch_batches([len(example.ids) for example in examples], 8, 0, 0)
    for step in range(4):
        chosen = sorted(batches[step], key=lambda i: -len(examples[i].ids))
        batch = common.collate([examples[i] for i in chosen], "cpu")
        loss, _ = common.response_loss(batch.select(common.hidden_states(model, batch.ids)), batch.targets, head)
        (loss / len(batch.targets)).backward()
        common.optimizer_step(model, optimizer, common.learning_rate(step, 4, 1e-3, "cosine", 0.1), 1.0)
    saved = weights(tmp_path / "ntp")
    assert same(saved, {key: value for key, value in model.state_dict().items() if key in saved})


@pytest.mark.parametrize("flags", [["--mu", "0"], [], ["--mixup_norm", "mean"], ["--ntp_on", "confident"], ["--split", "thirds"]])
def test_micro_batching_changes_nothing(tmp_path, monkeypatch, flags):
    """8x1, 4x2, 2x4 (a pair is never cut) and, without pairs, 1x8 give the same gradients: normalised once over the
    optimizer batch, Mixup included."""
    sizes = (8, 4, 2) if "--mu" not in flags else (8, 4, 1)
    gradients = {}

    def keep(model, optimizer, lr, max_grad_norm):
        gradients[size] = [p.grad.clone() for p in model.parameters()]
        raise common.UserError("enough")

    run_flags = ["--data", "toy#30", "--partition", "random", "--max_steps", "1", "--max_length", "200", *flags]
    monkeypatch.setattr(common, "optimizer_step", keep)
    for size in sizes:
        with pytest.raises(SystemExit):
            run(tmp_path / str(size), *run_flags, "--micro_batch_size", str(size))
    norm = max(g.abs().max() for g in gradients[8])
    for size in sizes[1:]:
        assert max((one - other).abs().max() for one, other in zip(gradients[8], gradients[size])) < 1e-6 * max(1, norm)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage, at", [("reference", 5), ("train", 7)])
def test_killed_and_resumed_is_bit_identical(tmp_path, monkeypatch, finished, stage, at):
    flags = ["--data", "toy#80", "--eval_data", "toy/copy", "--max_steps", "10", "--log_every", "1", "--save_every", "3"]
    log = common.Run.log

    def kill(self, step, values, line=None):
        log(self, step, values, line)
        if step == at and f"{stage}/ntp" in values:
            raise Killed

    monkeypatch.setattr(common.Run, "log", kill)
    with pytest.raises(Killed):
        run(tmp_path / "run", *flags)
    monkeypatch.setattr(common.Run, "log", log)
    torch.rand(100)  # another place in the model's RNG
    run(tmp_path / "run", *flags, "--resume")
    assert same(weights(tmp_path / "run"), weights(finished[0]))
    assert records(tmp_path / "run") == records(finished[0])
    assert (tmp_path / "run" / "confidence.jsonl").read_bytes() == (finished[0] / "confidence.jsonl").read_bytes()


def test_resume_refuses_another_run(finished, capsys):
    folder, _ = finished
    before = (folder / "summary.json").read_bytes()
    for flags, message in ((["--seed", "1", "--resume"], "--resume: --seed"), ([], "already holds a run"),
                           (["--resume", str(folder / "nowhere")], "no run in this folder")):
        with pytest.raises(SystemExit) as exit:
            run(folder, "--data", "toy#80", "--eval_data", "toy/copy", "--max_steps", "10", *flags)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and message in error and error.splitlines()[-1].startswith("error: ")
    run(folder, "--data", "toy#80", "--eval_data", "toy/copy", "--max_steps", "10", "--resume")
    assert "nothing to resume" in capsys.readouterr().out and (folder / "summary.json").read_bytes() == before


def test_confidence_file_is_reused_and_checked(tmp_path, finished, capsys):
    folder, _ = finished
    flags = ["--data", "toy#80", "--eval_data", "toy/copy", "--max_steps", "10", "--log_every", "1"]
    run(tmp_path / "again", *flags, "--confidence", str(folder / "confidence.jsonl"))
    assert same(weights(tmp_path / "again"), weights(folder))  # the same split, so the same model
    assert not any("reference/ntp" in record for record in records(tmp_path / "again"))
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "other", "--data", "toy#81", "--max_steps", "2", "--confidence", str(folder / "confidence.jsonl"))
    assert exit.value.code == 2 and "computed for other rows" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    broken = tmp_path / "broken.jsonl"
    broken.write_text((folder / "confidence.jsonl").read_text() + "{\n")
    with pytest.raises(SystemExit):
        run(tmp_path / "other", "--data", "toy#80", "--max_steps", "2", "--confidence", str(broken))
    assert f"{broken}, row 82" in capsys.readouterr().err


def test_reference_with_another_tokenizer(tmp_path, model_folder):
    """Confidences are per example: a weaker reference with its own tokenizer and fewer positions ranks the same rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    weak = tmp_path / "weak"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator([row.response + row.input for _, row in common.toy_rows()],
                            trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(weak)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=400, n_positions=512, n_embd=16, n_layer=1, n_head=2)).save_pretrained(weak)
    run(tmp_path / "run", "--data", "toy#40", "--ref_model", str(weak), "--max_steps", "5")
    manifest, *rows = [json.loads(line) for line in (tmp_path / "run" / "confidence.jsonl").read_text().splitlines()]
    assert manifest["model"] == str(weak) and len(rows) == 40


@pytest.mark.parametrize("flags", [
    ["--ntp_on", "none", "--mu", "1"],
    ["--ntp_on", "confident", "--mu", "0"],
    ["--ntp_on", "unconfident"],
    ["--split", "thirds"],
    ["--lora_rank", "2", "--gradient_checkpointing"],
    ["--select", "longest", "--select_n", "20"],
    ["--dtype", "bf16"],
])
def test_variants_run(tmp_path, flags):
    summary = run(tmp_path / "run", "--data", "toy#40", "--max_steps", "3", "--num_checkpoints", "2", *flags)
    assert summary["steps"] == 3


def test_partition_by_source_pairs_the_two_datasets(tmp_path, capsys):
    run(tmp_path / "run", "--data", "toy/copy#20", "toy/add#12", "--partition", "source", "--max_steps", "3")
    assert "split by source: 20 confident, 12 unconfident" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path / "other", "--data", "toy/copy#20", "--partition", "source", "--max_steps", "3")
    assert "needs two datasets" in capsys.readouterr().err


def test_select_by_scores(tmp_path, capsys):
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({"score": i % 10}) + "\n" for i in range(40)))
    run(tmp_path / "run", "--data", "toy/add#40", "--select", str(scores), "--select_n", "8", "--max_steps", "2", "--mu", "0")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["datasets"] == {"add": 8}
    kept = [row for dataset in common.load_data(["toy/add#40"]) for row in dataset.rows][9::10]
    assert len(kept) == 4  # the rows of score 9 are certain to be among the 8
    scores.write_text("1\n" * 39)
    with pytest.raises(SystemExit):
        run(tmp_path / "other", "--data", "toy/add#40", "--select", str(scores), "--max_steps", "2")
    assert "has 39 scores for 40 rows" in capsys.readouterr().err


def test_low_learning_rate_moves_the_weights(tmp_path):
    """fp32 master weights under bf16 autocast: at the paper's lr 2e-6 bf16 weights would not move at all."""
    sftmix.main([*QUICK, "--lr", "2e-6", "--dtype", "bf16", "--data", "toy/add#16", "--mu", "0", "--max_steps", "1", "--warmup_ratio", "0",
                 "--output_dir", str(tmp_path / "run")])
    before, after = common.tiny_model(0).state_dict(), weights(tmp_path / "run")
    moved = [(before[key] != after[key]).float().mean().item() for key in after if key.endswith("mlp.c_fc.weight")]
    assert min(moved) > 0.99


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_other_architectures_train_and_reload(tmp_path, model_folder, name):
    sftmix.main(["--model", model_folder(name), "--template", "plain", "--data", "toy#30", "--max_steps", "5", "--batch_size", "8",
                 "--output_dir", str(tmp_path / "run")])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    ids = tokenizer("Repeat the word.\nbalo\n", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and model.config.use_cache
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_bad_flags_are_one_line(tmp_path, capsys):
    for flags in (["--mu", "0", "--ntp_on", "none"], ["--batch_size", "7"], ["--alpha", "0"], ["--data", str(tmp_path / "none.jsonl")],
                  ["--model", str(tmp_path / "none")], ["--data", "toy/nothing"], ["--num_checkpoints", "50", "--max_steps", "3"]):
        with pytest.raises(SystemExit) as exit:
            sftmix.main(["--output_dir", str(tmp_path / "run"), "--data", "toy#20", *flags])
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit.value.code == 2 and lines[-1].startswith("error: "), flags


def test_command_from_the_shell(tmp_path):
    command = [sys.executable, str(ROOT / "sftmix.py"), "--data", "toy#24", "--max_steps", "5", "--batch_size", "4", "--output_dir", str(tmp_path / "run"),
               "--show_batch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "⟦</s>⟧" in done.stdout and (tmp_path / "run" / "summary.json").exists()
    bad = subprocess.run([sys.executable, str(ROOT / "sftmix.py"), "--data", "nowhere.jsonl"], capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode == 2 and bad.stderr == "error: nowhere.jsonl: no such file or folder\n"
