"""The errors a user meets, each with the exit code the command line gives it.

Anything else that escapes is a defect of mmscale (or of the user's own code) and exits with 1 and a traceback.
"""


class UserError(ValueError):
    """A mistake that one clear message explains; shown without a traceback."""

    exit_code = 1
    is_told_by_another = False  # of several ranks that agreed on the error, one shows it


class ConfigError(UserError):
    """The configuration or the command is wrong. The message lists every problem found."""

    exit_code = 2


class DataError(UserError):
    """The data can't be used. The message names shard, key and field where there are any."""

    exit_code = 3


class Preempted(UserError):
    """Stopped early on request, with a checkpoint from which the same command resumes."""

    exit_code = 75
