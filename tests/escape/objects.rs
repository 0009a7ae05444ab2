//! Hostile cells, objects and exceptions: after each the host is alive, its result is well formed and
//! bounded, a neighbour is unharmed, and the session still has what it had.
//!
//! A cell can lie about its own result, since it runs in the same interpreter as the agent: nothing here asks
//! that it tells the truth.

use std::time::Duration;

use kaa::{Environment, EnvironmentExt, Error, ExecuteOptions, Execution, Limit, Limits, Outcome};

use super::common::{limited, print, run};

/// What a case must come to.
pub(crate) enum Expect {
    /// An exception of this type, and nothing lost.
    Raises(&'static str),
    /// The interpreter ended with this code; rolled back.
    Exits(i32),
    /// Softly stopped by this limit.
    Soft(Limit),
    /// Rolled back after this limit.
    Hard(Limit),
    /// It does its work.
    Completes,
    /// It ends by itself, one way or another.
    Ends,
}
use Expect::{Completes, Ends, Exits, Hard, Raises, Soft};

const CASES: &[(&str, &str, Expect)] = &[
    // The lines that abort a peer's host process.
    ("json depth", "import json; json.loads('['*200000)", Raises("RecursionError")),
    ("parentheses", "eval('('*5000 + ')'*5000)", Raises("MemoryError")),
    (
        "deep repr",
        "deep = []\nfor i in range(200000): deep = [deep]\nrepr(deep)",
        Raises("RecursionError"),
    ),
    ("recursion", "def f(): f()\nf()", Raises("RecursionError")),
    (
        "recursion without limit",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return f(n + 1)\nf(0)",
        Raises("RecursionError"),
    ),
    ("dropping a deep list", "deep = None", Exits(134)),
    ("_exit", "import os; os._exit(3)", Exits(3)),
    ("abort", "import os; os.abort()", Exits(134)),
    ("kill", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", Ends),
    ("raise_signal", "import signal; signal.raise_signal(signal.SIGABRT)", Exits(134)),
    ("big power", "3**10**8", Soft(Limit::Compute)),
    ("big shift", "1 << 10**11", Ends),
    ("regex bomb", "import re; re.match('(a+)+$', 'a'*40 + 'b')", Soft(Limit::Compute)),
    ("bytearray", "b = bytearray(2**30 + 2**29)", Raises("MemoryError")),
    ("list bomb", "x = [0]\nwhile True: x = x + x", Raises("MemoryError")),
    ("string bomb", "s = 'x'\nwhile True: s += s", Raises("MemoryError")),
    ("dict bomb", "d = {}\ni = 0\nwhile True:\n    d[i] = 'x' * 1000\n    i += 1", Ends),
    ("endless loop", "while True: pass", Soft(Limit::Compute)),
    ("endless generator", "sum(x for x in iter(int, 1))", Soft(Limit::Compute)),
    ("sorted with key", "sorted(range(10**7), key=lambda x: -x)", Ends),
    (
        "stubborn loop",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        Hard(Limit::Compute),
    ),
    (
        "stubborn finally",
        "def f():\n    try:\n        while True: pass\n    finally: f()\nf()",
        Ends,
    ),
    ("sleep", "import time; time.sleep(100)", Soft(Limit::Wall)),
    (
        "stubborn sleep",
        "import time\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass",
        Hard(Limit::Wall),
    ),
    ("select", "import select; select.select([], [], [], 100)", Ends),
    (
        "multiprocessing",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        Ends,
    ),
    ("ctypes", "import ctypes; ctypes.string_at(0)", Ends),
    ("raw pointer", "import _ctypes", Raises("ModuleNotFoundError")),
    (
        "bad code object",
        "def f(): pass\nf.__code__ = f.__code__.replace(co_code=b'\\xff' * 50)\nf()",
        Ends,
    ),
    (
        "closing descriptors",
        "import os\nfor fd in range(100):\n    try: os.close(fd)\n    except OSError: pass",
        Ends,
    ),
    ("replacing streams", "import sys\nsys.stdout = sys.stderr = None\ndel sys.stdin", Ends),
    (
        "replacing print",
        "import builtins\nbuiltins.print = builtins.repr = builtins.len = None",
        Ends,
    ),
    ("emptying builtins", "import builtins\nvars(builtins).clear()", Ends),
    (
        "replacing json",
        "import json\njson.dumps = json.loads = None\nimport sys\nsys.modules.clear()",
        Ends,
    ),
    (
        "tracing",
        "import sys\nsys.settrace(lambda *a: 1/0)\nsys.setprofile(lambda *a: 1/0)\nprint(1)",
        Ends,
    ),
    ("hostile repr", "class A:\n    def __repr__(self): raise SystemExit(9)\na = A()\na", Ends),
    ("endless repr", "class A:\n    def __repr__(self):\n        while True: pass\na = A()", Ends),
    (
        "hostile exception",
        "class E(Exception):\n    def __str__(self): raise E()\nraise E()",
        Raises("E"),
    ),
    (
        "hostile class",
        "class M(type):\n    @property\n    def __name__(cls): 1/0\nclass E(Exception, metaclass=M): pass\nraise E",
        Ends,
    ),
    (
        "hostile del",
        "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a",
        Ends,
    ),
    (
        "deleting the agent",
        "import sys\nfor name in list(sys.modules):\n    if 'kaa' in name: del sys.modules[name]",
        Ends,
    ),
    ("gutting the agent", "import kaa_agent.agent as a\nvars(a).clear()", Ends),
    ("null source", "\0", Raises("SyntaxError")),
    ("surrogates", "print('\\ud800')", Ends),
    ("atexit", "import atexit; atexit.register(lambda: 1/0)", Ends),
    (
        "threads",
        "import threading\nt = threading.Thread(target=print, args=(1,)); t.start(); t.join()",
        Ends,
    ),
    ("held lock", "import threading\nl = threading.Lock(); l.acquire(); l.acquire()", Ends),
    ("raw lock", "import _thread\nl = _thread.allocate_lock(); l.acquire(); l.acquire()", Ends),
    ("gc storm", "import gc\ngc.set_threshold(1)\nx = [[] for _ in range(20000)]", Ends),
];

/// Objects whose methods are hostile: each `a` or exception is looked at by the report after its cell.
const OBJECTS: &[(&str, &str)] = &[
    ("repr raises", "class A:\n    def __repr__(self): raise ValueError(self)\na = A()\na"),
    ("repr prints", "class A:\n    def __repr__(self): print('from repr'); return 'A'\na = A()\na"),
    ("repr exits", "class A:\n    def __repr__(self): import os; os._exit(7)\na = A()\na"),
    ("repr aborts", "class A:\n    def __repr__(self): import os; os.abort()\na = A()"),
    ("repr recurses", "class A:\n    def __repr__(self): return repr(self)\na = A()\na"),
    ("repr is huge", "class A:\n    def __repr__(self): return 'x' * 10 ** 8\na = A()\na"),
    ("repr is no text", "class A:\n    def __repr__(self): return 5\na = A()\na"),
    (
        "repr is a subclass",
        "class S(str):\n    def __getitem__(self, at): return S('y' * 10 ** 7)\n    def __len__(self): return 1\n    def __str__(self): 1/0\nclass A:\n    def __repr__(self): return S('x' * 10 ** 6)\na = A()\na",
    ),
    (
        "repr changes globals",
        "class A:\n    def __repr__(self):\n        globals().clear(); return 'A'\nkeep2 = keep\na = A()\nkeep = keep2",
    ),
    ("repr calls a model", "class A:\n    def __repr__(self): return llm_query('x')\na = A()\na"),
    (
        "repr is a lone surrogate",
        "class A:\n    def __repr__(self): return '\\ud800\\0\\x1b[2J'\na = A()\na",
    ),
    (
        "repr of a class",
        "class M(type):\n    def __repr__(cls): 1/0\n    def __getattribute__(cls, name): 1/0\nclass A(metaclass=M): pass\na = A()\nA",
    ),
    (
        "class lies",
        "class A:\n    @property\n    def __class__(self): return dict\n    def __getattribute__(self, name): raise KeyboardInterrupt\na = A()\na",
    ),
    (
        "equality lies",
        "class A(str):\n    def __eq__(self, other): raise SystemExit\n    def __hash__(self): return hash('keep')\na = {A('k'): 1}\na",
    ),
    (
        "keys of globals",
        "class K(str):\n    def __eq__(self, other): raise RuntimeError\n    def __hash__(self): return hash('keep')\nglobals()[K('other')] = 1",
    ),
    ("names are no texts", "globals()[5] = 1; globals()[None] = 2; globals()[(1,)] = 3"),
    (
        "name is a subclass",
        "class K(str):\n    def isidentifier(self): return True\n    def startswith(self, *a): raise MemoryError\nglobals()[K('hidden')] = 1",
    ),
    (
        "dict is a subclass",
        "class D(dict):\n    def items(self): return [(1,)] * 10 ** 6\n    def __len__(self): return -1\n    def __iter__(self): raise GeneratorExit\na = D(x=1)\na",
    ),
    (
        "number is a subclass",
        "class I(int):\n    def __int__(self): return self\n    def __str__(self): 1/0\n    def bit_length(self): return -5\n    __repr__ = __index__ = __str__\na = I(5)\na",
    ),
    ("format", "class A:\n    def __format__(self, spec): return 'x' * 10 ** 7\nprint(f'{A()}')"),
    (
        "del resurrects",
        "saved = []\nclass A:\n    def __del__(self): saved.append(self)\na = A(); del a; b = saved[0]; saved.clear(); del b",
    ),
    (
        "del raises",
        "class A:\n    def __del__(self): raise SystemExit(5)\na = A(); del a; [A() for _ in range(1000)]",
    ),
    (
        "reduce",
        "class A:\n    def __reduce__(self): return (eval, ('1/0',))\n    def __reduce_ex__(self, n): raise SystemExit\na = A()\na",
    ),
    (
        "buffer",
        "class A:\n    def __buffer__(self, flags): return memoryview(b'x' * 10 ** 6)\na = A()\na",
    ),
    ("cyclic", "a = []; a.append(a); d = {}; d['d'] = d; t = (a, d); a.append(t)\nt"),
    ("many ways down", "a = []\nfor n in range(60): a = [a, a]\na"),
    ("huge type name", "a = type('T' * 10 ** 7, (), {})()\na"),
    (
        "type name of a subclass",
        "class S(str):\n    def __str__(self): 1/0\na = type(S('T'), (), {})()\na",
    ),
    ("surrogate type name", "a = type('T\\ud800\\n\\x1b[2J', (), {})()\na"),
    (
        "module property",
        "import types\nclass M(types.ModuleType):\n    def __getattr__(self, name): raise SystemExit\nm = M('m')\nm",
    ),
];

/// Exceptions that are raised.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("str raises itself", "class E(Exception):\n    def __str__(self): raise self\nraise E"),
    ("str is huge", "raise Exception('x' * 10 ** 8)"),
    ("str is no text", "class E(Exception):\n    def __str__(self): return b'x'\nraise E"),
    ("str exits", "class E(Exception):\n    def __str__(self): import os; os._exit(7)\nraise E"),
    (
        "str does not end",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    ),
    ("str is a surrogate", "raise Exception('\\ud800\\n\\0')"),
    ("name is huge", "raise type('E' * 10 ** 7, (Exception,), {})"),
    ("name is a surrogate", "raise type('E\\ud800', (Exception,), {})"),
    (
        "name raises",
        "class M(type):\n    @property\n    def __name__(cls): 1/0\n    __qualname__ = __module__ = __name__\nclass E(Exception, metaclass=M): pass\nraise E",
    ),
    ("impersonates a limit", "raise LimitReached('wall')"),
    ("subclass of a limit", "class LimitReached(LimitReached): pass\nraise LimitReached('fuel')"),
    ("same name as a limit", "class LimitReached(BaseException): pass\nraise LimitReached"),
    ("impersonates the agent's", "raise type('_Full', (BaseException,), {})"),
    ("keyboard", "raise KeyboardInterrupt"),
    ("generator exit", "raise GeneratorExit"),
    ("exit with an object", "class A:\n    def __str__(self): 1/0\nraise SystemExit(A())"),
    ("exit with a number", "raise SystemExit(10 ** 100)"),
    ("subclass of exit", "class E(SystemExit):\n    code = property(lambda self: 1/0)\nraise E(3)"),
    (
        "base exception",
        "class E(BaseException):\n    def __getattribute__(self, name): raise self\nraise E",
    ),
    (
        "cause property",
        "class E(Exception):\n    __cause__ = property(lambda self: 1/0)\n    __context__ = __traceback__ = __notes__ = __suppress_context__ = __cause__\nraise E",
    ),
    (
        "cyclic causes",
        "a, b = ValueError(1), ValueError(2)\na.__cause__ = b; b.__cause__ = a\nraise a",
    ),
    ("endless causes", "class E(Exception):\n    __cause__ = property(lambda self: E())\nraise E"),
    (
        "many causes",
        "e = None\nfor n in range(20000):\n    new = ValueError(n); new.__context__ = e; e = new\nraise e",
    ),
    ("notes", "e = ValueError(1); e.__notes__ = ['x' * 10 ** 7, 5, None]\nraise e"),
    (
        "notes are no list",
        "class N:\n    def __iter__(self): raise SystemExit\ne = ValueError(1); e.__notes__ = N()\nraise e",
    ),
    ("wide group", "raise ExceptionGroup('g', [ValueError(n) for n in range(20000)])"),
    (
        "deep group",
        "g = ValueError(1)\nfor n in range(3000): g = ExceptionGroup('g', [g])\nraise g",
    ),
    (
        "long traceback",
        "def f(n):\n    if n: f(n - 1)\n    else: 1/0\nimport sys; sys.setrecursionlimit(5000); f(3000)",
    ),
    ("file name", "exec(compile('1/0', '\\x1b[2J\\n' * 10000, 'exec'))"),
    ("missing file name", "exec(compile('1/0', '../../../../etc/passwd', 'exec'))"),
    (
        "source of a loader",
        "import sys\nclass L:\n    def get_source(self, name): 1/0\n__loader__ = L(); __name__ = 'x'\nexec(compile('1/0', 'nowhere', 'exec'), {'__loader__': L(), '__name__': 'y'})",
    ),
    (
        "syntax error of its own",
        "raise SyntaxError('m', ('f' * 10 ** 6, 10 ** 9, 10 ** 9, 'text' * 10 ** 6))",
    ),
    (
        "syntax error of objects",
        "e = SyntaxError('m'); e.lineno = e.text = e.offset = e.filename = object()\nraise e",
    ),
    ("unicode error", "raise UnicodeDecodeError('u', b'x' * 10 ** 7, 0, 10 ** 7, 'r')"),
    ("key error", "raise KeyError('x' * 10 ** 7)"),
    ("import error", "raise ImportError(name=object(), path=object())"),
    ("name error", "globals()['n' * 10 ** 6] = 1\nnnn"),
    ("memory error", "raise MemoryError"),
    ("recursion error", "raise RecursionError('x')"),
    ("stop iteration", "raise StopIteration(5)"),
];

/// What Python looks up or calls by itself, replaced.
const HOOKS: &[(&str, &str)] = &[
    ("excepthook", "import sys\nsys.excepthook = sys.displayhook = sys.unraisablehook = None\n1/0"),
    (
        "hooks that raise",
        "import sys\ndef f(*a): raise SystemExit\nsys.excepthook = sys.displayhook = sys.unraisablehook = f\n1/0",
    ),
    (
        "audit hook",
        "import sys\nhits = []\ndef f(*a):\n    hits.append(a)\n    if len(hits) > 50: raise RuntimeError\nsys.addaudithook(f)",
    ),
    (
        "settrace",
        "import sys, threading\ndef f(*a):\n    while True: pass\nsys.settrace(f); threading.settrace(f)",
    ),
    ("setprofile", "import sys\ndef f(*a): raise KeyboardInterrupt\nsys.setprofile(f)"),
    (
        "monitoring",
        "import sys\nm = sys.monitoring; m.use_tool_id(3, 'x')\ndef f(*a): raise SystemExit\nm.register_callback(3, m.events.CALL, f); m.set_events(3, m.events.CALL)",
    ),
    (
        "import",
        "import builtins\ndef f(*a, **k): raise SystemExit\nbuiltins.__import__ = builtins.__build_class__ = f",
    ),
    (
        "finders",
        "import sys\nsys.meta_path[:] = sys.path[:] = sys.path_hooks[:] = []\nsys.path_importer_cache.clear()",
    ),
    ("modules", "import sys\nfor name in list(sys.modules): sys.modules[name] = 5"),
    (
        "types",
        "import builtins\nfor name in ('str', 'int', 'dict', 'list', 'type', 'bytes', 'object', 'isinstance', 'Exception', 'BaseException'): setattr(builtins, name, None)",
    ),
    (
        "streams",
        "import sys\nclass S:\n    def write(self, *a): raise SystemExit\n    def flush(self): raise SystemExit\n    def __getattr__(self, name): raise SystemExit\nsys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = S()",
    ),
    ("closed streams", "import sys, os\nsys.stdout.close(); sys.stderr.close(); sys.stdin.close()"),
    (
        "stream internals",
        "import sys\nfor s in (sys.stdout, sys.stderr):\n    try: s.buffer.close()\n    except Exception: pass\n    try: s.detach()\n    except Exception: pass",
    ),
    (
        "library",
        "import json, traceback, io, linecache, codecs, re, keyword, types\nfor m in (json, traceback, io, linecache, codecs, re, keyword, types): vars(m).clear()",
    ),
    (
        "patched library",
        "import json, traceback, linecache, ast\ndef f(*a, **k): raise SystemExit\njson.dumps = json.loads = traceback.format_exception = linecache.getline = linecache.getlines = linecache.updatecache = ast.parse = f\n1/0",
    ),
    (
        "codecs",
        "import codecs\ndef f(*a): raise SystemExit\ncodecs.register(f); codecs.register_error('strict', f); codecs.register_error('surrogatepass', f); codecs.register_error('replace', f)\nprint('\\ud800')",
    ),
    (
        "collector",
        "import gc\ndef f(*a): raise SystemExit\ngc.callbacks.append(f); gc.set_threshold(1); gc.set_debug(gc.DEBUG_LEAK)\n[[] for _ in range(1000)]",
    ),
    (
        "collector spins",
        "import gc\ndef f(*a):\n    while True: pass\ngc.callbacks.append(f); gc.collect()",
    ),
    (
        "weak references",
        "import weakref\nclass A: pass\na = A()\ndef f(r):\n    while True: pass\nr = weakref.ref(a, f)\ndel a",
    ),
    (
        "exit functions",
        "import atexit, weakref\nclass A: pass\na = A(); weakref.finalize(a, print, 'x')\natexit.register(lambda: 1/0); atexit._run_exitfuncs()",
    ),
    (
        "signals",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass",
    ),
    ("recursion limit", "import sys\nsys.setrecursionlimit(40)"),
    ("high recursion limit", "import sys\nsys.setrecursionlimit(2 ** 31 - 1)"),
    (
        "switch interval",
        "import sys\nsys.setswitchinterval(1e-9); sys.set_int_max_str_digits(0); sys.set_asyncgen_hooks(lambda a: 1/0, lambda a: 1/0)",
    ),
    (
        "frames of the agent",
        "import sys\nf = sys._getframe()\nwhile f:\n    for name in list(f.f_locals):\n        try: f.f_locals[name] = None\n        except Exception: pass\n    f = f.f_back",
    ),
    (
        "objects of the agent",
        "import gc\nfor o in gc.get_objects():\n    if type(o).__module__.startswith('kaa') and hasattr(o, '__dict__'): vars(o).clear()",
    ),
    (
        "functions of the agent",
        "import gc, types\nfor o in gc.get_objects():\n    if isinstance(o, types.FunctionType) and 'kaa' in (o.__module__ or ''):\n        try: o.__code__ = (lambda *a, **k: 1/0).__code__\n        except ValueError: pass",
    ),
    (
        "tables of the agent",
        "import sys\nfor n, m in list(sys.modules.items()):\n    if 'kaa' in n:\n        for k in list(vars(m)):\n            if not k.startswith('__'): vars(m)[k] = None",
    ),
    ("door", "import _host\n_host.call = lambda frame: b'garbage'\n1/0"),
    ("door says nothing", "import _host\n_host.call = lambda frame: b''"),
    ("door spins", "import _host\ndef f(frame):\n    while True: pass\n_host.call = f"),
    ("turn", "import builtins\nbuiltins.__kaa_turn__ = None\nbuiltins.LimitReached = None"),
    (
        "dict of main",
        "import __main__, sys\nvars(__main__).pop('__builtins__'); del sys.modules['__main__']",
    ),
    ("own frame", "import sys\nsys._getframe().clear"),
    (
        "generators of the agent",
        "import gc, types\nfor o in gc.get_objects():\n    if isinstance(o, (types.GeneratorType, types.CoroutineType)):\n        try: o.close()\n        except BaseException: pass",
    ),
    (
        "asynchronous",
        "import asyncio\nasync def f():\n    while True: await asyncio.sleep(0)\nasyncio.run(f())",
    ),
    (
        "task left behind",
        "import asyncio\nloop = asyncio.new_event_loop()\nasync def f():\n    try: await asyncio.sleep(1000)\n    finally:\n        while True: pass\nt = loop.create_task(f()); loop.run_until_complete(asyncio.sleep(0)); del t, loop",
    ),
    (
        "decorated answer",
        "class D(dict):\n    def get(self, *a): raise SystemExit\n    def __getitem__(self, k): raise SystemExit\nanswer = D(content='x', ready=True)",
    ),
    (
        "answer of objects",
        "class A:\n    def __str__(self): raise SystemExit\n    __repr__ = __bool__ = __str__\nanswer['content'] = A(); answer['ready'] = A()",
    ),
];

pub(crate) fn limits() -> Limits {
    Limits {
        compute: Duration::from_millis(800),
        wall: Duration::from_millis(1600),
        grace: Duration::from_millis(150),
        memory_bytes: 256 << 20,
        ..Limits::default()
    }
}

impl Expect {
    fn is_met(&self, execution: &Execution) -> bool {
        let kind = execution.exception.as_ref().map_or("", |e| e.type_name.as_str());
        let (outcome, rolled_back) = (execution.outcome, execution.rolled_back);
        match self {
            Raises(name) => outcome == Outcome::Raised && kind == *name && !rolled_back,
            Exits(code) => outcome == Outcome::Exited { code: *code } && rolled_back,
            Soft(limit) => {
                execution.limit == Some(*limit) && !rolled_back && outcome == Outcome::LimitReached
            }
            Hard(limit) => execution.limit == Some(*limit) && rolled_back,
            Completes => outcome == Outcome::Completed,
            Ends => true,
        }
    }
}

/// What is too large in a result, or doesn't fit together.
fn malformed(execution: &Execution) -> Option<String> {
    let mut sizes = vec![
        ("value", execution.value.as_ref().map_or(0, String::len), 512 << 10),
        ("variables", execution.variables.len(), 10_000),
        ("stdout", execution.stdout.bytes.len(), 1 << 20),
        // The traceback is at its end, beyond the cap.
        ("stderr", execution.stderr.bytes.len(), (1 << 20) + (512 << 10)),
    ];
    if let Some(exception) = &execution.exception {
        sizes.push(("type", exception.type_name.len(), 8 << 10));
        sizes.push(("message", exception.message.len(), 512 << 10));
        sizes.push(("traceback", exception.traceback.len(), 1 << 20));
    }
    for variable in &execution.variables {
        sizes.push(("name", variable.name.len(), 8 << 10));
        sizes.push(("type of a variable", variable.type_name.len(), 8 << 10));
        sizes.push(("repr", variable.repr.len(), 8 << 10));
    }
    if let Some((what, found, _)) = sizes.into_iter().find(|(_, found, most)| found > most) {
        return Some(format!("{what} of {found} bytes"));
    }
    let fits = match execution.outcome {
        Outcome::Raised => execution.exception.is_some(),
        Outcome::Completed => execution.exception.is_none(),
        Outcome::Exited { .. } | Outcome::LimitReached => true,
    };
    (!fits).then(|| format!("{:?} with {:?}", execution.outcome, execution.exception))
}

/// Limits for what is slow, and not about time.
pub(crate) fn patient() -> Limits {
    let long = Duration::from_secs(60);
    Limits { compute: long, wall: long, ..limits() }
}

/// Runs every case in one session, and looks after each at what is left of it, and at a neighbour.
pub(crate) async fn suffer<Code: AsRef<str>>(
    cases: impl Iterator<Item = (&'static str, Code, &'static Expect)>,
    most: Limits,
) {
    let mut neighbour = limited(limits());
    run(&mut neighbour, "keep = 'neighbour'").await;
    let mut session = limited(limits());
    run(&mut session, "keep = 41").await;
    let saved = session.snapshot().await.unwrap();
    let mut wrong = Vec::new();
    for (name, code, expect) in cases {
        // Recursion to a million frames.
        let own = if name.contains("recursion without") { patient() } else { most.clone() };
        let options = ExecuteOptions { limits: Some(own) };
        let found = match session.execute_opts(code.as_ref(), options).await {
            Ok(execution) => {
                let kind = execution.exception.as_ref().map_or("", |e| e.type_name.as_str());
                let text = format!(
                    "{:?} {:.50} {:?} rolled back: {}",
                    execution.outcome, kind, execution.limit, execution.rolled_back
                );
                if let Some(fault) = malformed(&execution) {
                    wrong.push(format!("{name}: {fault}"));
                }
                (expect.is_met(&execution), text)
            }
            // It broke the agent's own words; the session is as before.
            Err(error) => (matches!(error, Error::Protocol { .. }), error.to_string()),
        };
        if !found.0 {
            wrong.push(format!("{name}: {}", found.1));
        }
        for (who, environment, kept) in
            [("session", &mut session, "41\n"), ("neighbour", &mut neighbour, "neighbour\n")]
        {
            match environment.execute("print(keep)").await {
                Ok(after) if after.stdout.text() == kept => {}
                // What a cell did to its own interpreter stays done, until it's put back.
                Ok(_) | Err(Error::Protocol { .. }) if who == "session" => {
                    environment.restore(&saved).await.unwrap();
                    let text = print(environment, "print(keep)").await;
                    assert_eq!(text, kept, "{name}: not even as it was saved");
                    broken(name, &mut wrong);
                }
                Ok(after) => wrong.push(format!(
                    "{name}: the {who} lost its state ({}): {}",
                    found.1,
                    after.stderr.text()
                )),
                Err(error) => wrong.push(format!("{name}: the {who} is unusable: {error}")),
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Cells that do to their own interpreter, for good, what nobody can undo but who puts the session back.
const SELF_HARM: &[&str] = &["audit hook", "repr changes globals"];

fn broken(name: &str, wrong: &mut Vec<String>) {
    if !SELF_HARM.contains(&name) {
        wrong.push(format!("{name}: the session needs a restore"));
    }
}

#[tokio::test]
async fn hostile_cells_cost_nothing_but_themselves() {
    suffer(CASES.iter().map(|(name, code, expect)| (*name, *code, expect)), limits()).await;
}

#[tokio::test]
async fn hostile_objects_are_reported_within_bounds() {
    suffer(OBJECTS.iter().map(|(name, code)| (*name, *code, &Ends)), limits()).await;
}

#[tokio::test]
async fn hostile_exceptions_are_reported_within_bounds() {
    suffer(EXCEPTIONS.iter().map(|(name, code)| (*name, *code, &Ends)), limits()).await;
}

#[tokio::test]
async fn hooks_and_patches_are_undone_or_taken_back() {
    suffer(HOOKS.iter().map(|(name, code)| (*name, *code, &Ends)), limits()).await;
}

#[tokio::test]
async fn a_gigabyte_of_output_is_cut_at_the_cap() {
    let limits = Limits { output_bytes: 1 << 20, memory_bytes: 1 << 30, ..Limits::default() };
    let mut session = limited(limits);
    let one_line = run(&mut session, "print('x' * 200_000_000)").await;
    assert_eq!((one_line.stdout.total_bytes, one_line.stdout.bytes.len()), (200_000_001, 1 << 20));
    let lines = "import sys\ns = 'y' * 1_000_000\nfor _ in range(1000): sys.stderr.write(s)";
    let lines = run(&mut session, lines).await;
    assert_eq!((lines.stderr.total_bytes, lines.stderr.bytes.len()), (1_000_000_000, 1 << 20));
    assert_eq!(print(&mut session, "print('still here')").await, "still here\n");
}
