"""A run's folder: adapter, merged GGUF, Modelfile, model card. `results/<run>/` is all that training hands to serving.

python -m hatespeech.export results/<run>/ --base BASE.gguf    # adapter.gguf + its base -> model.gguf
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hatespeech import UserError, ollama, task

MODELFILE = f'''# What a run's folder serves: `ollama create NAME -f results/<run>/Modelfile`. Every run gets this file.
FROM ./model.gguf
TEMPLATE """{task.TEMPLATE}"""
PARAMETER num_ctx {task.CONTEXT_TOKENS}
PARAMETER num_predict 1
PARAMETER temperature 0
PARAMETER repeat_penalty 1
'''


def checkpoint_name(member: int) -> str:
    """The file of a member's progress (checkpoint.py) in the folder of an unfinished run."""
    return f"checkpoint{member}.pt"


# Architectures whose GGUF stores the q and k rows of each head with the two rotary halves interleaved.
_ROTARY_INTERLEAVED = {"llama": "llama", "mistral": "llama"}


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """Work in `<folder>.incomplete`, which becomes `<folder>` when all is written and stays visible when not.

    What an unfinished run left there goes, but for its checkpoints.

    Raises UserError where the folder exists, or where another run is writing it.
    """
    if folder.exists():
        raise UserError(f"{folder} holds a finished run: choose another --output, or remove it")
    work = folder.with_name(folder.name + ".incomplete")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing {work}: wait for it, or choose another --output") from error
        checkpoints = list(work.glob("checkpoint*.pt"))
        leftovers = [path for path in work.iterdir() if path.name != ".lock" and path not in checkpoints]
        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if checkpoints:
            print(f"{work} is left from a run that did not finish: its checkpoint stays")
        elif leftovers:
            print(f"{work} is left from a run that did not finish: starting it again")
        yield work
        for path in work.glob("checkpoint*.pt"):
            path.unlink()
        (work / ".lock").unlink()
        work.rename(folder)


def read_settings(run: Path) -> dict:
    """A run's settings.json: its base, label_tokens, class_scores and how it was made. UserError where it is no run."""
    try:
        settings = json.loads((run / "settings.json").read_text())
        return settings | {name: settings[name] for name in ("base", "label_tokens", "class_scores")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run} is no finished run: its settings.json can't be used ({error!r})") from error


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_weights(classifier, base: str, folder: Path) -> None:
    """The trained LoRA as `adapter/` (PEFT), `adapter.gguf`, merged weights and the Modelfile that serves them.

    A .gguf base gives `model.gguf` (F16). Others give `merged/`, 16-bit safetensors, for Ollama's converter.
    """
    model = classifier.model
    model.save_pretrained(folder / "adapter")
    (folder / "Modelfile").write_text(MODELFILE)
    if model.config.model_type in _ROTARY_INTERLEAVED or base.endswith(".gguf"):
        write_adapter(model, folder / "adapter.gguf")
    if base.endswith(".gguf"):
        merge(Path(base), folder / "adapter.gguf", folder / "model.gguf")
        return
    write_merged(model, classifier.tokenizer, folder / "merged")


# Weights of at most about so many bytes are in memory at once, and go to one file.
_SHARD_BYTES = 2 << 30


def write_merged(model, tokenizer, folder: Path) -> None:
    """A PeftModel as float16 safetensors of plain linear layers: the weights it was trained on, plus its update.

    A 4-bit base is dequantised, not fetched anew in 16 bit: the update was learned on what 4 bit left of it. float16:
    bfloat16's 8 bits round a small update away, by 0.02 in the probabilities of SmolLM2-135M.
    """
    from safetensors.torch import save_file
    from transformers.utils import cached_file

    folder.mkdir()
    shard, weight_map = {}, {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in _merged_tensors(model.get_base_model()):
        shard[name] = tensor
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
            flush()
    flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    # Ollama's converter (0.24) looks for rope_theta where it was before transformers 5, and takes 10000 if it isn't.
    config = (config.get("rope_parameters") or {}) | config | {"dtype": "float16"}
    if config["model_type"] == "mistral":  # the converter does not know the name; but for the window it is a Llama
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)
    # The converter wants sentencepiece's own file where the base has one; transformers 5 writes tokenizer.json alone.
    base = model.peft_config["default"].base_model_name_or_path
    if vocabulary := cached_file(base, "tokenizer.model", _raise_exceptions_for_missing_entries=False):
        shutil.copy(vocabulary, folder)


def _merged_tensors(causal) -> Iterator[tuple[str, object]]:
    """(name, float16 tensor on the CPU) of each weight, once where two layers share it."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    seen = set()
    for path, module in causal.named_modules():
        if ".lora_" in path or path.endswith(".base_layer"):
            continue
        plain = getattr(module, "base_layer", module)
        for name, parameter in plain.named_parameters(recurse=False):
            if parameter.data_ptr() in seen:
                continue
            seen.add(parameter.data_ptr())
            weight = parameter.detach()
            if name == "weight" and hasattr(parameter, "quant_state"):
                weight = dequantize_module_weight(plain).detach()
            if name == "weight" and plain is not module:
                a, b = (getattr(module, f"lora_{which}")["default"].weight.detach().float() for which in "AB")
                weight = weight.float() + module.scaling["default"] * (b @ a)
            yield f"{path}.{name}", weight.to("cpu", torch.float16).contiguous()


def converted(folder: Path, tokenizer) -> Iterator[str]:
    """Make model.gguf of merged/ with one converter after the other, for as long as the caller asks for another.

    Yields who made it: llama.cpp's own converter, where unsloth keeps a checkout of it, then Ollama's. A model.gguf
    that is there without merged/ is the only one. A converter that refuses is named and passed over.
    """
    if not (folder / "merged").exists():
        yield "merging with the gguf package"
        return
    llama_cpp = Path(os.environ.get("UNSLOTH_LLAMA_CPP_PATH", Path.home() / ".unsloth" / "llama.cpp"))
    script = llama_cpp / "convert_hf_to_gguf.py"
    if script.exists():
        print(f"converting the merged weights to GGUF with {script}")
        command = [sys.executable, script, "merged", "--outfile", "model.gguf", "--outtype", "f16"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            print(f"{script}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        else:
            yield str(script)
    print("converting the merged weights to GGUF with Ollama's own converter")
    ollama.convert(folder, "./merged")
    name_pretokenizer(folder / "model.gguf", tokenizer)
    yield "Ollama's converter"


def name_pretokenizer(gguf_path: Path, tokenizer) -> None:
    """Where Ollama's converter did not know a tokenizer's way to split words and wrote `default`, write what it is.

    Known here: digits one by one (SmolLM's), and GPT-2's own. Others stay; train.finish_gguf tells if that is wrong.
    """
    file = _read(gguf_path)
    entry = file.get_field("tokenizer.ggml.pre")
    if entry is None or entry.contents() != "default":
        return
    splitter = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    kinds = [part["type"] for part in splitter.get("pretokenizers", [splitter])]
    name = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}.get(tuple(kinds))
    if name is None:
        return
    part = gguf_path.with_name(gguf_path.name + ".part")
    writer = start_gguf(part, file, {"tokenizer.ggml.pre": name})
    for tensor in file.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    write_gguf(writer, part, gguf_path)


def write_adapter(model, path: Path) -> None:
    """A PEFT LoRA as the GGUF that llama.cpp and Ollama's ADAPTER read, in fp16.

    Written here because Ollama's own converter of PEFT's safetensors leaves q and k in the wrong rotary order.
    model: a PeftModel. Raises UserError for an architecture whose order is not known here.
    """
    import gguf
    from peft import get_peft_model_state_dict

    model_type = model.config.model_type
    if model_type not in _ROTARY_INTERLEAVED:
        raise UserError(
            f"adapters of {model_type} models can't be written as GGUF (only {', '.join(_ROTARY_INTERLEAVED)}): "
            "give the base as a directory or hub id"
        )
    config, lora = model.config, model.peft_config["default"]
    arch = _ROTARY_INTERLEAVED[model_type]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(lora.lora_alpha))
    for key, tensor in sorted(get_peft_model_state_dict(model).items()):
        module, which = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        values = tensor.detach().float().cpu().numpy()
        if which == "B" and (n := heads.get(module.rsplit(".", 1)[1])):
            values = values.reshape(n, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        name = names.get_name(module)
        if name is None:
            raise UserError(f"no GGUF name is known for the adapted layer {module}")
        writer.add_tensor(f"{name}.weight.lora_{which.lower()}", np.ascontiguousarray(values, dtype=np.float16))
    write_gguf(writer, part, path)


def merge(base: Path, adapter: Path, merged: Path) -> None:
    """base.gguf + adapter.gguf -> one F16 GGUF, faster to serve than the two apart: W + alpha / r * B A.

    numpy alone, a few seconds for SmolLM2-135M. The file appears whole or not at all.
    """
    import gguf
    from tqdm.auto import tqdm

    adapter_file, base_file = _read(adapter), _read(base)
    lora = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in adapter_file.tensors}
    alpha = adapter_file.get_field("adapter.lora.alpha").contents()
    unknown = {name.rsplit(".lora_", 1)[0] for name in lora} - {tensor.name for tensor in base_file.tensors}
    if unknown:
        raise UserError(f"{adapter} does not belong to {base}: the base has no {', '.join(sorted(unknown)[:3])}")

    part = merged.with_name(merged.name + ".part")
    writer = start_gguf(part, base_file, {"general.file_type": int(gguf.LlamaFileType.MOSTLY_F16)})
    for tensor in tqdm(base_file.tensors, desc="merging", unit="tensor", mininterval=1.0):
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if f"{tensor.name}.lora_a" in lora:
            # In double precision, so that after rounding to F16 every machine gets the same file: calibration and log
            # know the model by its sha256.
            a, b = (lora[f"{tensor.name}.lora_{which}"].astype(np.float64) for which in "ab")
            weight = weight + (alpha / len(a)) * (b @ a)
        writer.add_tensor(tensor.name, weight.astype(np.float32 if weight.ndim == 1 else np.float16))
    write_gguf(writer, part, merged)


def start_gguf(path: Path, like, changes: dict[str, object]):
    """A GGUF writer with the metadata of another file, some of it changed."""
    import gguf

    writer = gguf.GGUFWriter(path, like.get_field("general.architecture").contents())
    for name, entry in like.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *inner = entry.types
            value = changes[name] if name in changes else entry.contents()
            writer.add_key_value(name, value, kind, inner[-1] if inner else None)
    return writer


def write_gguf(writer, part: Path, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, path)


def _read(path: Path):
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable GGUF file ({error})") from error


def complete(run: Path, base: Path | None) -> None:
    """Make `model.gguf` in a run's folder that was shipped as its adapter alone, from the base its settings name."""
    merged = run / "model.gguf"
    if merged.exists() or (run / "merged").exists():
        return
    expected = read_settings(run)["base"]
    if base is None:
        raise UserError(f"{run} holds no model.gguf: give the base it was trained on, {expected['name']}, with --base")
    if (found := sha256_of(base)) != expected["sha256"]:
        raise UserError(f"{base} is not the base of {run}: its sha256 is {found}, not {expected['sha256']}")
    merge(base, run / "adapter.gguf", merged)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hatespeech.export", description=complete.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, e.g. results/smollm2-135m")
    parser.add_argument("--base", type=Path, help="the .gguf file of the base the run was trained on")
    arguments = parser.parse_args()
    try:
        complete(arguments.run, arguments.base)
    except UserError as error:
        sys.exit(f"export: {error}")


if __name__ == "__main__":
    main()
