"""The one exception that means: the user can put this right."""


class ConfigError(ValueError):
    """Bad input. The message names the value and the remedy; entry points print it without a traceback, exit
    code 2."""
