"""The model card of a bundle: its target, its origin, and the uses that it is not for."""

from __future__ import annotations

from collections.abc import Sequence

from crcjax.runs.bundle import Encoder, MemberFacts, Target
from crcjax.runs.run_directory import Run
from crcjax.validation.calibration import Calibration


def model_card(
    target: Target,
    members: Sequence[MemberFacts],
    encoder: Encoder | None,
    run: Run,
    calibration: Calibration | None,
) -> str:
    """The card as Markdown; `run` is the first member's run."""
    config = run.config
    split_counts = " and ".join(
        f"{len(run.ids(split))} ids of slides and cases in {split}" for split in ("train", "val")
    )
    lines = [
        f"# Model card: {target.name} of {target.cancer_type} cancer",
        "",
        "Research use only. This model has no regulatory clearance, and no claim of clinical validity is made.",
        *_synthetic(run),
        "",
        "## Prediction target",
        "",
        f"* Target: {target.name}. Classes: {', '.join(target.classes)}. Cancer: {target.cancer_type}.",
        f"* One prediction per {config.data.unit}, from haematoxylin and eosin slides at "
        f"{', '.join(config.data.magnifications or run.tiling.magnifications)}, {run.tiling.tile_px} px tiles.",
        f"* Output: {config.model.head}. {_calibration(calibration)}",
        "",
        "## Models",
        "",
        f"* Aggregator {config.model.mil}; tile encoder {config.model.encoder}.",
        *_encoder(encoder, run),
        f"* Members: {len(members)}; each is the checkpoint of one training run.",
        "",
        "| model | seed | step | validation metrics | config SHA-256 | data SHA-256 |",
        "|---|---|---|---|---|---|",
        *map(_row, members),
        "",
        "## Training data",
        "",
        f"* The first member's run has {split_counts}; the bundle holds their keyed hashes alone.",
        "* Validation cases chose the checkpoint and fitted the calibration. They give no estimate of performance.",
        "",
        "## Open: to be filled in by a person",
        "",
        "* Performance on held-out cases, with intervals, overall and by site, scanner and subgroup.",
        "* Population, sites, scanners and stains of the training slides; the reference method of the labels.",
        "* Intended users and setting; known failures; who answers questions.",
    ]
    return "\n".join(lines) + "\n"


def _synthetic(run: Run) -> list[str]:
    if run.synthetic is None:
        return ["The run does not record whether its slides were synthetic."]
    return ["**Trained on synthetic slides.** Its predictions mean nothing for patients."] if run.synthetic else []


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "Probabilities are not calibrated."
    names = ", ".join(calibration.limits.largest) if calibration.limits else ""
    limits = (
        f"Slides beyond limits of {names} are not evaluable." if names else "It has no limits for evaluable slides."
    )
    return (
        f"Calibrated: temperature {calibration.temperature:.3f}; conformal sets ({calibration.method}) that may miss the true "
        f"class in {calibration.error:.0%} of cases, fitted on {calibration.cases['']} validation cases. {limits}"
    )


def _encoder(encoder: Encoder | None, run: Run) -> list[str]:
    if encoder:
        return [
            f"* The weights of {encoder.name} are not in the bundle: file of SHA-256 {encoder.sha256}, published as "
            f"{encoder.source}. Its licence applies."
        ]
    config = run.config.model
    if config.imported_features:
        return [f"* Features of {config.encoder} are computed by another program; their weights are unknown."]
    if not config.frozen and config.encoder != "compact":
        return [
            f"* The weights of {config.encoder} were fine-tuned and are in the bundle. The encoder's licence applies."
        ]
    return []


def _row(member: MemberFacts) -> str:
    metrics = (
        ", ".join(f"{name} {value:.4g}" for name, value in sorted((member.metrics or {}).items())) or "not evaluated"
    )
    cells = (member.model_id, member.seed, member.step, metrics, member.config_sha256, member.data_sha256 or "unknown")
    return "| " + " | ".join(map(str, cells)) + " |"
