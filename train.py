"""Fine-tune a small classifier out of a large language model: load -> split -> tune -> calibrate -> evaluate -> export.

python -m train                                                      # MHS, Mistral-7B in 4 bit, a CUDA GPU
python -m train --model HuggingFaceTB/SmolLM2-135M-Instruct          # a small base; trains on a CPU too
python -m train --dataset rows.csv --output results/mine             # your own rows: CSV, JSONL or Parquet
python -m train --evaluate-only --output results/mine                # measure a run as Ollama serves it
python -m train --evaluate-only --output results/mine --test-dataset yours.csv
torchrun --nproc-per-node 4 -m train                                 # several GPUs
MODEL_DIR=results/mine ./bootstrap.sh                                # serve it
"""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

try:
    import numpy as np
    import pandas as pd
    import tyro
except ModuleNotFoundError as error:
    sys.exit(f"train: {error.name} is not installed: conda env create -f environment.yml, or pip install -e '.[train]'")

from hatespeech import UserError, calibration, card, data, evaluation, export, ollama, pictures, task, tuning

# Mean difference of label probabilities, trained against served: rounding to 16 bit costs some thousandths, bf16 on a
# GPU hundredths, a wrong tokenizer or rotary order tenths.
SERVED_TOLERANCE = 0.1


@dataclass(frozen=True)
class Rows:
    """What to learn from, and what to test on"""

    dataset: str = data.HUB_ID
    """Annotation rows: a hub id, or a .csv, .jsonl or .parquet file with comment_id, text, hate_speech_score."""
    test_dataset: str | None = None
    """Test on these rows instead of a part of --dataset, of which what is like them is then left out."""
    validation_share: float = 0.1
    """Comments held out to choose settings by."""
    test_share: float = 0.1
    """Comments held out for the reported metrics. Not used with --test-dataset."""
    calibrate_on: Literal["validation", "test"] = "validation"
    """test: where only the test labels are sound. Its metrics are then cross-fitted: no comment calibrates itself."""


@dataclass(frozen=True)
class Learning:
    """How to learn"""

    targets: Literal["hard", "soft"] = "soft"
    """hard: the score's class. soft: class probabilities, from the score and its error."""
    score_error: float = 0.5
    """The score's standard error, on its own scale, for soft targets."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: every class counts the same in the loss, however rare."""
    epochs: float = 2.0
    """Passes over the training comments."""
    learning_rate: float = 2e-4
    """AdamW's, after warm-up. 1e-3 suits a base as small as SmolLM2-135M."""
    batch_size: int = 64
    """Comments an optimizer step; how many are computed at once follows from the free memory."""
    rank: int = 16
    """Rank of the LoRA on every linear layer."""
    alpha: int = 32
    """LoRA's scale; alpha / rank multiplies the update."""
    max_steps: int | None = None
    """Stop after so many optimizer steps: a trial run."""
    seed: int = 0
    """For the split, the LoRA's start and the order of the comments."""


@dataclass(frozen=True)
class Settings:
    """Fine-tune an LLM to tell Hate / Neutral / Supportive apart, say how good it is, and export it for Ollama."""

    model: str = "unsloth/mistral-7b-instruct-v0.3-bnb-4bit"
    """The base: a hub id, a directory, or a .gguf file."""
    output: Path | None = None
    """The run's folder. Default: results/ and the base's name."""
    evaluate_only: bool = False
    """Train nothing: measure the finished run in --output, on its test comments or on --test-dataset."""
    engine: Literal["ollama", "torch"] = "ollama"
    """For --evaluate-only. ollama: as it is served, at OLLAMA_HOST."""
    quantize: Literal["F16", "Q8_0", "Q4_K_M"] = "F16"
    """The format of model.gguf. Less than F16 is Ollama's work: smaller, on a GPU faster, not the same model."""
    checkpoint_every_s: float = 60.0
    """Save progress so often. The same command goes on from it after Ctrl-C, kill -9 or a power cut."""
    note: str = ""
    """For the model card: what a reader must know of these data."""
    rows: Rows = field(default_factory=Rows)
    learning: Learning = field(default_factory=Learning)

    @classmethod
    def of(cls, **flat) -> "Settings":
        """From settings by their flags' names, as settings.json holds them."""
        parts = {name: part for name, part in (("rows", Rows), ("learning", Learning))}
        for name, part in parts.items():
            own = {each.name for each in fields(part)} & flat.keys()
            parts[name] = part(**{each: flat.pop(each) for each in own})
        return cls(**flat, **parts)

    def flat(self) -> dict:
        nested = asdict(self)
        return {**nested.pop("rows"), **nested.pop("learning"), **nested}


def main(settings: Settings) -> None:
    check(settings)
    rows, learning = settings.rows, settings.learning
    folder = settings.output or Path("results") / Path(settings.model).stem.lower()
    if settings.evaluate_only:
        return evaluate(folder, settings)
    with tuning.processes() as rank, nullcontext() if rank else export.run_folder(folder) as work:
        tuning.check_base(settings.model)
        tokenizer = tuning.load_tokenizer(settings.model)
        splits, counts = load_splits(settings, lambda texts: [len(ids) for ids in tuning.encode(tokenizer, texts)])
        lora = {"rank": learning.rank, "alpha": learning.alpha, "seed": learning.seed}
        classifier = tuning.load(settings.model, tokenizer, **lora)
        prompts = {name: tuning.encode(tokenizer, part["text"].tolist()) for name, part in splits.items()}
        zero_shot = None if rank else tuning.label_probabilities(classifier, prompts["test"])
        training = tuning.fit(
            classifier,
            prompts["train"],
            targets_of(splits["train"], learning),
            steps=learning.max_steps or max(1, round(learning.epochs * len(prompts["train"]) / learning.batch_size)),
            batch_size=learning.batch_size,
            learning_rate=learning.learning_rate,
            seed=learning.seed,
            checkpoint=work and work / export.CHECKPOINT,
            checkpoint_every_s=settings.checkpoint_every_s,
        )
        if rank:
            return
        describe(work, settings, splits, counts, classifier, training)
        record_zero_shot(work, splits["test"], zero_shot)
        probabilities = {}
        for name in sorted(splits.keys() - {"train"}, key=lambda name: name != rows.calibrate_on):
            probabilities[name] = tuning.label_probabilities(classifier, prompts[name])
            record(work, splits, name, "torch", probabilities[name])
        export.write_weights(classifier, settings.model, work)
        finish_gguf(
            work, classifier, settings.quantize, splits["test"]["text"][:20].tolist(), probabilities["test"][:20]
        )
    print(f"\n{(folder / 'report.txt').read_text()}\n{folder} is complete. Serve it: MODEL_DIR={folder} ./bootstrap.sh")


def check(settings: Settings) -> None:
    """Refuse what can't end well before anything is computed."""
    if settings.rows.calibrate_on == "validation" and not settings.rows.validation_share:
        raise UserError("no comments to calibrate on: give --validation-share, or --calibrate-on test")
    if settings.quantize != "F16" and not shutil.which("ollama"):
        raise UserError(
            f"--quantize {settings.quantize} is Ollama's work, and there is no `ollama` command: install it"
        )


def targets_of(train: pd.DataFrame, learning: Learning) -> np.ndarray:
    """(n, 3) what to learn of each training comment: class probabilities, times its class's weight."""
    targets = data.soft_targets(train["score"], learning.score_error if learning.targets == "soft" else 0.0)
    if learning.class_weights == "balanced":  # as scikit-learn's: n / (number of classes * comments of the class)
        share = train["label"].value_counts(normalize=True)
        targets *= (1 / (len(task.LABELS) * train["label"].map(share))).to_numpy()[:, None]
    return targets


def load_splits(settings: Settings, count_tokens=None) -> tuple[dict[str, pd.DataFrame], dict]:
    """Comments by split, and the counts of what was read and left out."""
    comments = data.comments(data.read(settings.rows.dataset), count_tokens)
    shares = {"validation": settings.rows.validation_share, "test": settings.rows.test_share}
    extra, counts = {}, {settings.rows.dataset: comments.counts}
    if settings.rows.test_dataset:
        shares["test"] = 0.0
        test = data.comments(data.read(settings.rows.test_dataset), count_tokens)
        data.require_classes(test.frame, "test")
        comments.frame, dropped = data.without(comments.frame, test.frame)
        extra = {"test": test.frame}
        counts |= {settings.rows.test_dataset: test.counts, "comments_left_out_for_being_like_a_test_comment": dropped}
    shares = {"train": 1 - sum(shares.values())} | {name: share for name, share in shares.items() if share}
    return data.split(comments.frame, shares, settings.learning.seed) | extra, counts


def stored_splits(folder: Path, settings: Settings) -> dict[str, pd.DataFrame]:
    """The comments of a run's splits.json, as the data sets hold them now; no split of which one is missing."""
    sources = [source for source in (settings.rows.dataset, settings.rows.test_dataset) if source]
    pool = pd.concat([data.comments(data.read(source)).frame for source in sources])
    pool = pool.drop_duplicates("comment_id", keep="last").set_index("comment_id", drop=False)
    stored = json.loads((folder / "splits.json").read_text())
    return {name: pool.loc[ids].reset_index(drop=True) for name, ids in stored.items() if set(ids) <= set(pool.index)}


def describe(folder: Path, settings: Settings, splits: dict, counts: dict, classifier, training: dict) -> None:
    """Write what a reader needs to run it again, and what serving needs to know: label_tokens, class_scores, base."""
    is_file = settings.model.endswith(".gguf")
    train = splits["train"]
    pd.DataFrame(training.pop("curve")).to_csv(folder / "learning_curve.csv", index=False, float_format="%.5g")
    export.write_json(folder / "splits.json", {name: part["comment_id"].tolist() for name, part in splits.items()})
    about = {
        "command": "python -m train " + shlex.join(sys.argv[1:]),
        "settings": settings.flat() | {"output": None},  # the folder may be moved
        "commit": commit(),
        "versions": versions(),
        "hardware": tuning.hardware(),
        "data": {
            "counts": counts,
            "sha256": {name: data.fingerprint(part) for name, part in splits.items()},
            "comments": {name: len(part) for name, part in splits.items()},
        },
        "base": {
            "name": Path(settings.model).name if is_file else settings.model,
            "sha256": export.sha256_of(Path(settings.model)) if is_file else None,
        },
        "prompt_version": task.PROMPT_VERSION,
        "label_tokens": classifier.label_tokens,
        "class_scores": [round(train.loc[train["label"] == label, "score"].mean(), 4) for label in task.LABELS],
        "training": training,
    }
    export.write_json(folder / "settings.json", about)


def record(folder: Path, splits: dict, name: str, engine: str, probabilities: np.ndarray, **origin) -> None:
    """Add an engine's evaluation to the run's folder: calibration, metrics, predictions, report, pictures, card."""
    run = export.read_settings(folder)
    part, scores, path = splits[name], splits[name]["score"].to_numpy(), folder / "metrics.json"
    if name == run["settings"]["calibrate_on"]:
        if engine == "as_served" or folder.suffix == ".incomplete":  # torch's must not replace that of what is served
            about = {"split": name, "engine": engine, "sha256": run["data"]["sha256"][name]}
            fitted = calibration.fit(probabilities, scores, **about)
            replace(fitted, model_sha256=origin.get("model_sha256")).save(folder / "calibration.json")
        calibrated, expected = calibration.cross_fit(probabilities, scores)
    else:
        fitted = calibration.Calibration.load(folder / "calibration.json")
        calibrated = fitted.apply(probabilities)
        expected = fitted.expected(calibrated)
    uncalibrated = probabilities, probabilities @ np.asarray(run["class_scores"])
    found = {f"{engine}_uncalibrated": uncalibrated, engine: (calibrated, expected)}
    metrics = json.loads(path.read_text()) if path.exists() else {}
    for classifier, predicted in found.items():
        measured = origin | evaluation.measure(part, *predicted)
        metrics.setdefault(name, {})[classifier] = measured
    if name == "test":
        set_beside(folder, splits, metrics, engine, found, run["class_scores"])
    export.write_json(path, metrics)
    if name == "test":
        title = f"{folder.name.removesuffix('.incomplete')}: {len(part)} test comments, {engine}"
        (folder / "report.txt").write_text(evaluation.report(part, calibrated))
        pictures.draw_all(folder, title, part, probabilities, calibrated, expected)
        (folder / "README.md").write_text(card.model_card(folder, run, metrics, engine))


def record_zero_shot(folder: Path, test: pd.DataFrame, probabilities: np.ndarray) -> None:
    """Keep what the base predicted before training."""
    expected = probabilities @ np.asarray(export.read_settings(folder)["class_scores"])
    evaluation.save_predictions(folder / evaluation.PREDICTIONS, test, "test", {"zero_shot": (probabilities, expected)})


def set_beside(folder: Path, splits: dict, metrics: dict, engine: str, found: dict, class_scores: list[float]) -> None:
    """Add what ours are to be seen beside: baselines on the same comments, the differences to the best of
    them (by macro F1), error rates by group, the annotators' own vote, the reference's leaky protocol.

    found: what ours predict. All goes to predictions.csv, which also keeps what the base predicted before training.
    """
    test, path, others = splits["test"], folder / evaluation.PREDICTIONS, {}
    if "tfidf_calibrated" not in evaluation.load_predictions(folder, missing_ok=True):
        beside = evaluation.baselines(splits["train"], test, splits.get("validation"), class_scores)
        evaluation.save_predictions(path, test, "test", beside)
    evaluation.save_predictions(path, test, "test", found)
    for name, predicted in evaluation.load_predictions(folder).items():
        if not name.startswith(("torch", "as_served")):
            others[name] = evaluation.predicted_of(predicted)
            if name not in metrics["test"]:
                metrics["test"][name] = evaluation.measure(test, *others[name])
    best = max(others, key=lambda name: metrics["test"][name]["macro_f1"]["value"])
    compared = evaluation.compare(test, found[engine], others[best])
    metrics.setdefault("test_differences", {})[engine] = {"baseline": best, "metrics": compared}
    metrics.setdefault("test_groups", {})[engine] = evaluation.groups(test, found[engine][0])
    metrics["annotators_vote"] = evaluation.vote(test)
    if "tfidf_by_row_leaky" not in metrics:
        metrics["tfidf_by_row_leaky"] = evaluation.by_row(pd.concat([splits["train"], test]), class_scores)


def finish_gguf(folder: Path, classifier, quantize: str, texts: list[str], expected: np.ndarray) -> None:
    """Make sure of a model.gguf that Ollama serves with training's probabilities, and bind the calibration to it.

    expected: (n, 3), torch's label probabilities of the texts. Merged safetensors go through the first converter at
    hand whose file passes. Without an `ollama` command nothing is checked, and merged safetensors stay as they are;
    both are said.
    """
    if not shutil.which("ollama"):
        print("no `ollama` command here: what it will serve is not checked; python -m train --evaluate-only does later")
        if (folder / "merged").exists():
            path = folder / "Modelfile"
            path.write_text(path.read_text().replace("./model.gguf", "./merged"))
            print("merged/ stays as 16-bit safetensors; ollama create converts it")
            return
    else:
        tokens = tuple(classifier.label_tokens)
        for converted in export.converted(folder, classifier.tokenizer):
            try:
                difference = np.abs(ollama.served_once(folder, tokens, texts) - expected).mean()
            except ollama.OllamaError as error:
                print(f"{converted}: {error}")
                continue
            if difference <= SERVED_TOLERANCE:
                break
            print(f"{converted}: Ollama serves other probabilities than training saw, by {difference:.2f} on average")
        else:
            raise UserError(
                f"no model.gguf serves what was trained: this base's weights or tokens are read otherwise. {folder} "
                "keeps what was trained; give the base as a .gguf, or a llama.cpp checkout: UNSLOTH_LLAMA_CPP_PATH"
            )
        print(f"served by Ollama, label probabilities differ from training's by {difference:.4f} on average")
        if quantize != "F16":
            ollama.convert(folder, "./model.gguf", "--quantize", quantize)
            difference = np.abs(ollama.served_once(folder, tokens, texts) - expected).mean()
            print(f"quantised to {quantize} by Ollama, they differ by {difference:.4f}; --evaluate-only tells the cost")
        shutil.rmtree(folder / "merged", ignore_errors=True)
    fitted = calibration.Calibration.load(folder / "calibration.json")
    replace(fitted, model_sha256=export.sha256_of(folder / "model.gguf")).save(folder / "calibration.json")


def evaluate(folder: Path, settings: Settings) -> None:
    """Measure a finished run: on its own test comments, adding to its folder, or on other rows (--test-dataset)."""
    run = export.read_settings(folder)
    trained = Settings.of(**run["settings"])
    splits = stored_splits(folder, trained)
    for name, expected in run["data"]["sha256"].items():
        if name not in splits or data.fingerprint(splits[name]) != expected:
            raise UserError(
                f"{trained.rows.dataset} has changed since {folder} was trained: its {name} comments differ"
            )
    test, other = splits["test"], settings.rows.test_dataset
    if other:
        test, seen = data.without(data.comments(data.read(other)).frame, splits["train"])
        print(f"{other}: {len(test)} comments; {seen} left out, being like one of training")
    engine, predict = ("as_served", predict_as_served) if settings.engine == "ollama" else ("torch", predict_by_torch)
    probabilities, origin = predict(folder, run, test["text"].tolist())
    if not other:
        if engine == "torch" and "zero_shot" not in evaluation.load_predictions(folder, missing_ok=True):
            tokenizer = tuning.load_tokenizer(trained.model)
            base = tuning.load(trained.model, tokenizer, rank=1, alpha=1, seed=0)
            untrained = tuning.label_probabilities(base, tuning.encode(tokenizer, test["text"].tolist()))
            record_zero_shot(folder, test, untrained)
        record(folder, splits, "test", engine, probabilities, **origin)
        print((folder / "report.txt").read_text())
        return
    fitted = calibration.Calibration.load(folder / "calibration.json")
    calibrated = fitted.apply(probabilities)
    measured = {engine: evaluation.measure(test, calibrated, fitted.expected(calibrated))}
    rows = evaluation.groups(test, calibrated)
    print(evaluation.report(test, calibrated), evaluation.table(measured), evaluation.groups_table(rows), sep="\n\n")
    path = folder / "evaluations" / f"{Path(other).stem}.json"
    path.parent.mkdir(exist_ok=True)
    export.write_json(path, {"dataset": other, engine: origin | measured[engine], f"{engine}_by_group": rows})
    print(f"\nstored in {path}")


def predict_as_served(folder: Path, run: dict, texts: list[str]) -> tuple[np.ndarray, dict]:
    """(n, 3) label probabilities as users get them, quantisation and all, and where they are from."""
    from tqdm.auto import tqdm

    server = ollama.Ollama(os.environ.get("OLLAMA_HOST", ""), ollama.model_name(folder), tuple(run["label_tokens"]))
    try:
        origin = {"ollama": server.version(), "digest": server.digest(), "model_sha256": server.weights_sha256()}
        asked = tqdm(texts, desc="asking Ollama", unit="comment")
        return np.array([server.classify(text).probabilities for text in asked]), origin
    except ollama.OllamaError as error:
        raise UserError(f"{error} (MODEL_DIR={folder} ./bootstrap.sh starts it)") from error


def predict_by_torch(folder: Path, run: dict, texts: list[str]) -> tuple[np.ndarray, dict]:
    """The same by torch, from the run's adapter, or where it was shipped without, from its merged model.gguf."""
    adapter, merged, settings = folder / "adapter", folder / "model.gguf", Settings.of(**run["settings"])
    if not adapter.exists() and not merged.exists():
        raise UserError(f"{folder} holds neither adapter/ nor model.gguf: MODEL_DIR={folder} ./bootstrap.sh makes one")
    base = settings.model if adapter.exists() else str(merged)
    tuning.check_base(base)
    tokenizer = tuning.load_tokenizer(base)
    lora = {"rank": settings.learning.rank, "alpha": settings.learning.alpha, "seed": 0}
    classifier = tuning.load(base, tokenizer, **lora, adapter=adapter if adapter.exists() else None)
    return tuning.label_probabilities(classifier, tuning.encode(tokenizer, texts)), {"hardware": tuning.hardware()}


def commit() -> str | None:
    """The commit the code is at, marked where files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
    return head + ("-dirty" if changed.stdout.strip() else "")


def versions() -> dict[str, str | None]:
    names = ("torch", "transformers", "peft", "unsloth", "bitsandbytes", "scikit-learn", "gguf")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def parse(arguments: list[str] | None = None) -> Settings:
    # Blank lines between: tyro would join the commands to one paragraph.
    description = __doc__.replace("\n", "\n\n")
    return tyro.cli(tyro.conf.OmitArgPrefixes[Settings], args=arguments, description=description)


if __name__ == "__main__":
    try:
        main(parse())
    except (UserError, ollama.OllamaError) as error:
        sys.exit(f"train: {error}")
    except KeyboardInterrupt:
        sys.exit("train: stopped. The same command goes on from the last checkpoint, if training had begun")
