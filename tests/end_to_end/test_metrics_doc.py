"""docs/metrics.md against a run: every metric is documented, and every documented one is written."""

from pathlib import Path

from support.metrics_doc import DOC, documented, matching
from support.runs import train

OVERRIDES = (
    *(
        "trainer.steps=2",
        "rollout.lag=4",
        "eval.every=1",
        "reward.parts.form.name=format",
        "reward.parts.form.weight=0.1",
    ),
    *(
        "model.mtp=1",
        "trainer.mtp_weight=0.1",
        "router.replay=rollout",
        "router.attribute_every=1",
        "algorithm.kl=0.01",
    ),
)

THIS_RUN = (
    *("actor/kl_ref", "actor/draft_loss", "mis/window_high", "mis/accept_lag/<lag>", "critic/vf_explained_var"),
    *("moe/confidence/mean", "moe/expert_agreement", "attribution/<cause>", "attribution/<cause>_mediated"),
    *("eval/<set>/avg@<k>", "reference/forced_careful", "timing_s/attribute", "timing_s/eval"),
)
"""Names that are marked "only with …", and this run is with it."""


def test_a_run_writes_what_is_documented_and_nothing_else(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", *OVERRIDES)
    names = documented(DOC.read_text(encoding="utf-8"))
    keys = {key for row in rows for key in row} - {"step"}
    found = {key: matching(key, names) for key in keys}
    assert {key: place for key, place in found.items() if len(place) != 1} == {}
    written = {place[0] for place in found.values()}
    assert {name for name, always in names.items() if always} - written == set()
    assert set(THIS_RUN) - written == set()
