"""Whom alarms are told to: the channels of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hvbackup import config
from hvbackup.configuration import NotifySettings
from hvbackup.errors import HvbackupError
from hvbackup.notify import Channel, Mail, Syslog, Webhook


def channels(settings: Mapping[str, NotifySettings]) -> tuple[dict[str, Channel], dict[str, str]]:
    """Every channel that can be used, and why the others can't."""
    made: dict[str, Channel] = {}
    errors: dict[str, str] = {}
    for name, one in settings.items():
        try:
            made[name] = _channel(one)
        except HvbackupError as e:
            errors[name] = str(e)
    return made, errors


def _channel(one: NotifySettings) -> Channel:
    if one.kind == "syslog":
        return Syslog()
    if one.kind == "webhook":
        return Webhook(one.url, _secret(one.secret_file))
    host, _, port = one.server.partition(":")
    port_number = int(port) if port.isdecimal() else 25
    return Mail(host, list(one.to), one.sender, port_number, one.security, one.user, _secret(one.password_file))


def _secret(path: str) -> str:
    return config.read_secret(Path(path), "Secret").strip() if path else ""
