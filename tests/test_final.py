"""final/ is the model that was trained: names, numbers, dtypes and end tokens, for every base."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, error_line, killed_at, read_json, read_jsonl, same, to_jsonl
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import data
import dynamics
import dynamix_sft
import eval as evaluation
import models
import sftmix

CPU = torch.device("cpu")
SETS = "--eval_data toy/copy toy/sort"  # all rows: #N would depend on --seed
SCRIPTS = {"sftmix": sftmix, "dynamix_sft": dynamix_sft, "dynamics": dynamics}
RUN = f"--data toy/add#12 toy/copy#12 {SETS} --template alpaca"
RUN += " --max_steps 3 --batch_size 4 --save_every 0 --lr 2e-2"
OWN = {"sftmix": " --mu 0", "dynamix_sft": " --update_every 2", "dynamics": ""}
OWN["dynamics"] = " --targets copy --probe_steps 1 --updates none --eval_limit 4 --lr 3e-3"
OWN["dynamics"] += " --max_length 2048 --lora_rank 0"


def train(folder, model, flags="", script="sftmix"):
    """A short run -> its folder."""
    command = f"{RUN}{OWN[script]} --model {model} --output_dir {folder} {flags}"
    SCRIPTS[script].main(command.split())
    return Path(folder)


def evaluate(folder, model, flags=""):
    """eval.py on the run's evaluation sets -> {label: numbers}."""
    command = f"--model {model} {SETS} --output_dir {folder} {flags}"
    evaluation.main(command.split())
    return read_json(Path(folder) / "results.json")[str(model)]


def assert_same_numbers(run, result):
    """eval.py's numbers are those the run ended with, in summary.json and in metrics.jsonl."""
    own, last = read_json(run / "summary.json")["eval"], read_jsonl(run / "metrics.jsonl")[-1]
    assert len(own) == 2
    for label, row in own.items():
        assert result[label]["nll"] == pytest.approx(row["nll"], abs=1e-6)
        assert result[label]["accuracy"] == row["accuracy"]
        assert last[f"eval/{label}/nll"] == row["nll"]


def dtypes(folder):
    """The dtypes in a folder's safetensors file, which has one."""
    file = next(Path(folder).glob("*.safetensors"))
    return {tensor.dtype for tensor in load_file(file).values()}


def names(folder):
    with safe_open(next(Path(folder).glob("*.safetensors")), "pt") as file:
        return set(file.keys())


def copy_of(model, folder, dtype=None):
    """A copy of a model folder, its weights as dtype."""
    shutil.copytree(model, folder)
    if dtype:
        weights = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        weights.save_pretrained(folder)
    return str(folder)


@pytest.fixture()
def elsewhere(tmp_path, monkeypatch):
    """A working directory to go to -> function that goes there."""
    (tmp_path / "elsewhere").mkdir()
    return lambda: monkeypatch.chdir(tmp_path / "elsewhere")


# ------------------------------------------------------------------------ the numbers of a run


TURNS = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"


@pytest.mark.parametrize("flags", ["", "--lora_rank 4"])
@pytest.mark.parametrize("script", ["sftmix", "dynamix_sft"])
@pytest.mark.parametrize("template", ["alpaca", "plain", "chat", "mine.jinja"])
def test_final_gives_the_runs_numbers(template, script, flags, tmp_path, model_folder, elsewhere):
    """By eval.py without any flag from another folder: every template, full and LoRA, a base of
    fp32 and one of bf16 (whose own template is another), a --max_length that cuts."""
    base = copy_of(model_folder("llama"), tmp_path / "base", torch.bfloat16)
    (tmp_path / "base" / "chat_template.jinja").write_text(TURNS)
    (tmp_path / "mine.jinja").write_text(TURNS.replace("'[", "'(["))
    name = base if template in ("chat", "plain") else model_folder("gpt2")
    own = str(tmp_path / template) if template == "mine.jinja" else template
    length = {"alpaca": 300, "plain": 34}.get(template, 60)
    more = f"{flags} --template {own} --max_length {length}"
    run = train(tmp_path / "run", name, more, script)
    elsewhere()
    assert_same_numbers(run, evaluate(tmp_path / "eval", run / "final"))
    before = read_jsonl(run / "metrics.jsonl")[0]["eval/copy/nll"]
    assert abs(read_json(run / "summary.json")["eval"]["copy"]["nll"] - before) > 0.1
    saved = transformers.AutoTokenizer.from_pretrained(run / "final")
    asked = saved.apply_chat_template([{"role": "user", "content": "u"}], tokenize=False)
    begins = {
        "alpaca": "<s>Below is an",
        "plain": "<s>u",
        "chat": "[user]u",
        "mine.jinja": "([user]u",
    }
    assert asked.startswith(begins[template])
    if flags:  # as PEFT has it, not merged
        merged, ids = common.load_model(str(run / "final"), CPU)[0], torch.arange(40)[None]
        lora = peft.AutoPeftModelForCausalLM.from_pretrained(run / "final", dtype=merged.dtype)
        torch.testing.assert_close(merged(ids).logits, lora(ids).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("flags", ["", "--lora_rank 4"])
def test_dynamics_lists_the_rows_of_its_report(flags, tmp_path, model_folder, elsewhere):
    """Rows of test_rows.jsonl, final/ and nothing else give the report's numbers."""
    run = train(tmp_path / "run", model_folder("llama"), flags, "dynamics")
    elsewhere()
    listed, result = read_jsonl(run / "test_rows.jsonl"), evaluate(tmp_path / "eval", run / "final")
    report = read_json(run / "summary.json")["eval"]
    assert set(report) == set(result) == {row["label"] for row in listed}
    for label, numbers in report.items():
        rows = [row for row in listed if row["label"] == label]
        assert rows and all(row["nll"] and not row["choice"] for row in rows)
        lines = read_jsonl(next((tmp_path / "eval" / "predictions").rglob(f"{label}.jsonl")))
        assert len(rows) < len(lines)
        chosen = [lines[row["index"]] for row in rows]
        assert [line["row"] for line in chosen] == [row["row"] for row in rows]
        tokens = sum(line["tokens"] for line in chosen)
        nll = sum(line["nll"] for line in chosen) / tokens
        assert tokens == numbers["tokens"] and nll == pytest.approx(numbers["nll"], abs=1e-6)


def test_which_rows_a_side_measures():
    """Sides hold their rows in another order than the set, and not those that are skipped."""
    rows = [data.Row((("user", str(i)),), "yes", file="f", number=i + 5) for i in range(4)]
    ids = np.arange(3)
    examples = [data.Example(ids, 1, row) for row in (0, 2)]
    questions = [data.Example(ids, 1, row) for row in (1, 1, 2, 2)]
    dataset, order = data.Dataset("set", rows), [rows[3], rows[0], rows[1]]
    side = dynamics.Side(questions, [2, 2], [0, 1], examples)
    found = dynamics.list_rows(dataset, order, side)
    assert [row["index"] for row in found] == [0, 1, 3]
    assert [row["row"] for row in found] == ["f, row 5", "f, row 6", "f, row 8"]
    assert [(row["nll"], row["choice"]) for row in found] == [
        (False, True),
        (True, True),
        (True, False),
    ]


# ------------------------------------------------------------------------ adapters as bases


@pytest.mark.parametrize("second", ["--lora_rank 2", ""])
@pytest.mark.parametrize("base", ["llama", "tiny"])
def test_training_on_an_adapter(base, second, tmp_path, model_folder, monkeypatch, elsewhere):
    """Everything by relative paths: an adapter, then an adapter or all weights on top of it."""
    name = base
    monkeypatch.chdir(tmp_path)
    if base != "tiny":
        name = "models/base"
        copy_of(model_folder(base), tmp_path / name)
    train("first", name, "--lora_rank 4 --seed 3")
    run = train(tmp_path / "second", "first/final", second)
    start = read_jsonl(run / "metrics.jsonl")[0]
    elsewhere()
    about = read_json(tmp_path / "first" / "final" / "cleansft.json")
    assert about["base"] == ("tiny" if base == "tiny" else str(tmp_path / name))
    assert about["seed"] == 3
    first, result = tmp_path / "first", evaluate(tmp_path / "eval1", tmp_path / "first" / "final")
    assert_same_numbers(first, result)  # tiny has other weights for every seed: 3's, not eval.py's
    assert start["eval/copy/nll"] == pytest.approx(result["copy"]["nll"], abs=1e-6)
    assert_same_numbers(run, evaluate(tmp_path / "eval2", run / "final"))
    if second:
        assert all("lora" in name for name in names(run / "final"))
        config = read_json(run / "final" / "adapter_config.json")
        assert config["base_model_name_or_path"] == str(tmp_path / "first" / "final")
    else:
        assert not (run / "final" / "adapter_config.json").exists()
        plain = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
        assert names(run / "final") == set(plain.state_dict()) - set(plain.all_tied_weights_keys)


def test_an_adapter_names_no_path_to_its_readers(tmp_path, model_folder):
    """The card that PEFT writes is for the hub; of a base that is there only here it names a path.
    What loading needs keeps it."""
    base = copy_of(model_folder("llama"), tmp_path / "base")
    run = train(tmp_path / "run", base, "--lora_rank 2", "dynamics")
    again = train(tmp_path / "again", run / "final", "--lora_rank 2")
    tiny = train(tmp_path / "tiny", "tiny", "--lora_rank 2")
    needed = {"adapter_config.json", "cleansft.json"}
    for folder in (run / "best", run / "final", again / "final", tiny / "final"):
        assert (folder / "adapter_model.safetensors").exists()
        for file in set(folder.iterdir()) - {folder / name for name in needed}:
            assert str(tmp_path).encode() not in file.read_bytes(), file
        assert not (folder / "README.md").exists()
    config = read_json(run / "final" / "adapter_config.json")
    assert config["base_model_name_or_path"] == base


def test_hub_ids(tmp_path, monkeypatch):
    """Whether the hub would know the name: no path, and not one of ours."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    names = ("", "tiny", "org/here", str(tmp_path), "org/base", "gpt2")
    assert [name for name in names if models.is_hub_id(name)] == ["org/base", "gpt2"]


@pytest.mark.parametrize("other", ["", "name_or_path", "config"])
def test_the_card_of_a_base_on_the_hub_stays(other, tmp_path, model_folder):
    """other: what of the base's names is a path, as where its own base is one."""
    args = sftmix.parse_args(f"--lora_rank 2 --output_dir {tmp_path / 'run'}".split())
    args.template_date, names = None, {"name_or_path": "org/base", "config": "org/base"}
    model, tokenizer = common.load_model(model_folder("llama"), CPU)
    names |= {other: model_folder("llama")} if other else {}
    model.name_or_path, model.config.name_or_path = names["name_or_path"], names["config"]
    run = common.Run("sftmix", args)
    run.open()
    adapted = models.add_adapter(model, args)
    run.save_model(adapted, data.with_template(tokenizer, "plain"))
    card = run.folder / "final" / "README.md"
    assert card.exists() == (not other)
    if not other:
        assert "base_model: org/base" in card.read_text(encoding="utf-8")
    config = read_json(run.folder / "final" / "adapter_config.json")
    assert config["base_model_name_or_path"] == names["name_or_path"]


def test_the_base_of_an_adapter_is_found(tmp_path, monkeypatch):
    """A relative path from the folder that the run was started in, else as it is."""
    folder = tmp_path / "work" / "runs" / "a" / "final"
    folder.mkdir(parents=True)
    file = folder / "adapter_config.json"
    (tmp_path / "work" / "models" / "base").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, found in (
        ("models/base", str(tmp_path / "work" / "models" / "base")),
        ("org/elsewhere", "org/elsewhere"),
        ("tiny", "tiny"),
    ):
        file.write_text(json.dumps({"base_model_name_or_path": name}))
        assert common.find_base(file) == (found, 0)
    (folder / "cleansft.json").write_text(json.dumps({"seed": 7}))
    assert common.find_base(file) == ("tiny", 7)
    file.write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(data.UserError, match="names no base"):
        common.find_base(file)


def test_an_adapter_of_another_model_is_refused(tmp_path, model_folder, capsys):
    run = train(tmp_path / "run", model_folder("llama"), "--lora_rank 2")
    config = run / "final" / "adapter_config.json"
    saved = read_json(config)
    config.write_text(json.dumps({**saved, "base_model_name_or_path": str(tmp_path / "gone")}))
    flags = f"--model {run / 'final'} {RUN} --mu 0 --output_dir {tmp_path / 'other'}".split()
    assert f"{config}: its base {tmp_path}/gone is not" in error_line(capsys, sftmix.main, flags)
    weights = load_file(run / "final" / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, run / "final" / "adapter_model.safetensors", {"format": "pt"})
    config.write_text(json.dumps(saved))
    line = error_line(capsys, sftmix.main, flags)
    assert "missing adapter keys" in line and "layers.1" in line
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------ dtype


@pytest.mark.parametrize("flags", ["", "--lora_rank 2"])
def test_final_has_the_dtype_of_its_base(flags, tmp_path, model_folder):
    base = copy_of(model_folder("llama"), tmp_path / "base", torch.bfloat16)
    for number, (name, wanted, flag) in enumerate((
        (base, torch.bfloat16, ""),
        (model_folder("llama"), torch.float32, ""),
        (base, torch.float32, "--save_dtype fp32"),
        (model_folder("llama"), torch.float16, "--save_dtype fp16"),
    )):  # fmt: skip
        run = train(tmp_path / f"run{number}", name, f"{flags} {flag}")
        assert dtypes(run / "final") == {wanted}
        if not flags:
            config = transformers.AutoConfig.from_pretrained(run / "final")
            assert config.dtype == wanted
        short = {value: key for key, value in common.DTYPES.items()}[wanted]
        assert read_json(run / "config.json")["flags"]["save_dtype"] == short


def test_best_keeps_fp32(tmp_path, model_folder):
    """Checkpoints that training goes back to are not rounded; final/ is."""
    base = copy_of(model_folder("llama"), tmp_path / "base", torch.bfloat16)
    run = train(tmp_path / "run", base, script="dynamics")
    assert dtypes(run / "best") == {torch.float32} and dtypes(run / "final") == {torch.bfloat16}
    kept, rounded = load_file(run / "best" / "model.safetensors"), run / "final"
    for name, tensor in load_file(rounded / "model.safetensors").items():
        assert torch.equal(tensor, kept[name].to(torch.bfloat16))


def test_rounding_that_moves_the_loss_is_said(tmp_path, model_folder, capsys, monkeypatch):
    """The numbers are of the rounded weights; more than 0.002 nats are a warning."""
    name, said = model_folder("llama"), "warning: saving final/ as bf16 moved the loss on 'copy'"
    exact = train(tmp_path / "exact", name)
    assert "warning: saving" not in capsys.readouterr().out
    own = read_json(exact / "summary.json")["eval"]
    monkeypatch.setattr(common, "ROUNDING", 0.0)
    rounded = train(tmp_path / "rounded", name, "--save_dtype bf16")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(said))
    assert line.endswith("--save_dtype fp32 keeps every bit")
    now = read_json(rounded / "summary.json")["eval"]
    moved = now["copy"]["nll"] - own["copy"]["nll"]
    assert moved != 0 and f"by {moved:+.4f} nats" in line
    monkeypatch.undo()
    assert common.ROUNDING == 0.002
    values = iter([1.0, 1.0021, 1.0, 0.9981, 1.0, float("nan")])
    monkeypatch.setattr(common, "evaluate", lambda *_, **__: {"copy": {"nll": next(values)}})
    for number, warned in enumerate((True, False, True)):
        folder = tmp_path / f"moved{number}"
        model, tokenizer = common.load_model(name, CPU)
        args = sftmix.parse_args(f"--model {name} --output_dir {folder}".split())
        args.save_dtype, args.template_date = "bf16", None
        tokenizer = data.with_template(tokenizer, "plain")
        run = common.Run("sftmix", args)
        run.open()
        common.save_final(model, tokenizer, common.evaluator({}, args), 1, run)
        assert ("warning: saving" in capsys.readouterr().out) == warned


def test_resume_may_save_otherwise(tmp_path, model_folder):
    """--save_dtype changes what is written, not what is computed."""
    name, flags = model_folder("llama"), "--save_every 1 --eval_every 2"
    whole = train(tmp_path / "whole", name, flags)
    with killed_at(2, "eval/copy/nll"):
        train(tmp_path / "run", name, flags)
    run = train(tmp_path / "run", name, f"{flags} --save_dtype bf16 --resume")
    exact = load_file(whole / "final" / "model.safetensors")
    for name, tensor in load_file(run / "final" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16))


# ------------------------------------------------------------------------ what stands beside


def test_generate_stops_at_the_trained_end(tmp_path, model_folder):
    """The base's generation_config names another end token; the model learns to answer with EOS."""
    for flags in ("", "--lora_rank 8"):
        base = copy_of(model_folder("llama"), tmp_path / f"base{len(flags)}")
        values = read_json(Path(base) / "generation_config.json")
        values |= {"eos_token_id": 5, "temperature": 0.9, "do_sample": False}  # as Llama 2 has it
        (Path(base) / "generation_config.json").write_text(json.dumps(values))
        rows = [{"prompt": "x", "completion": "ab"}] * 8
        file = to_jsonl(tmp_path / "rows.jsonl", rows)
        more = f"--data {file} --eval_data {file} --template plain --max_steps 40 --batch_size 8"
        run = train(tmp_path / f"run{len(flags)}", base, f"{more} {flags}")
        saved = read_json(run / "final" / "generation_config.json")
        assert saved["eos_token_id"] == 258 and saved["temperature"] == 0.9
        model, tokenizer = common.load_model(str(run / "final"), CPU)
        assert model.generation_config.eos_token_id == 258
        ids = tokenizer("x\n", return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert answer.tolist() == [*tokenizer("ab", add_special_tokens=False).input_ids, 258]


IM = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
IM += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_end_tokens(tokenizer):
    """A chat template's own end of turn first, not what stands after it; and EOS."""
    own = common.tiny_tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = own.convert_tokens_to_ids("<|im_end|>")

    def ends(template, name="chat"):
        own.chat_template = template
        return data.end_tokens(data.with_template(own, name))

    assert ends(IM) == ends(IM.replace("<|im_end|>", "<|im_end|></s>")) == [end, 258]
    assert ends(IM, "alpaca") == ends(IM, "plain") == [258]
    assert ends(IM.replace("<|im_end|>", "")) == [258]  # nothing marks the end
    assert ends(IM.replace("<|im_end|>", "</s>")) == [258]


def test_cleansft_json(tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(Path(model_folder("llama")).parent)
    run = train(tmp_path / "run", "model-llama", "--max_length 512 --seed 4", "dynamics")
    wanted = {"script": "dynamics", "base": model_folder("llama"), "template": "alpaca"}
    wanted |= {"max_length": 512, "template_date": None, "seed": 4}
    for name in ("final", "best"):
        assert read_json(run / name / "cleansft.json") == wanted


# ------------------------------------------------------------------------ bases


def test_tensors_must_be_the_architectures(tmp_path, model_folder, capsys):
    """A base with a tensor too few or too many is refused by the tensor's name, in every script."""
    weights = load_file(Path(model_folder("llama")) / "model.safetensors")
    gone, more = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    few = {name: tensor for name, tensor in weights.items() if name != gone}
    many = {**weights, more: weights[gone].clone()}
    for number, (kind, tensor, state) in enumerate((
        ("missing", gone, few), ("unexpected", more, many)
    )):  # fmt: skip
        base = Path(copy_of(model_folder("llama"), tmp_path / f"base{number}"))
        save_file(state, base / "model.safetensors", {"format": "pt"})
        flags = f"--model {base} --eval_data toy#9 --output_dir {tmp_path / 'run'}".split()
        for main in (sftmix.main, dynamix_sft.main, evaluation.main):
            line = error_line(capsys, main, flags)
            assert f"1 {kind} tensors for LlamaForCausalLM: {tensor}" in line
    assert not (tmp_path / "run").exists()


def test_buffers_of_old_checkpoints_are_excused(tmp_path):
    """GPT-Neo on the hub holds its causal masks, as models did when buffers were saved."""
    sizes = dict(hidden_size=32, num_layers=1, num_heads=4, vocab_size=259)
    kinds = dict(attention_types=[[["global"], 1]], max_position_embeddings=64)
    config = transformers.GPTNeoConfig(**sizes, **kinds)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.attention.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    common.tiny_tokenizer().save_pretrained(tmp_path)
    assert same(common.load_model(str(tmp_path), CPU)[0].state_dict(), model.state_dict())


def test_model_names(tmp_path, model_folder, monkeypatch, capsys):
    (tmp_path / "model.bin").write_text("")
    (tmp_path / "model.gguf").write_text("")
    for name, problem in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "none.gguf", "no such file"),
        ("none.gguf", "no such file"),
        (tmp_path / "model.bin", "is a file"),
        ("", "no such folder"),
    ):
        line = error_line(capsys, sftmix.main, ["--model", str(name), "--data", "toy#9"])
        assert line.startswith(f"error: --model {name}: {problem}")
    assert common.find_model("org/name") == ("org/name", {})
    assert common.find_model(model_folder("llama")) == (model_folder("llama"), {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.UserError, match="needs: pip install gguf"):
        common.find_model(str(tmp_path / "model.gguf"))
    monkeypatch.undo()
    (tmp_path / "other.gguf").write_text("")
    with pytest.raises(data.UserError, match="holds 2 .gguf files; name one"):
        common.find_model(str(tmp_path))


def write_gguf(path, model, tokenizer):
    """A Llama as llama.cpp writes it: byte-level BPE, rotary pairs of q and k interleaved."""
    gguf = pytest.importorskip("gguf")
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ids.append(("ab", 259))  # a file has merges
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in ids])
    writer.add_token_types([3 if 255 < i < 259 else 1 for _, i in ids])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor.numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return str(path)


def gguf_tensors(model):
    """The state dict under GGUF's names."""
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    parts |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    parts |= {"self_attn.o_proj": "attn_output", "model.layers": "blk", "lm_head": "output"}
    parts |= {"model.norm": "output_norm", "model.embed_tokens": "token_embd"}
    heads, tensors = {"q": 4, "k": 2}, {}
    for name, tensor in model.state_dict().items():
        for old, new in parts.items():
            name = name.replace(old, new)
        count = heads.get(name.split(".")[-2].removeprefix("attn_"))
        if count:
            shape = count, 2, len(tensor) // count // 2, -1
            tensor = tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape)
        tensors[name] = tensor.detach().contiguous()
    return tensors


def test_a_gguf_file_as_base(tmp_path, tokenizer, monkeypatch, elsewhere):
    """Its logits and tokens, by file and by folder; trained, it is an ordinary folder."""
    torch.manual_seed(0)
    config = ARCHITECTURES["llama"]()
    config.vocab_size = 260  # the tokenizer's 259 and a merge
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    (tmp_path / "models").mkdir()
    file = write_gguf(tmp_path / "models" / "small.gguf", model, tokenizer)
    monkeypatch.chdir(tmp_path)
    for name in (file, "models", "models/small.gguf"):
        loaded, own = common.load_model(name, CPU)
        ids = own("Grüße!").input_ids
        assert len(own) == 260 and ids[-7:] == tokenizer("Grüße!").input_ids[-7:]
        assert own.eos_token_id == 258
        batch = torch.tensor([ids])
        with torch.no_grad():
            gap = (loaded(batch).logits - model(batch).logits).abs().max()
        assert gap < 1e-4 and loaded.base_dtype == torch.float32
    for flags in ("", "--lora_rank 2 --dtype bf16"):
        run = train(tmp_path / f"run{len(flags)}", "models/small.gguf", flags)
        assert dtypes(run / "final") == {torch.float32}
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / "elsewhere")
            dtype = "--dtype bf16" if flags else ""
            result = evaluate(tmp_path / f"eval{len(flags)}", run / "final", dtype)
        assert_same_numbers(run, result)
    config = read_json(tmp_path / "run0" / "final" / "config.json")
    assert "quantization_config" not in config and config["dtype"] == "float32"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run0" / "final")
    assert names(tmp_path / "run0" / "final") == set(plain.state_dict())
    assert os.listdir(tmp_path / "models") == ["small.gguf"]
