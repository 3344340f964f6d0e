"""Parameter-efficient fine-tuning of causal language models, in which every step proves what it did."""


class UserError(Exception):
    """A mistake that the user can mend: shown as one message that says where, what, and what to write instead."""

    status = 2
    """Exit status of the command."""
