"""What AWS's own tools would use: the keys, region and endpoint of a profile.

The library behind `objects` reads the environment variables, and asks the machine that it runs on
where that is Amazon's, but no profiles.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from merge_kit.errors import HubError

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_OTHER_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
"""Where one of these is set, a profile's keys are not wanted."""
_STATIC = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_BORROWED = ("sso_session", "sso_start_url", "credential_process", "role_arn", "login_session")
"""What a profile says whose keys another program must fetch."""


def settings() -> dict[str, str]:
    """Settings for an S3 store that the library would not find itself; variables come first.

    Raises
    ------
    HubError
        The profile that AWS_PROFILE names is not there, holds no keys of its own, or its file
        cannot be read; or half of the keys is set.
    """
    if bool(os.environ.get("AWS_ACCESS_KEY_ID")) != bool(os.environ.get("AWS_SECRET_ACCESS_KEY")):
        raise HubError(
            "of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY only one is set: set both, or neither."
        )
    found: dict[str, str] = {}
    for name in ENDPOINTS:
        if value := os.environ.get(name):
            found.setdefault("endpoint", value)
    profile = _profile()
    if not any(os.environ.get(name) for name in _OTHER_KEYS):
        found |= _keys(profile)
    if "region" in profile and not any(os.environ.get(name) for name in _REGIONS):
        found["region"] = profile["region"]
    if "endpoint_url" in profile:
        found.setdefault("endpoint", profile["endpoint_url"])
    return found


def _keys(profile: Mapping[str, str]) -> dict[str, str]:
    found = {ours: profile[theirs] for theirs, ours in _STATIC.items() if theirs in profile}
    if not found and (how := next((name for name in _BORROWED if name in profile), None)):
        name = _name() or "default"
        raise HubError(
            f"the AWS profile '{name}' holds no keys of its own but '{how}': set them for this "
            f"shell with eval \"$(aws configure export-credentials --profile '{name}' "
            '--format env)".'
        )
    return found


def _name() -> str | None:
    return os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")


def _profile() -> dict[str, str]:
    """What the files say of the profile; keys in the credentials file win."""
    name = _name()
    files = {
        _path("AWS_CONFIG_FILE", "config"): "default" if not name else f"profile {name}",
        _path("AWS_SHARED_CREDENTIALS_FILE", "credentials"): name or "default",
    }
    found: dict[str, str] = {}
    there = False
    for path, section in files.items():
        parser = _read(path)
        for wanted in (section, name or "default"):
            if parser.has_section(wanted):
                there = True
                found |= dict(parser.items(wanted))
                break
    if name and not there:
        places = " or ".join(map(str, files))
        raise HubError(f"there is no AWS profile '{name}' in {places}: check AWS_PROFILE.")
    return found


def _path(variable: str, name: str) -> Path:
    return Path(os.environ.get(variable) or Path("~/.aws") / name).expanduser()


def _read(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(default_section="no section is the default of others")
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError, configparser.Error):
        # What the parser says of a line would show what stands in it.
        raise HubError(f"{path} cannot be read as a file of AWS profiles: correct it.") from None
    return parser
