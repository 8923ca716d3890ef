"""Every error that merge-kit raises on purpose.

MergeKitError
├── UsageError            the command was called wrongly (exit status 2)
├── MissingExtraError     an optional dependency is not installed
├── DataError             images and labels at a site
│   ├── ImageError        one image cannot be read
│   └── LabelError        a label table or a split is wrong
├── FederationError       the contract that all sites share, or a site's folder
├── TensorFileError       a file that breaks the safetensors format
├── VectorError           tensors that do not fit the base
│   ├── BaseMismatchError taken from other base weights
│   └── NonFiniteError    NaN or infinity among the values
├── ContributionError     a manifest or payload that may not be merged
│   └── SignatureError    a signature that is missing, wrong or of a stranger
├── ProvenanceError       what a merged model says of itself cannot be read
├── RecipeError           a merge recipe or a method's options
├── PolicyError           a policy does not let something leave the site
├── AuditError            a site's audit log is not what was written
├── HubError              the storage where contributions lie
│   └── UnreachableError  it cannot be asked at this moment, or not by us
│       └── SiteUnreachableError  nor the hub that one site has of its own
├── TrainingError         a fine-tuning run that cannot go on
└── ExperimentError       a command of an experiment failed

The message of each is one sentence for the person at the keyboard: what is wrong, where (file,
tensor, line, site) and what to do about it.
"""


class MergeKitError(Exception):
    """Base of all errors that merge-kit raises on purpose; the command exits with `exit_code`."""

    exit_code = 1


class UsageError(MergeKitError):
    """The command was called wrongly."""

    exit_code = 2


class MissingExtraError(MergeKitError):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the extra '{extra}', which is not installed: "
            f"run pip install 'merge-kit[{extra}]'."
        )


class DataError(MergeKitError):
    """Something is wrong with the images or labels of a site."""


class ImageError(DataError):
    """One image cannot be read."""


class LabelError(DataError):
    """A label table or a split is wrong."""


class FederationError(MergeKitError):
    """The federation contract, or a site's folder, is wrong."""


class TensorFileError(MergeKitError):
    """A file breaks the safetensors format."""


class VectorError(MergeKitError):
    """Tensors do not fit the base."""


class BaseMismatchError(VectorError):
    """A vector was taken from other base weights."""


class NonFiniteError(VectorError):
    """A tensor holds NaN or infinity."""


class ContributionError(MergeKitError):
    """A contribution may not be merged."""


class SignatureError(ContributionError):
    """A signature is missing, wrong, or made by a key that the federation does not know."""


class ProvenanceError(MergeKitError):
    """A merged model's provenance is missing, or breaks the format."""


class RecipeError(MergeKitError):
    """A merge recipe, or an option of a method, is wrong."""


class PolicyError(MergeKitError):
    """A policy does not let something leave the site, or cannot be read."""


class AuditError(MergeKitError):
    """A site's audit log is not what was written."""


class HubError(MergeKitError):
    """The storage where contributions lie cannot do what was asked."""


class UnreachableError(HubError):
    """The storage cannot be asked at this moment, or not by us: nothing is known of what is there.

    Where it is asked for many entries the work ends, and no entry is taken for unsound.
    """


class SiteUnreachableError(UnreachableError):
    """The hub that one site has of its own cannot be asked: nothing is known of what that site has
    published or taken back."""

    def __init__(self, site: str, message: str) -> None:
        super().__init__(message)
        self.site = site


class TrainingError(MergeKitError):
    """A fine-tuning run cannot go on."""


class ExperimentError(MergeKitError):
    """A command of an experiment failed."""
