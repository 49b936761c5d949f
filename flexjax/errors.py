"""One exception class per exit code: what a user, a shell script or a scheduler can act on.

A message is one line that names the file, expert, key or step, what was expected, what came, and what to do. It never
quotes training text. Anything that is not a `FlexjaxError` is a bug of ours and keeps its traceback.
"""


class FlexjaxError(Exception):
    """Base class; `exit_code` is what the process returns."""

    exit_code = 1

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class ConfigError(FlexjaxError):
    """A flag, a config field or a combination of them cannot be used."""

    exit_code = 2


class DataError(FlexjaxError):
    """A corpus, document or token file cannot be read as declared."""

    exit_code = 3


class IntegrityError(FlexjaxError):
    """Bytes, shapes or digests are not those that were declared."""

    exit_code = 4


class PolicyError(FlexjaxError):
    """A request names or needs something that it may not use."""

    exit_code = 5


class StorageError(FlexjaxError):
    """A directory cannot be read, written or locked."""

    exit_code = 6


class NumericError(FlexjaxError):
    """Training does not produce finite numbers any more."""

    exit_code = 7


class Preempted(FlexjaxError):
    """The run was asked to stop, saved its state, and continues when started again."""

    exit_code = 75
