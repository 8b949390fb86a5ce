"""Fine-tune a small classifier out of a large language model: load -> split -> tune -> calibrate -> measure -> export.

python -m train                                                      # MHS, Mistral-7B in 4 bit, a CUDA GPU
python -m train --model HuggingFaceTB/SmolLM2-135M-Instruct          # a small base; trains on a CPU too
python -m train --dataset rows.csv --output results/mine             # your own rows: CSV, JSONL or Parquet
python -m train --also more.csv --also-weight 0.5                    # and others to learn from, which count half
python -m train --evaluate-only --output results/mine                # measure a run as Ollama serves it
python -m train --evaluate-only --output results/mine --test-dataset yours.csv
python -m train --reference                                          # the reference's recipe and its leaky report
torchrun --nproc-per-node 4 -m train                                 # several GPUs
MODEL_DIR=results/mine ./bootstrap.sh                                # serve it
"""

import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

try:
    import numpy as np
    import pandas as pd
    import tyro
except ModuleNotFoundError as error:
    sys.exit(f"train: {error.name} is not installed: conda env create -f environment.yml, or pip install -e '.[train]'")

from hatespeech import UserError, calibration, ollama, runs, tables, tokens
from hatespeech.training import (
    averaging,
    checks,
    data,
    evaluation,
    export,
    loop,
    processes,
    recording,
    reference,
    tuning,
)

# Mean difference of label probabilities, trained against served: rounding to 16 bit costs some thousandths, bf16 on a
# GPU hundredths, a wrong tokenizer or rotary order tenths.
SERVED_TOLERANCE = 0.1
Repeatable = tyro.conf.UseAppendAction


@dataclass(frozen=True)
class Settings:
    """Fine-tune an LLM to tell Hate / Neutral / Supportive apart, say how good it is, and export it for Ollama."""

    model: str = "unsloth/mistral-7b-instruct-v0.3-bnb-4bit"
    """The base: a hub id, a directory, or a .gguf file."""
    output: Path | None = None
    """The run's folder. Default: results/ and the base's name."""
    dataset: str = data.HUB_ID
    """What to learn from: a hub id, or a .csv, .jsonl or .parquet file with text and one of hate_speech_score (a
    number), label (Hate, Neutral, Supportive, or Not hate) and hateful (1 or 0). Rows of one comment_id are one
    comment."""
    test_dataset: str | None = None
    """Test on these rows instead of a part of --dataset, of which what is like them is then left out."""
    also: Annotated[tuple[str, ...], Repeatable] = ()
    """More rows to learn from, of the same columns; none of them is measured on. May be given several times."""
    also_weight: Annotated[tuple[float, ...], Repeatable] = ()
    """How much a row of --also counts beside one of --dataset; one for each --also, in order. Default: 1."""
    annotations: str | None = None
    """Rows of MHS's schema about the test comments: whom they speak of, and what single annotators said."""
    validation_share: float = 0.1
    """Comments of --dataset held out to calibrate and to choose settings by."""
    test_share: float = 0.1
    """Comments of --dataset held out for the reported metrics. Not used with --test-dataset."""
    score_error: float = 0.5
    """The score's standard error, on its own scale: a comment near a cut point teaches both classes. 0: its class."""
    epochs: float = 2.0
    """Passes over the training comments."""
    learning_rate: float = 2e-4
    """AdamW's, after warm-up. 1e-3 to 2e-3 suit a base as small as SmolLM2-135M."""
    batch_size: int = 64
    """Comments per optimizer step; how many are computed at once follows from the free memory."""
    rank: int = 16
    """Rank of the LoRA on every linear layer."""
    alpha: int = 32
    """LoRA's scale; alpha / rank multiplies the update."""
    members: int = 1
    """Train so many LoRAs of one beginning, each on the comments in another order, and average them to one."""
    max_steps: int | None = None
    """Stop after so many optimizer steps: a trial run."""
    seed: int = 0
    """For the split, the LoRA's start and the order of the comments."""
    functional: Path = checks.FUNCTIONAL
    """Functional checks: a CSV of short texts of known kinds, with the right answers."""
    gate: Path | None = None
    """Export no model that does not reach what this file asks. Default: results/gates.json, of which is only said."""
    quantize: Literal["F16", "Q8_0", "Q4_K_M"] = "F16"
    """The format of model.gguf. Less than F16 (by llama-quantize): smaller, on a GPU faster, not the same model."""
    checkpoint_every_s: float = 60.0
    """Save progress so often. The same command goes on from it after Ctrl-C, kill -9 or a power cut."""
    note: str = ""
    """For the model card: what a reader must know of these data."""
    evaluate_only: bool = False
    """Train nothing: measure the finished run in --output, on its test comments or on --test-dataset."""
    engine: Literal["ollama", "torch"] = "ollama"
    """For --evaluate-only. ollama: as it is served, at OLLAMA_HOST."""
    reference: bool = False
    """Repeat the reference's recipe, which splits by row and so leaks, and print its report. Nothing is exported."""

    @classmethod
    def of(cls, stored: dict) -> "Settings":
        """From a run's settings.json, which may be of an older version with other fields."""
        known = {each.name for each in fields(cls)} & stored.keys()
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        return cls(**{name: found[name] for name in known})

    def as_json(self) -> dict:
        """Without the folder, which may be moved; a path in the checkout as from there."""
        stored = asdict(self) | {"output": None}
        for name, value in stored.items():
            if isinstance(value, Path):
                here = value.is_absolute() and value.is_relative_to(checks.ROOT)
                stored[name] = str(value.relative_to(checks.ROOT) if here else value)
        return stored


def main(settings: Settings) -> None:
    check(settings)
    folder = settings.output or Path("results") / Path(settings.model).name.removesuffix(".gguf").lower()
    if settings.evaluate_only:
        return evaluate(folder, settings)
    gates = checks.read_gates(settings.gate or checks.GATES)
    functional = checks.load(settings.functional)
    tuning.check_base(settings.model)
    if settings.reference:
        return reference.run(settings)
    with processes.joined() as rank, nullcontext() if rank else runs.run_folder(folder) as work:
        # Load and split.
        tokenizer = tokens.load_tokenizer(settings.model)
        splits, counts = load_splits(settings, functional, tokenizer)
        splits["functional"] = functional
        prompts = {name: tokens.encode(tokenizer, part["text"].tolist()) for name, part in splits.items()}
        # Tune.
        lora = {"rank": settings.rank, "alpha": settings.alpha, "seed": settings.seed}
        classifier = tuning.load(settings.model, tokenizer, **lora)
        zero_shot = None if rank else tuning.label_probabilities(classifier, prompts["test"])
        training = tune(classifier, prompts["train"], goals_of(splits["train"], settings), settings, work)
        if rank:
            return
        # Calibrate on validation comments, then measure on the others.
        recording.describe(work, settings.as_json(), splits, counts, classifier, training)
        recording.record_zero_shot(work, splits["test"], zero_shot)
        probabilities = {}
        for name in ("validation", "test", "functional"):
            probabilities[name] = tuning.label_probabilities(classifier, prompts[name])
            recording.record(work, splits, name, "torch", probabilities[name])
        recording.write_report(work, splits, "torch", gates)
        refuse_failed(work, settings)
        # Export.
        export.write_weights(classifier, settings.model, work)
        first = splits["test"]["text"][:20].tolist()
        finish_gguf(work, classifier, settings.quantize, first, probabilities["test"][:20])
    print(f"\n{(folder / 'report.txt').read_text()}\n{folder} is complete. Serve it: MODEL_DIR={folder} ./bootstrap.sh")


def check(settings: Settings) -> None:
    """Refuse, by its flag's name, what can't end well before anything is computed."""
    test_share = 0.0 if settings.test_dataset else settings.test_share
    rules = (
        ("validation-share", 0 < settings.validation_share < 1, "is between 0 and 1: the model is calibrated on it"),
        ("test-share", 0 < test_share < 1 or settings.test_dataset, "is between 0 and 1, or give --test-dataset"),
        (
            "test-share",
            settings.validation_share + test_share < 1,
            "and --validation-share leave nothing to learn from",
        ),
        (
            "also-weight",
            len(settings.also_weight) in (0, len(settings.also)),
            "is given once for each --also, or never",
        ),
        ("also-weight", all(0 < weight < 1e6 for weight in settings.also_weight), "is a number above 0"),
        ("score-error", 0 <= settings.score_error < 100, "is 0 or more"),
        ("epochs", 0 < settings.epochs < 1e6, "is above 0"),
        ("learning-rate", 0 < settings.learning_rate < 1, "is above 0 and below 1"),
        ("checkpoint-every-s", settings.checkpoint_every_s >= 0, "is 0 or more"),
        *((name, getattr(settings, name.replace("-", "_")) >= 1, "is 1 or more") for name in COUNTS),
        ("max-steps", settings.max_steps is None or settings.max_steps >= 1, "is 1 or more"),
        ("seed", 0 <= settings.seed < 2**32, "is 0 or more"),
    )
    for flag, holds, rule in rules:
        if not holds:
            raise UserError(f"--{flag} {rule}")
    for source in (settings.dataset, settings.test_dataset, settings.annotations, *settings.also):
        if source and data.is_file(source):
            tables.open_table(source)
    if settings.quantize != "F16" and not settings.evaluate_only:
        export.quantizer()  # found or built now, not when hours of training are over


COUNTS = ("batch-size", "rank", "alpha", "members")


def load_splits(settings: Settings, functional: pd.DataFrame, tokenizer) -> tuple[dict[str, pd.DataFrame], dict]:
    """Comments by split, and the counts of what was read and left out.

    The training comments have two columns more: source, the file or hub id they are from, and weight.
    """

    def read(source: str) -> data.Comments:
        return data.comments(data.read(source), lambda texts: [len(ids) for ids in tokens.encode(tokenizer, texts)])

    comments = read(settings.dataset)
    frame, counts = comments.frame, {settings.dataset: comments.counts}
    shares = {"train": 1.0, "validation": settings.validation_share}
    measured = {"functional": functional.assign(comment_id=functional["id"])}
    if settings.test_dataset:
        test = read(settings.test_dataset)
        data.require_classes(test.frame, "test")
        measured["test"], counts[settings.test_dataset] = test.frame, test.counts
    else:
        shares["test"] = settings.test_share
    for name, part in measured.items():
        frame, counts[f"comments_left_out_for_being_like_one_of_{name}"] = data.without(frame, part)
    parts, counts["comments_left_out_for_being_like_a_held_out_one"] = data.split(frame, shares, settings.seed)
    parts |= {"test": measured["test"]} if settings.test_dataset else {}
    if settings.annotations:
        parts["test"] = data.with_annotations(parts["test"], data.read(settings.annotations))
    train = [parts["train"].assign(source=settings.dataset, weight=1.0)]
    held_out = pd.concat([parts["validation"], parts["test"], measured["functional"]])
    for source, weight in zip(settings.also, settings.also_weight or [1.0] * len(settings.also), strict=True):
        other = read(source)
        kept, dropped = data.without(other.frame, held_out)
        counts[source] = other.counts | {"comments_left_out_for_being_like_a_measured_one": dropped}
        train.append(kept.assign(source=source, weight=weight))
    return parts | {"train": pd.concat(train, ignore_index=True)}, counts


def goals_of(train: pd.DataFrame, settings: Settings) -> np.ndarray:
    """(n, 4) what to learn of each training comment (data.targets), times its weight."""
    return data.targets(train, settings.score_error) * train["weight"].to_numpy()[:, None]


def tune(classifier, prompts: list[list[int]], goals: np.ndarray, settings: Settings, work: Path | None) -> dict:
    """Train the members and leave their average in the classifier; what loop.fit reports of all of them."""
    start = averaging.state(classifier.model)
    states, reports = [], []
    for member in range(settings.members):
        averaging.restore(classifier.model, start)
        training = loop.fit(
            classifier,
            prompts,
            goals,
            steps=settings.max_steps or max(1, round(settings.epochs * len(prompts) / settings.batch_size)),
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=settings.seed + member,
            checkpoint=work and work / runs.checkpoint_name(member),
            checkpoint_every_s=settings.checkpoint_every_s,
        )
        states.append(averaging.state(classifier.model))
        reports.append(training)
    if settings.members == 1:
        return training
    mean, lost = averaging.average(states)
    averaging.restore(classifier.model, mean)
    sums = {
        name: round(sum(each[name] for each in reports), 2) for name in ("steps", "rows", "seconds", "steps_left_out")
    }
    sums["rows_per_s"] = round(sums["rows"] / max(sums["seconds"], 1e-9), 1)
    return training | sums | {"members": settings.members, "update_lost_by_the_rank": round(lost, 4)}


def refuse_failed(work: Path, settings: Settings) -> None:
    """Say which gates the run passed. Raises UserError where --gate asks for more."""
    results = recording.read_metrics(work)["gates"]["torch"]
    print("\n".join(checks.sentence(result) for result in results))
    if settings.gate and not all(result["passed"] for result in results):
        raise UserError(f"no model is exported: {settings.gate} asks for more. {work} has metrics.json and README.md")


def finish_gguf(folder: Path, classifier, quantize: str, texts: list[str], expected: np.ndarray) -> None:
    """Make sure of a model.gguf that Ollama serves with training's probabilities, and bind the calibration to it.

    expected: (n, 3), torch's label probabilities of the texts. Without an `ollama` command nothing is checked, which is
    said. Quantised, the model is not the one that the calibration was fitted for, and is served uncalibrated until
    --evaluate-only has fitted it anew.
    """
    maker, label_tokens = export.converted(folder), tuple(classifier.label_tokens)
    served = bool(shutil.which("ollama"))
    if served:
        check_served(folder, maker, label_tokens, texts, expected)
    else:
        print("no `ollama` command here: what it will serve is not checked; python -m train --evaluate-only does later")
    fitted = calibration.Calibration.load(folder / "calibration.json")
    replace(fitted, model_sha256=runs.sha256_of(folder / "model.gguf")).save(folder / "calibration.json")
    if quantize != "F16":
        export.quantise(folder, quantize)
        print(f"quantised to {quantize} by llama-quantize", end="")
        if served:
            difference = np.abs(ollama.served_once(folder, label_tokens, texts) - expected).mean()
            print(f": label probabilities differ from training's by {difference:.4f} on average", end="")
        print("\nthe calibration was fitted before that, so the service answers `calibrated: false` until")
        print("`python -m train --evaluate-only` has fitted it to what is served, and says what quantising costs")
    shutil.rmtree(folder / "merged", ignore_errors=True)


def check_served(
    folder: Path, maker: str, label_tokens: tuple[str, ...], texts: list[str], expected: np.ndarray
) -> None:
    """Refuse a model.gguf that Ollama reads otherwise than training did. maker: what made it."""
    try:
        difference = np.abs(ollama.served_once(folder, label_tokens, texts) - expected).mean()
    except ollama.OllamaError as error:
        print(f"{maker}: {error}")
        difference = np.inf
    if difference <= SERVED_TOLERANCE:
        print(f"served by Ollama, label probabilities differ from training's by {difference:.4f} on average")
        return
    if np.isfinite(difference):
        print(f"{maker}: Ollama serves other probabilities than training saw, by {difference:.2f} on average")
    raise UserError(
        f"no model.gguf serves what was trained: this base's weights or tokens are read otherwise. {folder} "
        "keeps what was trained; give the base as a .gguf, or a llama.cpp checkout: UNSLOTH_LLAMA_CPP_PATH"
    )


def evaluate(folder: Path, settings: Settings) -> None:
    """Measure a finished run: on its own comments, adding to its folder, or on other rows (--test-dataset)."""
    run = runs.read_settings(folder)
    trained = Settings.of(run["settings"])
    splits = stored_splits(folder, run, trained)
    engine, predict = ("as_served", predict_as_served) if settings.engine == "ollama" else ("torch", predict_by_torch)
    if settings.test_dataset:
        return evaluate_other(folder, run, splits, settings, engine, predict)
    splits["functional"] = checks.load(settings.functional)
    for name in ("validation", "test", "functional"):
        probabilities, origin = predict(folder, run, splits[name]["text"].tolist())
        recording.record(folder, splits, name, engine, probabilities, **origin)
    recording.write_report(folder, splits, engine, checks.read_gates(settings.gate or checks.GATES))
    print((folder / "report.txt").read_text())
    print("\n".join(checks.sentence(result) for result in recording.read_metrics(folder)["gates"][engine]))
    if settings.gate and not all(result["passed"] for result in recording.read_metrics(folder)["gates"][engine]):
        raise UserError(f"{settings.gate} asks for more than this run reaches")


def evaluate_other(folder: Path, run: dict, splits: dict, settings: Settings, engine: str, predict) -> None:
    """Measure a finished run on rows of its own user, without those it was trained on."""
    comments = data.comments(data.read(settings.test_dataset)).frame
    test, seen = data.without(comments, splits["train"])
    print(f"{settings.test_dataset}: {len(test)} comments; {seen} left out, being like one of training")
    if settings.annotations:
        test = data.with_annotations(test, data.read(settings.annotations))
    probabilities, origin = predict(folder, run, test["text"].tolist())
    answered = np.isfinite(probabilities).all(axis=1)
    if not answered.all():
        print(f"{(~answered).sum()} left out: the service refuses them (too long, or with a NUL)")
    test, probabilities = test[answered].reset_index(drop=True), probabilities[answered]
    fitted = calibration.Calibration.load(folder / "calibration.json")
    calibrated = fitted.apply(probabilities)
    measured = {engine: evaluation.measure(test, calibrated, fitted.expected(calibrated))}
    rows = evaluation.groups(test, calibrated)
    print(evaluation.report(test, calibrated), evaluation.table(measured), evaluation.groups_table(rows), sep="\n\n")
    path = folder / "evaluations" / f"{Path(settings.test_dataset).stem}.json"
    path.parent.mkdir(exist_ok=True)
    about = {"dataset": Path(settings.test_dataset).name, "commit": recording.commit()}
    about |= {"left_out": seen, "refused": int((~answered).sum())}
    runs.write_json(path, about | {engine: origin | measured[engine], f"{engine}_by_group": rows})
    print(f"\nstored in {path}")


def stored_splits(folder: Path, run: dict, trained: Settings) -> dict[str, pd.DataFrame]:
    """The comments of a run's splits.json, as its data sets hold them now; of train those that are still at hand.

    Raises UserError where the validation or test comments are not what they were.
    """
    sources = [source for source in (trained.dataset, trained.test_dataset) if source]
    others = [source for source in trained.also if Path(source).exists()]
    pool = pd.concat([data.comments(data.read(source)).frame for source in (*others, *sources)])
    pool = pool.drop_duplicates("comment_id", keep="last").set_index("comment_id", drop=False)
    splits = {}
    for name, ids in recording.read_splits(folder).items():
        splits[name] = pool.loc[[each for each in ids if each in pool.index]].reset_index(drop=True)
        if name != "train" and data.fingerprint(splits[name]) != run["data"]["sha256"][name]:
            raise UserError(
                f"{' or '.join(sources)} has changed since {folder} was trained: its {name} comments differ"
            )
    if trained.annotations:
        splits["test"] = data.with_annotations(splits["test"], data.read(trained.annotations))
    return splits


def predict_as_served(folder: Path, run: dict, texts: list[str]) -> tuple[np.ndarray, dict]:
    """(n, 3) label probabilities as users get them, quantisation and all, and where they are from; NaN for a text that
    the service refuses."""
    from tqdm.auto import tqdm

    server = ollama.Ollama(os.environ.get("OLLAMA_HOST", ""), runs.model_name(folder), tuple(run["label_tokens"]), 60)
    probabilities = np.full((len(texts), 3), np.nan)
    try:
        origin = {"ollama": server.version(), "digest": server.digest(), "model_sha256": server.weights_sha256()}
        for row, text in enumerate(tqdm(texts, desc="asking Ollama", unit="comment")):
            if "\0" in text:
                continue
            try:
                probabilities[row] = server.classify(text).probabilities
            except ollama.TextTooLong:
                continue
        return probabilities, origin
    except ollama.OllamaError as error:
        raise UserError(f"{error} (MODEL_DIR={folder} ./bootstrap.sh starts it)") from error


def predict_by_torch(folder: Path, run: dict, texts: list[str]) -> tuple[np.ndarray, dict]:
    """The same by torch, from the run's adapter, or where it was shipped without, from its merged model.gguf."""
    adapter, merged, settings = folder / "adapter", folder / "model.gguf", Settings.of(run["settings"])
    if not adapter.exists() and not merged.exists():
        raise UserError(f"{folder} holds neither adapter/ nor model.gguf: MODEL_DIR={folder} ./bootstrap.sh makes one")
    base = settings.model if adapter.exists() else str(merged)
    tuning.check_base(base)
    tokenizer = tokens.load_tokenizer(base)
    lora = {"rank": settings.rank, "alpha": settings.alpha, "seed": 0}
    classifier = tuning.load(base, tokenizer, **lora, adapter=adapter if adapter.exists() else None)
    return tuning.label_probabilities(classifier, tokens.encode(tokenizer, texts)), {"hardware": tuning.hardware()}


def parse(arguments: list[str] | None = None) -> Settings:
    # Blank lines between: tyro would join the commands to one paragraph.
    return tyro.cli(Settings, args=arguments, description=__doc__.replace("\n", "\n\n"))


if __name__ == "__main__":
    try:
        main(parse())
    except (UserError, ollama.OllamaError) as error:
        sys.exit(f"train: {error}")
    except KeyboardInterrupt:
        sys.exit("train: stopped. The same command goes on from the last checkpoint, if training had begun")
