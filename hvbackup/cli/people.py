"""user, token: who may use the API and the console of the service."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from hvbackup import config
from hvbackup.cli.invocation import now
from hvbackup.cli.output import Out, table
from hvbackup.cli.parser import Verbs, add_shared, add_verb, interactive
from hvbackup.errors import UsageError

if TYPE_CHECKING:
    from hvbackup.auth import Accounts, User

ROLES = ("viewer", "operator", "restorer", "admin")
TEXT = """\
roles:
  viewer     sees machines, points, timelines and jobs
  operator   also captures, pauses, tags, holds, checks
  restorer   also boots, maps and restores
  admin      everything

--machines limits a role to machines: names, patterns, tag:TAG, source:SOURCE, id:ID, !PATTERN.
"""


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    for what, help_ in (("user", "who may log in to the console"), ("token", "what lets programs in to the API")):
        verb = add_verb(verbs, what, help_, epilog=TEXT)
        actions = verb.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=type(verb))
        for name, run in ACTIONS[what].items():
            action = actions.add_parser(name, help=f"{name} a {what}", description=f"{name.capitalize()} a {what}.")
            add_shared(action)
            action.set_defaults(run=run)
            if name == "list":
                continue
            action.add_argument(
                "name", metavar="NAME" if (what, name) != ("token", "remove") else "TOKEN", help=f"the {what}"
            )
            if name == "add":
                action.add_argument("--role", required=True, choices=ROLES, help="what it may do")
                action.add_argument(
                    "--machines", action="append", default=[], metavar="WORD", help="only these machines"
                )
                _add_more(action, what)


def _add_more(action: argparse.ArgumentParser, what: str) -> None:
    if what == "user":
        action.add_argument("--totp", action="store_true", help="with an authenticator's code as a second factor")
        action.add_argument(
            "--single-sign-on",
            action="store_true",
            help="no password: the [provider] of the configuration says who it is",
        )
        action.add_argument(
            "--password-file", metavar="FILE", help="the password; - for standard input (default: it is asked for)"
        )
    else:
        action.add_argument("--expires", default="90d", metavar="TIME", help="after so long (default: 90d; 0: never)")


def _accounts(args: argparse.Namespace) -> Accounts:
    from hvbackup.auth import Accounts

    return Accounts(config.private(config.places(args.store).configuration), now)


def user_add(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup user add NAME --role ROLE`."""
    import socket

    from hvbackup.auth import Role, totp_uri

    made = _accounts(args).add_user(args.name, Role(args.role), args.machines, _password(args), totp=args.totp)
    uri = totp_uri(made, socket.gethostname()) if made.totp else None
    lines = [f"{made.name} is {made.role} of {', '.join(made.machines)}"]
    lines += [f"For an authenticator, shown once: {uri}"] if uri else []
    out.answer({"user": {"name": made.name, "role": made.role, "machines": made.machines}, "totp": uri}, lines)
    return 0


def _password(args: argparse.Namespace) -> str | None:
    if args.single_sign_on:
        if args.password_file:
            raise UsageError("Whoever comes in by single sign-on has no password here; leave out --password-file")
        return None
    if args.password_file == "-":
        return sys.stdin.readline().rstrip("\n")
    if args.password_file:
        from pathlib import Path

        return config.read_secret(Path(args.password_file), "Password file").rstrip("\n")
    if not interactive():
        raise UsageError("Nobody is there to type a password; use --password-file FILE")
    import getpass

    first = getpass.getpass("Password: ")
    if first != getpass.getpass("The same once more: "):
        raise UsageError("The two passwords differ; nothing was changed")
    return first


def user_list(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup user list`."""
    found = _accounts(args).users()
    shown = [
        {
            "name": u.name,
            "role": u.role,
            "machines": u.machines,
            "second_factor": bool(u.totp),
            "single_sign_on": u.signs_on,
        }
        for u in found
    ]
    rows = [(u.name, u.role, ", ".join(u.machines), _factor(u)) for u in found]
    out.answer({"users": shown}, table(("NAME", "ROLE", "MACHINES", "SECOND FACTOR"), rows))
    return 0


def _factor(user: User) -> str:
    return "the provider's" if user.signs_on else "yes" if user.totp else "no"


def user_remove(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup user remove NAME`."""
    _accounts(args).remove_user(args.name)
    out.answer({"removed": args.name}, [f"{args.name} can't log in any more"])
    return 0


def token_add(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup token add NAME --role ROLE`."""
    from hvbackup.auth import Role
    from hvbackup.schedule import stretch

    lasts = 0 if args.expires == "0" else stretch(args.expires)
    made, text = _accounts(args).add_token(args.name, Role(args.role), args.machines, lasts)
    shown: dict[str, Any] = {"id": made.id, "name": made.name, "role": made.role, "machines": made.machines}
    lines = (
        [text]
        if args.quiet
        else [f"Token {made.id} of {made.name}; it is shown once and kept nowhere:", "", f"    {text}", ""]
    )
    if args.quiet and not args.json:
        print(text)
        return 0
    out.answer({**shown, "token": text}, lines)
    return 0


def token_list(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup token list`."""
    from hvbackup.model import Instant
    from hvbackup.moments import local, rfc3339

    found = _accounts(args).tokens()
    shown = [
        {"id": t.id, "name": t.name, "role": t.role, "machines": t.machines,
         "expires": rfc3339(Instant(t.expires)) if t.expires else None}
        for t in found
    ]  # fmt: skip
    rows = [
        (t.id, t.name, t.role, ", ".join(t.machines), local(Instant(t.expires)) if t.expires else "never")
        for t in found
    ]
    out.answer({"tokens": shown}, table(("TOKEN", "NAME", "ROLE", "MACHINES", "EXPIRES"), rows))
    return 0


def token_remove(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup token remove TOKEN`."""
    _accounts(args).remove_token(args.name)
    out.answer({"removed": args.name}, [f"Token {args.name} opens nothing any more"])
    return 0


ACTIONS = {
    "user": {"add": user_add, "list": user_list, "remove": user_remove},
    "token": {"add": token_add, "list": token_list, "remove": token_remove},
}
