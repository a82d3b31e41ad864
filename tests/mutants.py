"""Deliberately wrong versions of the method: every one must fail a test.

    python tests/mutants.py [FILE.py ...] [--only TEXT]   # by hand: about 40 minutes on 2 cores

Each mutant below replaces one piece of one line in a copy of the repository, runs the tests that
matter for that file, and is "killed" by the first that fails. Survivors are printed at the end;
exit status 1 if there are any. A piece that does not occur exactly once any more is an error: who
changes a line updates its mutant.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
# The tests that matter, the fast ones first.
TESTS = {
    "sftmix.py": [
        "tests/test_flags_sftmix.py",
        "tests/test_flags_shared.py",
        "tests/test_sftmix.py",
    ],
    "dynamix_sft.py": [
        "tests/test_flags_dynamix_sft.py",
        "tests/test_dynamix_sft.py",
        "tests/test_baselines.py",
    ],
    "baselines.py": ["tests/test_baselines.py"],
    "dynamics.py": [
        "tests/test_flags_dynamics.py",
        "tests/test_dynamics.py",
        "tests/test_final.py",
    ],
    "common.py": [
        "tests/test_flags_shared.py",
        "tests/test_common.py",
        "tests/test_sftmix.py",
        "tests/test_final.py",
        "tests/test_terminal.py",
        "tests/test_baselines.py",
    ],
    "runs.py": [
        "tests/test_common.py",
        "tests/test_terminal.py",
        "tests/test_final.py",
        "tests/test_flags_shared.py",
    ],
    "models.py": ["tests/test_final.py", "tests/test_common.py", "tests/test_flags_shared.py"],
    "data.py": [
        "tests/test_reading.py",
        "tests/test_data.py",
        "tests/test_prepare.py",
        "tests/test_common.py",
    ],
    "prepare.py": ["tests/test_prepare.py"],
}
# file -> [(piece of a line, what stands there instead)]
MUTANTS: dict[str, list[tuple[str, str]]] = {
    "data.py": [
        ('"parse_float": Number, ', '"parse_float": float, '),
        ('"parse_int": Number, ', '"parse_int": int, '),
        ('"\\n" * (number - 1) + line', "line"),
        ('raw.removeprefix(b"\\xef\\xbb\\xbf")', "raw"),
        ("error.start += at", "error.start += 0"),
        ("blank and not line.strip()", "False"),
        ('.decode("utf-8-sig")', '.decode("utf-8")'),
        ("if item is not None}", "}"),
        ('return "true" if value else "false"', "return str(value)"),
        ('return "\\n".join(_part(part) for part in value)', 'return "".join(map(_part, value))'),
        ('"developer": "system"', '"developer": "user"'),
        ('if value in ("0", "0.0", "false"):', 'if value in ("0", "false"):'),
        ("elif not messages:", "elif len(messages) < 2:"),
        (
            "for place, turn in enumerate([*context, *turns]):",
            "for place, turn in enumerate(turns):",
        ),
        ("if message[1] != messages[0][1]:", "if False:"),
        ("filled - self.used) | self.unused", "filled - self.used)"),
        ("text.strip().upper() == str(names[i]).upper()", "text == names[i]"),
        ("if len(meant) > 1:", "if len(meant) > 9:"),
        ("if not 0 <= int(answer) < count:", "if int(answer) >= count:"),
        ('if split == "eval" else ("train", "")', 'if split == "eval" else ("train", "", "test")'),
        ("if spec and os.path.exists(spec):", "if False:"),
        ("CLOCK.sub(lambda found: repr(day.strftime(found[2])), text)", "text"),
        ("return first or datetime.date.today()", "return datetime.date.today()"),
        ("min((at for at in places if at >= 0)", "max((at for at in places if at >= 0)"),
        ("at = answer.rfind(self.end)", "at = answer.find(self.end)"),
        ("if not self.marker.search(text):", "if True:"),
        ("if joint[: len(prompt)] != prompt:", "if False:"),
        ("r if r and r[-1] in last else [*r, eos]", "[*r, eos]"),
        ("[bos] if adds_bos(self.tokenizer) else []", "[] if bos is None else [bos]"),
        (
            'self.seen[shape] = f"the {lost[0]} turn\'s text" if lost else None',
            "self.seen[shape] = None",
        ),
        ('lost or (None if name in prompt else f"the tool {name}")', "lost"),
        ('(None if name in answer else f"the call of {name}")', "None"),
        ('lost or (None if _holds(answer, reasoning) else "the reasoning")', "lost"),
        ('if role == "assistant" else text.strip()', "if role else text.strip()"),
        ("counts[CUT] += cut", "counts[CUT] += 0"),
        ("if not example.cut:", "if True:"),
        ("Counter(dataset.left_out) + Counter(found)", "Counter(found)"),
        ('for name in ("length", "start"):', 'for name in ("length",):'),
        ('for name in ("length", "start"):', 'for name in ("start",):'),
        ('table["part"] += len(tokens)', 'table["part"] += 0'),
        ('follows &= table["part"][1:]', 'follows |= table["part"][1:]'),
        ('source.drawn = f"{count} by seed {seed}"', 'source.drawn = f"{count}"'),
        ('source.drawn = f"{count} by seed {seed}"', 'source.drawn = f"{seed}"'),
        ("keep[data_rng(seed, ", "keep[data_rng(0, "),
        ("len(rows) - len(kept)", "0"),
    ],
    "prepare.py": [
        ('examples.table["begin"] += at', "pass"),
        ('examples.table["row"] += total.size', "pass"),
        ("dataset.note(counts, ())", "pass"),
        ("total.note(own.left_out, own.unused)", "pass"),
        ("not count:", "False:"),
        ("if problems:", "if False:"),
        ("[content, source.drawn, source.column]", "[content, source.drawn]"),
        ("[content, source.drawn, source.column]", "[content, source.column]"),
        ("[content, source.drawn, source.column]", "[source.drawn, source.column]"),
        ("recipe.tokenizer_sha256, recipe.max_length, code", "recipe.max_length, code"),
        ("recipe.max_length, code, versions]", "code, versions]"),
        ("recipe.max_length, code, versions]", "recipe.max_length, versions]"),
        ("recipe.max_length, code, versions]", "recipe.max_length, code]"),
        ("fcntl.flock(stream, fcntl.LOCK_EX)", "pass"),
        ("while os.getppid() == parent:", "while True:"),
        ('own["dataset"] = len(result)', "pass"),
        ('table[one["examples"] :]', "table"),
        ('digests[one["size"] :]', "digests"),
        ("(np.cumsum(rows) - 1)[", "np.arange(len(rows))["),
        ("np.cumsum([0] + [one.size for one in sets])", "np.zeros(len(sets) + 1, int)"),
        ("shutil.rmtree(old, ignore_errors=True)", "pass"),
    ],
    "sftmix.py": [
        ("return -perplexity.mean(axis=0)", "return perplexity.mean(axis=0)"),
        ("return -perplexity.mean(axis=0)", "return -np.median(perplexity, axis=0)"),
        ("return -perplexity.mean(axis=0)", "return -np.log(perplexity).mean(axis=0)"),
        ("return -perplexity.mean(axis=0)", "return -perplexity[-1]"),
        ("values = np.exp(nll / tokens)", "values = np.exp(nll)"),
        ("values = np.exp(nll / tokens)", "values = nll / tokens"),
        (
            "{round(steps * c / count) for c in range(1, count + 1)}",
            "{round(steps * c / count) for c in range(count)}",
        ),
        (
            "{round(steps * c / count) for c in range(1, count + 1)}",
            "{round(steps * c / (count + 1)) for c in range(1, count + 1)}",
        ),
        ("if done in stage.points:  # ----", "if step in stage.points:  # ----"),
        ("perplexity[:, index] = values", "perplexity[:, place] = values"),
        ("else -values[0]", "else values[0]"),
        ("everything[:, rows] = perplexity", "everything[:, : len(rows)] = perplexity"),
        (
            "model = common.load_trainable(args.ref_model, args)[0]",
            "model = common.load_trainable(args.model, args)[0]",
        ),
        (
            "model = common.load_trainable(args.model, args)[0]  # a fresh",
            "model = common.load_trainable(args.ref_model or args.model, args)[0]  # a fresh",
        ),
        ("half = (len(order) + 1) // 2", "half = len(order) // 2"),
        ("half = (len(order) + 1) // 2", "half = (len(order) + 1) // 2 + 1"),
        ("return order[:half], order[half:]", "return order[half:], order[:half]"),
        (
            "return order[:third], order[third : len(order) - third], order[len(order) - third :]",
            "return order[:third], order[len(order) - third :], order[third : len(order) - third]",
        ),
        ("third = len(order) // 3", "third = len(order) // 4"),
        (
            "confident, rest, unconfident = partition_thirds(conf)",
            "confident, unconfident, rest = partition_thirds(conf)",
        ),
        ("first = np.array(source) == source[0]", "first = np.array(source) != source[0]"),
        ("first = np.array(source) == source[0]", "first = np.array(source) == min(source)"),
        (
            'conf = data_rng(args.seed, "random").random(len(source))',
            'conf = data_rng(0, "random").random(len(source))',
        ),
        (
            'conf = data_rng(args.seed, "random").random(len(source))',
            "conf = -np.arange(len(source))",
        ),
        ("shorter = np.minimum(lengths[:half], lengths[half:])", "shorter = lengths[:half]"),
        (
            "confident, unconfident = starts[pair] + n, starts[pair + half] + n",
            "confident, unconfident = starts[pair + 1] - 1 - n, starts[pair + half + 1] - 1 - n",
        ),
        (
            "torch.lerp(logits[half:], logits[:half], lam)",
            "torch.lerp(logits[:half], logits[half:], lam)",
        ),
        ("torch.cat([lam, 1 - lam], 1)", "torch.cat([1 - lam, lam], 1)"),
        ("logits[:half].addcmul_(mixed, lam, value=mu)", "logits[:half].addcmul_(mixed, lam)"),
        (
            "logits[half:].addcmul_(mixed, 1 - lam, value=mu)",
            "logits[half:].addcmul_(mixed, 1 - lam)",
        ),
        (
            "logits[half:].addcmul_(mixed, 1 - lam, value=mu)",
            "logits[half:].addcmul_(mixed, lam, value=mu)",
        ),
        ("ntp, logits = ntp * factor, logits.mul_(factor[:, None])", "ntp = ntp * factor"),
        (
            "return torch.stack([ntp + mu * mixup, ntp, mixup])",
            "return torch.stack([ntp + mixup, ntp, mixup])",
        ),
        ('(scored, positions) if rule == "mean"', '(positions, scored) if rule == "mean"'),
        ('(scored, positions) if rule == "mean"', '(tokens, positions) if rule == "mean"'),
        ("else (tokens, tokens)", "else (scored, tokens)"),
        ("else (tokens, tokens)", "else (tokens, positions)"),
        ("return divisor, mu * divisor / mixup if mixup else 0.0", "return divisor, mu"),
        ("beta(args.alpha, args.alpha, len(width))", "beta(0.5, 0.5, len(width))"),
        ("beta(args.alpha, args.alpha, len(width))", "beta(args.alpha, 1.0, len(width))"),
        (
            "beta(args.alpha, args.alpha, len(width))",
            "beta(args.alpha, args.alpha, 1).repeat(len(width))",
        ),
        (
            "beta(args.alpha, args.alpha, len(width))",
            "beta(2 * args.alpha, 2 * args.alpha, len(width))",
        ),
        ('lam = data_rng(args.seed, "lambda", step)', 'lam = data_rng(args.seed, "lambda")'),
        ('lam = data_rng(args.seed, "lambda", step)', 'lam = data_rng(0, "lambda", step)'),
        ("tokens = int(responses[present].sum())", "tokens = int(lengths[present].sum())"),
        (
            "scored = float((stage.ntp_weight[present] * responses[present]).sum())",
            "scored = float(responses[present].sum())",
        ),
        (
            "positions = int(responses[chosen].min(0).sum())",
            "positions = int(responses[chosen].max(0).sum())",
        ),
        (
            "normalisers(scored, positions, tokens, stage.mu, args.mixup_norm)",
            "normalisers(positions, scored, tokens, stage.mu, args.mixup_norm)",
        ),
        (
            "normalisers(scored, positions, tokens, stage.mu, args.mixup_norm)",
            'normalisers(scored, positions, tokens, stage.mu, "batch")',
        ),
        (
            "normalisers(scored, positions, tokens, stage.mu, args.mixup_norm)",
            "normalisers(scored, positions, tokens, args.mu and 0.2, args.mixup_norm)",
        ),
        (
            "sftmix_loss(states, y, n, lam[part], head.weight",
            "sftmix_loss(states, y, n, lam[: len(part)], head.weight",
        ),
        ('own["ntp_weight"] = None if weight.all() else weight', 'own["ntp_weight"] = None'),
        ("(losses[0] / divisor).backward()", "(losses[0] / tokens).backward()"),
        ("(losses[0] / divisor).backward()", "(losses[0] / int(n.sum())).backward()"),
        ("(losses[0] / divisor).backward()", "losses[0].backward()"),
        (
            "common.response_states(model, micro, args.dtype)",
            'common.response_states(model, micro, "fp32")',
        ),
        ("rates[step], args.max_grad_norm)", "args.lr, args.max_grad_norm)"),
        ("rates[step], args.max_grad_norm)", "rates[step], 1.0)"),
        ("data_rng(seed, name, epoch).permutation", "data_rng(seed, name).permutation"),
        ("data_rng(seed, name, epoch).permutation", "data_rng(0, name, epoch).permutation"),
        ("data_rng(seed, name, epoch).permutation", 'data_rng(seed, "both", epoch).permutation'),
        ("unpaired(unconfident[pairs:])[::-1]", "unpaired(unconfident[pairs:])"),
        (
            "ends = np.cumsum(sizes) * twos //",
            "ends = (np.arange(len(sizes)) + 1 == len(sizes)) * twos * (pairs + twos) //",
        ),
        ("twos = (alone.shape[1] + 1) // 2", "twos = alone.shape[1]"),
        ("if step // steps_per_epoch != epoch:", "if epoch is None:"),
        (
            "common.epoch_batches(len(indices), batch_size, seed, epoch)",
            "common.epoch_batches(len(indices), batch_size, seed, 0)",
        ),
        (
            "common.epoch_batches(len(indices), batch_size, seed, epoch)",
            "common.epoch_batches(len(indices), batch_size, 0, epoch)",
        ),
        ("options = args.batch_size, args.seed", "options = args.batch_size, 0"),
        (
            "getattr(halves, args.ntp_on, trained_on)",
            "getattr(split(source, -perplexity, args), args.ntp_on, trained_on)",
        ),
        ("getattr(halves, args.ntp_on, trained_on)", "trained_on"),
        (
            "batches = partial(ntp_batches, trained_on, *options)",
            "batches = partial(ntp_batches, np.arange(len(rows)), *options)",
        ),
        ('weight[trained_on] = args.ntp_on != "none"', "weight[trained_on] = 1"),
        ('weight[trained_on] = args.ntp_on != "none"', "weight[:] = 1"),
        ('return args.mu == 0 and args.ntp_on == "full"', "return args.mu == 0"),
        ("np.argsort(-scores, ", "np.argsort(scores, "),
        ("scores = examples.response_lengths", "scores = examples.lengths"),
        ("[: args.select_n]])", "[: max(args.select_n, len(examples) // 2)]])"),
        ("datasets if kept is None else keep_rows(datasets, kept))", "datasets)"),
        ("scored = np.flatnonzero(np.isfinite(perplexity).all(0))", "scored = rows"),
        ("epochs=3.0, batch_size=32", "epochs=1.0, batch_size=32"),
        ("batch_size=32, lr=2e-6", "batch_size=128, lr=2e-6"),
        ("lr=2e-6, weight_decay=0.1", "lr=2e-5, weight_decay=0.1"),
        ("lr=2e-6, weight_decay=0.1", "lr=2e-6, weight_decay=0.0"),
        ('schedule="cosine", warmup_ratio=0.1', 'schedule="linear", warmup_ratio=0.1'),
        ('schedule="cosine", warmup_ratio=0.1', 'schedule="cosine", warmup_ratio=0.03'),
        (
            '"--alpha", type=common.positive_float, default=0.5',
            '"--alpha", type=common.positive_float, default=1.0',
        ),
        (
            '"--mu", type=common.non_negative_float, default=0.2',
            '"--mu", type=common.non_negative_float, default=0.1',
        ),
        ('default=5, metavar="C"', 'default=3, metavar="C"'),
        ("args.epochs = None", "pass"),
        ("window = deque(maxlen=args.log_every)", "window = deque()"),
        (
            "window.append([*ranks.all_sum(sums).tolist(), divisor, scored, positions])",
            "window.append([*ranks.all_sum(sums).tolist(), divisor, tokens, positions])",
        ),
        ('counts["examples"] += len(present)', 'counts["examples"] += chosen.size'),
        ('others = {"epoch": done / steps_per_epoch', 'others = {"epoch": step / steps_per_epoch'),
    ],
    "dynamix_sft.py": [
        ("EPSILON = 1e-6", "EPSILON = 1e-2"),
        ("logits = beta * (values - values.max())", "logits = (values - values.max())"),
        ("(values - values.max()) + np.log(prior / prior.sum())", "(values - values.max())"),
        ("return (1 - gamma) * weights", "return weights"),
        ("weights / weights.sum() + gamma / len(values)", "weights / weights.sum() + gamma"),
        (
            "((before - after) / (before + eps)).mean()",
            "((after - before) / (before + eps)).mean()",
        ),
        ("((before - after) / (before + eps)).mean()", "((before - after) / (before + eps)).sum()"),
        ("((before - after) / (before + eps)).mean()", "((before - after) / (after + eps)).mean()"),
        ("((before - after) / (before + eps)).mean()", "((before - after) / before).mean()"),
        ("((before - after) / (before + eps)).mean()", "(before - after).mean()"),
        (
            "((before - after) / (before + eps)).mean()",
            "(before - after).sum() / (before + eps).sum()",
        ),
        ("return (rewards - low) / (high - low)", "return rewards / (high - low)"),
        ("return (rewards - low) / (high - low)", "return rewards / high"),
        ("else np.zeros_like(rewards)", "else np.ones_like(rewards)"),
        (
            "return alpha * values + (1 - alpha) * min_max(rewards)",
            "return (1 - alpha) * values + alpha * min_max(rewards)",
        ),
        (
            "return alpha * values + (1 - alpha) * min_max(rewards)",
            "return alpha * values + (1 - alpha) * rewards",
        ),
        (
            "return alpha * values + (1 - alpha) * min_max(rewards)",
            "return min_max(alpha * values + (1 - alpha) * rewards)",
        ),
        (
            "log = np.log(np.asarray(proportions, dtype=np.float64))",
            "log = np.asarray(proportions, dtype=np.float64)",
        ),
        ("return (log - log.max()) / beta", "return log - log.max()"),
        (
            "entropy[rows] = -(log_p.exp() * log_p).sum(1)",
            "entropy[rows] = -(log_p.exp() * log_p).sum(1) / math.log(2)",
        ),
        ("entropy[rows] = -(log_p.exp() * log_p).sum(1)", "entropy[rows] = -log_p.max(1).values"),
        (
            'nll, tokens, _ = common.score(model, examples, size, "fp32")',
            "nll, tokens, _ = common.score(model, examples, size, args.dtype)",
        ),
        ("with common.evaluation_mode(model):", "with torch.no_grad():"),
        (
            'common.response_states(model, batch, "fp32")',
            "common.response_states(model, batch, args.dtype)",
        ),
        ("order = rng.permutation(size)", "order = np.arange(size)"),
        ("order = rng.permutation(size)", "order = rng.integers(0, size, size)"),
        ("return order[:count], order[:count]", "return order, order"),
        ("return order[:count], order[count : 2 * count]", "return order[:count], order[:count]"),
        (
            'step = float(state["step"]) + 1 if state else 1.0',
            'step = float(state["step"]) if state else 1.0',
        ),
        (
            'mean = gradient * (1 - beta1) + (state["exp_avg"] * beta1 if state else 0)',
            "mean = gradient * (1 - beta1)",
        ),
        ("square = gradient**2 * (1 - beta2)", "square = gradient**2"),
        ("root = (square / (1 - beta2**step)).sqrt()", "root = square.sqrt()"),
        ("(mean / (1 - beta1**step) / root", "(mean / root"),
        (' + group["weight_decay"] * weight)', ")"),
        ("return -ranks.all_sum(torch", "return ranks.all_sum(torch"),
        (".sum()).item() / (loss + eps)", ".sum()).item()"),
        (".sum()).item() / (loss + eps)", ".sum()).item() / loss"),
        ('groups = {p: {**group, "lr": lr}', "groups = {p: group"),
        ("yield adamw_update(p, p.grad * clip,", "yield adamw_update(p, p.grad,"),
        (
            'virtual, fresh = args.lookahead == "virtual", args.reward_on == "fresh"',
            'virtual, fresh = True, args.reward_on == "fresh"',
        ),
        (
            'virtual, fresh = args.lookahead == "virtual", args.reward_on == "fresh"',
            'virtual, fresh = args.lookahead == "virtual", False',
        ),
        ('own = data_rng(args.seed, "reward", step, k)', 'own = data_rng(args.seed, "reward", k)'),
        ("measured = [examples[i] for i in other]", "measured = [examples[i] for i in first]"),
        (
            "losses = common.backward(model, on, args)",
            "losses = common.backward(model.eval(), on, args)",
        ),
        ("before = losses if reuse else look(model, measured, args)", "before = losses"),
        ('args.dtype == "fp32" and not fresh', 'args.dtype == "fp32"'),
        ('args.dtype == "fp32" and not fresh', "not fresh"),
        ('reuse = args.reward == "loss" and args.dtype', "reuse = args.dtype"),
        ("reuse = reuse and common.same_rng(rng)", "reuse = bool(reuse)"),
        (
            "common.optimizer_step(model, optimizer, lr, args.max_grad_norm)",
            "common.optimizer_step(model, optimizer, args.lr, args.max_grad_norm)",
        ),
        (
            "common.optimizer_step(model, optimizer, lr, args.max_grad_norm)",
            'common.optimizer_step(model, optimizer, lr, float("inf"))',
        ),
        (
            "                snapshot.restore()\n",
            "                snapshot.restore() if k + 1 == len(arms) else None\n",
        ),
        (
            "losses = common.backward(model, measured, args)",
            "losses = common.backward(model, on, args)",
        ),
        ("loss = float(np.average(losses, weights=tokens))", "loss = float(np.average(losses))"),
        ("                common.set_rng_state(rng)\n", ""),
        ("common.learning_rate(step, steps, args)", "common.learning_rate(step + 1, steps, args)"),
        ("self.prior = self.proportions if args.prior else uniform", "self.prior = uniform"),
        (
            "self.prior = self.proportions if args.prior else uniform",
            "self.prior = self.proportions",
        ),
        ('if args.init == "proportional":', "if False:"),
        (
            "args.update_every if sampler.every else 0, steps)\n    counts",
            "args.update_every, steps)\n    counts",
        ),
        ('"uniform": baselines.Uniform', '"uniform": Sampler'),
        ("sampler.load({name: array.numpy()", "({name: array.numpy()"),
        ("draws.cursors = run.state", "cursors = run.state"),
        ("    model.train()\n    bar", "    bar"),
        ("draws.batch(sampler.group_mixture(), step)", "draws.batch(sampler.proportions, step)"),
        ("draws.batch(sampler.group_mixture(), step)", "draws.batch(sampler.group_mixture(), 0)"),
        (
            "order = len(pool), args.batch_size, args.seed, epoch",
            "order = len(pool), args.batch_size, args.seed, 0",
        ),
        (
            "drawn = batches[step % steps_per_epoch]",
            "drawn = data_rng(args.seed, 'order', step).integers(0, len(pool), args.batch_size)",
        ),
        ("optimizer, rates[step], args.max_grad_norm)", "optimizer, args.lr, args.max_grad_norm)"),
        (
            "seen[:, example.dataset] += 1, example.response_length",
            "seen[:, example.dataset] += 1, len(example.ids)",
        ),
        (
            "window.append([float(losses @ tokens), int(tokens.sum())])",
            "window.append([float(losses.mean()), 1])",
        ),
        ("if done in update_at:", "if step in update_at:"),
        ("if done in update_at:", "if args.update_every and step % args.update_every == 0:"),
        (
            'with run.timer("reward"):\n                rewards',
            'with run.timer("train"):\n                rewards',
        ),
        ("optimizer, done, rates[done])", "optimizer, done, rates[step])"),
        (
            "update_values(self.values, rewards, self.args.alpha)",
            "update_values(np.zeros_like(self.values), rewards, self.args.alpha)",
        ),
        (
            "log_mixture(run, done, sampler, rewards)",
            "log_mixture(run, done, sampler, min_max(rewards))",
        ),
        (
            '"sampler": tensors(sampler.state())',
            '"sampler": {"values": tensors(sampler.state())["values"] * 0}',
        ),
        ('"cursors": draws.cursors', '"cursors": np.zeros_like(draws.cursors)'),
        (
            '{**row, "passes": passes, "coverage": passes / epochs}',
            '{**row, "passes": passes, "coverage": passes}',
        ),
        (
            "epochs=2.0, batch_size=128, lr=1e-5, weight_decay=0.0",
            "epochs=3.0, batch_size=128, lr=1e-5, weight_decay=0.0",
        ),
        (
            "epochs=2.0, batch_size=128, lr=1e-5, weight_decay=0.0",
            "epochs=2.0, batch_size=128, lr=2e-5, weight_decay=0.1",
        ),
        ('schedule="linear", warmup_ratio=0.03', 'schedule="cosine", warmup_ratio=0.03'),
        ('"--sampling", default="dynamix"', '"--sampling", default="proportional"'),
        (
            '"--beta", type=common.non_negative_float, default=4.0',
            '"--beta", type=common.non_negative_float, default=5.0',
        ),
        (
            '"--gamma", type=common.fraction, default=0.3',
            '"--gamma", type=common.fraction, default=0.1',
        ),
        (
            '"--alpha", type=common.fraction, default=0.95',
            '"--alpha", type=common.fraction, default=0.9',
        ),
        ('exploration."""\n\n    every = 50', 'exploration."""\n\n    every = 100'),
        (
            "per_epoch = len(common.batch_sizes(total, args.batch_size))",
            "per_epoch = total // args.batch_size",
        ),
    ],
    "baselines.py": [
        ("return np.full(len(self.labels), 1 / len(self.labels))", "return self.proportions"),
        ("            module.training = training\n", "            pass\n"),
        ("        model.zero_grad(set_to_none=True)\n        ranks", "        ranks"),
        ("        common.set_rng_state(rng)\n", ""),
        ("sizes / sizes.sum()).sum() / 2)", "sizes / sizes.sum()).sum())"),
        ("np.stack([np.log(sizes / sizes.sum()),", "np.stack([0 * sizes,"),
        ("softmax(logits) * np.sum(rewards) - rewards", "softmax(logits) - rewards"),
        (
            "softmax(logits) * np.sum(rewards) - rewards",
            "softmax(logits) * (softmax(logits) @ rewards - rewards)",
        ),
        ("mean, square = 0.9 * mean +", "mean, square = 0.0 * mean +"),
        ("0.999 * square + 0.001 * gradient**2", "0.99 * square + 0.01 * gradient**2"),
        ("        taken = taken + 1\n", "        taken = taken * 0 + 1\n"),
        ("mean / (1 - 0.9**taken) /", "mean /"),
        (
            "return np.stack([logits, mean, square, taken])",
            "return np.stack([logits, *np.zeros((3, len(logits)))])",
        ),
        ("rewards, lr=self.args.actor_lr)})", "rewards)})"),
        ("ACTOR_STEPS = 200", "ACTOR_STEPS = 100"),
        ("size // HELD_OUT_SHARE", "-(-size // HELD_OUT_SHARE)"),
        ("np.sort(order[count:])", "np.sort(order)"),
        ("share / norm if norm else 0.0", "share"),
        ("inner(direction, gradient) / norm if norm", "inner(direction, gradient) if norm"),
        (
            "share = np.zeros(len(self.labels)), 1 / len(self.labels)",
            "share = np.zeros(len(self.labels)), 1",
        ),
        ("self.some(k, self.parts[k][0], step, 1)", "self.some(k, self.held_out[k], step, 1)"),
        ("self.some(k, self.held_out[k], step, 0)", "self.some(k, self.parts[k][0], step, 0)"),
        ("self.some(k, self.held_out[k], step)\n", "self.some(k, self.parts[k][0], step)\n"),
        ("-(log_p.exp() * log_p).sum(1), log_p.amax(1)", "-log_p.mean(1), log_p.amax(1)"),
        ("1 - np.exp(log_max).mean()", "1 - np.exp(np.mean(log_max))"),
        ("1 - np.exp(log_max).mean()", "np.exp(log_max).mean()"),
        ("    model.train()\n    before", "    before"),
        ("range(args.mc_passes - 1)", "range(args.mc_passes)"),
        ("return np.exp(np.minimum(difference, 700))", "return np.exp(-difference)"),
        ("count if len(order) >= fewest else 1", "count"),
        ("count if len(order) >= fewest else 1", "count if len(order) > fewest else 1"),
        ("return means / means.mean()", "return means"),
        ("return means / means.mean()", "return means / means.sum()"),
        ("[ratios[part].mean() for", "[np.median(ratios[part]) for"),
        (
            "np.concatenate([example.ids[:1], example.ids[example.start :]])",
            "example.ids[example.start :]",
        ),
        ("return Example(example.ids, 1, example.row)", "return example"),
        (
            "        model.eval()\n        for k, (label, examples) in",
            "        for k, (label, examples) in",
        ),
        ("part[:NORM_EXAMPLES]", "part[:1]"),
        ("part[:RATIO_EXAMPLES]", "part[:1]"),
        (
            "np.concatenate([p * softmax(logits) for",
            "np.concatenate([p * logits.size**-1.0 + 0 * logits for",
        ),
        ("norms.append(math.sqrt(inner(found, found)))", "norms.append(inner(found, found))"),
        ('"start_loss": self.start_loss}', '"start_loss": self.start_loss * 0}'),
        ('"local": self.local, ', '"local": self.local * 0, '),
        ('return {"weights": self.weights}', 'return {"weights": self.proportions}'),
    ],
    "dynamics.py": [
        ("return (after - before[:, None]) / steps", "return after - before[:, None]"),
        ("return (after - before[:, None]) / steps", "return (before[:, None] - after) / steps"),
        ("return -lr * np.array(rows", "return lr * np.array(rows"),
        ("torch.dot(own, other).item()", "torch.cosine_similarity(own, other, dim=0).item()"),
        ("FEASIBILITY_TOLERANCE = 1e-4", "FEASIBILITY_TOLERANCE = 1e-2"),
        ("LAMBDAS = (1.0, 1e2, 1e4, 1e6)", "LAMBDAS = (1.0,)"),
        ("EPSILONS = (0.0, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1)", "EPSILONS = (0.0,)"),
        ("np.maximum(change @ w + excess + epsilon, 0)", "change @ w + excess + epsilon"),
        (
            "np.maximum(change @ w + excess + epsilon, 0)",
            "np.maximum(change @ w + excess - epsilon, 0)",
        ),
        ("lam * violation @ violation", "lam * violation.sum()"),
        ("2 * lam * change.T @ violation", "lam * change.T @ violation"),
        ("np.full(len(start), 1 / len(start)), vertex)", ")"),
        ("if gradient @ found - gradient.min() < gap:", "if True:"),
        ("return min(solutions)[2]", "return solutions[-1][2]"),
        ("objective = slopes[targets].sum(0)", "objective = slopes[targets].max(0)"),
        ("change = horizon * slopes[constraints]", "change = slopes[constraints]"),
        (
            "excess = losses[constraints] - reference[constraints]",
            "excess = reference[constraints] - losses[constraints]",
        ),
        ('"predicted": losses + horizon * (slopes @ w)', '"predicted": losses + slopes @ w'),
        ('{"lambda": lam * spread / scale**2', '{"lambda": lam'),
        ('"epsilon": epsilon * scale', '"epsilon": epsilon'),
        ("epsilon=epsilon, lam=lam)", "epsilon=epsilon, lam=1.0)"),
        ("epsilon=epsilon, lam=lam)", "epsilon=-epsilon, lam=lam)"),
        (
            "violation.max(initial=0.0) <= FEASIBILITY_TOLERANCE",
            "violation[:1].max(initial=0.0) <= FEASIBILITY_TOLERANCE",
        ),
        ("rank = (not feasible, objective @ w if", "rank = (feasible, objective @ w if"),
        ("objective @ w if feasible else violation @ violation)", "violation @ violation)"),
        (
            "objective @ w if feasible else violation @ violation)",
            "objective @ w if feasible else violation.max())",
        ),
        ("rank < best[0]", "rank > best[0]"),
        (
            "(1 - damping) * weights + damping * previous",
            "damping * weights + (1 - damping) * previous",
        ),
        ('if rule == "uniform" else', "if rule else"),
        ("if target_mass is None:", "if target_mass != 1:"),
        (
            "((serves, target_mass), (~serves, 1 - target_mass))",
            "((serves, 1 - target_mass), (~serves, target_mass))",
        ),
        ("EVEN_UPDATES = 6", "EVEN_UPDATES = 5"),
        ('"light": 2, "dense": 4', '"light": 4, "dense": 2'),
        ("even / 2**k", "even / (k + 1)"),
        ("int((k + 0.5) * len(rates) / probe_steps)", "int(k * len(rates) / probe_steps)"),
        ("int((k + 0.5) * len(rates) / probe_steps)", "0"),
        ("COST_MARGIN * (args.max_cost - 1) * static", "COST_MARGIN * args.max_cost * static"),
        ("args.batch_size * min(lengths)", "args.batch_size * max(lengths)"),
        ("* static - probing", "* static"),
        ("updates * len(lengths) * tokens[0]", "updates * tokens[0]"),
        ("VALIDATION_FRACTION = 0.5", "VALIDATION_FRACTION = 0.6"),
        ("choice_error(-nll,", "choice_error(nll,"),
        ("choice_error(-nll,", "choice_error(-nll / tokens,"),
        ("return nll.sum() / tokens.sum()", "return (nll / tokens).mean()"),
        (".permutation(len(prompts))\n", ".permutation(len(prompts)) * 0 + range(len(prompts))\n"),
        ("cut = round(fraction * len(prompts))", "cut = round((1 - fraction) * len(prompts))"),
        ("return ranked[:first], ranked[first:]", "return ranked[first:], ranked[:first]"),
        ("return ranked[:first], ranked[first:]", "return ranked[:first], ranked"),
        ("return 1 - float(np.mean(right))", "return float(np.mean(right))"),
        (
            'common.score(model, examples, 2 * args.micro_batch_size, "fp32")',
            "common.score(model, examples, 2 * args.micro_batch_size, args.dtype)",
        ),
        ("(float(slack[1]) / 100, True)", "(float(slack[1]), True)"),
        ("levels[i] * (1 + value) if relative", "levels[i] + value if relative"),
        ("and loss - level > FEASIBILITY_TOLERANCE", "and loss > level"),
        ('if domain.role == "constraint" and loss', 'if domain.role != "target" and loss'),
        ("float(sum(loss for domain", "float(max(loss for domain"),
        (
            'for domain, loss in pairs if domain.role == "target"',
            'for domain, loss in pairs if domain.role != "constraint"',
        ),
        ('[domain for domain in self.domains if domain.role != "monitored"]', "list(self.domains)"),
        ('data_rng(seed, "probe", step, j)', 'data_rng(seed, "pass", j, 0)'),
        ('data_rng(seed, "probe", step, j)', 'data_rng(seed, "probe", 0, j)'),
        (
            "    rates = probe_rates(interval.rates, args.probe_steps)",
            "    rates = [interval.rates[0]] * args.probe_steps",
        ),
        (
            "    rates = probe_rates(interval.rates, args.probe_steps)",
            "    rates = [args.lr] * args.probe_steps",
        ),
        (
            "zip(probe_batches(examples, *options), rates)",
            "zip(probe_batches(problem.examples[0], *options), rates)",
        ),
        ("            snapshot.restore()\n", "            snapshot.restore() if j else None\n"),
        ("model.eval()  # no dropout", "model.train()  # no dropout"),
        (
            "flat_gradient(model, d.validation.examples, args)",
            "flat_gradient(model, d.test.examples, args)",
        ),
        (
            "batch = sum(probe_batches(examples, *options), [])",
            "batch = probe_batches(examples, *options)[0]",
        ),
        (
            "gradient_slopes(own, other, float(np.mean(rates)))",
            "gradient_slopes(own, other, args.lr)",
        ),
        (
            "gradient_slopes(own, other, float(np.mean(rates)))",
            "gradient_slopes(own, other, rates[0])",
        ),
        (
            "np.full(len(labels), 1 / len(labels)) if problem",
            "np.array(sizes) / sum(sizes) if problem",
        ),
        ("{*updates, steps, *common.every(args.eval_every, steps)}", "{*updates, steps}"),
        (
            'found["feasible"] and (not best or found["total"] < best["total"])',
            'found["feasible"] and (not best or found["total"] <= best["total"])',
        ),
        ('found["feasible"] and (not best or found["total"] < best["total"])', 'found["feasible"]'),
        (
            'found["feasible"] and (not best or found["total"] < best["total"])',
            'not best or found["total"] < best["total"]',
        ),
        ("best = found if improved else best", "best = found if improved or best else best"),
        ("end = min([point for point in updates if point > step] + [steps])", "end = steps"),
        ("Interval(step, rates[step:end]", "Interval(step, rates[: end - step]"),
        (
            "known = losses[: len(problem.decided)]",
            "known = problem.before[: len(problem.decided)]",
        ),
        ("last_update = known.tolist()", "last_update = last_update or known.tolist()"),
        ("sampler.batch(mixture, step)", "sampler.batch(np.roll(mixture, 1), step)"),
        (
            "optimizer_step(model, optimizer, rates[step], args",
            "optimizer_step(model, optimizer, args.lr, args",
        ),
        (
            "feasible = not failed and total < target_total(domains, problem.before)",
            "feasible = not failed",
        ),
        (
            "feasible = not failed and total < target_total(domains, problem.before)",
            "feasible = not failed and total <= target_total(domains, problem.before)",
        ),
        (
            "feasible = not failed and total < target_total(domains, problem.before)",
            "feasible = total < target_total(domains, problem.before)",
        ),
        (
            "violations(domains, losses, problem.reference)",
            "violations(domains, losses, problem.before)",
        ),
        (
            "slope_matrix(interval.losses, after, args.probe_steps)",
            "slope_matrix(interval.losses, after, horizon)",
        ),
        (
            "slope_matrix(interval.losses, after, args.probe_steps)",
            "slope_matrix(problem.before[: len(decided)], after, args.probe_steps)",
        ),
        (
            "reference = problem.reference[: len(decided)]",
            "reference = problem.before[: len(decided)]",
        ),
        ("(*known, targets, constraints, horizon)", "(*known, constraints, targets, horizon)"),
        ("(*known, targets, constraints, horizon)", "(*known, targets, constraints[1:], horizon)"),
        (
            "(*known, targets, constraints, horizon)",
            "(*known, targets, constraints, args.probe_steps)",
        ),
        (
            "known = interval.losses, slopes, reference",
            "known = interval.losses, slopes[::-1], reference",
        ),
        (
            "mixture = damp(solution, mixture, args.damping)",
            "mixture = damp(solution, np.full(len(mixture), 1 / len(mixture)), args.damping)",
        ),
        ("change = horizon * (slopes @ mixture)", "change = horizon * (slopes @ solution)"),
        (
            "reference = reference_levels(domains, old, rules)",
            "reference = reference_levels(domains, new, rules)",
        ),
        ("violations(domains, new, reference)", "violations(domains, old, reference)"),
        (
            'after[label]["nll"] - before[label]["nll"] for',
            'after[label]["loss"] - before[label]["loss"] for',
        ),
        ("100 * (1 - math.exp(min(np.mean(change), 700.0)))", "-100 * float(np.mean(change))"),
        (
            "100 * (1 - math.exp(min(np.mean(change), 700.0)))",
            "100 * (1 - float(np.mean(np.exp(change))))",
        ),
        ("min(np.mean(change), 700.0)", "min(np.sum(change), 700.0)"),
        ("feasible = best is not None and not failed and fell", "feasible = not failed and fell"),
        (
            "feasible = best is not None and not failed and fell",
            "feasible = best is not None and fell",
        ),
        (
            "feasible = best is not None and not failed and fell",
            "feasible = best is not None and not failed",
        ),
        ('"reduction_percent": reduction if feasible else 0.0', '"reduction_percent": reduction'),
        ("batch_size=8, max_length=512", "batch_size=16, max_length=512"),
        ("lr=2e-4", "lr=2e-5"),
        ('schedule="cosine", warmup_ratio=0.03', 'schedule="linear", warmup_ratio=0.03'),
        (
            "DEFAULT_STEPS, DEFAULT_LORA_RANK = 2048, 32",
            "DEFAULT_STEPS, DEFAULT_LORA_RANK = 1024, 32",
        ),
        ('0 if args.model == "tiny" else DEFAULT_LORA_RANK', "DEFAULT_LORA_RANK"),
        ("label in (args.target_data or args.targets) for", "label in args.targets for"),
        (
            'role = "target" if label in args.targets else "constraint"',
            'role = "target" if label not in args.targets else "constraint"',
        ),
        ('metric = "error" if label in args.accuracy else "nll"', 'metric = "nll"'),
        (
            "split_rows(dataset.rows, args.validation_fraction, label)",
            "split_rows(dataset.rows, VALIDATION_FRACTION, label)",
        ),
        ("problem.rows = args.eval_limit or affordable", "problem.rows = affordable"),
        ("often = range(0, steps, args.eval_every) if args.eval_every else ()", "often = ()"),
        (
            "reference_levels(problem.domains, problem.before, rules)",
            'reference_levels(problem.domains, [r["loss"] for r in problem.test.values()], rules)',
        ),
        ("    if best:  # final/", "    if not best:  # final/"),
        ('run.cost("probe", "eval")', 'run.cost("probe")'),
        (
            "domains.sort(key=lambda domain: ROLES.index(domain.role))",
            "domains.sort(key=lambda domain: domain.label)",
        ),
        ("for part in (problem.decided, domains)]", "for part in (domains, problem.decided)]"),
        ("evaluations = len({*updates, steps, *often})", "evaluations = len(updates)"),
        ("return total / len(side.sizes or side.examples)", "return total / len(side.examples)"),
        ("order += rng.permutation(len(examples)).tolist()", "order += range(len(examples))"),
        ("{round(point) for point", "{int(point) for point"),
        ("{int(point) for point in schedule", "{int(point) + 1 for point in schedule"),
        (
            "common.optimizer_step(model, optimizer, rate, args.max_grad_norm)",
            "common.optimizer_step(model, optimizer, rate, 1.0)",
        ),
        ('new = [after[domain.label]["loss"] for', 'new = [after[domain.label]["nll"] for'),
        (
            "value, relative = rules.get(domain.label, (0.0, True))",
            "value, relative = rules.get(domain.label, (0.02, True))",
        ),
        ('add("--updates", default="light"', 'add("--updates", default="none"'),
        ('type=common.few, default=4, metavar="C"', 'type=common.few, default=8, metavar="C"'),
        ('data_rng(seed, "probe", step, j)', 'data_rng(seed, "pass", j, step)'),
        (
            "first = sum(place[row.prompt] < cut for row in rows)",
            "first = round(fraction * len(rows))",
        ),
        ("validation, test = (make_side", "test, validation = (make_side"),
        ("levels[i] * (1 + value) if relative", "levels[i] * (1 - value) if relative"),
        ("mixture = damp(solution, mixture, args.damping)", "mixture = solution"),
        ("sampler.batch(mixture, step)", "sampler.batch(mixture, step // 16)"),
        (
            "rng.permutation(len(examples)).tolist()",
            "rng.integers(0, len(examples), len(examples)).tolist()",
        ),
        ("        if step in updates:\n", "        if step in updates and step:\n"),
        ("weights[part] = mass * shares[part]", "weights[part] = shares[part]"),
        (
            "known = interval.losses, slopes, reference",
            "known = interval.losses, slopes.T, reference",
        ),
        ("objective = slopes[targets].sum(0)", "objective = -slopes[targets].sum(0)"),
        ("after[:, j] = validation_losses(", "after[:, 0] = validation_losses("),
        ('"index": index[id(rows[i])], "row"', '"index": i, "row"'),
        ("{example.row for example in side.responses}", "set(range(len(rows)))"),
    ],
    "models.py": [
        (
            "storage = torch.bfloat16 if frozen_bf16 else torch.float32",
            'storage = torch.bfloat16 if args.dtype == "bf16" else torch.float32',
        ),
        ("args.lora_alpha or 2 * args.lora_rank", "args.lora_alpha or args.lora_rank"),
        ("lora_dropout=args.lora_dropout", "lora_dropout=0.0"),
        ('"target_modules": "all-linear"', '"target_modules": ["q_proj", "v_proj"]'),
        ("refuse_tensors(name, model, info)\n", "pass\n"),
        ('info["unexpected_keys"] - buffers', "set()"),
        ("config.dtype or config.get_text_config().dtype or torch.float32", "torch.float32"),
        ("drop_extra_tokens(tokenizer)\n", "pass\n"),
        ("model.hf_quantizer.remove_quantization_config(model)", "pass"),
        (
            ".from_pretrained(model, name).merge_and_unload()",
            ".from_pretrained(model, name).unload()",
        ),
        ("model.requires_grad_(True)", "pass"),
        ('filterwarnings("error", "Found', 'filterwarnings("ignore", "Found'),
        ("return os.path.abspath(name) if", "return name if"),
        ('return base, json.loads(about.read_text(encoding="utf-8"))["seed"]', "return base, 0"),
        ("model.generation_config = GenerationConfig", "GenerationConfig"),
    ],
    "runs.py": [
        ("cast(trainable(model) if dtype else (), dtype)", "pass"),
        ("] = ends if len(ends) > 1 else ends[0]", "] = ends[-1]"),
        ('"track", "show_batch", "save_dtype"', '"track", "show_batch"'),
        ('if record["step"] == step else ()', ""),
        ("with no_bars():", "with contextlib.nullcontext():"),
        ("(lm.name_or_path, lm.config.name_or_path)", "(lm.name_or_path,)"),
        ('"ignore", category=FutureWarning, module=NEWS', '"ignore", module=NEWS'),
    ],
    "common.py": [
        ("return weights / weights.sum()", "return np.full(len(weights), 1 / len(weights))"),
        ("slope = 1 - logits**2", "slope = 1 - logits"),
        (
            "picked = (logits.gather(1, targets) * probs).sum(1)",
            "picked = logits.gather(1, targets).mean(1)",
        ),
        (
            "logits.div_(total).scatter_add_(1, targets, -probs)",
            "logits.div_(total).scatter_add_(1, targets, -torch.ones_like(probs))",
        ),
        (
            "logits.div_(total).scatter_add_(1, targets, -probs)",
            "logits.div_(total).scatter_(1, targets, -probs)",
        ),
        (
            "logits.div_(total).scatter_add_(1, targets, -probs)",
            "logits.copy_((logits / total).bfloat16()).scatter_add_(1, targets, -probs)",
        ),
        ("probs = probs.to(logits.dtype)", "probs = probs.bfloat16().to(logits.dtype)"),
        ("nll = (peak + total.log()).squeeze(1) - picked", "nll = total.log().squeeze(1) - picked"),
        ("d_bias += logits.sum(0)", "d_bias = logits.sum(0)"),
        ("d_weight.addmm_(gradient.T, states)", "d_weight.addmm_(gradient.T, states, beta=0)"),
        ("logits += bias", "pass"),
        ("scale = d_totals[0].to(gradient.dtype)", "scale = torch.ones((), dtype=gradient.dtype)"),
        (
            "nll[rows] = cross_entropy_(logits, targets[rows], head)",
            "nll[rows] = cross_entropy_(logits, targets[: len(rows)], head)",
        ),
        ('enabled=dtype == "bf16"', "enabled=False"),
        ("ids.shape[1] + example.start - 1", "ids.shape[1] + example.start"),
        (
            "np.concatenate([example.ids[example.start :] for",
            "np.concatenate([example.ids[example.start - 1 : -1] for",
        ),
        (
            "counts = [0 if example is None else example.response_length for example in examples]",
            "counts = [example.response_length for example in present]",
        ),
        (
            "for at in range(0, len(order), size)]\n    return [group",
            "for at in range(0, len(order) - size + 1, size)]\n    return [group",
        ),
        ("SLICE_RATIO = 0.8", "SLICE_RATIO = 0.9"),
        ("SLICE_RATIO * lengths[slices[-1][0]]", "SLICE_RATIO * lengths[slices[0][0]]"),
        ("at += ids.size", "at += len(ids)"),
        ("first = at + row * ids.shape[1]", "first = row * ids.shape[1]"),
        ('order = data_rng(seed, "order", epoch)', 'order = data_rng(seed, "order")'),
        ('order = data_rng(seed, "order", epoch)', 'order = data_rng(0, "order", epoch)'),
        ("permutation(count)", "choice(count, count)"),
        ('rng = data_rng(self.seed, "pass", k, number)', 'rng = data_rng(self.seed, "pass", k)'),
        ('rng = data_rng(self.seed, "pass", k, number)', 'rng = data_rng(0, "pass", k, number)'),
        ("rng.permutation(self.sizes[k])", "rng.choice(self.sizes[k], self.sizes[k])"),
        ("self.cursors[k] += len(part)", "self.cursors[k] = len(part)"),
        ("return self.starts[k] + np.concatenate(parts)", "return np.concatenate(parts)"),
        ('rng = data_rng(self.seed, "mixture", step)', 'rng = data_rng(self.seed, "mixture")'),
        ('rng = data_rng(self.seed, "mixture", step)', 'rng = data_rng(0, "mixture", step)'),
        ("self.batch_size, p=probabilities)", "self.batch_size)"),
        ("with evaluation_mode(model), bar:", "with torch.no_grad(), bar:"),
        ("nll[group] = [part.sum().item()", "nll[group] = [part.mean().item()"),
        (
            "correct[rows] = logits.argmax(1) == targets[rows]",
            "correct[rows] = logits.argmin(1) == targets[rows]",
        ),
        (
            "last[group] = states[batch.response_lengths.cumsum(0) - 1]",
            "last[group] = states[batch.response_lengths.cumsum(0) - batch.response_lengths]",
        ),
        ("float(nll.sum() / tokens.sum())", "float((nll / tokens).mean())"),
        ("float(correct.sum() / count)", "float((correct / tokens).mean())"),
        ("(p.dim() >= 2) == matrices", "(p.dim() >= 1) == matrices"),
        ("((True, args.weight_decay), (False, 0.0))", "((True, 0.0), (False, 0.0))"),
        ("betas=(0.9, 0.999)", "betas=(0.9, 0.95)"),
        ("eps=1e-8", "eps=1e-6"),
        (
            "warmup = math.ceil(args.warmup_ratio * total)",
            "warmup = int(args.warmup_ratio * total)",
        ),
        ("return args.lr * (step + 1) / warmup", "return args.lr * step / warmup"),
        ("progress = (step - warmup) / max(1, total - warmup)", "progress = step / total"),
        (
            "progress = (step - warmup) / max(1, total - warmup)",
            "progress = (step + 1 - warmup) / max(1, total - warmup)",
        ),
        (
            "cosine = 0.5 * (1 + math.cos(math.pi * progress))",
            "cosine = math.cos(math.pi * progress / 2)",
        ),
        ('"linear": 1 - progress', '"linear": 1 - 0.9 * progress'),
        ('group["lr"] = lr', 'group["lr"] *= 1'),
        (
            "clip_grad_norm_(trainable(model), max_grad_norm)",
            "clip_grad_norm_(trainable(model), math.inf)",
        ),
        (
            "clip_grad_norm_(trainable(model), max_grad_norm)",
            "clip_grad_norm_(trainable(model), 1.0)",
        ),
        ("(loss / int(tokens.sum())).backward()", "(loss / len(nll)).backward()"),
        ("(loss / int(tokens.sum())).backward()", "(loss / len(examples)).backward()"),
        ("(loss / int(tokens.sum())).backward()", "loss.backward()"),
        ("losses[order] = [nll.mean()", "losses[:] = [nll.mean()"),
        ("math.ceil(args.epochs * steps_per_epoch - 1e-9)", "int(args.epochs * steps_per_epoch)"),
        (
            "return range(count, steps, count) if count else range(0)",
            "return range(1, steps, count) if count else range(0)",
        ),
        (
            "        result = measure(model)\n    for",
            "        result = trained or measure(model)\n    for",
        ),
        ("if not abs(moved) <= ROUNDING", "if abs(moved) > ROUNDING"),
        ("ROUNDING = 0.002", "ROUNDING = 0.0022"),
        ('result = run.logged("eval", 0)', "result = {}"),
        ('"eval_before": before}', '"eval_before": after}'),
        ('before[label]["loss"], row["loss"]', 'row["loss"], before[label]["loss"]'),
    ],
}


def copy_repository(folder: Path) -> None:
    """The working tree without runs, caches and git."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".sh", ".md") and path.is_file():
            shutil.copy(path, folder / path.name)
    for name in ("tests", "docs", "benchmarks"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)


def preload() -> None:
    """Import the libraries once: every mutant runs in a fork of this process."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in (
        "torch",
        "transformers",
        "datasets",
        "peft",
        "scipy.optimize",
        "matplotlib.figure",
    ):
        importlib.import_module(name)
    for name in ("llama", "gpt2", "qwen2", "gemma2"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def survives(job: tuple[str, str, str]) -> bool:
    """Whether all tests pass on the mutant (file, old, new); in a process of its own."""
    file, old, new = job
    folder = Path.cwd() / f"mutant-{os.getpid()}"
    folder.mkdir()
    copy_repository(folder)
    source = (folder / file).read_text(encoding="utf-8")
    (folder / file).write_text(source.replace(old, new) if old else source, encoding="utf-8")
    os.chdir(folder)
    sys.path[:1] = [str(folder), str(folder / "tests")]
    for stream in (1, 2):
        os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    tests = [test for test in TESTS[file] if (folder / test).exists()]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]
    status = pytest.main([*options, *tests])
    shutil.rmtree(folder, ignore_errors=True)
    return status == 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=list(MUTANTS), metavar="FILE.py")
    parser.add_argument("--only", default="", help="mutants whose replaced piece holds this text")
    args = parser.parse_args(argv)
    jobs = [(file, "", "") for file in args.files]  # without a mutant the tests must pass
    for file in args.files:
        source = (ROOT / file).read_text(encoding="utf-8")
        for old, new in MUTANTS[file]:
            if source.count(old) != 1:
                raise SystemExit(f"{file}: {old!r} occurs {source.count(old)} times, expected 1")
            if args.only in old:
                jobs.append((file, old, new))
    preload()
    survivors, context = 0, multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with context.Pool(WORKERS, maxtasksperchild=1) as pool:
            for job, alive in zip(jobs, pool.imap(survives, jobs, chunksize=1)):
                file, old, new = job
                if not old and not alive:
                    raise SystemExit(f"{file}: {' '.join(TESTS[file])} fail without any mutant")
                if not old:
                    print(f"passes    {file}: as it is", flush=True)
                    continue
                survivors += alive
                verdict = "SURVIVES" if alive else "killed"
                print(f"{verdict:8}  {file}: {old}  ->  {new}", flush=True)
    print(f"{len(jobs) - len(args.files)} mutants, {survivors} survivors")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
