"""The workaround for vLLM's CPU router, in vLLM's environment."""

from support.vllm_process import run_in_vllm

ROUTE = """
import torch
from rollouts.vllm.cpu_router import route_sigmoid_on_cpu
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

def route(**settings):
    bias = torch.tensor([0.0, 0.0, 0.5, 0.0])
    router = CPURouter(2, 4, e_score_correction_bias=bias, routed_scaling_factor=3.0, **settings)
    return router._compute_routing(torch.zeros(1, 8), torch.tensor([[2.0, 1.0, 0.5, -1.0]]), None)

"""


def test_without_the_workaround_the_cpu_router_refuses_sigmoid() -> None:
    """When this fails, vLLM has learned it, and rollouts/vllm/cpu_router.py can go."""
    program = """
try:
    route(scoring_func="sigmoid")
except AssertionError:
    print("refused")
"""
    assert run_in_vllm("-c", ROUTE + program).split()[-1] == "refused"


def test_with_it_the_bias_selects_and_the_scores_weigh() -> None:
    """Scores .88, .73, .62, .27: the bias lifts the third over the second and is not in the weights."""
    program = """
assert route_sigmoid_on_cpu() and route_sigmoid_on_cpu()
weights, experts = route(scoring_func="sigmoid")
order = experts[0].argsort()
assert experts[0][order].tolist() == [0, 2], experts
scores = torch.tensor([2.0, 0.5]).sigmoid()
assert torch.allclose(weights[0][order], 3 * scores / scores.sum()), weights
weights, experts = route(scoring_func="softmax")
assert sorted(experts[0].tolist()) == [0, 1]
print("routed")
"""
    assert run_in_vllm("-c", ROUTE + program).split()[-1] == "routed"


def test_it_does_nothing_where_the_platform_mocked_here_is_no_cpu() -> None:
    program = """
from unittest.mock import patch
from vllm.platforms import current_platform
before = CPURouter.__init__
with patch.object(type(current_platform), "is_cpu", return_value=False):
    assert route_sigmoid_on_cpu() is False
assert CPURouter.__init__ is before
print("untouched")
"""
    assert run_in_vllm("-c", ROUTE + program).split()[-1] == "untouched"
