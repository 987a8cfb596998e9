"""Seeds of what is public: weights, diffusion noise, batches; never of masks or privacy noise."""

import hashlib


def public_seed(stream: str, step: int) -> int:
    """Seed, in [0, 2**63), of one step of a stream, which any other name or step shares with none.

    Args:
        stream: public name, such as the run's seed and what it is for.
    """
    return int.from_bytes(hashlib.sha256(f"{stream}/{step}".encode()).digest()[:8], "big") >> 1
