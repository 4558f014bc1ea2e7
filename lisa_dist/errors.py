"""The errors that are for users: their message is all that is printed."""


class UserError(ValueError):
    """A setting or a file of the user's that cannot work: the message names it, the rule and the way out."""


class SharedError(UserError):
    """An error that all ranks raise together: rank 0 alone prints it."""
