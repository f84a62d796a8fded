"""How the project's commands speak of a user's mistake: one message, no traceback, exit status
2."""

import contextlib
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
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


class UserError(Exception):
    """Something that the user can mend. The message says what was wrong, with what value, and what
    to do."""


@contextlib.contextmanager
def explains_out_of_memory(message):
    """Makes a UserError with the message of what says that memory is not enough: an exception of
    Python's, or one of torch's several."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("not enough memory", "allocate memory", "out of memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        raise UserError(f"out of memory {message}") from None


def exits_on_user_error(main):
    """Decorate a command's `main`: a UserError, a full disk, a wrong path, Ctrl-C or an output that
    nobody reads any more becomes a message on stderr and a non-zero exit."""

    @functools.wraps(main)
    def wrapper(*arguments, **keywords):
        # A terminal may know ASCII only: what it lacks is written as an escape.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")
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
            print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        sys.exit(2)

    return wrapper
