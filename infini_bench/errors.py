"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """A mistake in the user's input or machine, told in one sentence that says what to do.

    The command line prints it as ``error: ...`` and exits with code 2; nothing else does.
    """
