"""Feature extractors of the distribution metrics: Inception, or a small network."""

import hashlib
import http.client
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from core.config.metrics import SUFFIXES
from core.data import Split, to_float
from core.errors import ConfigError
from core.evaluation.classifiers import train_classifier
from core.evaluation.networks import FEATURES, Classifier

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Digest of the published weights; their file name ends in its first eight digits."""

_REMEDIES = (
    "set evaluation.inception_weights=PATH to a copy of "
    f"{WEIGHTS_URL}, or evaluation.fid_extractor=cnn, whose scores are named fid_cnn and so on"
)
_BATCH = 64
"""Most images of 299x299 pixels at once; bounds the memory and does not change the result."""


class FeatureExtractor(Protocol):
    """Maps images to vectors that are compared.

    Attributes:
        suffix: of the names of scores, such as `_cnn` in `fid_cnn`.
        dimension: length D of a feature vector.
        what: the network and what it is shown, in words.
    """

    suffix: str
    dimension: int
    what: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float `[B, D]`, of images, uint8 `[B, C, H, W]`, C 1 or 3."""
        ...


class InceptionExtractor:
    """Pool3 of the Inception v3 network of Heusel et al. (2017), as ported by pytorch-fid.

    Images are resized to 299x299 by pytorch-fid; grey ones are repeated to three channels.

    Args:
        weights: file of the published weights; None looks for them, see `find_weights`.
        device: where the network runs.

    Raises:
        ConfigError: pytorch-fid is not installed, or the published weights were not found.
    """

    suffix = SUFFIXES["inception"]
    dimension = 2048
    what = (
        f"Inception v3 of pytorch-fid, pool3, weights of SHA-256 {WEIGHTS_SHA256}; resized to "
        "299x299, grey repeated to RGB"
    )

    def __init__(self, weights: str | Path | None, device: torch.device | str) -> None:
        inception = _import_inception()
        path = find_weights(weights)
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
    """Penultimate layer of a small classifier trained on real images; names end in `_cnn`.

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

    suffix = SUFFIXES["cnn"]
    dimension = FEATURES
    what = "small classifier trained on the real images; size and channels as they are"

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
        network = train_classifier(train, validation, num_classes, epochs, batch_size, seed, device)
        assert isinstance(network, Classifier)
        self._network = network

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
    """Returns the file of the published Inception weights; call it early to fail before compute.

    Args:
        weights: the user's copy of the published file; nothing is then downloaded. None looks in
            the cache of torch.hub, and downloads to there what is absent or damaged.

    Raises:
        ConfigError: there is no file whose SHA-256 is `WEIGHTS_SHA256`: scores of other weights
            would compare with no published one. Says what was tried and how to go on.
    """
    if weights is not None:
        path = Path(weights)
        if not path.is_file():
            raise ConfigError(
                f"evaluation.inception_weights='{weights}' is not a file: correct the path, or "
                "set evaluation.fid_extractor=cnn, whose scores are named fid_cnn and so on"
            )
        if (digest := _sha256(path)) != WEIGHTS_SHA256:
            raise ConfigError(
                f"evaluation.inception_weights='{weights}' has SHA-256 {digest}, not that of the "
                f"published weights, {WEIGHTS_SHA256}: fid would compare with no other; {_REMEDIES}"
            )
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rsplit("/", 1)[-1]
    found = "is absent"
    if path.is_file():
        if _sha256(path) == WEIGHTS_SHA256:
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
            "evaluation.fid_extractor=cnn, whose scores are named fid_cnn and so on"
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
