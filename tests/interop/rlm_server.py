"""RLM's LM handler over clients without models: prints its port, serves until stdin ends."""

import sys

from rlm.clients.base_lm import BaseLM
from rlm.core.lm_handler import LMHandler
from rlm.core.types import ModelUsageSummary, UsageSummary


class Mock(BaseLM):
    def completion(self, prompt):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if text == "boom":
            raise ValueError("kaput")
        return f"{self.model_name} heard {text}"

    async def acompletion(self, prompt):
        return self.completion(prompt)

    def get_last_usage(self):
        return ModelUsageSummary(1, 2, 3)

    def get_usage_summary(self):
        return UsageSummary({self.model_name: self.get_last_usage()})


handler = LMHandler(Mock("default"), other_backend_client=Mock("second"))
handler.register_client("third", Mock("third"))
with handler:
    print(handler.port, flush=True)
    sys.stdin.read()
