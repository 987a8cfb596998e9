"""Bounds of epsilon that `audit` has proven of a run: in words, and as a bundle holds them."""

import hashlib
from collections.abc import Mapping
from typing import Any

from core.errors import ConfigError
from core.evaluation.audit import CONFIDENCE
from core.io.code_digest import code_digest
from core.io.files import read_json, write_json
from core.privacy.accounting.rounding import downward, upward
from core.record.folder import RunFolder

_FORMS = {
    "white_box": "noisy updates of DP-SGD (white box)",
    "black_box": "synthetic images (black box)",
}
NOT_AUDITED = "not audited"


def keep(run: RunFolder, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Keeps what an audit found, beside what it found earlier in another form.

    What once proved too much stays, as another audit may miss it by chance.

    Args:
        found: by form, as of `core.evaluation.audit.audit`, with the `epsilon` that is claimed.
    """
    before = _forms(run)
    stays = {form: each for form, each in before.items() if _proves_too_much(each)}
    content = {**_about(run), "confidence": CONFIDENCE, **before, **found, **stays}
    write_json(run.audit, content)


def require_same_code(run: RunFolder) -> None:
    """Refuses to audit what other code has made.

    Raises:
        ConfigError: the run began with other code, of which an audit of this code says nothing.
    """
    if run.begun_with()[1] not in ("", code_digest()):
        raise ConfigError(
            f"'{run.path}' was made by other code of core, of which an audit of this code would "
            "say nothing: audit it with the version that made it"
        )


def _about(run: RunFolder) -> dict[str, str]:
    """The plan and the code that are audited."""
    plan = hashlib.sha256(run.plan_file.read_bytes()).hexdigest()
    return {"plan": plan, "code": code_digest()}


def _forms(run: RunFolder) -> dict[str, Any]:
    """What was found by form; nothing where the folder held another plan or other code then."""
    if not run.audit.exists():
        return {}
    found = read_json(run.audit)
    _, code = run.begun_with()
    # An earlier version kept neither.
    same = found.get("plan") == _about(run)["plan"] and code in ("", found.get("code"))
    return {form: found[form] for form in _FORMS if form in found} if same else {}


def audit_lines(run: RunFolder) -> list[str]:
    """What the audit has proven, a line for each form, and what can still be tried."""
    found, lines = _forms(run), list[str]()
    for form, name in _FORMS.items():
        if each := found.get(form):
            lines.append(
                f"{name}: epsilon is at least {downward(each['epsilon_lower_bound'])}, of "
                f"{downward(each['provable'])} that {each['canaries']} canaries can prove; "
                f"{upward(each['epsilon'])} is claimed"
            )
        else:
            count = " --black-box COUNT" if form == "black_box" else ""
            lines.append(f"{name}: {NOT_AUDITED}: python -m core audit --run-dir {run.path}{count}")
    return [*lines, f"bounds hold at once with confidence {CONFIDENCE:g}"] if found else lines


def audit_failures(run: RunFolder) -> list[str]:
    """Each form that proves more than is claimed."""
    return [
        f"the audit of the {_FORMS[form]} proves more than epsilon"
        for form, each in _forms(run).items()
        if _proves_too_much(each)
    ]


def _proves_too_much(each: Mapping[str, Any]) -> bool:
    return each["epsilon_lower_bound"] > each["epsilon"]


def bundled_bounds(run: RunFolder) -> dict[str, Any] | str:
    """All that a bundle holds of the audit: bounds by form, and their confidence.

    Privacy: canaries are made up, so the bounds tell nothing of the data.
    """
    bounds = {form: each["epsilon_lower_bound"] for form, each in _forms(run).items()}
    return {"epsilon_at_least": bounds, "confidence": CONFIDENCE} if bounds else NOT_AUDITED


def bounds_in_words(bundled: Mapping[str, Any] | str) -> str:
    """`bundled_bounds` as one sentence."""
    if isinstance(bundled, str):
        return bundled
    bounds = bundled["epsilon_at_least"].items()
    proven = ", ".join(f"{downward(bound)} by {_FORMS[form]}" for form, bound in bounds)
    return f"epsilon is at least {proven}, with confidence {bundled['confidence']:g}"
