# /// case
# title = "asyncio runs: gather, sleep, tasks, timeouts, cancelling, queues"
# contract = ["state"]
# plain = true
# ///

# %%
import asyncio

async def double(n):
    await asyncio.sleep(0.01 * (3 - n))
    return n * 2

async def main():
    return await asyncio.gather(double(1), double(2), double(3))

asyncio.run(main())
#: value = "[2, 4, 6]"

# %%
async def slow():
    await asyncio.sleep(60)

async def late():
    try:
        await asyncio.wait_for(slow(), 0.05)
    except asyncio.TimeoutError:
        return "late"

async def cancelled():
    task = asyncio.create_task(slow())
    await asyncio.sleep(0)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return "cancelled"

async def queued():
    queue = asyncio.Queue()
    async def produce():
        for n in range(3):
            await queue.put(n)
    task = asyncio.create_task(produce())
    found = [await queue.get() for _ in range(3)]
    await task
    return found

print(asyncio.run(late()), asyncio.run(cancelled()), asyncio.run(queued()))
#: stdout = "late cancelled [0, 1, 2]\n"

# %%
async def numbers():
    for n in range(3):
        yield n

class Door:
    async def __aenter__(self):
        return "open"
    async def __aexit__(self, *error):
        print("shut")

async def both():
    async with Door() as door:
        return door, [n async for n in numbers()]

asyncio.run(both())
#: stdout = "shut\n"
#: value = "('open', [0, 1, 2])"

# %%
async def fails():
    raise LookupError("inside")

asyncio.run(fails())
#: exception = "LookupError: inside"
