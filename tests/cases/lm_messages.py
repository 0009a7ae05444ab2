# /// case
# title = "A prompt may be a chat: a list of messages or one message"
# session.lm = "echo"
# ///

# %%
import json
chat = [{"role": "system", "content": "é"}, {"role": "user", "content": "hi", "n": [1, None, True]}]
json.loads(llm_query(chat)) == chat, json.loads(llm_query(chat[0])) == chat[0]
#: value = "(True, True)"
#: lm_prompts = 2

# %%
[json.loads(answer) if answer[0] in "[{" else answer for answer in llm_query_batched([chat, "text", chat[1]])] == [chat, "text", chat[1]]
#: value = "True"
