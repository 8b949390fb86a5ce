import json
import subprocess
import sys

import gguf
import numpy as np
import pytest

from hatespeech import UserError, runs
from hatespeech.training import export
from tests.conftest import ROOT


def test_a_run_appears_whole(tmp_path):
    folder = tmp_path / "results" / "mine"
    with runs.run_folder(folder) as work:
        assert (work.name, folder.exists()) == ("mine.incomplete", False)
        (work / "metrics.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_run_that_fails_stays_visibly_incomplete_and_can_start_again(tmp_path, capsys):
    folder = tmp_path / "mine"

    def fail() -> None:
        with runs.run_folder(folder) as work:
            (work / "half.json").write_text("{")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not folder.exists()
    assert (tmp_path / "mine.incomplete" / "half.json").exists()
    with runs.run_folder(folder) as work:
        assert not (work / "half.json").exists()
    assert "did not finish: starting it again" in capsys.readouterr().out
    assert folder.exists()


def test_a_checkpoint_outlives_a_run_that_fails_but_not_one_that_ends(tmp_path, capsys):
    work = tmp_path / "mine.incomplete"
    work.mkdir()
    for member in (0, 11):
        (work / runs.checkpoint_name(member)).write_text("progress")
    (work / "half.json").write_text("{")
    with runs.run_folder(tmp_path / "mine"):
        assert sorted(path.name for path in work.glob("*.pt")) == ["checkpoint0.pt", "checkpoint11.pt"]
        assert not (work / "half.json").exists()
    assert "its checkpoint stays" in capsys.readouterr().out
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_finished_run_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="holds a finished run"), runs.run_folder(tmp_path / "mine"):
        pass


def test_two_runs_into_one_folder(tmp_path):
    code = (
        "import sys, pathlib; from hatespeech import runs\n"
        "with runs.run_folder(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mine")]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another run is writing"), runs.run_folder(tmp_path / "mine"):
        pass
    first.communicate("")
    assert (tmp_path / "mine").exists()


SOME = ("blk.0.attn_q.weight", "blk.7.attn_k.weight", "blk.29.ffn_down.weight")
NORM = "blk.0.attn_norm.weight"


@pytest.fixture(scope="module")
def files(run, base_gguf) -> list[gguf.GGUFReader]:
    """The base, the shipped adapter and what bootstrap.sh merges of them."""
    return [gguf.GGUFReader(path) for path in (base_gguf, run / "adapter.gguf", run / "model.gguf")]


@pytest.mark.slow
def test_merged_weights_are_base_plus_update(files):
    base, adapter, merged = (
        {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for tensor in file.tensors
            if tensor.name.startswith((*SOME, NORM))
        }
        for file in files
    )
    alpha = files[1].get_field("adapter.lora.alpha").contents()
    for name in SOME:
        a, b = adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]
        expected = base[name] + alpha / a.shape[0] * b @ a
        assert np.abs(merged[name] - expected).max() < 1e-3 * np.abs(expected).max()
        assert np.abs(merged[name] - base[name]).max() > 1e-3 * np.abs(expected).max()
    assert np.array_equal(merged[NORM], base[NORM])  # norms have no LoRA


@pytest.mark.slow
def test_merged_metadata_and_tensors_are_the_bases(files):
    base, _, merged = files
    for name, entry in base.fields.items():
        if not name.startswith("GGUF.") and name != "general.file_type":
            assert all(map(np.array_equal, merged.get_field(name).parts, entry.parts)), name
    assert [(t.name, t.shape.tolist()) for t in merged.tensors] == [(t.name, t.shape.tolist()) for t in base.tensors]


def test_another_base_is_refused(run, base_gguf, tmp_path):
    stored = json.loads((run / "settings.json").read_text())
    stored["base"] = {"name": "b.gguf", "sha256": "0" * 64}
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"give the base it was trained on, b\.gguf"):
        export.complete(tmp_path, None)
    with pytest.raises(UserError, match="is not the base of"):
        export.complete(tmp_path, base_gguf)
    assert not (tmp_path / "model.gguf").exists()


def test_the_command_explains_itself(tmp_path):
    command = [sys.executable, "-m", "hatespeech.training.export", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("export: ")
    assert "no finished run" in done.stderr


def test_a_broken_gguf_is_named(base_gguf, tmp_path):
    broken = tmp_path / "adapter.gguf"
    broken.write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(UserError, match="no readable GGUF"):
        export.merge(base_gguf, broken, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize("four_bit", [False, True])
def test_merged_safetensors_compute_what_was_trained(four_bit, tokenizer, tmp_path, monkeypatch):
    """Of a 4-bit base too, whose weights in 16 bit nobody has: the same logits, from several files."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": not four_bit}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **heads)).save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if four_bit else None
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    monkeypatch.setattr(export, "_SHARD_BYTES", 100_000)
    model.train()  # bitsandbytes repacks a CPU's 4-bit weights for inference, out of the dequantiser's sight
    ids = torch.tensor([tokenizer("Some words to read.").input_ids])
    with torch.no_grad():
        expected = model(ids).logits
        export.write_merged(model, tokenizer, tmp_path / "merged")
        with model.disable_adapter():
            untrained = model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    assert (merged - expected).abs().max() < 0.01 * (expected - untrained).abs().max()


def test_the_converter_is_unsloths_where_it_has_one_and_its_refusal_is_told(tmp_path, monkeypatch):
    """A stand-in for the converter; the real one is test_convert.py's."""
    (tmp_path / "merged").mkdir()
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", str(tmp_path))
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))")
    assert export.converted(tmp_path) == str(script)
    assert (tmp_path / "model.gguf").read_text() == "merged --outfile model.gguf.part --outtype f16"
    script.write_text("raise NotImplementedError('Architecture X not supported!')")
    with pytest.raises(UserError, match=r"can't convert.*Architecture X not supported!"):
        export.converted(tmp_path)
    assert (tmp_path / "model.gguf").exists()  # the good one stays
