"""How the project's commands speak of a user's mistake: one message, no traceback, exit status
2."""

import argparse
import errno
import functools
import os
import sys

# What the file system says when a path is wrong, closed to us, taken, or on a full disk.
OF_THE_FILE_SYSTEM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}


class UserError(Exception):
    """Something that the user can mend. The message says what was wrong, with what value, and what
    to do."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are UserErrors; it shows a docstring as it is written."""

    def __init__(self, **options):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def error(self, message):
        raise UserError(f"{message}; --help lists what there is")


def exits_on_user_error(main):
    """Decorate a command's `main`: a UserError, a full disk, a wrong path, Ctrl-C or an output that
    nobody reads any more becomes a message on stderr and a non-zero exit."""

    @functools.wraps(main)
    def wrapper(*arguments, **keywords):
        try:
            returned = main(*arguments, **keywords)
            sys.stdout.flush()  # or a closed pipe is noticed only at the interpreter's end
            return returned
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except BrokenPipeError:
            try:
                print(flush=True)
            except BrokenPipeError:  # it is our own output's, not some other pipe's
                print(
                    "ended: nobody reads the output any more (as after `| head`)", file=sys.stderr
                )
                # What is left to flush goes nowhere.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            raise
        except OSError as error:
            if error.errno not in OF_THE_FILE_SYSTEM:
                raise
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        sys.exit(2)

    return wrapper
