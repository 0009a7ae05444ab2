"""What RLM's own clients get from the LM handler at an address: plan and result are JSON."""

import json
import sys

from rlm.core.comms_utils import LMRequest, send_lm_request, send_lm_request_batched
from rlm.environments.local_repl import LocalREPL

plan = json.load(sys.stdin)
address = (plan["host"], plan["port"])
repl = LocalREPL(lm_handler_address=address)
result = {
    "cells": [repl.execute_code(cell).to_dict() for cell in plan["cells"]],
    "requests": [
        send_lm_request(address, LMRequest.from_dict(request)).to_dict()
        for request in plan["requests"]
    ],
    "batches": [
        [response.to_dict() for response in send_lm_request_batched(address, prompts, depth=0)]
        for prompts in plan["batches"]
    ],
}
repl.cleanup()
json.dump(result, sys.stdout)
