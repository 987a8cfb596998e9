"""Private scores of a run: each is drawn once, and stored before it is used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from core.config import Config
from core.data import Dataset
from core.evaluation.metrics import dp_accuracy
from core.io.files import read_json, write_json
from core.privacy.keys import KeyedStream
from core.privacy.plan.plan import PrivacyPlan


@dataclass(frozen=True)
class PrivateScores:
    """What classifiers get right among the private training images, with noise on the number.

    Args:
        plan: charges all of them: one for the run's end, one for each early private score, and one
            for each epoch of each classifier where these are chosen so.
        noise: secret stream; every score has a place in it.
        folder: where each is kept. On any rank: no two ranks ask for the same one.
        identity: of the run.
        keep: called once a score lies on the disk.

    Privacy: the same noise on what another classifier gets right would give both away, so a score
        that was ever drawn is read from its file, whatever model is given.
    """

    config: Config
    plan: PrivacyPlan
    dataset: Dataset
    noise: KeyedStream
    folder: Path
    identity: str
    keep: Callable[[], None] = lambda: None

    @property
    def choose_epochs(self) -> bool:
        """Whether each classifier's epoch is chosen by them."""
        return self.config.evaluation.epoch_chosen_on == "dp"

    def at_end(self, model: nn.Module) -> float:
        """`dp_accuracy` of the run, in [0, 1]."""
        return self._kept("dp_accuracy", 0, model)

    def of_epoch(self, network: str, repeat: int, model: nn.Module, epoch: int) -> float:
        """The same of one classifier after an epoch, from 1, of its training."""
        settings = self.config.evaluation
        training = settings.classifiers.index(network) * settings.num_repeats + repeat
        before = 1 + len(self.config.early_steps)  # As if all early scores were private.
        place = before + training * settings.classifier_epochs + epoch - 1
        return self._kept(f"{network}-{repeat}-epoch-{epoch}", place, model)

    def _kept(self, name: str, place: int, model: nn.Module) -> float:
        path = self.folder / f"{name}.json"
        if path.exists() and (kept := read_json(path))["identity"] == self.identity:
            return kept["dp_accuracy"]
        assert self.plan.score is not None
        settings, score = self.config.evaluation, self.plan.score
        value = dp_accuracy(model, self.dataset, settings, score, self.noise, place)
        write_json(path, {"identity": self.identity, "dp_accuracy": value})
        self.keep()
        return value
