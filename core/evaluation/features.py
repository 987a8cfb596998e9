"""Feature extractors for the Frechet distance: Inception, or a small network on real images."""

import hashlib
import http.client
import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from core.data import Split, to_float
from core.errors import ConfigError
from core.evaluation.classifiers import FEATURES, Classifier, train_classifier

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d"
"""First digits of the digest of the published weights; their file name ends in it."""

_REMEDIES = (
    "set evaluation.inception_weights=PATH to a copy of "
    f"{WEIGHTS_URL}, or evaluation.fid_extractor=cnn, which scores as fid_cnn"
)
_BATCH = 64
"""Most images of 299x299 pixels at once; bounds the memory and does not change the result."""

_log = logging.getLogger(__name__)


class FeatureExtractor(Protocol):
    """Maps images to vectors whose moments are compared.

    Attributes:
        name: of the metric, `fid` or `fid_cnn`.
        dimension: length D of a feature vector.
    """

    name: str
    dimension: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float `[B, D]`, of images, uint8 `[B, C, H, W]`, C 1 or 3."""
        ...


class InceptionExtractor:
    """Pool3 of the Inception v3 network of Heusel et al. (2017), as ported by pytorch-fid.

    Images are resized to 299x299 by pytorch-fid; grey ones are repeated to three channels.

    Args:
        weights: file of the network's state; None takes the published one, see `find_weights`.
        device: where the network runs.

    Attributes:
        digest: SHA-256 of the weights file, 64 hexadecimal digits.

    Raises:
        ConfigError: pytorch-fid is not installed, or no usable weights were found.
    """

    name = "fid"
    dimension = 2048

    def __init__(self, weights: str | Path | None, device: torch.device | str) -> None:
        inception = _import_inception()
        path = find_weights(weights)
        self.digest = _sha256(path)
        if not self.digest.startswith(WEIGHTS_SHA256):
            _log.warning("'%s' is not the published Inception: fid not comparable to papers", path)
        self._device = device
        self._network = _load_network(inception, path).to(device).eval()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features `[B, 2048]`, float32, of images, uint8 `[B, C, H, W]`, C 1 or 3."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images have shape {list(images.shape)}, not [B, 1 or 3, H, W]")
        parts = [images.new_zeros((0, self.dimension), dtype=torch.float32, device=self._device)]
        for batch in images.split(_BATCH):
            pixels = to_float(batch.to(self._device)).expand(-1, 3, -1, -1)
            parts.append(self._network(pixels)[0].flatten(1))
        return torch.cat(parts)


class CnnExtractor:
    """Penultimate layer of a small classifier trained on real images; scores as `fid_cnn`.

    Its scale depends on the data set, the seed and the training length: compare values of
    `fid_cnn` only where all of these agree, and never with `fid`.

    Args:
        train: real training images.
        validation: held-out part of the real training images; chooses the epoch.
        num_classes: labels lie in [0, num_classes).
        epochs: passes over `train`, >= 1.
        batch_size: of the training, >= 1.
        seed: the same seed gives the same features.
        device: where the network is trained and runs.

    Privacy: the network is trained on private images without protection; neither it nor the
        metric is private, and it must not be released.
    """

    name = "fid_cnn"
    dimension = FEATURES

    def __init__(
        self,
        train: Split,
        validation: Split,
        num_classes: int,
        epochs: int,
        batch_size: int,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self._device = device
        self._network = train_classifier(
            train, validation, num_classes, epochs, batch_size, seed, device
        )

    @classmethod
    def restored(
        cls,
        state: dict[str, torch.Tensor],
        like: Split,
        num_classes: int,
        device: torch.device | str,
    ) -> "CnnExtractor":
        """The extractor whose `state_dict` was kept, for images of the shape of `like`."""
        extractor = cls.__new__(cls)
        _, channels, height, width = like.images.shape
        network = Classifier(channels, (height, width), num_classes, torch.Generator())
        network.load_state_dict(state)
        extractor._device, extractor._network = device, network.to(device).eval()
        return extractor

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `restored` needs."""
        return self._network.state_dict()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features `[B, 64]`, float32, of images, uint8 `[B, C, H, W]`."""
        return self._network.penultimate(to_float(images.to(self._device)))


def find_weights(weights: str | Path | None) -> Path:
    """Returns the file of Inception weights; call it early to fail before any compute.

    Args:
        weights: a file of the user's, taken as it is. None looks for the published file in the
            cache of torch.hub and downloads it there if it is absent or damaged.

    Raises:
        ConfigError: says what was tried and how to go on.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise ConfigError(
                f"evaluation.inception_weights='{weights}' is not a file: correct the path, or "
                "set evaluation.fid_extractor=cnn, which scores as fid_cnn"
            )
        return Path(weights)
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rsplit("/", 1)[-1]
    found = "is absent"
    if path.is_file():
        if _sha256(path).startswith(WEIGHTS_SHA256):
            return path
        found = "is damaged (SHA-256 differs)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256, progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ConfigError(
            f"no Inception weights for fid: '{path}' {found}, and the download failed ({error}); "
            f"{_REMEDIES}"
        ) from None
    return path


def _import_inception() -> Any:
    try:
        from pytorch_fid import inception
    except ImportError as error:
        raise ConfigError(
            f"fid needs pytorch-fid ({error}): pip install pytorch-fid, or set "
            "evaluation.fid_extractor=cnn, which scores as fid_cnn"
        ) from None
    return inception


def _load_network(inception: Any, path: Path) -> nn.Module:
    """Builds pytorch-fid's network, whose constructor knows only a download, from a local file."""
    download = inception.load_state_dict_from_url
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        inception.load_state_dict_from_url = lambda *_, **__: state
        with torch.random.fork_rng(devices=[]):
            return inception.InceptionV3([inception.InceptionV3.DEFAULT_BLOCK_INDEX])
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"'{path}' does not hold pytorch-fid's Inception weights ({reason}); {_REMEDIES}"
        ) from None
    finally:
        inception.load_state_dict_from_url = download


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
