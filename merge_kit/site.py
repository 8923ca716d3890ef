"""A site's working folder: its name, its key, and its own copy of the federation."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merge_kit import signing
from merge_kit.errors import FederationError
from merge_kit.federation import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    FEDERATION_FILE,
    Federation,
    check_base,
    read_federation,
)
from merge_kit.files import new_folder, storage_errors, write_atomic
from merge_kit.hub import FolderHub, Hub
from merge_kit.misnamed import refuse_misnamed
from merge_kit.schema import Digest, Document, SiteName, now, parse
from merge_kit.trust import check_latest, check_signed, unchecked_on
from merge_kit.yamlfile import dump_yaml, read_yaml

SITE_FILE = "site.yaml"
KEY_FILE = "keys/site.pem"
PUBLIC_KEY_FILE = "keys/site.pub"
COPY = "federation"


class SiteConfig(Document):
    """site.yaml."""

    format: Literal[1] = 1
    name: SiteName
    hub: str
    federation: Digest
    """Contract hash, pinned at `join`."""


@dataclass(frozen=True, slots=True)
class Site:
    """An opened working folder."""

    root: Path
    config: SiteConfig
    federation: Federation

    @property
    def name(self) -> str:
        """The site's name in the federation."""
        return self.config.name

    @property
    def key_file(self) -> Path:
        """The private key."""
        return self.root / KEY_FILE

    @property
    def base_folder(self) -> Path:
        """The base as a timm folder."""
        return self.root / COPY / "base"


def federation_on(hub: Hub) -> Federation:
    """The contract on a hub; raises as `federation_file_on`."""
    return federation_file_on(hub)[1]


def federation_file_on(hub: Hub) -> tuple[bytes, Federation]:
    """The bytes of a hub's federation file, and the contract that these very bytes hold, checked.

    Raises
    ------
    FederationError
        The hub holds no federation.
    SignatureError
        Its coordinator has not signed it as it stands, or it is older than one seen before.
    PolicyError
        Beside it, in a folder, lies a file that looks like a policy, which nobody reads.
    """
    if not hub.has(FEDERATION_FILE):
        raise FederationError(
            f"{hub.uri} is not a federation: it has no {FEDERATION_FILE}; "
            "create one with 'merge-kit init'."
        )
    where = f"{hub.uri}/{FEDERATION_FILE}"
    if isinstance(hub, FolderHub):
        refuse_misnamed(
            hub.root,
            f"a federation's policy stands in {FEDERATION_FILE} under 'policy', and "
            "'merge-kit sign' signs it after a change; remove it.",
        )
    data, federation = unchecked_on(hub)
    check_signed(federation, where)
    check_latest(federation, hub.uri)
    return data, federation


def base_folder(hub: Hub) -> Path:
    """The base of a hub's federation as a timm folder on this machine."""
    hub.fetch(BASE_CONFIG)
    return hub.fetch(BASE_WEIGHTS).parent


def join(hub: Hub, name: str, root: Path) -> Site:
    """Create a site's working folder: copy and check the base, make the key pair.

    Joining twice with the same name and hub changes nothing.

    Raises
    ------
    FederationError
        The hub holds no federation, or the folder is another site's.
    BaseMismatchError
        The base on the hub is not what the contract says.
    """
    federation = federation_on(hub)
    config = parse(
        SiteConfig,
        {"name": name, "hub": hub.uri, "federation": federation.contract_hash},
        f"site '{name}'",
        FederationError,
    )
    if (root / SITE_FILE).is_file():
        site = open_site(root)
        if site.config != config:
            raise FederationError(
                f"{root} is the folder of site '{site.name}' on the hub {site.config.hub}: "
                "choose another folder with --folder."
            )
        return site
    with new_folder(root) as folder:
        copy = folder / COPY
        with storage_errors(root):
            (copy / "base").mkdir(parents=True)
            shutil.copyfile(hub.fetch(BASE_WEIGHTS), copy / BASE_WEIGHTS)
        check_base(federation, copy / BASE_WEIGHTS, f"{hub.uri}/{BASE_WEIGHTS}")
        write_atomic(copy / BASE_CONFIG, federation.model_config_json)
        write_atomic(copy / FEDERATION_FILE, federation.to_yaml())
        key = signing.create_key(folder / KEY_FILE)
        write_atomic(folder / PUBLIC_KEY_FILE, key + "\n")
        write_atomic(folder / SITE_FILE, dump_yaml(config))
    return open_site(root)


def open_site(root: Path) -> Site:
    """Open a working folder.

    Raises
    ------
    FederationError
        `root` is no site's folder, or its copy of the federation was changed.
    """
    path = root / SITE_FILE
    if not path.is_file():
        raise FederationError(
            f"{root} is not a site's folder: it has no {SITE_FILE}; run 'merge-kit join' first."
        )
    file = read_yaml(path, FederationError)
    config = parse(SiteConfig, file.data, file.place, FederationError)
    federation = read_federation(root / COPY)
    check_pinned(config, federation, str(root / COPY))
    return Site(root, config, federation)


def check_pinned(config: SiteConfig, federation: Federation, where: str) -> None:
    """Compare a contract with the one that the site joined.

    Raises
    ------
    FederationError
        Names both hashes.
    """
    if federation.contract_hash != config.federation:
        raise FederationError(
            f"{where} holds the contract {federation.contract_hash}, site '{config.name}' joined "
            f"{config.federation}: ask the coordinator, and join again if the change is wanted."
        )


def rotate_key(site: Site) -> tuple[Path, str]:
    """Make a new key pair for a site; gives the place of the old private key, and the new public
    one.

    Killed in between it leaves the old pair, or the new private key beside the old public key's
    file; `merge-kit key show` reads the private key, so it always names the one that signs.
    """
    stamp = now().replace(":", "").replace("-", "")
    number = 1
    while (kept := site.key_file.with_name(f"site-until-{stamp}-{number}.pem")).exists():
        number += 1  # rotated twice within a second
    fresh = site.key_file.with_name(f"site-new-{stamp}-{number}.pem")
    public = signing.create_key(fresh)
    with storage_errors(site.key_file):
        os.link(site.key_file, kept)
        fresh.replace(site.key_file)
    write_atomic(site.root / PUBLIC_KEY_FILE, public + "\n")
    return kept, public
