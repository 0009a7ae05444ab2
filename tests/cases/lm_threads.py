# /// case
# title = "Threads and pools that models write gather LM calls into calls at once"
# session.lm = "slow"
# ///

# %%
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    print(list(pool.map(llm_query, "abcdefgh")))
#: stdout = "['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']\n"
#: at_once = 8
#: lm_prompts = 8

# %%
def ask(x):
    return llm_query("p" + x) + "!"
with ThreadPoolExecutor(8) as pool:
    print([future.result() for future in [pool.submit(ask, x) for x in "abcdefgh"]])
#: stdout = "['pa!', 'pb!', 'pc!', 'pd!', 'pe!', 'pf!', 'pg!', 'ph!']\n"
#: at_once = 8

# %%
import threading
out = {}
def work(x):
    out[x] = llm_query(x)
threads = [threading.Thread(target=work, args=(x,)) for x in "abcdefgh"]
for thread in threads: thread.start()
for thread in threads: thread.join()
[out[x] for x in "abcdefgh"]
#: value = "['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']"
#: at_once = 8

# %%
import asyncio
async def main():
    return await asyncio.gather(*[asyncio.to_thread(llm_query, x) for x in "abcd"])
asyncio.run(main())
#: value = "['a', 'b', 'c', 'd']"
#: at_once = 4
