"""Flags of the project's commands: what each takes, what it may be, what --help says of it."""

import argparse
import dataclasses
import difflib
import math
import os

from errors import UserError


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag.

    Its default (a bool, int, float or string) decides what it takes: 1.0, not 1, for a number that
    may be 0.5. Where the default is None, `kind` does. Values are one of `choices`, or from
    `minimum` to `maximum`, both included.
    """

    default: object
    help: str
    choices: tuple = ()
    minimum: float = -math.inf
    maximum: float = math.inf
    kind: type = None

    def __post_init__(self):
        object.__setattr__(self, "kind", self.kind or type(self.default))

    @property
    def limits(self):
        """What a number may be, in words."""
        if math.isfinite(self.maximum):
            least = f"from {self.minimum} to " if math.isfinite(self.minimum) else "at most "
            return f"{least}{self.maximum}"
        return f"at least {self.minimum}" if math.isfinite(self.minimum) else ""

    def check(self, name, value):
        """Raises UserError for a value outside the limits, not finite, or empty."""
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value}: expected a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(
                f"--{name}={str(value)[:9]}...: expected a number between -2^63 and 2^63"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not self.minimum <= value <= self.maximum:
            raise UserError(f"--{name}={value}: expected a number, {self.limits}")
        if value == "" and self.default is None:
            raise UserError(f"--{name}=: it is empty")

    def parse(self, name, text):
        """The value that a text says; ~ at its beginning is the user's folder."""
        text = os.path.expanduser(text)
        try:
            value = boolean(text) if self.kind is bool else self.kind(text)
        except ValueError:
            kinds = {bool: "true or false", int: "a whole number", float: "a number"}
            raise UserError(f"--{name}={text}: expected {kinds[self.kind]}") from None
        self.check(name, value)
        return value


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


class Parser(argparse.ArgumentParser):
    """An argparse parser of Options. Its complaints are UserErrors, a flag that it does not know is
    answered with the nearest one, and a docstring is shown as it is written."""

    def __init__(self, **arguments):
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=kind, allow_abbrev=False, **arguments)

    def add(self, name, option, group=None):
        """One flag; --help says its meaning, its default and its limits."""
        default = str(option.default).lower() if option.kind is bool else str(option.default)
        notes = [default] * (option.default not in (None, ""))
        notes += [option.limits] * bool(option.limits)
        text = option.help + f" ({'; '.join(notes)})" * bool(notes)
        (group or self).add_argument(
            f"--{name}",
            default=self.argument_default or option.default,
            type=lambda text: option.parse(name, text),
            choices=option.choices or None,
            metavar=None if option.choices else option.kind.__name__.upper(),
            help=text.replace("%", "%%"),
            **dict(nargs="?", const=True) if option.kind is bool else {},  # --yes is --yes=true
        )

    def parse_args(self, arguments=None, namespace=None):
        typed, unknown = self.parse_known_args(arguments, namespace)
        if not unknown:
            return typed
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"{flag!r} is not a flag; flags are written --name=value")
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists what there is"
        raise UserError(f"unknown flag {flag}; {hint}")

    def error(self, message):
        raise UserError(f"{message}; --help lists what there is")
