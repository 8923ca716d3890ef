"""What may leave a site: the federation's policy and the site's own, which nothing overrides.

``policy.yaml`` in a site's folder is the site's. Whatever cannot be read, is unknown or is not
stated counts as a refusal: nothing leaves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from merge_kit import signing
from merge_kit.errors import FederationError, PolicyError, SignatureError
from merge_kit.federation import Bounds
from merge_kit.files import write_atomic
from merge_kit.manifest import Kind, Manifest
from merge_kit.misnamed import refuse_misnamed
from merge_kit.schema import parse
from merge_kit.site import COPY
from merge_kit.yamlfile import read_yaml

POLICY_FILE = "policy.yaml"
APPROVALS = "approvals"
Telling = Literal["training", "validation", "group_counts", "other_images", "privacy"]
"""Fields of a manifest that a site may want not to tell."""


class SitePolicy(Bounds):
    """policy.yaml: what the site asks of whatever leaves it, beside what the federation asks."""

    format: Literal[1] = 1
    allowed_hubs: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """How the hubs begin that may be sent to, as absolute paths or URIs; null for any."""
    allowed_kinds: tuple[Kind, ...] | None = None
    """What may be sent: vector, moments, norms, predictions, fisher, gram; null for all."""
    forbidden_fields: tuple[Telling, ...] = ()
    """Fields of a manifest that must be empty."""
    second_signature: tuple[str, ...] = ()
    """Public keys of people of whom one has to approve each contribution (`merge-kit approve`);
    empty for nobody."""

    @field_validator("second_signature")
    @classmethod
    def _are_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            try:
                signing.parse_public_key(key)
            except FederationError as fault:
                raise ValueError(str(fault).rstrip(".")) from fault
        return keys


def site_policy(root: Path) -> SitePolicy:
    """A site's policy; without a file it asks for nothing.

    Raises
    ------
    PolicyError
        The file cannot be read, or has an unknown key or a wrong value; or another file looks as if
        it was to be the policy.
    """
    called = f"a site's policy is {root / POLICY_FILE}"
    refuse_misnamed(root, f"{called}: rename it, or remove it.", POLICY_FILE)
    refuse_misnamed(root / COPY, f"{called}: move it there, or remove it.")
    path = root / POLICY_FILE
    if not path.exists() and not path.is_symlink():
        return SitePolicy()
    file = read_yaml(path, PolicyError)
    return parse(SitePolicy, file.data, file.place, PolicyError)


def breach(manifest: Manifest, bounds: Bounds, whose: str) -> str | None:
    """In which way a contribution goes beyond a policy's bounds; None if in none."""
    examples, norm = examples_of(manifest), manifest.payload.norm
    if bounds.minimum_examples is not None and examples < bounds.minimum_examples:
        return (
            f"counts {examples} training images for certain, and {whose} asks for at least "
            f"{bounds.minimum_examples}"
        )
    if manifest.kind == "vector" and bounds.maximum_norm is not None and norm > bounds.maximum_norm:
        return (
            f"has the norm {norm:.4g}, above the {bounds.maximum_norm:.4g} of {whose} (fewer steps "
            "or a lower learning rate give a smaller one)"
        )
    if bounds.maximum_epsilon is None:
        return None
    if manifest.privacy is None:
        return f"states no differential privacy, and {whose} asks for it"
    if manifest.privacy.epsilon > bounds.maximum_epsilon:
        return (
            f"states an epsilon of {manifest.privacy.epsilon:g}, above the "
            f"{bounds.maximum_epsilon:g} of {whose}"
        )
    return None


def check(manifest: Manifest, bounds: Bounds, whose: str) -> None:
    """Refuse to send what goes beyond a policy's bounds.

    Raises
    ------
    PolicyError
        Names the rule and whose it is.
    """
    if reason := breach(manifest, bounds, whose):
        raise PolicyError(f"the {manifest.kind} {reason}: nothing was sent.")


def examples_of(manifest: Manifest) -> int:
    """The fewest training images that a manifest's counts can stand for: "<N" for 1."""

    def least(count: int | str) -> int:
        return count if isinstance(count, int) else 1

    if manifest.images is not None:  # an image has several classes
        return least(manifest.images)
    counts = [*manifest.class_counts.values(), *(manifest.group_counts or {}).values()]
    return sum(map(least, counts)) + least(manifest.other_images or 0)


def check_site(manifest: Manifest, policy: SitePolicy, hub: str) -> None:
    """Refuse what a site's own policy does not let go to this hub.

    Raises
    ------
    PolicyError
        Names the rule.
    """
    whose = "the site's own policy"
    if policy.allowed_hubs is not None and not any(_begins(hub, a) for a in policy.allowed_hubs):
        raise PolicyError(
            f"{whose} lets nothing go to {hub}; it allows "
            f"{', '.join(policy.allowed_hubs) or 'no hub'}: nothing was sent."
        )
    if policy.allowed_kinds is not None and manifest.kind not in policy.allowed_kinds:
        raise PolicyError(
            f"{whose} does not let {manifest.kind} leave the site; it allows "
            f"{', '.join(policy.allowed_kinds) or 'nothing'}: nothing was sent."
        )
    for field in policy.forbidden_fields:
        if getattr(manifest, field) is not None:
            raise PolicyError(
                f"{whose} does not let the field '{field}' of a manifest leave the site, and this "
                f"{manifest.kind} has it: nothing was sent."
            )
    check(manifest, policy, whose)


def _begins(hub: str, allowed: str) -> bool:
    """Whole parts of a place alone: `s3://a/b` allows `s3://a/b/c` and not `s3://a/bc`. Of a folder
    it counts where it really is, whatever links and `..` lead there."""
    if "://" not in hub:
        path = Path(allowed.removeprefix("file://"))
        return path.is_absolute() and Path(hub).resolve().is_relative_to(path.resolve())
    if {".", ".."} & set(hub.split("/")):
        return False  # some storages would follow it out of the place that it begins with
    allowed = allowed.rstrip("/")
    return hub == allowed or hub.startswith(f"{allowed}/")


def approve(root: Path, manifest: Manifest, key_file: Path, site_key: str) -> str:
    """Write that the owner of a key approves a contribution; gives the public key.

    Raises
    ------
    PolicyError
        The site's policy does not ask for this key, or it is the site's own.
    """
    policy = site_policy(root)
    _check_second(root, policy, site_key)
    signed = signing.sign(key_file, signing.APPROVAL_CONTEXT, manifest.to_bytes())
    if signed.key not in policy.second_signature:
        raise PolicyError(
            f"{key_file} is the key {signed.key}, which {root / POLICY_FILE} does not name under "
            "'second_signature'."
        )
    write_atomic(root / APPROVALS / f"{manifest.id}.json", signed.to_bytes())
    return signed.key


def _check_second(root: Path, policy: SitePolicy, site_key: str) -> None:
    """Whoever publishes has the site's key, so that its signature is no second one."""
    if site_key in policy.second_signature:
        raise PolicyError(
            f"{root / POLICY_FILE} names the site's own key under 'second_signature': let a second "
            "person make one with 'merge-kit key new', and name that."
        )


def check_approved(
    root: Path, run: Path, manifest: Manifest, policy: SitePolicy, site_key: str
) -> None:
    """Refuse what nobody has approved, where somebody has to.

    Parameters
    ----------
    run
        The folder that the contribution is of, for the message.
    site_key
        The public key that signs the contribution itself.

    Raises
    ------
    PolicyError
        Names the command that is missing; or the site's own key is to be the second.
    """
    if not policy.second_signature:
        return
    _check_second(root, policy, site_key)
    path = root / APPROVALS / f"{manifest.id}.json"
    try:
        signature = signing.parse_signature(path.read_bytes(), str(path), "it is no signature")
        signing.verify(signature, signing.APPROVAL_CONTEXT, manifest.to_bytes(), str(path))
    except (OSError, SignatureError) as error:
        raise PolicyError(
            f"the {manifest.kind} {manifest.id[:12]} has to be approved by a second person before "
            f"it leaves the site: run 'merge-kit approve {root} --run {run} --key <their key>', "
            "with the options of this command."
        ) from error
    if signature.key not in policy.second_signature:
        raise PolicyError(
            f"{path} is signed with {signature.key}, which the site's own policy does not name: "
            "let one of those approve it whom it does."
        )
