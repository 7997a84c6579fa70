"""Exceptions that end a command with a message instead of a traceback."""

from collections.abc import Collection


class ConfigError(ValueError):
    """Bad input. The message names the value and the remedy; entry points print it without a traceback, exit
    code 2."""


class Exit(Exception):
    """The message says all there is to say: entry points print it without a traceback and end with `code`."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ConfigError where the value of option `name` is none of the choices."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(choices)}.")
