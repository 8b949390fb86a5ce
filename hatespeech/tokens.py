"""A base's tokenizer: prompts as token ids, the same everywhere, and the first token of each label."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hatespeech import UserError, task


def load_tokenizer(base: str):
    """The base's tokenizer. Raises UserError where it can't be had or can't tell the labels by their first token."""
    with explained(base):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**location(base))


def label_ids(tokenizer) -> tuple[int, ...]:
    """The first token of each completion, as the tokenizer puts it behind a prompt.

    Raises UserError where two labels share it, where it fuses with the prompt, or where a text could smuggle in one of
    the tokenizer's control tokens in spite of task.spell_out.
    """
    prompt = tokenizer(task.prompt("A text.")).input_ids
    ids = []
    for completion in task.COMPLETIONS:
        joined = tokenizer(task.prompt("A text.") + completion).input_ids
        if joined[: len(prompt)] != prompt:
            raise UserError(f"this tokenizer fuses the prompt's end with{completion!r}: choose another base")
        ids.append(joined[len(prompt)])
    if len(set(ids)) < len(ids):
        raise UserError(f"this tokenizer starts two of {task.LABELS} with the same token: choose another base")
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    obeyed = [token for token in control if token in task.spell_out(token)]
    if obeyed:
        raise UserError(f"a text could smuggle in the control tokens {obeyed}: task.spell_out must know them")
    return tuple(ids)


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Prompt token ids, as Ollama evaluates them (BOS where the model has one)."""
    return tokenizer([task.prompt(text) for text in texts]).input_ids


def location(base: str) -> dict[str, str]:
    """from_pretrained's arguments for a hub id, a directory or a .gguf file."""
    if not base.endswith(".gguf"):
        return {"pretrained_model_name_or_path": base}
    path = Path(base)
    if not path.is_file():
        raise UserError(f"{base}: no such file")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@contextmanager
def explained(base: str) -> Iterator[None]:
    """Turn what goes wrong while a base is fetched and loaded into one sentence and a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{base}: neither a local model nor to be had from the Hugging Face hub ({type(error).__name__}). "
            "Check the name and the network, or give a directory or a .gguf file: --model PATH"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install '.[train]' (or environment.yml)") from error
