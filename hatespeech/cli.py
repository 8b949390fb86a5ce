"""The one command for all there is: `hatespeech --help`. It stands above the wings, as train.py and app.py do."""

import os
import sys
from pathlib import Path

import click
from flask.cli import ScriptInfo

from hatespeech import __version__
from hatespeech.serving import commands


def served(serves: bool = True):
    """app.py's app, whatever else is called app.py in the folder that the command was given in."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from app import create_app

    return create_app(serves=serves)


@click.group(
    context_settings={"obj": ScriptInfo(create_app=lambda: served(serves=False)), "help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="hatespeech")
def main() -> None:
    """Tell Hate, Neutral and Supportive texts apart, with a model of your own.

    \b
    echo 'some text' | hatespeech classify             a label for each line
    hatespeech classify comments.txt --jsonl           an answer with probabilities for each line
    hatespeech classify comments.csv classified.csv    a table's rows, with columns added
    hatespeech doctor                                  what is installed and served, what is wrong, how to mend it

    Settings are those of ./bootstrap.sh --help, from the environment. Whatever is classified is in the service's log.
    Completion in your shell: eval "$(_HATESPEECH_COMPLETE=bash_source hatespeech)", or zsh_source, fish_source.
    """


for command in (commands.classify, commands.feedback, commands.replay, commands.purge, commands.keys):
    main.add_command(command)


@main.command()
@click.option("--host", default="127.0.0.1", envvar="HOST", show_default=True, help="Off loopback it demands API keys.")
@click.option("--port", default=5000, envvar="PORT", show_default=True, type=click.IntRange(1, 65535))
def serve(host: str, port: int) -> None:
    """Serve, where ./bootstrap.sh has set all up and an Ollama answers."""
    os.environ["HOST"] = host = host or "127.0.0.1"
    served()  # what is wrong with a setting is said in one line, before gunicorn starts
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    config = ["--config", "python:hatespeech.serving.gunicorn_conf", "--bind", address]
    # With -P and this package imported first, nothing in the folder of the caller takes the place of a module.
    start = "import sys, hatespeech.cli; sys.argv[0] = 'gunicorn'; from gunicorn.app.wsgiapp import run; run()"
    os.execv(sys.executable, [sys.executable, "-P", "-c", start, *config, "hatespeech.cli:served()"])


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bulk(arguments: tuple[str, ...]) -> None:
    """Classify millions of texts with all cores, GPUs and machines. `hatespeech bulk --help` has its options."""
    from hatespeech.bulk import job

    job.main(list(arguments))


@main.command()
def doctor() -> None:
    """Say what is installed, which model is served by which engine, what is wrong, and how to mend it."""
    from hatespeech.doctor import findings

    wrong = 0
    for finding in findings():
        wrong += not finding.fine
        click.echo(f"{'ok   ' if finding.fine else 'WRONG'}  {finding.what}")
        if finding.remedy:
            click.echo(f"       -> {finding.remedy}")
    if wrong:
        raise click.ClickException(f"{wrong} to be mended")


if __name__ == "__main__":
    main()
