"""What is built around an engine follows what the engine can do."""

from types import SimpleNamespace

import pytest

from mispo.build.rollouts import build_attributor
from mispo.config.load import load_config
from rollouts.engine import Capabilities
from support.engines import EchoEngine


@pytest.mark.parametrize(
    ("experts", "replay", "record", "recorded"),
    [(True, True, True, True), (False, True, True, False), (True, False, True, False), (True, True, False, False)],
)
def test_routing_is_attributed_where_the_engine_records_and_replays_it(
    experts: bool, replay: bool, record: bool, recorded: bool
) -> None:
    engine = EchoEngine()
    engine.can = Capabilities(experts=experts, replay=replay, loops=False, stop_strings=False)
    setup = SimpleNamespace(config=load_config(["recipe=smoke", f"router.record={str(record).lower()}"]))
    attributor = build_attributor(setup, SimpleNamespace(engine=engine), learner=None)
    assert attributor is not None
    assert attributor.recorded == recorded
