"""Public classes of other people's packages, made smaller as a user does it: ``make packages``."""
