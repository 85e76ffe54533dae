"""Let vLLM 0.32 route Step's sigmoid MoE on a CPU; imports nothing of this project, so any process of vLLM can.

vLLM's CPU router takes sigmoid scores and a selection bias in its grouped top-k alone; without groups it asserts
softmax. One group that holds all experts is the same selection, so that is what a sigmoid router is made to use.
"""

from __future__ import annotations

from functools import wraps
from typing import Any


def route_sigmoid_on_cpu() -> bool:
    """Teach this process's vLLM, before it builds a model. False, and nothing done, where vLLM runs on no CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    build = CPURouter.__init__
    if hasattr(build, "__wrapped__"):
        return True

    @wraps(build)
    def build_with_one_group(router: Any, *args: Any, **kwargs: Any) -> None:
        build(router, *args, **kwargs)
        if router.scoring_func == "sigmoid" and not router.use_grouped_topk and router.custom_routing_function is None:
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1

    CPURouter.__init__ = build_with_one_group
    return True
