"""Every error that a user of the pass can meet. Each message says what is wrong and what to do."""

from torch._dynamo.exc import ShortenTraceback


class FgtpError(ShortenTraceback):
    """Base of all errors raised by fgtp_pass.

    Dynamo wraps what a backend raises in BackendCompilerFailed, except for errors of this class
    of its own, so that `except ConfigError` works around a compiled call.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args, first_useful_frame=None)


class ConfigError(FgtpError, ValueError):
    """The options or the `finegrained_tp_config` are wrong; raised before any weight is touched."""


class DetectionError(FgtpError, ValueError):
    """A requested component has no site in the model, or its weights cannot be cut as asked."""


class CheckpointError(FgtpError, ValueError):
    """A checkpoint is missing, damaged, or of another model; no weight of it is in force."""


class AgreementError(FgtpError):
    """The ranks of a group do not agree, or one of them failed; names the rank and its reason.

    shared: all of them raise it. away: at least one of them could not be reached.
    """

    def __init__(self, message: str, *, shared: bool = False, away: bool = False):
        super().__init__(message)
        self.shared, self.away = shared, away


class TokenCountError(FgtpError):
    """`tokens="equal"` was promised, but the ranks of a group came with different token counts."""


class ShardedWeightError(FgtpError):
    """A weight that is in force as shards was read or changed as if it were whole."""


class InferenceOnlyError(FgtpError):
    """The model was compiled with gradients enabled."""


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of what it says; a bare assert says nothing."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
