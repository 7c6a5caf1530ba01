"""The errors gossamer raises: each message names the place, the value received, what is allowed and the remedy."""


def reason(error: BaseException) -> str:
    """What an error of another library says: its first line, with the class where that alone would say too little."""
    first = next(iter(str(error).strip().splitlines()), "")
    if first and not isinstance(error, LookupError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class GossamerError(Exception):
    """Base of every error that gossamer raises on purpose."""


class ConfigurationError(GossamerError, ValueError):
    """An argument, a recipe or a selection of tensors that cannot work; nothing has been changed."""


class OrderError(GossamerError, RuntimeError):
    """Calls that came in an order that would leave masks unenforced; the message states the right order."""


class StateError(GossamerError, ValueError):
    """A saved state or a file that is missing, damaged, or does not match what it is for; nothing has been changed."""


class DataError(GossamerError, RuntimeError):
    """A data set that is missing, incomplete or damaged; the message names the file and how to get it."""


class NonFiniteError(GossamerError, ArithmeticError):
    """A score that is NaN: training has diverged, and a ranking of such scores would mean nothing."""
