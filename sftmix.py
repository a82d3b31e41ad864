"""SFTMix (arXiv 2410.05248): instruction tuning with Mixup of confident and unconfident examples.

    python sftmix.py --model meta-llama/Llama-3.1-8B --data alpaca          # the paper's recipe
    python sftmix.py --data toy --eval_data toy --epochs 1                  # tiny model, minutes
    python sftmix.py --data alpaca --mu 0 --ntp_on full                     # the NTP baseline

The method, as it stands below from top to bottom (section numbers are the paper's):
  Step 1  train a reference model with next-token prediction (NTP); at C points of that training
          take every example's perplexity; confidence = -mean perplexity (§3.1)
  Step 2  split the data at the median of the confidence (§3.3)
  Step 3  pair confident with unconfident examples in every batch; mix the states that predict their
          n-th response tokens, and the tokens, with one λ ~ Beta(α, α) a pair; minimise
          NTP + μ · Mixup (§3.3)
What the paper leaves open, and what we chose: docs/sftmix.md.

Shapes: B examples of a micro-batch (first half confident), R response tokens of it, P mixed
positions, V vocabulary, H hidden, N examples of the data, C checkpoints of the reference.
"""

from __future__ import annotations

from argparse import Namespace
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import common
import data
import plots
import prepare
import ranks
from data import Examples, UserError, data_rng


# ---- Step 1: confidence --------------------------------------------------------------------------
def confidence(perplexity) -> np.ndarray:
    """Conf(Y_i|X_i) = -1/C Σ_c Perp_c(Y_i|X_i): minus the mean perplexity over the reference's
    checkpoints (§3.1). (C, N) -> (N,) float64.

    Raises ValueError where one is not finite: it would sort as most or least confident of all."""
    perplexity = np.asarray(perplexity, dtype=np.float64)
    if not np.isfinite(perplexity).all():
        raise ValueError("a perplexity is not finite")
    return -perplexity.mean(axis=0)


# ---- Step 2: the split ---------------------------------------------------------------------------
def partition(confidence) -> tuple[np.ndarray, np.ndarray]:
    """Split at the median: D^c the upper half by confidence, D^u the lower half (§3.3 step 1).

    (N,) -> (confident indices, unconfident indices), each by falling confidence. Ties keep the
    data's order; with an odd N the confident half has one more."""
    order = np.argsort(-np.asarray(confidence, dtype=np.float64), kind="stable")
    half = (len(order) + 1) // 2
    return order[:half], order[half:]


def partition_thirds(confidence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The footnote's equal thirds: (top, middle, bottom). Top and bottom are mixed, the middle only
    gets NTP (our reading). (N,) -> index arrays; what 3 does not divide goes to the middle."""
    order = np.argsort(-np.asarray(confidence, dtype=np.float64), kind="stable")
    third = len(order) // 3
    return order[:third], order[third : len(order) - third], order[len(order) - third :]


@dataclass(frozen=True)
class Halves:
    """Example indices: confident and unconfident ones, which are mixed, and the rest, which are
    not."""

    confident: np.ndarray
    unconfident: np.ndarray
    rest: np.ndarray


# ---- Step 3: the loss ----------------------------------------------------------------------------
def sftmix_loss_reference(hidden, targets, lengths, lam, weight, mu):
    """ℓ = ℓ_NTP + μ ℓ_Mixup as §3.3 writes it, one pair and one token after the other, with all
    logits. Slow: to be read, and to test sftmix_loss. Arguments and result as there."""

    def H(y, z):  # cross-entropy of y (V,) with softmax(z W), z (H,)
        return -(y * torch.log_softmax(z @ weight.T, dim=-1)).sum()

    one_hot = torch.nn.functional.one_hot(targets, len(weight)).to(hidden)  # (R, V)
    states, labels = hidden.split(list(lengths)), one_hot.split(list(lengths))  # by example
    ntp = sum(H(y, z) for y, z in zip(one_hot, hidden))
    mixup, half = 0.0, len(lengths) // 2
    for i in range(half):
        c, u = i, i + half
        for n in range(min(lengths[c], lengths[u])):
            z = lam[i] * states[c][n] + (1 - lam[i]) * states[u][n]
            y = lam[i] * labels[c][n] + (1 - lam[i]) * labels[u][n]
            mixup = mixup + H(y, z)
    return ntp + mu * mixup, ntp, mixup


def mixup_rows(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which rows are interpolated: the n-th response tokens of examples i and i + B/2, for
    n = 1 .. min(N^c, N^u) (§3.3 step 3).

    lengths (B,) response tokens of each example, first half confident -> rows of the confident
    side, rows of the unconfident side, pair number i of each (all (P,)), and the rows left over."""
    half = len(lengths) // 2
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shorter = np.minimum(lengths[:half], lengths[half:])
    pair = np.repeat(np.arange(half), shorter)
    n = np.arange(len(pair)) - np.repeat(np.cumsum(shorter) - shorter, shorter)
    confident, unconfident = starts[pair] + n, starts[pair + half] + n
    mixed = np.concatenate([confident, unconfident])
    alone = np.setdiff1d(np.arange(starts[-1]), mixed, assume_unique=True)
    return confident, unconfident, pair, alone


def block_loss(logits, targets, lam, head: common.Head, mu: float, ntp_weight) -> torch.Tensor:
    """ℓ of a block of rows. logits (r, V) are overwritten with dℓ/dlogits. lam (r/2,): the first
    half of the rows is interpolated with the second, None: NTP alone. targets (r,), ntp_weight (r,)
    or None. -> (3,) loss, ntp, mixup summed over the rows"""
    mixup = logits.new_zeros((), dtype=torch.float64)
    if lam is not None:
        half, lam = len(lam), lam.to(logits.dtype)[:, None]  # (r/2, 1)
        mixed = torch.lerp(logits[half:], logits[:half], lam)  # Z~ W = λ Z^c W + (1-λ) Z^u W
        y, probs = targets.view(2, half).T, torch.cat([lam, 1 - lam], 1)  # (r/2, 2): Y~
        mixup = common.cross_entropy_(mixed, y, head, probs).sum(dtype=torch.float64)
    ntp = common.cross_entropy_(logits, targets, head)  # mixed and logits are gradients now
    if ntp_weight is not None:
        factor = ntp_weight.to(logits.dtype)
        ntp, logits = ntp * factor, logits.mul_(factor[:, None])
    if lam is not None:
        logits[:half].addcmul_(mixed, lam, value=mu)  # dZ~/dZ^c = λ
        logits[half:].addcmul_(mixed, 1 - lam, value=mu)  # dZ~/dZ^u = 1 - λ
    ntp = ntp.sum(dtype=torch.float64)
    return torch.stack([ntp + mu * mixup, ntp, mixup])


def sftmix_loss(
    hidden, targets, lengths, lam, weight, mu, bias=None,
    *, scale=1.0, softcap=None, ntp_weight=None,
):  # fmt: skip
    """ℓ = ℓ_NTP + μ ℓ_Mixup of a micro-batch, as sums over tokens (§3.3 steps 2 and 3):

        Z~_n = λ Z^c_n + (1-λ) Z^u_n   Y~_n = λ Y^c_n + (1-λ) Y^u_n   ℓ_Mixup = Σ H(Y~_n, σ(Z~_n W))

    Equals sftmix_loss_reference. The head is linear: Z~ W = λ Z^c W + (1-λ) Z^u W. So the logits
    that NTP needs anyway are interpolated, and Mixup costs no matrix product of its own; its
    gradient is added to that of the two rows it came from.

    hidden (R, H): states that predict the response tokens, all of example 0, then of example 1 ...;
    the first half of the examples are confident, example i pairs with i + B/2. targets (R,),
    lengths (B,) with B even, lam (B/2,), weight (V, H), bias (V,). scale, softcap: the head's own
    (common.Head). ntp_weight (B,): factor on each example's NTP term (None = 1). With mu = 0
    nothing is mixed, lam is not used and B may be odd. Raises ValueError where shapes do not fit.
    -> loss, ntp, mixup: float64 scalars, loss = ntp + mu * mixup; loss is differentiable (once) in
    hidden, weight and bias."""
    head, lengths = common.Head(weight, bias, scale, softcap), np.asarray(lengths, dtype=np.int64)
    device, alone, blocks = hidden.device, np.arange(len(hidden)), []
    if lengths.sum() != len(hidden) or len(targets) != len(hidden):
        rows = f"{len(hidden)} rows of hidden, {len(targets)} targets"
        raise ValueError(f"{rows}, lengths that add up to {lengths.sum()}")
    if mu and (len(lengths) % 2 or 2 * len(lam) != len(lengths)):
        raise ValueError(f"{len(lengths)} examples need to be pairs with a lam each: {len(lam)}")
    size = common.chunk_rows(len(weight), device)
    if mu:
        confident, unconfident, pair, alone = mixup_rows(lengths)
        lam = torch.as_tensor(lam, dtype=torch.float64, device=device)
        lam = lam[torch.from_numpy(pair).to(device)]  # (P,) one λ a pair
        for at in range(0, len(pair), size // 2):
            part = slice(at, at + size // 2)  # the two rows of a pair stay in one block
            blocks.append((np.concatenate([confident[part], unconfident[part]]), lam[part]))
    blocks += [(alone[at : at + size], None) for at in range(0, max(1, len(alone)), size)]
    blocks = [(torch.from_numpy(rows).to(device), lam) for rows, lam in blocks]
    by_row = None
    if ntp_weight is not None:
        by_row = torch.as_tensor(np.repeat(ntp_weight, lengths), device=device)  # (R,)

    def loss(logits, rows, lam):
        factor = None if by_row is None else by_row[rows]
        return block_loss(logits, targets[rows], lam, head, mu, factor)

    totals = common.chunked_head_loss(hidden, head, blocks, loss)
    return totals[0], totals[1].detach(), totals[2].detach()


def normalisers(scored: float, positions: int, tokens: int, mu: float, rule: str):
    """What a batch's loss is divided by, and the factor of Mixup under that divisor. "batch": both
    sums by the response tokens of the batch (§3.3 read literally); "mean": NTP by the `scored`
    tokens that carry it, Mixup by the mixed `positions`. -> divisor, factor"""
    ntp, mixup = (scored, positions) if rule == "mean" else (tokens, tokens)
    divisor = ntp or mixup
    return divisor, mu * divisor / mixup if mixup else 0.0


# ---- Step 3: the batches -------------------------------------------------------------------------
def paired_batches(halves: Halves, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch of batches with as many confident as unconfident examples, randomly paired (§3.3
    step 3) -> (2, n) example indices each: confident above its unconfident partner, -1 where there
    is none.

    Both halves are shuffled and paired in that order, so that batches are drawn uniformly and pairs
    at random within them. What has no partner (of an odd N one example, the larger dataset's
    surplus, the middle third) is spread evenly over the batches, two in the place of a pair, the
    last of an odd number in the last batch. Every example occurs once."""
    parts = []
    for name, indices in vars(halves).items():
        order = np.asarray(indices, dtype=np.int64)
        parts.append(data_rng(seed, name, epoch).permutation(order))
    confident, unconfident, rest = parts
    pairs = min(len(confident), len(unconfident))
    alone = [unpaired(confident[pairs:]), unpaired(unconfident[pairs:])[::-1], unpaired(rest)]
    alone = np.concatenate(alone, 1)  # (2, n); where there is a rest, the halves are equal
    twos = (alone.shape[1] + 1) // 2  # a pair's place each
    sizes = common.batch_sizes(pairs + twos, batch_size // 2)
    ends = np.cumsum(sizes) * twos // max(1, pairs + twos)  # of `twos`, by the end of each batch
    paired = np.stack([confident[:pairs], unconfident[:pairs]])  # (2, pairs)
    mixed = np.split(paired, (np.cumsum(sizes) - ends)[:-1], 1)
    single = np.split(alone, 2 * ends[:-1], 1)
    return [np.concatenate(parts, 1) for parts in zip(mixed, single)]


def unpaired(indices: np.ndarray) -> np.ndarray:
    """(n,) -> (2, n): examples without a partner."""
    return np.stack([indices, np.full_like(indices, -1)])


# ---- The loop, for the reference and for the target model ----------------------------------------
@dataclass
class Stage:
    """One training: of the reference, or of the target model."""

    name: str  # "reference" or "train": prefix of the metrics
    examples: Examples
    epoch_batches: Callable[[int], list[np.ndarray]]  # epoch -> batches, (2, n) each
    steps: int
    mu: float
    ntp_weight: np.ndarray  # (N,) factor on each example's NTP term
    points: tuple = ()  # steps after which every example's perplexity is taken


@common.finish_step()
def train(model, stage: Stage, args: Namespace, run: common.Run, eval_sets: dict):
    """Train model for stage.steps optimizer steps, from where the run's checkpoint stopped.
    -> {"steps", "examples", "tokens"}, perplexities (C, N) after stage.points"""
    pool, steps = stage.examples, stage.steps
    optimizer = common.make_optimizer(model, args)
    rates = [common.learning_rate(step, steps, args) for step in range(steps)]
    torch.manual_seed(args.seed + ranks.rank())  # of dropout
    lengths = np.append(pool.lengths, 0)  # the last entry, [-1], is nobody's
    responses = np.append(pool.response_lengths, 0)
    counts, perplexity = {"steps": 0, "examples": 0, "tokens": 0}, np.zeros((0, len(pool)))
    window = deque(maxlen=args.log_every)  # of each step what step_values takes
    if run.state and run.state["stage"] == stage.name:
        common.restore(run.state, model, optimizer)
        counts, perplexity = run.state["counts"], run.state["perplexity"].numpy()
        window.extend(run.state["window"])
    eval_at = common.every(args.eval_every, steps)
    steps_per_epoch, epoch = len(stage.epoch_batches(0)), None
    size = max(1, args.micro_batch_size // (2 if stage.mu else 1))  # a pair is two examples
    model.train()
    bar = tqdm(total=steps, initial=counts["steps"], desc=stage.name, unit="step")
    for step in range(counts["steps"], steps):
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            batches = stage.epoch_batches(epoch)
        with run.timer(stage.name):
            chosen = batches[step % steps_per_epoch]  # (2, n)
            present, width = chosen[chosen >= 0], lengths[chosen].max(0)
            # ---- Step 3: one λ ~ Beta(α, α) a pair, from the data order's generator
            lam = data_rng(args.seed, "lambda", step).beta(args.alpha, args.alpha, len(width))
            # ---- Step 3: ℓ = ℓ_NTP + μ ℓ_Mixup over the batch, summed over micro-batches
            tokens = int(responses[present].sum())
            scored = float((stage.ntp_weight[present] * responses[present]).sum())
            positions = int(responses[chosen].min(0).sum())  # that are mixed
            divisor, mu = normalisers(scored, positions, tokens, stage.mu, args.mixup_norm)
            sums = torch.zeros(3, dtype=torch.float64, device=model.device)
            for part in common.micro_batches(range(len(width)), width, size):
                members = chosen[:, part].ravel()  # all first members, then all second
                micro = common.collate([pool[i] if i >= 0 else None for i in members], model.device)
                states, head = common.response_states(model, micro, args.dtype)  # (R, H)
                weight = stage.ntp_weight[members]
                own = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap}
                own["ntp_weight"] = None if weight.all() else weight
                y, n = micro.targets, micro.response_lengths
                losses = sftmix_loss(states, y, n, lam[part], head.weight, mu, **own)
                (losses[0] / divisor).backward()
                sums += torch.stack(losses).detach()
            grad_norm = common.optimizer_step(model, optimizer, rates[step], args.max_grad_norm)
        window.append([*ranks.all_sum(sums).tolist(), divisor, scored, positions])
        done, counts["steps"] = step + 1, step + 1
        counts["examples"] += len(present)
        counts["tokens"] += tokens
        bar.update(1)
        if done % args.log_every == 0 or done in (1, steps):
            values = {**step_values(window), "lr": rates[step], "grad_norm": grad_norm}
            seen = {key: counts[key] for key in ("examples", "tokens")}
            others = {"epoch": done / steps_per_epoch, **seen}
            run.log_training(stage.name, done, steps, values, others)
        if done in eval_at:
            common.evaluate_and_log(model, eval_sets, done, args, run)
        if done in stage.points:  # ---- Step 1: Perp_c of every example
            with run.timer("confidence"):
                perplexity = np.vstack([perplexity, perplexities(model, pool, args)])
        if done in stage.points or run.due(done, steps):
            state = {"stage": stage.name, "counts": counts, "window": list(window)}
            run.save_checkpoint({**state, "perplexity": perplexity}, model, optimizer)
    bar.close()
    return counts, perplexity


def step_values(window: deque) -> dict[str, float]:
    """Means over the last steps, each of sums of loss, NTP, Mixup and their three divisors: loss as
    it is minimised, NTP per token that carries it, Mixup per mixed position."""
    sums = np.sum(window, axis=0)
    pairs = zip(("loss", "ntp", "mixup"), sums[:3], sums[3:])
    return {name: value / divisor for name, value, divisor in pairs if divisor}


# ---- Step 1 of a run: the reference and its confidence file --------------------------------------
def perplexities(model, examples: Examples, args: Namespace) -> np.ndarray:
    """Perp(Y|X) = exp(mean NLL of the response) of every example (§3.1) -> (N,) float64.
    Raises UserError where one is not finite."""
    nll, tokens, _ = common.score(model, examples, 2 * args.micro_batch_size, args.dtype, "Perp")
    with np.errstate(over="ignore"):
        values = np.exp(nll / tokens)
    bad = np.sum(~np.isfinite(values))
    if bad:
        problem = f"the perplexity of {bad} examples is not finite: the reference model diverged"
        raise UserError(f"{problem}; lower --lr")
    return values


def ntp_batches(indices: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch of plain batches over some examples, (2, n) as paired_batches has them: nothing is
    mixed."""
    batches = common.epoch_batches(len(indices), batch_size, seed, epoch)
    return [unpaired(indices[batch]) for batch in batches]


def reference_stage(examples: Examples, args: Namespace) -> Stage:
    """Step 1: plain NTP on all examples, and the C points at which perplexities are taken: evenly
    spaced, the last at the end. Raises UserError where there are fewer steps than points."""
    everyone, count = np.arange(len(examples)), args.num_checkpoints
    batches = partial(ntp_batches, everyone, args.batch_size, args.seed)
    steps = common.total_steps(args, len(batches(0)))
    points = sorted({round(steps * c / count) for c in range(1, count + 1)} - {0})
    if len(points) < count:
        problem = f"the reference trains for only {steps} steps"
        raise UserError(f"--num_checkpoints {count}: {problem}")
    return Stage("reference", examples, batches, steps, 0.0, np.ones(len(examples)), points)


def reference_perplexities(model, stage: Stage, rows: np.ndarray, source: list, args, run):
    """Step 1: train the reference -> perplexities (C, rows of the data), nan but for `rows`, those
    of the stage's examples. Writes confidence.jsonl and its figures."""
    count = f"{len(rows):,} examples after steps {stage.points}"
    print(f"step 1  reference: {stage.steps} steps of {args.batch_size}, perplexities of {count}")
    _, perplexity = train(model, stage, args, run, {})
    conf = confidence(perplexity)
    manifest = {"fingerprint": run.config["data_fingerprint"], "rows": len(source)}
    manifest |= {"num_checkpoints": len(stage.points), "steps": stage.points}
    manifest |= {"model": args.ref_model or args.model, "lines": len(rows)}
    recipe = ("epochs", "max_steps", "lr", "batch_size", "seed")
    lines = [manifest | {flag: getattr(args, flag) for flag in recipe}]
    for i, values, value in zip(rows.tolist(), perplexity.T.tolist(), conf.tolist()):
        row = {"index": i, "source": source[i], "perplexity": values, "confidence": value}
        lines.append(row)
    common.write_jsonl(run.folder / "confidence.jsonl", lines)
    with run.timer("figures"):
        write_embeddings(model, stage.examples, rows, conf, args, run)
        if ranks.rank() == 0:
            plots.draw(run.folder)
    everything = np.full((len(perplexity), len(source)), np.nan)
    everything[:, rows] = perplexity
    return everything


def read_manifest(first: object, fingerprint: str, rows: int) -> dict:
    """The first line of --confidence, checked, where this script wrote it; {} for other files.
    Raises ValueError."""
    if not isinstance(first, dict) or "fingerprint" not in first:
        return {}
    if first["fingerprint"] != fingerprint or first.get("rows") != rows:
        made = f"{first.get('rows')} of fingerprint {str(first['fingerprint'])[:12]}"
        here = f"this data: {rows} of {fingerprint[:12]}"
        advice = "give the same --data, #N, --seed and --select"
        raise ValueError(f"was computed for other rows ({made}, {here}); {advice}")
    count = first.get("num_checkpoints")
    if type(count) is not int or not 1 <= count <= 10_000:
        raise ValueError(f"num_checkpoints is {count!r}, it must be at least 1")
    return first


def read_score(line: object, place: int, manifest: dict) -> tuple[object, list]:
    """A line of --confidence -> index of its row, what stands for its perplexities (C,). place: of
    the line among those of rows, from 0. Raises ValueError."""
    count = manifest.get("num_checkpoints", 1)
    form = f'"index" and "perplexity", a list of {count} numbers'
    form = form if manifest else '"confidence", a number, and "index" or one line for each row'
    if not isinstance(line, dict) or not {"perplexity" if manifest else "confidence"} <= set(line):
        raise ValueError(f"expected an object with {form}")
    values = line["perplexity"] if manifest else [line["confidence"]]
    kinds = {type(value) for value in values} if isinstance(values, list) else {list}
    if not kinds <= {int, float} or len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"expected {form}, all finite; found {str(values)[:60]}")
    return line.get("index", None if manifest else place), values


def read_confidence(path, fingerprint: str, rows: int) -> np.ndarray:
    """--confidence FILE -> perplexities (C, rows), nan where a row was not scored: of a file that
    this script wrote, whole and for these rows; or minus a user's own scores (1, rows),
    {"confidence"} or {"index", "confidence"} a line, one for every row. Raises UserError."""
    lines, number, seen = data.read_jsonl(path, "--confidence"), 1, set()
    try:
        manifest = read_manifest(lines[0], fingerprint, rows)
        scores, expected = lines[1:] if manifest else lines, manifest.get("lines", rows)
        perplexity = np.full((manifest.get("num_checkpoints", 1), rows), np.nan)
        for place, line in enumerate(scores):
            number = place + (2 if manifest else 1)
            index, values = read_score(line, place, manifest)
            if type(index) is not int or not 0 <= index < rows:
                raise ValueError(f"index {index!r} is none of the data's rows, 0 to {rows - 1}")
            if index in seen:
                raise ValueError(f"index {index} stands there twice")
            seen.add(index)
            perplexity[:, index] = values if manifest else -values[0]
        if len(seen) != expected and (not manifest or "lines" in manifest):
            raise ValueError(f"the file ends after {len(seen)} of {expected} rows: it is cut off")
    except (ValueError, OverflowError) as error:
        raise UserError(f"--confidence {path}, row {number}: {error}") from None
    return perplexity


FIGURE_EMBEDDINGS = 2500  # most and least confident examples in Figure 1


def write_embeddings(
    model, examples: Examples, rows: np.ndarray, conf: np.ndarray, args, run
) -> None:
    """embeddings.jsonl, for Figure 1: last hidden state of the final token of the most and the
    least confident examples, by the reference. Two principal components (the paper uses t-SNE; PCA
    needs no further library and no seed). rows (N,): the examples' rows of the data."""
    confident, unconfident = partition(conf)
    most, least = confident[:FIGURE_EMBEDDINGS], unconfident[-FIGURE_EMBEDDINGS:]
    pool = [examples[i] for i in (*most, *least)]
    states = np.zeros((len(pool), common.output_head(model).weight.shape[1]), np.float32)
    common.score(model, pool, 2 * args.micro_batch_size, args.dtype, "embeddings", states)
    states -= states.mean(0)
    _, spread, directions = np.linalg.svd(states, full_matrices=False)
    share = spread[:2] ** 2 / max((spread**2).sum(), 1e-30)
    lines, halves = [{"variance": share.tolist()}], ["confident"] * len(most)
    halves += ["unconfident"] * len(least)
    points = (states @ directions[:2].T).tolist()
    for i, half, (x, y) in zip(rows[[*most, *least]].tolist(), halves, points):
        lines.append({"index": i, "half": half, "x": x, "y": y})
    common.write_jsonl(run.folder / "embeddings.jsonl", lines)


# ---- Steps 2 and 3 of a run: which rows, which halves --------------------------------------------
def reference_examples(args: Namespace, kept: np.ndarray | None) -> tuple[Examples, np.ndarray]:
    """The data as --ref_model's own tokenizer and template have it -> examples, their rows. kept:
    by --select (select_rows)."""
    tokenizer, positions = common.load_tokenizer(args.ref_model)
    template = "auto" if args.template == "chat" else args.template
    template = data.pick_template(template, tokenizer)
    tokenizer = data.with_template(tokenizer, template, args.template_date)
    print(f"reference {args.ref_model}: template {template}")
    recipe = common.recipe(args, tokenizer)
    recipe = replace(recipe, max_length=min(args.max_length, positions))
    datasets = prepare.load(args.data, recipe)
    return prepare.pool(datasets if kept is None else keep_rows(datasets, kept))


def read_scores(path: str, rows: int) -> list[float]:
    """--select FILE: a number, or {"score": number}, a line for each row. Raises UserError."""
    scores, given = [], data.read_jsonl(path, "--select")
    if len(given) != rows:
        problem = f"has {len(given):,} scores for {rows:,} rows with a response"
        raise UserError(f"--select {path}: {problem}")
    for number, value in enumerate(given, 1):
        try:
            scores.append(float(value["score"] if isinstance(value, dict) else value))
            if np.isnan(scores[-1]):
                raise ValueError  # it has no place in an order
        except (ValueError, KeyError, TypeError):
            problem = f'{str(value)[:60]!r} is no number and no object with "score"'
            raise UserError(f"--select {path}, row {number}: {problem}") from None
    return scores


def select_rows(datasets: list, args: Namespace) -> np.ndarray:
    """--select (Table 7): which rows of all datasets are kept, --select_n of those with an example,
    the longest responses in tokens or the highest scores -> indices, rising. Raises UserError."""
    examples, rows = prepare.pool(datasets)
    scores = examples.response_lengths
    if args.select != "longest":
        scores = np.array(read_scores(args.select, sum(each.size for each in datasets)))[rows]
    if args.select_n > len(examples):
        problem = f"only {len(examples):,} rows can be chosen from"
        raise UserError(f"--select_n {args.select_n}: {problem}")
    kept = np.sort(rows[np.argsort(-scores, kind="stable")[: args.select_n]])
    print(f"data  --select {args.select}: {len(kept):,} rows kept")
    return kept


def keep_rows(datasets: list, kept: np.ndarray) -> list:
    """The datasets with those rows alone; one that keeps none is left out."""
    result, chosen = [], np.zeros(sum(each.size for each in datasets), bool)
    chosen[kept] = True
    for each in datasets:
        own, chosen = chosen[: each.size], chosen[each.size :]
        if own.any():
            result.append(each.keep(own, len(result)))
    return result


def split(source: list[str], perplexity: np.ndarray | None, args: Namespace) -> Halves:
    """Step 2: the examples' halves by confidence, by known quality or at random. source: label of
    each example's dataset; perplexity (C, N), where confidence decides."""
    nobody = np.zeros(0, np.int64)
    if args.partition == "source":  # Table 4: known quality, highest first
        first = np.array(source) == source[0]
        return Halves(np.flatnonzero(first), np.flatnonzero(~first), nobody)
    if args.partition == "random":
        conf = data_rng(args.seed, "random").random(len(source))
    else:
        conf = confidence(perplexity)
    if args.split == "thirds":
        confident, rest, unconfident = partition_thirds(conf)
        return Halves(confident, unconfident, rest)
    return Halves(*partition(conf), nobody)


def check_halves(rows: np.ndarray, source: list[str], args: Namespace) -> None:
    """Raise UserError, before any training, where step 2 would find nothing to split.
    rows: the examples that have a confidence, or will have one."""
    if not len(rows):
        raise UserError("no example has a confidence")
    if is_baseline(args):
        return
    halves = split([source[i] for i in rows], np.zeros((1, len(rows))), args)
    if not min(len(halves.confident), len(halves.unconfident)):
        problem = f"are too few for --split {args.split} by {args.partition}"
        raise UserError(f"--data: {len(rows)} examples {problem}; give more rows")


def target_stage(
    examples: Examples, rows: np.ndarray, source: list[str], perplexity, args: Namespace
) -> Stage:
    """Steps 2 and 3: what the target is trained on, in which batches, with which weights.
    rows (N,): the examples' rows of the data, source: label by row; perplexity (C, n) by row, or
    None where the split does not need it."""
    scored = np.ones(len(rows), bool)
    if perplexity is not None:
        scored = np.isfinite(perplexity[:, rows]).all(0)
        perplexity = perplexity[:, rows[scored]]
    if not scored.all():
        why = "have no confidence (skipped by the reference's tokenizer) and are skipped"
        print(f"data  {np.sum(~scored)} examples {why}")
    pool, rows = examples.take(scored), rows[scored]
    weight, trained_on = np.ones(len(pool)), np.arange(len(pool))
    options = args.batch_size, args.seed
    if not is_baseline(args):
        halves = split([source[i] for i in rows], perplexity, args)
        sizes = [f"{len(part):,} {name}" for name, part in vars(halves).items() if len(part)]
        print(f"step 2  split by {args.partition}: {', '.join(sizes)}")
        trained_on = getattr(halves, args.ntp_on, trained_on)  # that get NTP: one half, or all
    if args.mu:
        batches = partial(paired_batches, halves, *options)
        weight[:] = 0
        weight[trained_on] = args.ntp_on != "none"
    else:
        batches = partial(ntp_batches, trained_on, *options)
    steps = common.total_steps(args, len(batches(0)))
    epochs, tokens = steps / len(batches(0)), pool.response_lengths.sum()
    plan = f"{steps} steps, {args.epochs or epochs:.3g} epochs; {common.batch_arithmetic(args)}"
    print(f"train {plan}; {tokens:,} response tokens an epoch")
    return Stage("train", pool, batches, steps, args.mu, weight)


# ---- The script ----------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.ArgumentParser(description=__doc__)
    common.add_shared_flags(parser)
    # The paper's recipe (§4.1): Alpaca-52K 3 epochs; UltraChat-200K 1, MedAlpaca-263K 2.
    parser.set_defaults(epochs=3.0, batch_size=32, lr=2e-6, weight_decay=0.1)
    parser.set_defaults(schedule="cosine", warmup_ratio=0.1)
    # fmt: off
    add = parser.add_argument_group("SFTMix").add_argument
    add("--alpha", type=common.positive_float, default=0.5, help="λ ~ Beta(alpha, alpha) (§4.1)")
    add("--mu", type=common.non_negative_float, default=0.2,
        help="weight of Mixup; 0 with --ntp_on full is the NTP baseline (§4.1, Table 9)")
    add("--num_checkpoints", type=common.positive_int, default=5, metavar="C",
        help="points of the reference's training at which perplexities are taken (§3.1)")
    add("--ref_model", metavar="NAME",
        help="reference model, default a fresh instance of --model; any tokenizer (Table 3)")
    add("--confidence", metavar="FILE",
        help="instead of a reference: confidence.jsonl of another run on the same rows, or your "
             'own scores, {"confidence": NUMBER} for each row in order, or with its "index"')
    add("--partition", choices=["confidence", "source", "random"], default="confidence",
        help="source: of two datasets the first takes the place of the confident half (Table 4); "
             "random: not in the paper")
    add("--split", choices=["halves", "thirds"], default="halves",
        help="thirds: mix the top with the bottom third, NTP on all (footnote)")
    add("--ntp_on", choices=["full", "confident", "unconfident", "none"], default="full",
        help="examples that get NTP (Tables 5, 6); with --mu 0 only these are trained on")
    add("--mixup_norm", choices=["batch", "mean"], default="batch",
        help="batch: both sums divided by the batch's response tokens; mean: each by its own count")
    add("--select", metavar="longest|FILE",
        help="train on --select_n rows: the longest responses, or the highest scores (Table 7)")
    add("--select_n", type=common.positive_int, default=1000, help="rows that --select keeps")
    # fmt: on
    args = common.parse_flags(parser, argv, "sftmix")
    if args.max_steps:
        args.epochs = None
    if args.mu == 0 and args.ntp_on == "none":
        parser.error("--mu 0 --ntp_on none leaves no loss")
    if args.split == "thirds" and args.ntp_on != "full":
        parser.error("--split thirds goes with --ntp_on full")
    for flag in ("batch_size", "micro_batch_size"):
        if args.mu and getattr(args, flag) % 2:
            parser.error(f"--{flag} {getattr(args, flag)}: must be even, a pair stays together")
    if args.confidence and (args.ref_model or args.partition != "confidence"):
        parser.error("--confidence takes the place of --ref_model and --partition")
    return args


def is_baseline(args: Namespace) -> bool:
    return args.mu == 0 and args.ntp_on == "full"


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    run = common.Run("sftmix", args)
    if run.finished:
        return
    tokenizer = common.setup(args)
    datasets, eval_datasets = common.load_datasets(args, tokenizer)
    if args.partition == "source" and len(datasets) != 2:
        raise UserError(f"--partition source needs two datasets; --data gives {len(datasets)}")
    kept = select_rows(datasets, args) if args.select else None
    datasets = datasets if kept is None else keep_rows(datasets, kept)
    examples, rows = prepare.pool(datasets)
    eval_sets = {dataset.label: dataset.examples for dataset in eval_datasets}
    source = [dataset.label for dataset in datasets for _ in range(dataset.size)]  # by row
    fingerprint, perplexity, reference = data.fingerprint(datasets), None, None
    scored = rows
    if args.confidence:
        perplexity = read_confidence(args.confidence, fingerprint, len(source))
        scored = np.flatnonzero(np.isfinite(perplexity).all(0))
    elif args.partition == "confidence" and not is_baseline(args):
        known = examples
        if args.ref_model:
            known, scored = reference_examples(args, kept)
        reference = reference_stage(known, args)
    check_halves(np.intersect1d(scored, rows), source, args)
    model = common.load_start(args)
    common.print_memory(model, args)
    common.check_gradients(model, examples[0], args.dtype)
    step_1_is_over = run.state and run.state["stage"] == "train"
    if reference and args.ref_model and not step_1_is_over:  # before anything is written
        del model
        model = common.load_trainable(args.ref_model, args)[0]
    run.open(**common.data_config(datasets, eval_datasets, examples))
    if args.show_batch:
        data.show_examples(examples, tokenizer)
    if reference and step_1_is_over:
        perplexity = read_confidence(run.folder / "confidence.jsonl", fingerprint, len(source))
    elif reference:
        perplexity = reference_perplexities(model, reference, scored, source, args, run)
        del model
        model = common.load_trainable(args.model, args)[0]  # a fresh instance of the target
    target = target_stage(examples, rows, source, perplexity, args)
    before = common.evaluate_before(model, eval_sets, args, run)
    counts, _ = train(model, target, args, run, eval_sets)
    measure = common.evaluator(eval_sets, args)
    after = common.save_final(model, tokenizer, measure, counts["steps"], run)
    common.end_run(run, before, after, counts, plots.draw)


if __name__ == "__main__":
    main()
