"""What training (train.py) and serving (app.py) share: one module a concern, none imports leftwards.

data -> tuning -> calibration -> evaluation -> export -> results/<run>/ -> ollama -> app -> store -> reporting
"""

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can mend. Its message says what is wrong, where, and what to do next."""
