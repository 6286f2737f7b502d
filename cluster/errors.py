"""What an operator reads when something is wrong: one line with the setting or row, its value and the way out."""


class CappyError(Exception):
    """A failure the operator can act on. Exit code 1.

    Takes one positional message: Ray pickles exceptions by their `args`, and a second argument would not survive.
    """

    exit_code = 1


class UsageError(CappyError):
    """The command, a setting or an input cannot work as given. Exit code 2."""

    exit_code = 2


class Stopped(CappyError):
    """The run was told to stop and did so in good order; the same command goes on. Exit code 143, that of SIGTERM."""

    exit_code = 143
