"""The same update on one and two ranks and under every ZeRO stage; NaN never reaches the parameters."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from support.runs import python

SCRIPT = Path(__file__).with_name("updates_script.py")

Saved = Callable[[str, int, int], tuple[dict[str, Any], Path]]


def run_script(out: Path, stage: int, rounds: int, *flags: str, ranks: int = 1) -> dict[str, Any]:
    done = python(str(SCRIPT), str(out), str(stage), str(rounds), *flags, cwd=out.parent, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def straight(saved: Saved) -> dict[str, Any]:
    return saved("adamw", 0, 1)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One round by (optimizer, stage, ranks), run once for all tests: its result, and where its checkpoint lies."""

    @cache
    def run(optimizer: str, stage: int, ranks: int) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp(f"{optimizer}_{stage}_{ranks}")
        flags = ("--optimizer", optimizer, "--save", str(folder / "checkpoints"))
        return run_script(folder / "out.pt", stage, 1, *flags, ranks=ranks), folder / "checkpoints"

    return run


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Before any update; the same under every stage."""
    return run_script(tmp_path_factory.mktemp("untouched") / "before.pt", 0, 0)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert torch.allclose(a["losses"], b["losses"], rtol=1e-5)
    assert torch.allclose(a["norms"], b["norms"], rtol=1e-5)
    for name in ("actor", "critic"):
        for key, tensor in a[name].items():
            # Relative to the tensor: AdamW turns rounding in gradients near 0 into steps of up to lr.
            assert (tensor - b[name][key]).norm() <= 2e-5 * tensor.norm() + 1e-6, key
    assert torch.allclose(a["bootstrap"], b["bootstrap"], atol=1e-4)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (2, 2), (3, 2)])
def test_ranks_and_zero_stage_do_not_change_the_update(
    straight: dict[str, Any], tmp_path: Path, stage: int, ranks: int
) -> None:
    assert straight["applied"].all()
    assert straight["stop"] == (2, 3)
    other = run_script(tmp_path / "other.pt", stage, 1, ranks=ranks)
    assert_same(straight, other)
    assert other["leaves"] == (3 if stage == 3 else 0)  # a MoE layer is gathered whole


def test_muon_is_the_same_on_every_stage(straight: dict[str, Any], untouched: dict[str, Any], saved: Saved) -> None:
    """But for the last digits, as its products are in bf16."""
    alone, _ = saved("muon", 0, 1)
    assert not torch.allclose(straight["losses"][1:3], alone["losses"][1:3], rtol=1e-5)
    for stage, ranks in ((2, 2), (3, 2)):
        other, _ = saved("muon", stage, ranks)
        assert torch.allclose(alone["losses"], other["losses"], rtol=1e-3, atol=1e-5)
        for key, tensor in alone["actor"].items():
            moved = (tensor - untouched["actor"][key]).norm()
            assert (tensor - other["actor"][key]).norm() <= 0.1 * moved, key


@pytest.mark.parametrize("stage", [0, 3])
def test_gradient_checkpointing_does_not_change_the_update(
    straight: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    other = run_script(tmp_path / "other.pt", stage, 1, "--checkpointing", "yes")
    assert_same(straight, other)
    assert other["calls"] > straight["calls"]


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "parameters")])
def test_offloading_does_not_change_the_update(
    straight: dict[str, Any], tmp_path: Path, stage: int, offload: str
) -> None:
    """With a DeepSpeed file of the user's own as well."""
    own = tmp_path / "deepspeed.json"
    own.write_text('{"zero_optimization": {"reduce_bucket_size": 1000000}, "wall_clock_breakdown": false}')
    flags = ("--offload", offload, "--deepspeed", str(own))
    assert_same(straight, run_script(tmp_path / "other.pt", stage, 1, *flags))


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "adamw"), (2, "muon"), (3, "adamw")])
def test_a_gradient_that_is_not_finite_is_skipped(
    straight: dict[str, Any], untouched: dict[str, Any], tmp_path: Path, stage: int, optimizer: str
) -> None:
    after = run_script(tmp_path / "after.pt", stage, 1, "--nan", "yes", "--optimizer", optimizer)
    assert len(after["applied"]) == 5
    assert not after["applied"].any()
    for name in ("actor", "critic"):
        assert all(torch.equal(tensor, after[name][key]) for key, tensor in untouched[name].items())
        assert not all(torch.equal(tensor, straight[name][key]) for key, tensor in untouched[name].items())


def test_gradients_that_stay_not_finite_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="critic: 2 updates in a row had a gradient that is not finite"):
        run_script(tmp_path / "after.pt", 0, 1, "--nan", "yes", "--max-skipped", "2")


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "adamw"), (2, "adamw"), (3, "muon")])
def test_a_tensor_without_a_gradient_is_named(tmp_path: Path, stage: int, optimizer: str) -> None:
    with pytest.raises(
        AssertionError, match=r"actor: 1 of \d+ trainable tensors had no gradient .*: policy\.forgotten\."
    ):
        run_script(tmp_path / "unused.pt", stage, 1, "--unused", "yes", "--optimizer", optimizer)


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "muon"), (3, "adamw")])
def test_the_rehearsal_of_the_worst_case_leaves_no_trace(tmp_path: Path, stage: int, optimizer: str) -> None:
    """Bit for bit: losses, weights, and through them the optimizer's states."""
    flags = ("--optimizer", optimizer)
    plain = run_script(tmp_path / "plain.pt", stage, 2, *flags)
    after = run_script(tmp_path / "rehearsed.pt", stage, 2, "--rehearse", "yes", *flags)
    for key in ("losses", "norms", "logprobs"):
        assert torch.equal(plain[key], after[key]), key
    for name in ("actor", "critic"):
        assert all(torch.equal(tensor, after[name][key]) for key, tensor in plain[name].items())


def test_an_engine_that_does_not_take_the_weights_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"weight sync: engine and trainer differ by .* nats per token"):
        run_script(tmp_path / "deaf.pt", 0, 1, "--deaf", "yes")


@pytest.fixture(scope="module")
def continued(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The second round, from the checkpoint of the first, on one rank."""
    out = tmp_path_factory.mktemp("continued") / "same.pt"
    return run_script(out, 0, 1, "--load", str(saved("adamw", 0, 1)[1]))


@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 2)])
def test_a_checkpoint_continues_under_another_stage_and_number_of_ranks(
    saved: Saved,
    continued: dict[str, Any],
    tmp_path: Path,
    stage: int,
    ranks: int,
) -> None:
    _, checkpoints = saved("adamw", 0, 1)
    other = run_script(tmp_path / "other.pt", stage, 1, "--load", str(checkpoints), ranks=ranks)
    assert continued["stop"] == other["stop"] == (4, 6)
    assert_same(continued, other)


@pytest.mark.parametrize(("before", "after"), [((2, 2), (0, 1)), ((0, 1), (3, 2))])
def test_muons_states_come_back_under_another_stage_and_number_of_ranks(
    saved: Saved, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Bit for bit; under ZeRO 2 matrices lie across the border between two ranks."""
    first, checkpoints = saved("muon", *before)
    flags = ("--load", str(checkpoints), "--optimizer", "muon")
    other = run_script(tmp_path / "other.pt", after[0], 0, *flags, ranks=after[1])
    assert {name.rpartition(".")[2] for name in first["states"]} == {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert first["states"].keys() == other["states"].keys()
    for name, state in first["states"].items():
        assert state.any(), name
        assert torch.equal(state, other["states"][name]), name
