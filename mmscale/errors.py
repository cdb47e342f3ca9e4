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

    by_request = False  # by `mmscale stop` or the launcher, rather than by a signal to a rank


class CheckpointError(UserError):
    """A checkpoint can't be written or none can be read. The message names the folder and the file."""

    exit_code = 14


class Diverged(UserError):
    """The loss or the gradients aren't finite, and going back to a checkpoint didn't help."""

    exit_code = 15


class Fenced(UserError):
    """Another attempt has taken the run over, so this one may write no more."""

    exit_code = 17
