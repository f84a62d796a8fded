"""How the project's commands speak of a user's mistake: one message, no traceback, exit status 2."""

import functools
import sys


class UserError(Exception):
    """Something that the user can mend. The message says what was wrong, with what value, and what to do."""


def exits_on_user_error(main):
    """Decorate a command's `main`: a UserError or Ctrl-C becomes a message on stderr and a non-zero exit."""

    @functools.wraps(main)
    def wrapper(*arguments, **keywords):
        try:
            return main(*arguments, **keywords)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper
