# /// case
# title = "Threads and pools of threads do their work and give their results"
# plain = true
# ///

# %%
import threading
from concurrent.futures import ThreadPoolExecutor

found = []
threads = [threading.Thread(target=found.append, args=(n,)) for n in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sorted(found)
#: value = "[0, 1, 2]"

# %%
def work(n):
    if n == 2:
        raise ValueError("two")
    return n * n

with ThreadPoolExecutor(4) as pool:
    futures = [pool.submit(work, n) for n in range(4)]
    print(futures[3].result(), repr(futures[2].exception()), list(pool.map(str, range(3))))
#: stdout = "9 ValueError('two') ['0', '1', '2']\n"
