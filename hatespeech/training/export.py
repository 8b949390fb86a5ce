"""A run's folder: adapter, merged GGUF, Modelfile, model card. `results/<run>/` is all that training hands to serving.

python -m hatespeech.training.export results/<run>/ --base BASE.gguf    # adapter.gguf + its base -> model.gguf
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hatespeech import UserError, install, runs, task

MODELFILE = f'''# What a run's folder serves: `ollama create NAME -f results/<run>/Modelfile`. Every run gets this file.
FROM ./model.gguf
TEMPLATE """{task.TEMPLATE}"""
PARAMETER num_ctx {task.CONTEXT_TOKENS}
PARAMETER num_predict 1
PARAMETER temperature 0
PARAMETER repeat_penalty 1
'''


# Architectures whose GGUF stores the q and k rows of each head with the two rotary halves interleaved.
_ROTARY_INTERLEAVED = {"llama": "llama", "mistral": "llama"}


def write_weights(classifier, base: str, folder: Path) -> None:
    """The trained LoRA as `adapter/` (PEFT), its base's weights with it merged, and the Modelfile that serves them.

    A .gguf base of Llama's family gives `model.gguf` (F16), and `adapter.gguf`, which with the base is all that need be
    shipped. Others give `merged/`, 16-bit safetensors for llama.cpp's converter.
    """
    model = classifier.model
    model.save_pretrained(folder / "adapter")
    (folder / "Modelfile").write_text(MODELFILE)
    if base.endswith(".gguf") and model.config.model_type in _ROTARY_INTERLEAVED:
        write_adapter(model, folder / "adapter.gguf")
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
    runs.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    # Read from a GGUF, a model's config does not name its architecture.
    architectures = config.get("architectures") or [type(model.get_base_model()).__name__]
    runs.write_json(folder / "config.json", config | {"dtype": "float16", "architectures": architectures})
    tokenizer.save_pretrained(folder)
    _correct_byte_fallback(folder / "tokenizer.json")
    # The converter wants sentencepiece's own file where the base has one; transformers 5 writes tokenizer.json alone.
    base = model.peft_config["default"].base_model_name_or_path
    if base.endswith(".gguf"):
        return
    if vocabulary := cached_file(base, "tokenizer.model", _raise_exceptions_for_missing_entries=False):
        shutil.copy(vocabulary, folder)


def _correct_byte_fallback(path: Path) -> None:
    """Say in a tokenizer.json that its BPE does not fall back to byte tokens, where it has none.

    transformers 5 says it does of all that it reads from a GGUF. The converter takes such a tokenizer for
    sentencepiece's, and writes a wrong vocabulary.
    """
    tokenizer = json.loads(path.read_text())
    if tokenizer["model"].get("byte_fallback") and "<0x00>" not in tokenizer["model"]["vocab"]:
        tokenizer["model"]["byte_fallback"] = False
        path.write_text(json.dumps(tokenizer, ensure_ascii=False))


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


def converted(folder: Path) -> str:
    """Make model.gguf of merged/ by llama.cpp's converter, which is fetched where there is none; returns who made it.

    A model.gguf that is there without merged/ stays. Raises UserError where there is no converter to be had, or it
    refuses the model.
    """
    if not (folder / "merged").exists():
        return "merging with the gguf package"
    script = _of_llama_cpp(_CONVERTER)
    print(f"converting the merged weights to GGUF with {script}")
    command = [sys.executable, script, "merged", "--outfile", "model.gguf.part", "--outtype", "f16"]
    _run(command, folder, f"{script} can't convert the merged weights")
    os.replace(folder / "model.gguf.part", folder / "model.gguf")
    return str(script)


def quantise(folder: Path, kind: str) -> None:
    """Replace a folder's model.gguf by itself in fewer bits. kind: as llama-quantize names it, Q8_0 or Q4_K_M.

    Raises UserError where there is no llama-quantize, or it fails.
    """
    command = [quantizer(), "model.gguf", "model.gguf.part", kind]
    _run(command, folder, f"llama-quantize can't make {kind} of model.gguf")
    os.replace(folder / "model.gguf.part", folder / "model.gguf")


def quantizer() -> Path:
    """The llama-quantize command, which is built where there is none. UserError where that can't be done."""
    found = shutil.which(_QUANTIZER)
    return Path(found) if found else _of_llama_cpp(_QUANTIZER)


_CONVERTER, _QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
# Where a llama.cpp of ours is put: hatespeech/install.py makes it.
LLAMA_CPP = Path(__file__).parents[2] / ".cache" / "llama.cpp"


def _of_llama_cpp(name: str) -> Path:
    """A file of llama.cpp: of unsloth's checkout, of an Ollama built here, or of our own, which is fetched if need be.

    Raises UserError, with what to do, where that fails.
    """
    folders = [Path.home() / ".unsloth" / "llama.cpp", LLAMA_CPP]
    if command := shutil.which("ollama"):
        library = Path(command).resolve().parent.parent / "lib"
        folders[1:1] = [library / "llama.cpp", library / "ollama"]
    if given := os.environ.get("UNSLOTH_LLAMA_CPP_PATH"):
        folders.insert(0, Path(given).resolve())
    paths = [folder / inner / name for folder in folders for inner in ("", "build/bin")]
    if found := [path for path in paths if path.is_file()]:
        return found[0]
    print(f"no {name} of llama.cpp here: fetching it into {LLAMA_CPP}", flush=True)
    try:
        return Path(install.converter(LLAMA_CPP, name == _QUANTIZER)) / name
    except install.Failure as failure:
        raise UserError(
            f"{name} of llama.cpp can't be had: {failure.cause}. Mend that ({failure.remedy}), or give a llama.cpp "
            "checkout: UNSLOTH_LLAMA_CPP_PATH=FOLDER. Then run the same command again: nothing trained is lost, it "
            "goes on from its checkpoint"
        ) from failure


def _run(command: list[str | Path], folder: Path, failed: str) -> None:
    # Offline: all that the converter needs is in the folder.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{failed}: {reason[-500:]}. {folder} keeps what was trained")


def write_adapter(model, path: Path) -> None:
    """A PEFT LoRA as the GGUF that llama.cpp reads, in fp16.

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
    """Make `model.gguf` in a run's folder that was shipped without: of its adapter and the base its settings name."""
    merged = run / "model.gguf"
    if merged.exists():
        return
    if (run / "merged").exists():
        converted(run)
        return
    expected = runs.read_settings(run)["base"]
    if base is None:
        raise UserError(f"{run} holds no model.gguf: give the base it was trained on, {expected['name']}, with --base")
    if (found := runs.sha256_of(base)) != expected["sha256"]:
        raise UserError(f"{base} is not the base of {run}: its sha256 is {found}, not {expected['sha256']}")
    merge(base, run / "adapter.gguf", merged)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hatespeech.training.export", description=complete.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, e.g. results/smollm2-135m")
    parser.add_argument("--base", type=Path, help="the .gguf file of the base the run was trained on")
    arguments = parser.parse_args()
    try:
        complete(arguments.run, arguments.base)
    except UserError as error:
        sys.exit(f"export: {error}")


if __name__ == "__main__":
    main()
