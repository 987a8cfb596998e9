"""Keys and keyed random streams, from which masks and noise are drawn.

Every stream is derived by HKDF (RFC 5869, SHA-256) from a master secret that the user keeps
outside the repository and the run folder. A stream is SHAKE-256 of the key and a counter, so any
step can be drawn again exactly and no generator state needs to be kept.
"""

import hashlib
import hmac
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.errors import ConfigError
from core.io.files import write_first

if TYPE_CHECKING:
    import torch

SECRET_FILE_VARIABLE = "FETA_SWEEP_SECRET_FILE"
_LENGTH = 32
_DISTINCT = 18
"""Fewest different bytes, and differences of neighbours, of a secret; random: 30."""
_PIECE = 2**13


class MasterSecret:
    """The root of all keys; hidden from `repr`, logs and configuration dumps."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        if len(value) != _LENGTH:
            raise ConfigError(f"the master secret has {len(value)} bytes; it must have {_LENGTH}")
        self._value = value

    @classmethod
    def load(cls, create: bool = True) -> "MasterSecret":
        """Reads the secret file, or creates it with 32 random bytes that only its owner reads.

        The file is `$FETA_SWEEP_SECRET_FILE`, or `feta-sweep/master.secret` in the user's
        configuration folder.

        Args:
            create: False where another process has created it: a second secret would draw other
                masks and noise.

        Raises:
            ConfigError: the file is not a secret of 64 hexadecimal digits, is unreadable, may be
                read by others, or is no random number.
        """
        path = secret_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if create and not path.exists():
                write_first(path, os.urandom(_LENGTH).hex() + "\n")
            with path.open() as file:
                status, text = os.fstat(file.fileno()), file.read()
            secret = cls(bytes.fromhex(text.strip()))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the master secret at '{path}' cannot be used ({type(error).__name__}): point "
                f"{SECRET_FILE_VARIABLE} at a private file with 64 hexadecimal digits, the same "
                "on every machine of a run"
            ) from None
        # What another user lends, such as a mounted secret, is read by the right of a group.
        others = 0o077 if status.st_uid == os.geteuid() else 0o007
        if status.st_mode & others:
            raise ConfigError(
                f"the master secret at '{path}' may be used by others (mode "
                f"{status.st_mode & 0o777:o}), who could subtract the noise: chmod 600 '{path}', "
                "or begin with another secret if somebody may have read it"
            )
        if not secret._looks_random():
            raise ConfigError(
                f"the master secret at '{path}' is a pattern that can be guessed: begin with 32 "
                "random bytes, such as of `openssl rand -hex 32`"
            )
        return secret

    def _looks_random(self) -> bool:
        """Whether it repeats, counts or spells nothing; true of random bytes but for 1e-11."""
        value = self._value
        steps = {(after - before) % 256 for before, after in pairwise(value)}
        text = all(32 <= byte < 127 for byte in value)
        return min(len(set(value)), len(steps)) >= _DISTINCT and not text

    def keyed(self, digest: str) -> str:
        """What stands for the digest of private data wherever it is shown; 64 hexadecimal digits.

        Privacy: equal for equal data under one secret; without the secret it confirms no guess.
        """
        key = self.derive(fingerprint="", trial="", stage="", purpose="shown digests")
        return hmac.digest(key, digest.encode(), "sha256").hex()

    def derive(self, *, fingerprint: str, trial: str, stage: str, purpose: str) -> bytes:
        """Derives one 32-byte key; any other argument gives an unrelated key.

        Args:
            fingerprint: digest of the data set's content.
            trial: identity of the run, including the digest of its configuration.
            stage: such as `central_images`, `frequency` or `private_training`.
            purpose: `mask` or `noise`.
        """
        info = json.dumps([fingerprint, trial, stage, purpose]).encode()
        extracted = hmac.digest(b"feta-sweep v1", self._value, "sha256")
        return hmac.digest(extracted, info + b"\x01", "sha256")

    @property
    def public_id(self) -> str:
        """Tells secrets apart and gives nothing of them away; 16 hexadecimal digits."""
        return self.derive(fingerprint="", trial="", stage="", purpose="public id")[:8].hex()

    def __repr__(self) -> str:
        return "MasterSecret(hidden)"


def secret_path() -> Path:
    """Where the master secret is looked for."""
    if named := os.environ.get(SECRET_FILE_VARIABLE):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "feta-sweep" / "master.secret"


class KeyedStream:
    """Random numbers addressed by a counter: the same key and step give the same numbers.

    Privacy: the key stays in memory; whoever knows it can subtract the noise.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def bits(self, step: int, count: int) -> np.ndarray:
        """`count` independent uniform uint64 for `step` (any integer in [0, 2**64))."""
        digest = hashlib.shake_256(self._key + step.to_bytes(8, "big")).digest(8 * count)
        return np.frombuffer(digest, dtype="<u8")

    def uniform(self, step: int) -> float:
        """One number in (0, 1), of 53 bits."""
        return (float(self.bits(step, 1)[0] >> np.uint64(11)) + 0.5) * 2.0**-53

    def normal(self, step: int, count: int) -> "torch.Tensor":
        """`count` independent standard normal numbers, float64 `[count]`.

        Box and Muller (1958) from 53-bit uniforms, so that |x| <= 8.6. To be rounded only after
        it was added to what it hides.
        """
        import torch  # Here, as drivers and trials, which use keys, draw none.

        pairs = (count + 1) // 2
        uniform = self.bits(step, 2 * pairs) >> np.uint64(11)
        values = torch.empty(2 * pairs, dtype=torch.float64)
        # Piece by piece and in place: the numbers in between never leave the cache.
        for start in range(0, pairs, _PIECE):
            part = slice(start, min(start + _PIECE, pairs))
            radius, angle = (
                torch.as_tensor((bits[part].astype(np.float64) + 0.5) * 2.0**-53)
                for bits in (uniform[:pairs], uniform[pairs:])
            )
            radius.log_().mul_(-2.0).sqrt_()
            angle.mul_(2.0 * torch.pi)
            values[:pairs][part] = radius * angle.cos()
            values[pairs:][part] = radius.mul_(angle.sin_())
        return values[:count]

    def __repr__(self) -> str:
        return "KeyedStream(hidden)"
