"""The category of this client's warnings. Apart from the checks, so that silencing them needs no nnsight."""


class SurpriseWarning(UserWarning):
    """A block does something that comes out otherwise when it runs elsewhere."""
