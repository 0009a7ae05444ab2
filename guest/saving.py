"""A session's variables as a pickle, by `dill`: what a guest without memory images has for snapshots.

The file is what RLM's Docker environment keeps as `state.dill`: a dict of variables. Under `RECORD`, a name that no
cell's variable has, lies what the agent knows beside them.
"""

import io
import pickle

from .namespace import Answer
from .values import Body, short_name

RECORD = "__kaa__"
LOST_MAX = 200
_FILES = (io.IOBase,)
_RECORD_PARTS = (("counts", dict), ("first", list), ("answer", dict))
_KEPT_DUNDERS = frozenset(("__annotations__",))
_type, _str, _len, _bytes, _isinstance = type, str, len, bytes, isinstance


def variables(namespace):
    """What is the cells' own."""
    return {
        name: value
        for name, value in [*namespace.names.items()]
        if _type(name) is _str
        and name not in namespace.fixed
        and name != "answer"
        and (not (name[:2] == "__" and name[-2:] == "__") or name in _KEPT_DUNDERS)
    }


def make_save(agent):
    def save(_header, _data):
        """All variables that can be saved, and the names of those that can't."""
        import dill

        namespace = agent.namespace
        wanted, lost = variables(namespace), []
        for name, value in [*wanted.items()]:
            if _isinstance(value, _FILES):
                lost.append(name)  # An open file would be opened again, if its name still means the same.
                del wanted[name]
        record = {
            "counts": dict(namespace.counts),
            "first": [*namespace.first],
            "answer": dict(namespace.answer),
        }

        def dump():
            return dill.dumps({**wanted, RECORD: record}, protocol=4)

        def is_good(value):
            dill.loads(dill.dumps(value, protocol=4))
            return True

        def attempt(function, *args):
            result = agent.guarded(None, function, *args)
            if agent.channel.limit is not None:
                raise ValueError("the session: its saving was stopped (%s)" % agent.channel.limit)
            return result

        agent.channel.limit = None
        # All at once, so that what two variables share stays shared.
        data = attempt(dump)
        if data is None:
            for name, value in [*wanted.items()]:
                if not attempt(is_good, value):
                    lost.append(name)
                    del wanted[name]
            data = attempt(dump)
        if data is None:
            record["answer"] = {"content": "", "ready": False}
            data = attempt(dump)
        if data is None:
            raise ValueError("the session: its variables can't be saved by dill")
        body = Body()
        body.add(data)
        return {"lost": [short_name(name) for name in lost[:LOST_MAX]], "lost_count": _len(lost)}, body

    return save


def part(record, name, kind):
    """A part of the record, or an empty one if there is none of this kind."""
    found = record.get(name) if _type(record) is dict else None
    return found if _type(found) is kind else kind()


def make_load(agent):
    def load(_header, data):
        """Goes over to saved variables. Whatever goes wrong leaves the session as it was."""
        import dill

        def read():
            return dill.loads(_bytes(data))

        try:
            agent.channel.watching = True
            try:
                found = read()
            finally:
                agent.channel.watching = False
        except pickle.UnpicklingError as error:
            raise ValueError("the snapshot: it is no pickle: %s" % error) from None
        except Exception as error:
            raise ValueError("the snapshot: it can't be loaded: %s: %s" % (_type(error).__name__, error)) from None
        if _type(found) is not dict or not all(_type(name) is _str for name in found):
            raise ValueError("the snapshot: it is no dict of variables")
        record, namespace = found.pop(RECORD, None), agent.namespace
        # Somebody else may have written it. From here on nothing can go wrong.
        counts, first, answer = (part(record, name, kind) for name, kind in _RECORD_PARTS)
        namespace.reset()
        namespace.names.update(found)
        for kind in namespace.counts:
            count = counts.get(kind, 0)
            namespace.counts[kind] = count if _type(count) is int and count >= 0 else 0
            if kind in [name for name in first if _type(name) is _str] and kind + "_0" in found:
                namespace.first[kind] = namespace.names[kind] = found[kind + "_0"]
        if answer:
            namespace.answer = namespace.names["answer"] = Answer(answer)
        namespace.restore()
        return {}, None

    return load
