"""Hate speech, told from neutral and supportive speech by a language model of your own.

Three wings over one ground floor, and no arrow between wings (pyproject.toml has the contract, a test holds it):

    training/   rows of labelled comments -> a run's folder, results/<run>/          python -m train
    serving/    a run's folder and an Ollama -> an HTTP service, its pages and log   ./bootstrap.sh
    bulk/       a run's folder and files of texts -> the files with answers          hatespeech bulk

classifier.py is for Python: `from hatespeech import Classifier`.

The ground floor: task.py and normal.py (what is asked of a text), tokens.py and packing.py (prompts as a model takes
them), calibration.py and answers.py (what follows from probabilities), tables.py (files of rows), runs.py (a run's
folder), ollama.py and hosts.py (the engine), install.py (a machine that has none of it yet).
"""

import click

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "Classifier":  # imported only where it is asked for
        from hatespeech.classifier import Classifier

        return Classifier
    raise AttributeError(f"module 'hatespeech' has no attribute {name!r}")


class UserError(click.ClickException):
    """Something the user can mend. Its message says what is wrong, where, and what to do next.

    A command that lets it pass prints the message and exits with 1: click does so for its own kind of error.
    """
