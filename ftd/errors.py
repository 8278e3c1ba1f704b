"""The two ways a run can go wrong that are not bugs."""


class UserError(ValueError):
    """The input is wrong: the message gives the rule, the value and the remedy on one line.

    Whatever a user wrote may stand in it: line breaks and the like are shown as escapes.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class Diverged(ArithmeticError):
    """A training cannot go on: a loss is not finite, or a learning rate left (0, inf)."""
