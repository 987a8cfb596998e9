"""The errors a user can cause, each one clear sentence: value, allowed range, remedy."""


class UserError(Exception):
    """Base of every error whose text is meant for the user; printed without a traceback."""


class ConfigError(UserError):
    """A configuration key is unknown, missing, of the wrong type or out of range."""


class DataError(UserError):
    """A data set is missing, malformed or differs from what the configuration states."""


class InfeasibleError(UserError):
    """The privacy budget cannot pay for the configuration; nothing was read or spent."""


class StorageError(UserError):
    """The folder of a run is full, gone or cannot be written: nothing is trained unsaved."""
