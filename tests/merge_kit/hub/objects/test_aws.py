"""What is taken from AWS's own files, and what from the environment."""

from __future__ import annotations

import traceback

import pytest

from merge_kit.errors import HubError
from merge_kit.hub import aws
from tests.merge_kit.helpers import says
from tests.merge_kit.hub.contract import FILE
from tests.merge_kit.hub.objects.conftest import SECRET


@pytest.fixture
def files(surroundings, tmp_path, monkeypatch):
    """Write a config and a credentials file; no keys are in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    def write(config="", credentials=""):
        for name, text in (("CONFIG_FILE", config), ("SHARED_CREDENTIALS_FILE", credentials)):
            path = tmp_path / name.lower()
            path.write_text(text)
            monkeypatch.setenv(f"AWS_{name}", str(path))

    return write


KEYS = "aws_access_key_id = me\naws_secret_access_key = hush\n"


def test_without_files_nothing_is_set(files):
    assert aws.settings() == {}


def test_the_default_profile_is_read_from_both_files(files):
    files("[default]\nregion = eu-west-3\ns3 =\n  addressing_style = path\n", f"[default]\n{KEYS}")
    assert aws.settings() == {
        "access_key_id": "me", "secret_access_key": "hush", "region": "eu-west-3"
    }  # fmt: skip


@pytest.mark.parametrize("variable", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
def test_a_profile_is_chosen_by_its_name(files, monkeypatch, variable):
    monkeypatch.setenv(variable, "lab")
    files(
        "[default]\nregion = x\n[profile lab]\nendpoint_url = https://minio.lab\n",
        f"[default]\n{KEYS}[lab]\naws_access_key_id = it\naws_secret_access_key = sh\n"
        "aws_session_token = once\n",
    )
    assert aws.settings() == {
        "access_key_id": "it", "secret_access_key": "sh", "session_token": "once",
        "endpoint": "https://minio.lab",
    }  # fmt: skip


def test_variables_come_first(files, monkeypatch):
    files(f"[default]\nregion = x\nendpoint_url = https://elsewhere\n{KEYS}", f"[default]\n{KEYS}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")  # the library reads the keys itself
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://there")
    assert aws.settings() == {"endpoint": "https://there"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://here")
    assert aws.settings() == {"endpoint": "https://here"}


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_half_of_the_keys_is_named(files, monkeypatch, name):
    monkeypatch.setenv(name, "half")
    with says(
        HubError,
        "of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY only one is set: set both, or neither.",
    ):
        aws.settings()


def test_a_profile_that_is_not_there_is_named(files, monkeypatch, tmp_path):
    files(credentials=f"[default]\n{KEYS}")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with says(
        HubError,
        f"there is no AWS profile 'lab' in {tmp_path}/config_file or "
        f"{tmp_path}/shared_credentials_file: check AWS_PROFILE.",
    ):
        aws.settings()


@pytest.mark.parametrize("how", ["sso_session", "credential_process", "role_arn"])
def test_a_profile_whose_keys_another_program_fetches_is_named(files, monkeypatch, how):
    monkeypatch.setenv("AWS_PROFILE", "lab")
    files(f"[profile lab]\n{how} = something\n")
    with says(
        HubError,
        f"the AWS profile 'lab' holds no keys of its own but '{how}': set them for this shell with "
        "eval \"$(aws configure export-credentials --profile 'lab' --format env)\".",
    ):
        aws.settings()


@pytest.mark.parametrize("text", ["hush", "[default]\nhush\n", "[a]\n[a]\n", "\xff"])
def test_a_file_that_cannot_be_read_is_named_and_not_shown(files, tmp_path, text):
    files(credentials="")
    path = tmp_path / "shared_credentials_file"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(HubError) as caught:
        aws.settings()
    assert str(caught.value) == f"{path} cannot be read as a file of AWS profiles: correct it."
    assert "hush" not in "".join(traceback.format_exception(caught.value))


def test_a_hub_is_opened_with_a_profiles_keys(line, open_apart, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "profiles").write_text(
        f"[profile lab]\naws_access_key_id = of-the-lab\naws_secret_access_key = {SECRET}\n"
        f"endpoint_url = {line.url}\nregion = eu-central-1\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "profiles"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert not open_apart().has(FILE)
    signed = next(h for h in line.headers if "authorization" in h)["authorization"]
    assert "Credential=of-the-lab/" in signed
    assert "/eu-central-1/s3/" in signed
