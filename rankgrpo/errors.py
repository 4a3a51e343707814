"""What a user can have done wrong, or met, and can mend: every such error stands under `UserError`.

The command line prints a UserError as one message; any other exception is a defect of the program and shows its
traceback. Errors about given values are ValueErrors too, for callers that catch those.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_SHOWN_PROBLEMS = 20


class UserError(Exception):
    """The message says what is wrong, where, and what to do."""


class ConfigError(UserError, ValueError):
    """A configuration cannot be used; the message names the source, the key and the choices."""


class DataError(UserError, ValueError):
    """Input data are bad. The message shows the first problems; `problems` holds all, as `file:line: message`."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        shown = self.problems[:MAX_SHOWN_PROBLEMS]
        hidden = len(self.problems) - len(shown)
        tail = [f"  and {hidden} more"] if hidden else []
        super().__init__("\n".join([message, *(f"  {problem}" for problem in shown), *tail]))


class ModelError(UserError, ValueError):
    """A model is not known, not there or not usable; the message says how to name a right one."""


class EndpointError(UserError, ValueError):
    """An OpenAI-compatible endpoint cannot be used."""


class EncoderError(UserError, ValueError):
    """A text encoder cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be resumed from."""


class SaveError(UserError, RuntimeError):
    """Something could not be written; what was saved before is untouched."""


class BusyError(UserError, RuntimeError):
    """Another process works where this one was to."""


class ParallelError(UserError, RuntimeError):
    """The processes of a run cannot work together; the message says what to do."""


class SamplingError(UserError, RuntimeError):
    """The model cannot be sampled from."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says where and what to do.

    everywhere: every process of the run raises the same error, so that one of them is enough to print it.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        self.everywhere = everywhere
        super().__init__(message)
