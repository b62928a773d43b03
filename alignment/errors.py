"""Errors that are the user's to mend: shown as a message without a traceback, exit code 2."""


class AlignError(Exception):
    """A mistake in the input. The message says what is wrong, where, what was found and what to do."""


class ConfigError(AlignError):
    """A configuration file or a `key=value` argument is wrong."""


class DataError(AlignError):
    """A data file or one of its rows is wrong."""


class ModelError(AlignError):
    """A model, tokenizer or chat template cannot be used as asked."""


class TemplateRefusal(ModelError, DataError):
    """A chat template cannot write the turns of a row: either can be changed."""


class RunError(AlignError):
    """A run directory is in a state that the command must not change."""


class TrainingError(AlignError):
    """Training went where no number can be used."""


class SamplerError(AlignError):
    """A sampling engine cannot be started, or broke down."""
