"""The command `kvpaging`: serve, config, doctor, bench, plan, replay, version.

Imports little, so that the engine process is started before anything slow is imported.
Exit codes: 0 well, 1 the engine crashed for good, 2 something that was asked for can't be done.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from kvpaging.base.errors import ConfigError
from server.settings import FlagParser, Resolved, add_flags, did_you_mean, resolve

COMMANDS = {
    "serve": "serve a model over HTTP",
    "config": "print the resolved settings and where each came from",
    "doctor": "say what this machine can do, and what is missing",
    "bench": "measure how long steps take on this machine, for plan",
    "plan": "what to expect of a model, memory, device and trace",
    "replay": "run a trace through the cache, or the scheduler, without a model",
    "version": "print the version",
}
USAGE = "\n".join(
    [
        "usage: kvpaging COMMAND [FLAGS]",
        "",
        "A paged KV-cache inference server for large language models.",
        "",
        *(f"  {name:<8}  {what}" for name, what in COMMANDS.items()),
        "",
        "'kvpaging serve --help' lists every setting. Try: kvpaging serve",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's) names; give the exit code."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        match command:
            case "-h" | "--help" | "help":
                print(USAGE)
            case "version" | "--version":
                _parser("version").parse(rest)
                print(_version())
            case "serve":
                if argv is None:  # else signals are the caller's; from here on 0 is right
                    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
                return _serve(_resolved("serve", rest))
            case "config":
                print("\n".join(_resolved("config", rest).lines()))
            case "doctor":
                _parser("doctor").parse(rest)
                return _doctor()
            case "bench":
                _bench(rest)
            case "plan":
                _plan(rest)
            case "replay":
                _replay(rest)
            case _:
                hint = did_you_mean(command, COMMANDS)
                raise ConfigError(f"{command!r} is not a command{hint}\n{USAGE}")
    except ConfigError as error:
        print(f"kvpaging: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser(command: str) -> FlagParser:
    return FlagParser(f"kvpaging {command}", COMMANDS[command])


def _resolved(command: str, argv: Sequence[str]) -> Resolved:
    parser = _parser(command)
    add_flags(parser)
    return resolve(vars(parser.parse(argv)), os.environ)


def _serve(resolved: Resolved) -> int:
    from server.launch import serve

    for warning in resolved.warnings():
        print(f"kvpaging: {warning}", file=sys.stderr)
    return serve(resolved.settings)


def _doctor() -> int:
    from server.doctor import examine  # imports torch

    print("\n".join(examine()))
    return 0


def _bench(argv: Sequence[str]) -> None:
    from server import plan

    parser = _parser("bench")
    plan.add_bench_flags(parser)
    for line in plan.bench(parser.parse(argv)):
        print(line, flush=True)


def _plan(argv: Sequence[str]) -> None:
    from server import plan

    parser = _parser("plan")
    plan.add_plan_flags(parser)
    for line in plan.plan(parser.parse(argv)):
        print(line, flush=True)


def _replay(argv: Sequence[str]) -> None:
    from server import replay

    parser = _parser("replay")
    replay.add_flags(parser)
    for line in replay.replay(parser.parse(argv)):
        print(line, flush=True)


def _version() -> str:
    from importlib.metadata import version

    return version("kvpaging")
