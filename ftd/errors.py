"""The two ways a run can go wrong that are not bugs."""


class UserError(ValueError):
    """The input is wrong: the message gives the rule, the value and the remedy on one line."""


class Diverged(ArithmeticError):
    """A training cannot go on: a loss is not finite, or a learning rate left (0, inf)."""
