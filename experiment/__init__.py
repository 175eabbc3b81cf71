"""What the three rounds share. `rounds` knows the order of things; the other modules do not know each other."""


class UserError(Exception):
    """Something the person at the keyboard can mend: shown as one line on standard error, exit code 2."""
