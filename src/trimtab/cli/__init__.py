"""The command line. Everything heavy is imported only by the command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from trimtab import __version__, memory
from trimtab.cli.commands import COMMANDS, TOOLS, load
from trimtab.cli.output import help_of, overview
from trimtab.cli.recipes import run
from trimtab.errors import ConfigError, TrimtabError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 well, 2 an error the user can mend, 130 interrupted)."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(argv)
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        print(f"error: {memory.shortage(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupted:
        print("interrupted; what was written so far is kept, and `trimtab resume` goes on with it", file=sys.stderr)
        return 128 + getattr(interrupted, "signal", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"trimtab {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    wants_help = any(word in ("-h", "--help") for word in rest)
    if name in TOOLS:
        if wants_help:
            print(f"trimtab {name}: {TOOLS[name].what}")
            return 0
        status: int = load(TOOLS[name].run)(rest)
        return status
    if name not in COMMANDS:
        raise _unknown(name)
    if wants_help:
        help_of(name)
        return 0
    return run(name, rest)


def _unknown(name: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(name, [*COMMANDS, *TOOLS], n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"commands are: {', '.join([*COMMANDS, *TOOLS])}"
    return ConfigError(f"there is no command {name!r}", where="command line", fix=fix)
