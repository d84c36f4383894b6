"""The one exception whose text is written for the user."""


class UserError(Exception):
    """Bad input. The text is one line: what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2. Anything that a user can cause (a file, a
    key, a value, a missing device) raises this; every other exception is a bug and keeps its traceback.
    """
