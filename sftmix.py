"""SFTMix (arXiv 2410.05248): instruction tuning with Mixup between confident and unconfident examples.

    python sftmix.py --model meta-llama/Llama-3.1-8B --data alpaca          # the paper's recipe
    python sftmix.py --data toy --eval_data toy --epochs 1                  # the built-in tiny model, minutes on a laptop
    python sftmix.py --data alpaca --mu 0 --ntp_on full                     # the NTP baseline

The method, as it stands below from top to bottom (section numbers are the paper's):
  Step 1  train a reference model with plain next-token prediction (NTP); at C points of that training take every
          example's perplexity; confidence = - mean perplexity; split the data at the median          (§3.1, §3.3)
  Step 2  in every batch pair confident with unconfident examples at random; mix the states that predict their n-th
          response tokens, and the tokens, with one λ ~ Beta(α, α) a pair                              (§3.3)
  Step 3  minimise NTP + μ · Mixup                                                                     (§3.3)
What the paper leaves open, and what we chose: docs/sftmix.md.

Shapes: B examples of a micro-batch (first half confident), R response tokens of it, V vocabulary, H hidden, N examples
of the data, C checkpoints of the reference.
"""
from __future__ import annotations

import argparse
import gc
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import UserError

# ----------------------------------------------------------------------------------------------------------------------
# The method: Step 1, confidence
# ----------------------------------------------------------------------------------------------------------------------


def confidence(perplexity):
    """Conf(Y_i|X_i) = - 1/C Σ_c Perp_c(Y_i|X_i): minus the mean perplexity over the reference's checkpoints (§3.1).

    perplexity (C, N) -> (N,) float64. Raises ValueError where one is not finite: it would sort as the most or the least
    confident of all.
    """
    perplexity = np.asarray(perplexity, dtype=np.float64)
    if not np.isfinite(perplexity).all():
        raise ValueError("a perplexity is not finite")
    return -perplexity.mean(axis=0)


def partition(confidence):
    """Split at the median: D^c the upper half by confidence, D^u the lower half (§3.3 step 1).

    (N,) -> (confident indices, unconfident indices), each sorted by falling confidence. Ties keep the data's order; with
    an odd N the confident half has one more.
    """
    order = np.argsort(-np.asarray(confidence, dtype=np.float64), kind="stable")
    return np.split(order, [(len(order) + 1) // 2])


def partition_thirds(confidence):
    """The footnote's equal thirds: (top, middle, bottom). Top and bottom are mixed, the middle only gets NTP (our reading).
    (N,) -> three index arrays; what 3 does not divide goes to the middle."""
    order = np.argsort(-np.asarray(confidence, dtype=np.float64), kind="stable")
    third = len(order) // 3
    return np.split(order, [third, len(order) - third])


# ----------------------------------------------------------------------------------------------------------------------
# The method: Step 2 and 3, the loss
# ----------------------------------------------------------------------------------------------------------------------


def mixup_pairs(lengths):
    """Which rows are interpolated: the n-th response tokens of examples i and i + B/2, n = 1..min of the two (§3.3 step 3).

    lengths (B,) response tokens per example, first half confident -> rows of the confident side, rows of the unconfident
    side, pair number i of each (all (P,)), and the rows left over.
    """
    half = len(lengths) // 2
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shorter = np.minimum(lengths[:half], lengths[half:])
    pair = np.repeat(np.arange(half), shorter)
    n = np.arange(len(pair)) - np.repeat(np.cumsum(shorter) - shorter, shorter)
    confident, unconfident = starts[pair] + n, starts[pair + half] + n
    alone = np.setdiff1d(np.arange(starts[-1]), np.concatenate([confident, unconfident]), assume_unique=True)
    return confident, unconfident, pair, alone


def sftmix_loss(hidden, targets, lengths, lam, weight, mu, bias=None, *, scale=1.0, softcap=None, ntp_weight=None):
    """ℓ = ℓ_NTP + μ ℓ_Mixup of a micro-batch, as sums over tokens (§3.3 steps 2 and 3).

        Z~_n = λ Z^c_n + (1-λ) Z^u_n      Y~_n = λ Y^c_n + (1-λ) Y^u_n      ℓ_Mixup = Σ_pairs Σ_n H(Y~_n, σ(Z~_n W))

    The head is linear: Z~ W = λ Z^c W + (1-λ) Z^u W. So the logits that NTP needs anyway are interpolated, and Mixup costs
    no matrix product of its own; its gradient is added to that of the two rows it came from.

    hidden (R, H): states that predict the response tokens, all of example 0, then of example 1, ...; the first half of the
    examples are confident, example i pairs with i + B/2. targets (R,), lengths (B,) with B even, lam (B/2,), weight (V, H),
    bias (V,). scale, softcap: the head's own (common.Head). ntp_weight (B,): factor on each example's NTP term (None = 1).
    With mu = 0 nothing is mixed, lam is not used and B may be odd.
    -> loss, ntp, mixup: float64 scalars, loss = ntp + mu * mixup; loss is differentiable (once) in hidden, weight and bias.
    """
    head = common.Head(weight, bias, scale, softcap)
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.sum() != len(hidden) or len(targets) != len(hidden):
        raise ValueError(f"{len(hidden)} rows of hidden, {len(targets)} targets, lengths that add up to {lengths.sum()}")
    if mu and (len(lengths) % 2 or 2 * len(lam) != len(lengths)):
        raise ValueError(f"{len(lengths)} examples need to be pairs, with one lam each; lam has {len(lam)}")
    device = hidden.device
    row_weight = None if ntp_weight is None else torch.as_tensor(np.repeat(ntp_weight, lengths), device=device)

    def block_loss(logits, rows, lam):
        """logits (r, V) of NTP rows; with lam (r/2,) the first half of them is interpolated with the second."""
        mixup = logits.new_zeros((), dtype=torch.float64)
        if lam is not None:
            half, lam = len(lam), lam.to(logits.dtype)[:, None]                      # (r/2, 1)
            mixed = torch.lerp(logits[half:], logits[:half], lam)                    # Z~ W = λ Z^c W + (1-λ) Z^u W
            y = targets[rows].view(2, half).T                                        # (r/2, 2): y^c_n, y^u_n
            mixup = common.soft_cross_entropy_(mixed, y, torch.cat([lam, 1 - lam], 1), head).sum(dtype=torch.float64)
        ntp = common.cross_entropy_(logits, targets[rows], head)                     # mixed and logits are gradients now
        if row_weight is not None:
            factor = row_weight[rows].to(logits.dtype)
            ntp, logits = ntp * factor, logits.mul_(factor[:, None])
        if lam is not None:
            logits[:half].addcmul_(mixed, lam, value=mu)                             # dZ~/dZ^c = λ
            logits[half:].addcmul_(mixed, 1 - lam, value=mu)                         # dZ~/dZ^u = 1 - λ
        ntp = ntp.sum(dtype=torch.float64)
        return torch.stack([ntp + mu * mixup, ntp, mixup])

    size = common.chunk_rows(len(weight), device)
    blocks, alone = [], np.arange(len(hidden))
    if mu:
        confident, unconfident, pair, alone = mixup_pairs(lengths)
        lam = torch.as_tensor(lam, device=device)[torch.as_tensor(pair, device=device)]  # (P,) one λ a pair
        for at in range(0, len(pair), size // 2):
            rows = np.concatenate([confident[at:at + size // 2], unconfident[at:at + size // 2]])
            blocks.append((torch.from_numpy(rows).to(device), lam[at:at + size // 2]))
    blocks += [(torch.from_numpy(alone[at:at + size]).to(device), None) for at in range(0, len(alone), size)]
    totals = common.chunked_head_loss(hidden, head, blocks, block_loss)
    return totals[0], totals[1].detach(), totals[2].detach()


PAIR_GROUP = common.LENGTH_GROUP // 2  # pairs of similar length that stay together, so a group has as many examples as in NTP


def paired_batches(confident, unconfident, rest, lengths, batch_size, seed, epoch, window=common.LENGTH_WINDOW):
    """One epoch of batches with an equal number of confident and unconfident examples, randomly paired (§3.3 step 3).

    confident, unconfident, rest: example indices (rest, of the thirds, is never mixed); lengths by example index. Both
    halves are shuffled, grouped by length inside a window of batches (common.length_grouped), and dealt evenly over the same
    number of batches. Within a batch the pairs are random among the examples of similar length; with window=1, among all.
    -> list of batches; a batch is a list of (confident, unconfident) index pairs, None where there is no partner. Every
    example occurs exactly once.
    """
    lengths, total = np.asarray(lengths), len(confident) + len(unconfident) + len(rest)
    steps = -(-total // batch_size)
    parts = []
    for name, indices in (("confident", confident), ("unconfident", unconfident), ("rest", rest)):
        sizes = np.diff(np.linspace(0, len(indices), steps + 1).round().astype(int))
        order = common.data_rng(seed, name, epoch).permutation(np.asarray(indices, dtype=np.int64))
        # the same generator for all three: group k of each comes from the same place of its length order
        parts.append(common.length_grouped(order, lengths, sizes, common.data_rng(seed, "window", epoch), window, PAIR_GROUP))
    batches, rng = [], common.data_rng(seed, "pairs", epoch)

    def shuffled(indices):
        ranks = np.argsort(np.argsort(lengths[indices], kind="stable"))
        return indices[np.lexsort((rng.random(len(indices)), ranks // PAIR_GROUP if window > 1 else 0 * ranks))].tolist()

    for c, u, r in zip(*parts):
        c, u = shuffled(c), shuffled(u)
        width = max(len(c), len(u))
        c, u = c + [None] * (width - len(c)), u + [None] * (width - len(u))
        batches.append(list(zip(c, u)) + [(i, None) for i in r.tolist()])
    return batches


def mixed_tokens(batch, examples):
    """Interpolated positions of a paired batch: Σ_pairs min(N^c, N^u)."""
    return sum(min(examples[c].response_tokens, examples[u].response_tokens) for c, u in batch if c is not None and u is not None)


# ----------------------------------------------------------------------------------------------------------------------
# The loop, for the reference and for the target model
# ----------------------------------------------------------------------------------------------------------------------


def train(stage, model, examples, epoch_batches, steps, args, run, mu=0.0, ntp=(1.0, 1.0), state=None, score=None, eval_sets=None):
    """Train model on examples for `steps` optimizer steps; stage "reference" or "train" prefixes the metrics.

    epoch_batches(epoch) -> batches, each a list of groups of example indices: (i,) for NTP, (confident, unconfident) for
    SFTMix. mu, ntp: factor of Mixup and of each half's NTP. state: where a checkpoint stopped. score: (points, function) of
    the confidence pass, called after these steps. -> {"step", "examples", "tokens"}
    """
    device, head = next(model.parameters()).device, common.output_head(model)
    optimizer = common.make_optimizer(model, args.lr, args.weight_decay)
    torch.manual_seed(args.seed)
    counts, window, method = {"step": 0, "examples": 0, "tokens": 0}, np.zeros(4), {}
    if state:
        common.load_trainable_state(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        common.set_rng_state(state["rng"])
        counts, window, method = dict(state["counts"]), state["window"].numpy().copy(), state["method"]
    points, score_function = score or ((), None)
    epoch, batches = -1, []
    model.train()
    bar = tqdm(total=steps, initial=counts["step"], desc=stage, unit="step")
    while counts["step"] < steps:
        step = counts["step"]
        if not batches or step // len(batches) != epoch:
            epoch = step // len(batches) if batches else step // len(epoch_batches(0))
            batches = epoch_batches(epoch)
        batch = batches[step % len(batches)]
        flat = [i for group in batch for i in group if i is not None]
        tokens = sum(examples[i].response_tokens for i in flat)
        with run.timer(stage):
            # ---- Step 2: one λ ~ Beta(α, α) a pair, by the data order's generator
            lam = common.data_rng(args.seed, "lambda", step).beta(args.alpha, args.alpha, len(batch))
            # Both sums are divided by the response tokens of the whole batch; `mean` divides each by its own count.
            scored = sum(examples[i].response_tokens * w for group in batch for i, w in zip(group, ntp) if i is not None)
            positions = mixed_tokens(batch, examples) if mu else 0
            ntp_norm, mix_norm = (scored, positions) if args.mixup_norm == "mean" else (tokens, tokens)
            norm = ntp_norm or mix_norm
            mu_here = mu * norm / mix_norm if mix_norm else 0.0
            # ---- Step 3: ℓ = ℓ_NTP + μ ℓ_Mixup, summed over micro-batches
            width = [max(len(examples[i].ids) for i in group if i is not None) for group in batch]
            totals = torch.zeros(2, dtype=torch.float64, device=device)
            for part in common.micro_batches(range(len(batch)), width, max(1, args.micro_batch_size // len(batch[0]))):
                side = [[batch[k][s] for k in part] for s in range(len(batch[0]))]    # all first members, then all second
                micro = common.collate([None if i is None else examples[i] for i in sum(side, [])], device)
                with common.autocast(device, args.dtype):
                    hidden = common.hidden_states(model, micro.ids)                   # (B, T, H)
                weights = None if ntp == (1.0, 1.0) else np.repeat(ntp[:len(side)], len(part))
                loss, ntp_sum, mixup_sum = sftmix_loss(micro.select(hidden), micro.targets, micro.lengths, lam[part], head.weight,
                                                       mu_here, head.bias, scale=head.scale, softcap=head.softcap, ntp_weight=weights)
                (loss / norm).backward()
                totals += torch.stack([ntp_sum, mixup_sum])
            lr = common.learning_rate(step, steps, args.lr, args.schedule, args.warmup_ratio)
            grad_norm = common.optimizer_step(model, optimizer, lr, args.max_grad_norm)
        window += [*totals.tolist(), scored, positions]
        counts = {"step": step + 1, "examples": counts["examples"] + len(flat), "tokens": counts["tokens"] + tokens}
        step += 1
        bar.update(1)
        if step % args.log_every == 0 or step in (1, steps):
            values = {f"{stage}/ntp": window[0] / window[2]} if window[2] else {}
            if mu:
                values[f"{stage}/mixup"] = window[1] / max(window[3], 1)
            values = {**values, f"{stage}/lr": lr, f"{stage}/grad_norm": grad_norm}
            line = "  ".join(f"{key.split('/')[1]} {value:.4g}" for key, value in values.items())
            run.log(step, {"epoch": step / len(batches), "examples": counts["examples"], "tokens": counts["tokens"], **values},
                    f"{stage} {step}/{steps}  {line}")
            window[:] = 0
        if eval_sets and args.eval_every and step % args.eval_every == 0 and step < steps:
            evaluate(model, eval_sets, step, args, run)
        if step in points:
            with run.timer("confidence"):
                method = score_function(model, step, method)
        if (args.save_every and step % args.save_every == 0 and step < steps) or step in points:
            run.save_checkpoint({"stage": stage, "counts": counts, "window": torch.from_numpy(window), "method": method,
                                 "model": common.trainable_state(model), "optimizer": optimizer.state_dict()})
    bar.close()
    return counts, method


def evaluate(model, eval_sets, step, args, run):
    """Evaluate on --eval_data, log, and return common.evaluate's numbers."""
    with run.timer("eval"):
        result = common.evaluate(model, eval_sets, 2 * args.micro_batch_size, next(model.parameters()).device, args.dtype)
    run.log(step, {f"eval/{label}/{key}": value for label, row in result.items() for key, value in row.items()})
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Confidence files, selection
# ----------------------------------------------------------------------------------------------------------------------


def write_confidence(path, manifest, indices, sources, perplexity):
    """confidence.jsonl: a manifest line (what was scored, by which model), then one line a row. perplexity (C, N)."""
    lines = [json.dumps(manifest, ensure_ascii=False)]
    for i, source, values, conf in zip(indices, sources, perplexity.T.tolist(), confidence(perplexity).tolist()):
        lines.append(json.dumps({"index": int(i), "source": source, "perplexity": values, "confidence": conf}, ensure_ascii=False))
    common.write_text(path, "\n".join(lines) + "\n")


def read_confidence(path, fingerprint, rows):
    """-> perplexity (C, rows) with nan where a row was not scored. Raises UserError for a damaged file, or one that was
    computed on other rows."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--confidence {path}: cannot be read ({error})") from None
    perplexity = None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if number == 1:
                if record["fingerprint"] != fingerprint:
                    raise UserError(f"--confidence {path}: was computed for other rows ({record['rows']:,} of fingerprint "
                                    f"{record['fingerprint'][:12]}, this data: {rows:,} of {fingerprint[:12]}); give the same --data, "
                                    "#N, --seed and --select")
                perplexity = np.full((record["num_checkpoints"], rows), np.nan)
                continue
            perplexity[:, record["index"]] = record["perplexity"]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"--confidence {path}, row {number}: {type(error).__name__}: {error}; expected a line that sftmix.py wrote") from None
    return perplexity


def select_rows(datasets, examples, select, select_n):
    """Keep select_n rows (T7): "longest" responses in tokens of the target's tokenizer, or the highest scores of a FILE with
    one number, or {"score": number}, a line for every row of the data. -> indices into the rows of all datasets, in order."""
    rows = sum(len(dataset.rows) for dataset in datasets)
    scores = np.full(rows, -np.inf)
    if select == "longest":
        for index, example in examples.items():
            scores[index] = example.response_tokens
    else:
        try:
            lines = Path(select).read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--select {select}: cannot be read ({error}); expected `longest` or a file of scores") from None
        if len(lines) != rows:
            raise UserError(f"--select {select}: has {len(lines):,} scores for {rows:,} rows with a response")
        for i, line in enumerate(lines):
            try:
                record = json.loads(line)
                scores[i] = float(record["score"] if isinstance(record, dict) else record)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--select {select}, row {i + 1}: {line[:60]!r} is no number and no object with \"score\"") from None
        scores[[i for i in range(rows) if i not in examples]] = -np.inf  # no response left at max_length
    if select_n > np.isfinite(scores).sum():
        raise UserError(f"--select_n {select_n}: only {np.isfinite(scores).sum():,} rows can be chosen from")
    return np.sort(np.argsort(-scores, kind="stable")[:select_n])


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def plot_confidence(path, conf, source):
    """Confidence distributions by source (Figure 3), as mean perplexity on a log axis with the median split."""
    figure, axes = common.new_figure(width=6.4, height=3.8)
    axis, names = axes[0, 0], list(dict.fromkeys(source))
    mean_ppl = -conf
    bins = np.geomspace(mean_ppl.min() * 0.999, max(mean_ppl.max(), mean_ppl.min() * 1.01) * 1.001, 50)
    for name in names:
        values = mean_ppl[np.array(source) == name]
        axis.hist(values, bins, weights=np.full(len(values), 1 / len(values)), histtype="step", linewidth=1.5, label=f"{name} ({len(values):,})")
    axis.axvline(np.median(mean_ppl), color="black", linestyle="--", linewidth=1, label="median: D$^c$ left, D$^u$ right")
    common.log_axis(axis.xaxis)
    axis.set(xlabel="mean perplexity over the reference's checkpoints (= −confidence)", ylabel="share of the source's rows", title="Confidence by source")
    axis.legend(fontsize=7)
    common.save_figure(figure, path)


def plot_perplexity(path, perplexity, steps, halves):
    """Perplexity over the C checkpoints: median and quartiles of the confident and the unconfident half."""
    figure, axes = common.new_figure(width=5.6)
    axis = axes[0, 0]
    for name, indices in halves.items():
        low, middle, high = np.quantile(perplexity[:, indices], [0.25, 0.5, 0.75], axis=1)
        axis.plot(steps, middle, marker="o", label=f"{name} ({len(indices):,}): median, quartiles")
        axis.fill_between(steps, low, high, alpha=0.2)
    common.log_axis(axis.yaxis)
    axis.set(xlabel="optimizer step of the reference", ylabel="perplexity of a response", title="Training dynamics of the reference")
    axis.legend(fontsize=8)
    common.save_figure(figure, path)


def plot_loss(path, records):
    """NTP and Mixup loss per token over the steps, the reference's apart."""
    figure, axes = common.new_figure(width=5.6)
    axis = axes[0, 0]
    for key, label in (("reference/ntp", "reference, NTP"), ("train/ntp", "NTP"), ("train/mixup", "Mixup")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axis.plot(*zip(*points), label=label, linewidth=1.3)
    axis.set(xlabel="optimizer step", ylabel="loss per token (nats)", title="Training loss")
    axis.legend()
    common.save_figure(figure, path)


FIGURE_EMBEDDINGS = 2500  # most and least confident examples in Figure 1


@torch.no_grad()
def plot_embeddings(path, model, examples, halves, args):
    """Figure 1: last hidden state of the final token of the most and the least confident examples, by the reference. Two
    principal components (the paper uses t-SNE; PCA needs no further library and no seed)."""
    device, states, training = next(model.parameters()).device, [], model.training
    chosen = [halves["confident"][:FIGURE_EMBEDDINGS], halves["unconfident"][-FIGURE_EMBEDDINGS:]]
    both = np.concatenate(chosen)
    states = np.zeros((len(both), common.output_head(model).weight.shape[1]), np.float32)
    model.eval()
    for group in tqdm(common.micro_batches(range(len(both)), [len(examples[i].ids) for i in both], 2 * args.micro_batch_size),
                      desc="embeddings", leave=False):
        batch = common.collate([examples[both[k]] for k in group], device)
        with common.autocast(device, args.dtype):
            rows = batch.select(common.hidden_states(model, batch.ids))
        states[group] = rows[batch.lengths.cumsum(0).to(device) - 1].float().cpu().numpy()
    model.train(training)
    states -= states.mean(0)
    _, variance, directions = np.linalg.svd(states, full_matrices=False)
    points = states @ directions[:2].T
    share = variance[:2] ** 2 / max((variance ** 2).sum(), 1e-30)
    figure, axes = common.new_figure(width=5.2, height=4.4)
    for name, color, xy in (("most", "tab:blue", points[:len(chosen[0])]), ("least", "tab:orange", points[len(chosen[0]):])):
        axes[0, 0].scatter(*xy.T, s=4, alpha=0.5, color=color, label=f"{len(xy):,} {name} confident", linewidths=0)
    axes[0, 0].set(xlabel=f"first component ({share[0]:.0%} of the variance)", ylabel=f"second component ({share[-1]:.0%})",
                   title="Last hidden state of the reference")
    axes[0, 0].legend(markerscale=3)
    common.save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = common.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_shared_flags(parser)
    # The paper's recipe (§4.1): Alpaca-52K 3 epochs; UltraChat-200K takes --epochs 1, MedAlpaca-263K --epochs 2.
    parser.set_defaults(epochs=3.0, batch_size=32, lr=2e-6, weight_decay=0.1, schedule="cosine", warmup_ratio=0.1)
    add = parser.add_argument_group("SFTMix").add_argument
    add("--alpha", type=common.positive_float, default=0.5, help="λ ~ Beta(alpha, alpha) (§4.1)")
    add("--mu", type=common.non_negative_float, default=0.2, help="weight of Mixup; 0 with --ntp_on full is the NTP baseline (§4.1, Table 9)")
    add("--num_checkpoints", type=common.positive_int, default=5, metavar="C", help="points of the reference's training at which perplexities are taken (§3.1)")
    add("--ref_model", metavar="NAME", help="reference model instead of a fresh instance of --model; may have another tokenizer (Table 3)")
    add("--confidence", metavar="FILE", help="reuse the confidence.jsonl of another run on the same rows instead of training a reference")
    add("--partition", choices=["confidence", "source", "random"], default="confidence", help="source: of two datasets the first takes the place of the confident half (Table 4); random: not in the paper")
    add("--split", choices=["halves", "thirds"], default="halves", help="thirds: mix the top with the bottom third, NTP on all (footnote)")
    add("--ntp_on", choices=["full", "confident", "unconfident", "none"], default="full", help="examples that get the NTP term (Tables 5, 6); with --mu 0 only these are trained on")
    add("--mixup_norm", choices=["batch", "mean"], default="batch", help="batch: both sums divided by the response tokens of the batch; mean: each by its own count")
    add("--select", metavar="longest|FILE", help="train on --select_n rows only: the longest responses, or the highest scores of FILE (Table 7)")
    add("--select_n", type=common.positive_int, default=1000, metavar="N", help="rows that --select keeps (Table 7: 1,000)")
    add("--length_window", type=common.positive_int, default=common.LENGTH_WINDOW, metavar="BATCHES", help="within so many batches examples (and pairs) of similar length are kept together in groups of 8: less padding; 1 = no grouping across batches, pairs random among all of a batch (not in the paper)")
    args = parser.parse_args(argv)
    if args.max_steps:
        args.epochs = None
    if args.mu == 0 and args.ntp_on == "none":
        parser.error("--mu 0 --ntp_on none leaves no loss")
    if args.split == "thirds" and args.ntp_on != "full":
        parser.error("--split thirds goes with --ntp_on full")
    if args.mu and args.batch_size % 2:
        parser.error(f"--batch_size {args.batch_size}: must be even, half confident and half unconfident")
    if args.mu and args.micro_batch_size % 2:
        parser.error(f"--micro_batch_size {args.micro_batch_size}: must be even, a pair stays in one forward pass")
    if args.confidence and (args.ref_model or args.partition != "confidence"):
        parser.error("--confidence takes the place of --ref_model and --partition")
    return args


def load(name, args, device):
    model, tokenizer = common.load_model(name, device, seed=args.seed, dtype=args.dtype, gradient_checkpointing=args.gradient_checkpointing,
                                         lora_rank=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    common.check_head(model, device)
    return model, tokenizer


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    common.distributed_rank()
    device = common.pick_device()
    args.dtype = common.pick_dtype(args.dtype, device)
    baseline = args.mu == 0 and args.ntp_on == "full"
    uses_confidence = args.partition == "confidence" and not baseline

    # ---- data and model; nothing is written before all of it has been read
    datasets = common.load_data(args.data, args.source_column, args.seed)
    if args.partition == "source" and len(datasets) != 2:
        raise UserError(f"--partition source needs two datasets, the first in place of the confident half; --data gives {len(datasets)}")
    eval_rows = common.load_data(args.eval_data, seed=args.seed, split="eval")
    model, tokenizer = load(args.model, args, device)
    common.describe_model(model, args.model, args.dtype)
    args.template = common.pick_template(args.template, tokenizer)
    args.max_length = min(args.max_length or 2048, common.max_positions(model))
    if args.lora_rank and not args.lora_alpha:
        args.lora_alpha = 2.0 * args.lora_rank

    def index_examples(datasets, tokenizer, template, max_length, quiet=False):
        """-> {index of the row over all datasets: Example}; what a tokenizer drops is missing."""
        starts = np.cumsum([0] + [len(dataset.rows) for dataset in datasets])
        parts = common.encode_datasets(datasets, tokenizer, template, max_length, quiet)
        return {int(starts[example.dataset]) + example.row: example for part in parts for example in part}

    examples = index_examples(datasets, tokenizer, args.template, args.max_length)
    if args.select:
        keep = set(select_rows(datasets, examples, args.select, args.select_n).tolist())
        start = 0
        for dataset in datasets:
            size = len(dataset.rows)
            dataset.rows, start = [row for i, row in enumerate(dataset.rows, start) if i in keep], start + size
        datasets = [dataset for dataset in datasets if dataset.rows]
        print(f"data  --select {args.select}: {sum(len(dataset.rows) for dataset in datasets):,} rows kept")
        examples = index_examples(datasets, tokenizer, args.template, args.max_length, quiet=True)
    source = [dataset.label for dataset in datasets for _ in dataset.rows]  # by row
    fingerprint = common.fingerprint(datasets)
    perplexity = read_confidence(args.confidence, fingerprint, len(source)) if args.confidence else None  # (C, rows)
    eval_sets = {dataset.label: part for dataset, part in
                 zip(eval_rows, common.encode_datasets(eval_rows, tokenizer, args.template, args.max_length))}
    ref_examples = examples
    if uses_confidence and args.ref_model and perplexity is None:
        ref, ref_tokenizer = load(args.ref_model, args, torch.device("cpu"))
        ref_template = common.pick_template("auto" if args.template == "chat" else args.template, ref_tokenizer)
        print(f"reference {args.ref_model}: template {ref_template}")
        ref_examples = index_examples(datasets, ref_tokenizer, ref_template, min(args.max_length, common.max_positions(ref)))
        del ref, ref_tokenizer
    common.check_gradients(model, next(iter(examples.values())), device, args.dtype)
    run = common.Run("sftmix", args, data_fingerprint=fingerprint, eval_fingerprint=common.fingerprint(eval_rows),
                     datasets={dataset.label: len(dataset.rows) for dataset in datasets})
    if run.finished:
        print(f"{run.folder} is finished: nothing to resume")
        return
    state, stage = run.state, run.state["stage"] if run.state else None
    if args.show_batch:
        common.show_examples(list(examples.values()), tokenizer)

    # ---- Step 1: the reference's training dynamics
    if stage == "train" and uses_confidence and perplexity is None:
        perplexity = read_confidence(run.folder / "confidence.jsonl", fingerprint, len(source))  # Step 1 was over
    if uses_confidence and perplexity is None:
        if args.ref_model:
            del model
            free()
            model, _ = load(args.ref_model, args, device)
            common.describe_model(model, args.ref_model, args.dtype)
        rows = np.array(sorted(ref_examples))
        pool = [ref_examples[i] for i in rows]
        lengths = [len(example.ids) for example in pool]

        def reference_batches(epoch):
            return [[(i,) for i in batch.tolist()] for batch in
                    common.epoch_batches(lengths, args.batch_size, args.seed, epoch, window=args.length_window)]

        steps = common.total_steps(args, len(reference_batches(0)))
        points = sorted({round(steps * c / args.num_checkpoints) for c in range(1, args.num_checkpoints + 1)} - {0})
        if len(points) < args.num_checkpoints:
            raise UserError(f"--num_checkpoints {args.num_checkpoints}: the reference trains for only {steps} steps")
        print(f"step 1  reference: {steps} steps of {args.batch_size}, perplexities of {len(pool):,} examples after steps {points}")

        def take_perplexities(model, step, method):
            """Perp_c(Y|X) of every example, one more line of (c, rows)."""
            line = np.full((1, len(source)), np.nan)
            line[0, rows] = common.perplexities(model, pool, 2 * args.micro_batch_size, device, args.dtype, f"confidence {points.index(step) + 1}/{len(points)}")
            before = method["perplexity"].numpy() if method else np.zeros((0, len(source)))
            return {"perplexity": torch.from_numpy(np.concatenate([before, line]))}

        counts, method = train("reference", model, pool, reference_batches, steps, args, run, state=state, score=(set(points), take_perplexities))
        perplexity, state = method["perplexity"].numpy(), None
        write_confidence(run.folder / "confidence.jsonl", {
            "fingerprint": fingerprint, "rows": len(source), "num_checkpoints": len(points), "steps": points, "model": args.ref_model or args.model,
            "epochs": args.epochs, "max_steps": args.max_steps, "lr": args.lr, "batch_size": args.batch_size, "seed": args.seed,
        }, rows, [source[i] for i in rows], perplexity[:, rows])
        halves = dict(zip(("confident", "unconfident"), partition(confidence(perplexity[:, rows]))))
        with run.timer("figures"):
            plot_confidence(run.folder / "confidence.png", confidence(perplexity[:, rows]), [source[i] for i in rows])
            plot_perplexity(run.folder / "perplexity.png", perplexity[:, rows], points, halves)
            plot_embeddings(run.folder / "embeddings.png", model, pool, halves, args)
        del model
        free()
        model, _ = load(args.model, args, device)  # a fresh instance of the target

    # ---- Step 1, continued: the split. From here on an example's index is its place in pool.
    rows = np.array([i for i in sorted(examples) if not uses_confidence or np.isfinite(perplexity[:, i]).all()])
    if len(rows) < len(examples):
        print(f"data  {len(examples) - len(rows)} examples have no confidence and are left out (dropped by the reference's tokenizer)")
    if not len(rows):
        raise UserError("no example has a confidence")
    pool, rest = [examples[i] for i in rows], np.array([], dtype=np.int64)
    lengths = [len(example.ids) for example in pool]
    if not baseline:
        if args.partition == "source":  # Table 4: known quality, highest first
            first = np.array([source[i] == datasets[0].label for i in rows])
            confident, unconfident = np.flatnonzero(first), np.flatnonzero(~first)
        else:
            conf = confidence(perplexity[:, rows]) if uses_confidence else common.data_rng(args.seed, "random").random(len(rows))
            if args.split == "thirds":
                confident, rest, unconfident = partition_thirds(conf)
            else:
                confident, unconfident = partition(conf)
        if args.mu and not min(len(confident), len(unconfident)):
            raise UserError(f"{len(pool)} examples cannot be split into two parts to mix")
        print(f"step 1  split by {args.partition}: {len(confident):,} confident, {len(unconfident):,} unconfident"
              + (f", {len(rest):,} between" if len(rest) else ""))

    # ---- Steps 2 and 3: the target model
    if args.mu:
        def batches(epoch):
            return paired_batches(confident, unconfident, rest, lengths, args.batch_size, args.seed, epoch, args.length_window)
    else:
        chosen = np.arange(len(pool)) if baseline else {"confident": confident, "unconfident": unconfident}[args.ntp_on]
        chosen_lengths = [lengths[i] for i in chosen]

        def batches(epoch):
            return [[(int(chosen[i]),) for i in batch] for batch in
                    common.epoch_batches(chosen_lengths, args.batch_size, args.seed, epoch, window=args.length_window)]

    steps = common.total_steps(args, len(batches(0)))
    micro = min(args.micro_batch_size, args.batch_size)
    print(f"train {steps} steps, {args.epochs or steps / len(batches(0)):.3g} epochs; micro-batch {micro} x accumulation "
          f"{math.ceil(args.batch_size / micro)} x 1 rank = {args.batch_size} examples a step; {sum(e.response_tokens for e in pool):,} response tokens an epoch")
    if eval_sets and not (stage == "train" and state):
        common.print_evaluation(evaluate(model, eval_sets, 0, args, run))
    ntp = {"full": (1.0, 1.0), "confident": (1.0, 0.0), "unconfident": (0.0, 1.0), "none": (0.0, 0.0)}[args.ntp_on] if args.mu else (1.0, 1.0)
    counts, _ = train("train", model, pool, batches, steps, args, run, args.mu, ntp, state if stage == "train" else None, None, eval_sets)
    result = evaluate(model, eval_sets, steps, args, run) if eval_sets else {}
    if result:
        common.print_evaluation(result)
    run.save_model(model, tokenizer)
    plot_loss(run.folder / "loss.png", run.metrics())
    run.finish({"steps": counts["step"], "examples": counts["examples"], "tokens": counts["tokens"], "eval": result})


if __name__ == "__main__":
    main()
