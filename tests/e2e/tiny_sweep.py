"""The small sweep that the tests of whole sweeps share, as text of its file."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPLIT = """  stage_split:
    low: 0.2
    high: 0.6
"""


def sweep_text(name: str, head: str, space: str = SPLIT) -> str:
    """A sweep's file: `head` are keys of the sweep, `space` entries of its search space."""
    return f"""
name: {name}
base: {ROOT}/core/configs/digits.yaml
{head}
fixed:
  privacy.target_epsilon: 1.0
  training.num_steps: 20
  private_training.expected_batch_size: 60
  model.base_channels: 8
  sampler.num_steps: 3
  evaluation.num_images: 60
  evaluation.classifier_epochs: 1
  evaluation.extractor_epochs: 1
  runtime.ledger: runs/ledger
  runtime.checkpoint_every: 5
  runtime.log_every: 5
search_space:
{space}"""
