"""Models: found, loaded whole, adapted, and where their last hidden states and head are.

A name is a hub id, a folder, a GGUF file, `tiny`, or an adapter of any of them. Shapes: B examples,
T tokens, V vocabulary, H hidden."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import os
import pickle
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ranks
from data import UserError, quiet_hub

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER = "adapter_config.json"
NO_CODE = {"trust_remote_code": False}  # code of a model is never run, nor is anybody asked


def tiny_tokenizer() -> Any:
    """Byte-level tokenizer: 256 bytes, then <pad>, <s>, </s> (all distinct); BOS is added like
    Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **names)


def tiny_model(seed: int = 0) -> torch.nn.Module:
    """GPT-2 of about 1M random parameters (4 layers of 128, no dropout), the same for a seed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 259, "n_positions": 2048, "n_embd": 128, "n_layer": 4, "n_head": 4}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **tokens))


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> str:
    """auto -> bf16 where the GPU computes in it, else fp32. On a CPU with avx512_bf16, bf16 trains
    2.3 times as fast (SmolLM2-135M, 2 cores: 509 against 220 tokens/s), but auto stays fp32 there:
    resumed and repeated runs are then the same bits on every CPU."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return name


def find_model(name: str) -> tuple[str, dict]:
    """A model's name -> (folder or hub id, options for from_pretrained: the GGUF file that the name
    is, or that its folder holds). Raises UserError."""
    path, problem = Path(name), None
    if name == "tiny":
        return name, {}
    local = not name or name[0] in "./~" or name.count("/") > 1 or path.suffix == ".gguf"
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if local and not (name and path.exists()):
        problem = "no such folder" if path.suffix != ".gguf" else "no such file"
    elif path.is_file() and path.suffix != ".gguf":
        problem = "is a file; give a model's folder, or a .gguf file"
    elif (path / "config.json").exists() or (path / ADAPTER).exists() or not path.exists():
        return name, {}
    elif not files:
        problem = "the folder holds no config.json, so it is no model's"
    elif len(files) > 1:
        problem = f"holds {len(files)} .gguf files; name one, such as {files[0]}"
    elif not importlib.util.find_spec("gguf"):
        problem = "a .gguf file needs: pip install gguf"
    if problem:
        raise UserError(f"--model {name}: {problem}")
    return str(files[0].parent), {"gguf_file": files[0].name}


def is_hub_id(name: str) -> bool:
    """Whether a model's name is neither a path here nor one that only these scripts know."""
    return name not in ("", "tiny") and not Path(name).exists()


def lasting_name(name: str) -> str:
    """A model's name as it holds in any working directory: paths are absolute."""
    return os.path.abspath(name) if name != "tiny" and Path(name).exists() else name


def model_fingerprint(name: str) -> str:
    """sha256 of a model's files, of a large one 64 pieces evenly spread over it: a model that was
    trained again is another one, a copy of its folder is not. An adapter's base counts. Of a hub id
    the commit that is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(name)
    if name == "tiny" or not path.exists():
        cached = name.count("/") < 2 and try_to_load_from_cache(name, "config.json")
        return f"{name} {Path(cached).parent.name}" if isinstance(cached, str) else name
    digest = hashlib.sha256()
    for file in sorted(file for file in [path, *path.glob("[!.]*")] if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for at in range(0, size, max(2**16, size // 64)):
                stream.seek(at)
                digest.update(stream.read(2**16))
    if (path / ADAPTER).exists():
        digest.update(model_fingerprint(find_base(path / ADAPTER)[0]).encode())
    return digest.hexdigest()


def find_base(adapter: Path) -> tuple[str, int]:
    """An adapter_config.json -> the name of its base and, for `tiny`, that one's seed. A relative
    path, as others write it, is looked for from every folder above, then from the working one.
    Raises UserError."""
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        advice = "names no base (base_model_name_or_path); write its folder or hub id there"
        raise UserError(f"{adapter}: {advice}")
    about = adapter.with_name("cleansft.json")
    if base == "tiny" and about.exists():
        return base, json.loads(about.read_text(encoding="utf-8"))["seed"]
    above = [] if base == "tiny" else [folder / base for folder in adapter.absolute().parents]
    found = next((str(path) for path in above if path.exists()), base)
    if found[0] in "./~" and not Path(found).exists():
        advice = "is not there; write its folder or hub id into base_model_name_or_path"
        raise UserError(f"{adapter}: its base {base} {advice}")
    return found, 0


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No reports, warnings and progress bars of transformers inside: what is wrong is one line of
    ours."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), quiet_hub(), no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of transformers inside."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def refuse_tensors(name: str, model, info: dict) -> None:
    """Raise UserError where a checkpoint and the architecture do not hold the same tensors: missing
    ones would be random. Unexpected buffers are excused, old checkpoints carry them.
    info: from_pretrained's output_loading_info."""
    buffers = {buffer for buffer, _ in model.named_buffers()}
    for kind, names in (
        ("missing", info["missing_keys"]),
        ("unexpected", info["unexpected_keys"] - buffers),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            cause = f"{len(names)} {kind} tensors for {type(model).__name__}: {listed}"
            raise UserError(f"--model {name}: {cause}; are its files whole, and of one model?")


def refuse_nan(name: str, model) -> None:
    """Raise UserError where a weight is NaN or infinite."""
    weights = [(key, p) for key, p in model.named_parameters() if p.is_floating_point()]
    bad = []
    for key, weight in weights:
        total = weight.detach().sum(dtype=torch.float32)  # one pass; it may overflow by itself
        if not (torch.isfinite(total) or torch.isfinite(weight).all()):
            bad.append(key)
    if bad:
        problem = f"{len(bad)} of {len(weights)} tensors hold NaN or infinite values"
        advice = "its training diverged, or its files are damaged"
        raise UserError(f"--model {name}: {problem}, the first is {bad[0]}; {advice}")


def loading_problem(name: str, error: Exception) -> str:
    """Why a model cannot be loaded, in words of ours where the library's would mislead."""
    if "trust_remote_code" in str(error):
        advice = "use a model whose architecture transformers has"
        return f"needs code of its own (auto_map in its files), which is never run; {advice}"
    if isinstance(error, pickle.UnpicklingError) and "eights only" in str(error):
        advice = "which is never run; save them as safetensors"
        return f"cannot be loaded: its weights are a pickle that may hold code, {advice}"
    problem, inside = "cannot be loaded", Path(name, "final", "config.json")
    if "backend tokenizer" in str(error):
        problem = "holds no tokenizer that can be read, is its tokenizer.json missing?"
    advice = f"; the run's model is {inside.parent}" if inside.exists() else ""
    return f"{problem} ({type(error).__name__}: {str(error)[:300]}){advice}"


def drop_extra_tokens(tokenizer) -> None:
    """Take out, in place, the tokens that transformers' GGUF reader puts behind the file's own
    (GPT-2's <|endoftext|> into a Llama 3): the model has no embedding for them."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]  # {token: id}, or a list where the model is Unigram
    size = 1 + max(vocabulary.values()) if isinstance(vocabulary, dict) else len(vocabulary)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def load_files(name: str, storage: torch.dtype):
    """The model of a folder, hub id or GGUF file, as transformers loads it; every tensor must be
    there. Its base_dtype: config.json's; fp32 without one, as in a GGUF file (its blocks have
    none). Raises UserError."""
    import transformers

    folder, options = find_model(name)
    if options and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, folder, **options)
    model, info = load(dtype=storage, output_loading_info=True, **NO_CODE)
    refuse_tensors(name, model, info)
    model.base_dtype = torch.float32
    if options and getattr(model, "hf_quantizer", None):  # its weights are plain ones now
        model.hf_quantizer.remove_quantization_config(model)
    elif not options:
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        model.base_dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return model


def load_merged(name: str, adapter: Path):
    """The base of an adapter, which may be an adapter's folder itself, with the adapter merged into
    it in fp32. Raises UserError."""
    import peft
    from transformers import GenerationConfig

    model = load_weights(*find_base(adapter), torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # they would be random
        model = peft.PeftModel.from_pretrained(model, name).merge_and_unload()
    model.requires_grad_(True)  # PEFT froze it
    if adapter.with_name("generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(adapter.parent)
    return model


def load_weights(name: str, seed: int, storage: torch.dtype):
    """-> the model `name`, weights stored as `storage`; model.base_dtype is the dtype that its base
    is published in. Under torchrun only rank 0 reads weights: see empty_model. Raises UserError."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if ranks.rank():
        return empty_model(name, storage)
    adapter = None
    if name == "tiny":
        model = tiny_model(seed)
        model.base_dtype = torch.float32
    elif not find_model(name)[1]:
        adapter = find_adapter_config_file(name)
    if adapter:
        model = load_merged(name, Path(adapter))
        cast(model.parameters(), storage)
    elif name != "tiny":
        model = load_files(name, storage)
    model.name_or_path = lasting_name(name)  # what an adapter on it will say of its base
    return model


def read_config(name: str):
    """transformers' config of the model `name`, an adapter's that of its base."""
    import transformers

    seen = []
    while (Path(name) / ADAPTER).exists():
        if name in seen:
            raise UserError(f"--model {name}: is an adapter on itself, by {len(seen)} step(s)")
        seen.append(name)
        name = find_base(Path(name) / ADAPTER)[0]
    if name == "tiny":
        return tiny_model().config
    folder, options = find_model(name)
    return transformers.AutoConfig.from_pretrained(folder, **options, **NO_CODE)


def empty_model(name: str, storage: torch.dtype):
    """The model `name` with parameters that hold nothing, nor take memory until they are written:
    ranks.shard fills them."""
    import transformers

    with torch.device("meta"):
        make = transformers.AutoModelForCausalLM.from_config
        model = make(read_config(name), dtype=storage, **NO_CODE)
    model.to_empty(device="cpu").tie_weights()
    cast(model.parameters(), storage)
    model.base_dtype = torch.float32
    return model


def cast(parameters: Iterable, dtype: torch.dtype) -> None:
    """Store parameters as dtype, in place; buffers (rotary frequencies) keep theirs."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def read_tokenizer(name: str):
    """The tokenizer of the model `name`. Raises UserError where it knows no text."""
    from transformers import AutoTokenizer

    folder, options = find_model(name)
    if name == "tiny":
        tokenizer = tiny_tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options, **NO_CODE)
    if options:
        drop_extra_tokens(tokenizer)
    vocabulary = set(tokenizer.get_vocab().values())
    if len(vocabulary - set(tokenizer.added_tokens_decoder)) < 2:  # what is built out of no file
        problem = "holds no tokenizer that knows any text; is its tokenizer.json missing?"
        raise UserError(f"--model {name}: {problem}")
    return tokenizer


@contextlib.contextmanager
def one_line(name: str) -> Iterator[None]:
    """What transformers raises inside, many types with messages of many lines, is a UserError."""
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--model {name}: {loading_problem(name, error)}") from None


def load_tokenizer(name: str) -> tuple[Any, int]:
    """-> the tokenizer of a model, and how many positions that has; its weights are not read.
    Raises UserError."""
    with one_line(name):
        longest = positions(read_config(name))
        return read_tokenizer(name), longest


def load_model(name: str, device: torch.device, seed: int = 0, storage=torch.float32):
    """-> (model, tokenizer), weights stored as `storage`: fp32 master weights, since bf16 ones lose
    updates of lr 2e-6. A folder with an adapter gives its base with the adapter merged in. Raises
    UserError."""
    with one_line(name):
        model = load_weights(name, seed, storage)
        tokenizer = read_tokenizer(name)
    if ranks.rank() == 0:  # the others' weights hold nothing yet
        refuse_nan(name, model)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        counts = f"the tokenizer has {len(tokenizer):,} tokens, the model embeds only {rows:,}"
        raise UserError(f"--model {name}: {counts}")
    model.config.use_cache = False
    return model.to(device), tokenizer


def load_trainable(name: str, args: Namespace):
    """-> (model, tokenizer) ready to be trained as the shared flags say. Under LoRA with bf16 the
    frozen base is bf16 and the adapter fp32. Raises UserError."""
    gc.collect()  # what a deleted model held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    frozen_bf16 = args.lora_rank and args.dtype == "bf16"
    storage = torch.bfloat16 if frozen_bf16 else torch.float32
    model, tokenizer = load_model(name, torch.device("cpu"), args.seed, storage)
    with quiet_transformers():
        if args.lora_rank:
            model = add_adapter(model, args)
        if args.gradient_checkpointing:
            enable_checkpointing(model)
    model = place(model)
    check_head(model)
    return model, tokenizer


def place(model: torch.nn.Module) -> torch.nn.Module:
    """A model on the CPU -> on this process's device; under torchrun its part of it."""
    if not ranks.active():
        return model.to(pick_device())
    ranks.shard(model, causal_lm(model), pick_device())
    return model


def add_adapter(model, args: Namespace):
    """A LoRA adapter in fp32 on all linear layers -> the PEFT model, which trains nothing else."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2
    scale = {"r": args.lora_rank, "lora_alpha": float(args.lora_alpha or 2 * args.lora_rank)}
    where = {"target_modules": "all-linear", "fan_in_fan_out": transposed}
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=args.lora_dropout, **scale, **where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = get_peft_model(model, config)
    # a set, written in the order of a process's hashes: the same bytes after a resume
    config.target_modules = sorted(config.target_modules)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    return model


def enable_checkpointing(model) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the only name from transformers 6 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if model is not causal_lm(model):
        model.enable_input_require_grads()  # else the frozen embedding cuts the gradient off


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def positions(config) -> int:
    config = config.get_text_config()
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return own or 2048


def max_positions(model: torch.nn.Module) -> int:
    return positions(model.config)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T with fp32 (float64 for float64) result: bf16 inputs keep their speed, the sum is not
    rounded to bf16."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return a.to(wide) @ b.to(wide).T


@dataclass(frozen=True)
class Head:
    """The output head: logits = cap(scale · (hidden @ weight.T + bias)),
    cap(s) = softcap · tanh(s / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0  # Cohere multiplies by logit_scale, Granite divides by logits_scaling
    softcap: float | None = None  # Gemma-2

    def logits(self, hidden: Tensor) -> Tensor:
        """All of them, (..., H) -> (..., V): for a few rows, and to check the chunked losses."""
        raw = wide_product(hidden, self.weight)
        raw = (raw if self.bias is None else raw + self.bias) * self.scale
        return self.softcap * torch.tanh(raw / self.softcap) if self.softcap else raw


def output_head(model) -> Head:
    """The Head of any causal LM of transformers."""
    lm = causal_lm(model)
    layer, config = lm.get_output_embeddings(), lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    scale = scale * (getattr(config, "lm_head_multiplier", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), float(scale), softcap)


def hidden_states(model, ids: Tensor) -> Tensor:
    """Last hidden state after the final norm, the input of the head. ids (B, T) right-padded ->
    (B, T, H). Causal attention never looks right, so padding there needs no attention mask."""
    lm = causal_lm(model)
    if hasattr(lm, "sharded_backbone"):
        return lm.sharded_backbone(ids)
    return getattr(lm, lm.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model) -> None:
    """Raise UserError unless our head gives the model's own logits: some architectures do more
    than Head knows of."""
    lm, training = causal_lm(model), model.training
    model.eval()
    ids = torch.arange(8, device=model.device)[None] % output_head(model).weight.shape[0]
    own = lm(input_ids=ids, use_cache=False).logits.float()
    states = hidden_states(model, ids)[0]
    ours = output_head(model).logits(states)  # fetched after the pass, which gathers it
    model.train(training)
    ranks.reshard(lm)
    limit = 1e-3 if own.dtype == lm.dtype else 3e-2  # lm.dtype bf16: it rounds its own logits
    error = ((ours - own[0]).abs().max() / own.abs().max().clamp_min(1e-6)).item()
    if not error <= limit:
        problem = f"logits differ from the model's own by {error:.1e} (relative)"
        name = lm.config.model_type
        raise UserError(f"{name}: {problem}: this architecture's head is not supported")


def describe_model(model, name: str, dtype: str) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trainable(model))
    print(f"model {name}: {total:,} parameters, {trained:,} trainable, {dtype}, {model.device}")
