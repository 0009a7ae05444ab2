//! Snapshots, forks, templates, restore: in memory and on disk.

mod common;

use std::collections::BTreeMap;

use common::{image, open, print, run, runtime, session};
use kaa::{
    Context, Environment, EnvironmentExt, EnvironmentOptions, Error, Limits, Outcome, Policy, Tool,
    Value, WasmEnvironment, inspect_snapshot,
};

/// State of every kind that lives in memory: what makes it, and a cell that shows it.
const KINDS: &[(&str, &str, &str)] = &[
    (
        "a generator half-way",
        "g = (n * n for n in range(10)); next(g); next(g)",
        "next(g), next(g)",
    ),
    (
        "a closure",
        "def counter():\n    n = 0\n    def step():\n        nonlocal n\n        n += 1\n        return n\n    return step\nstep = counter(); step()",
        "step(), step()",
    ),
    (
        "a class and an instance",
        "class A:\n    made = 0\n    def __init__(self): A.made += 1\n    @property\n    def twice(self): return 2 * A.made\na = A()",
        "a.twice, A().twice, A.__mro__[1].__name__",
    ),
    (
        "lru_cache",
        "import functools\n@functools.lru_cache\ndef f(n): return n + 1\nf(1); f(1); f(2)",
        "f(1), f.cache_info()",
    ),
    ("random state", "import random; random.seed(7); random.random()", "random.random()"),
    ("a patched module", "import json; json.dumps = lambda x: 'patched'", "json.dumps(1)"),
    ("an open iterator", "it = iter({'a': 1, 'b': 2}.items()); next(it)", "next(it)"),
    ("a running count", "import itertools; c = itertools.count(5, 3); next(c)", "next(c), next(c)"),
    (
        "an exception with its traceback",
        "try: 1/0\nexcept Exception as e: x = e",
        "repr(x), x.__traceback__.tb_lineno",
    ),
    ("identity", "p = []; q = {'p': p}", "q['p'] is p, id(p) == id(q['p'])"),
    ("a weak reference", "import weakref\nclass W: pass\nw = W(); r = weakref.ref(w)", "r() is w"),
    (
        "a regular expression at work",
        "import re; m = re.finditer('a+', 'aa b aaa'); next(m)",
        "next(m).span()",
    ),
    ("bytes in a buffer", "import io; b = io.BytesIO(b'hello'); b.read(2)", "b.read()"),
    (
        "a coroutine half-way",
        "import types\n@types.coroutine\ndef wait(): yield 5\nasync def work():\n    await wait()\n    return 9\nc = work(); c.send(None)",
        "try: c.send(None)\nexcept StopIteration as e: x = e.value\nx",
    ),
    ("a sys setting", "import sys; sys.setrecursionlimit(777)", "sys.getrecursionlimit()"),
    (
        "files of the scratch directory",
        "import os\nos.mkdir('/tmp/d'); open('/tmp/d/f', 'w').write('kept')\nos.symlink('d/f', '/tmp/l')",
        "open('/tmp/l').read(), sorted(os.listdir('/tmp'))",
    ),
];

/// The same, for the image with numpy and pandas.
const SCIENCE: &[(&str, &str, &str)] = &[
    (
        "an array",
        "import numpy as np; x = np.arange(1000).reshape(10, 100); y = x[::2]",
        "y.sum(), y.base is not None",
    ),
    (
        "a random generator of numpy",
        "import numpy as np; g = np.random.default_rng(3); g.random()",
        "g.random(), np.random.rand()",
    ),
    (
        "a frame",
        "import pandas as pd; d = pd.DataFrame({'a': [1, 2], 'b': ['x', 'y']}); s = d.groupby('b')",
        "s['a'].sum().to_dict(), d.dtypes.to_dict()",
    ),
];

async fn shown(session: &mut WasmEnvironment, cell: &str) -> String {
    let execution = run(session, cell).await;
    assert_eq!(execution.outcome, Outcome::Completed, "{cell}: {}", execution.stderr.text());
    execution.value.unwrap_or_default()
}

#[tokio::test]
async fn everything_in_memory_survives() {
    let directory = tempfile::tempdir().unwrap();
    for (image_name, kinds) in [("base", KINDS), ("sci", SCIENCE)] {
        let image = image(image_name);
        for (kind, make, show) in kinds {
            let open = || runtime().environment(&image, EnvironmentOptions::default()).unwrap();
            let mut session = open();
            run(&mut session, make).await;
            let snapshot = session.snapshot().await.unwrap();
            let file = directory.path().join("s");
            snapshot.save(&file).unwrap();
            let expected = shown(&mut session, show).await;
            assert!(!expected.is_empty(), "{kind}");
            let mut fork = runtime().resume(&snapshot, EnvironmentOptions::default()).unwrap();
            assert_eq!(shown(&mut fork, show).await, expected, "{kind}: a fork");
            session.restore(&snapshot).await.unwrap();
            assert_eq!(shown(&mut session, show).await, expected, "{kind}: restored");
            let loaded = runtime().load_snapshot(&file, &Limits::default()).unwrap();
            let mut loaded = runtime().resume(&loaded, EnvironmentOptions::default()).unwrap();
            assert_eq!(shown(&mut loaded, show).await, expected, "{kind}: from a file");
            let mut other = open();
            other.restore(&snapshot).await.unwrap();
            assert_eq!(shown(&mut other, show).await, expected, "{kind}: over another session");
            other.restore(&snapshot).await.unwrap();
            other.hibernate().await.unwrap();
            assert!(other.is_hibernated());
            assert_eq!(shown(&mut other, show).await, expected, "{kind}: woken");
        }
    }
}

#[tokio::test]
async fn forks_are_independent() {
    let mut session = session();
    run(&mut session, "x = [1]; open('/tmp/f', 'w').write('a')").await;
    let mut fork = session.fork().await.unwrap();
    fork.execute("x.append(2); open('/tmp/f', 'w').write('b')").await.unwrap();
    run(&mut session, "x.append(3)").await;
    let show = "print(x, open('/tmp/f').read())";
    assert_eq!(print(&mut session, show).await, "[1, 3] a\n");
    assert_eq!(fork.execute(show).await.unwrap().stdout.text(), "[1, 2] b\n");
    drop(session);
    assert_eq!(fork.execute(show).await.unwrap().stdout.text(), "[1, 2] b\n");
}

#[tokio::test]
async fn open_files_are_refused_by_name() {
    let mut session = session();
    run(&mut session, "f = open('/tmp/notes.txt', 'w')").await;
    for error in [
        session.snapshot().await.unwrap_err(),
        session.fork().await.err().unwrap(),
        session.hibernate().await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains("`/tmp/notes.txt`"), "{error}");
    }
    run(&mut session, "f.write('x'); f.close()").await;
    session.snapshot().await.unwrap();
}

#[tokio::test]
async fn restoring_closes_files_and_undoes_those_in_scratch() {
    let mut session = session();
    run(&mut session, "open('/tmp/a', 'w').write('1')").await;
    let snapshot = session.snapshot().await.unwrap();
    run(&mut session, "f = open('/tmp/b', 'w'); open('/tmp/a', 'w').write('2')").await;
    session.restore(&snapshot).await.unwrap();
    let show = "import os; print(os.listdir('/tmp'), open('/tmp/a').read(), 'f' in globals())";
    assert_eq!(print(&mut session, show).await, "['a'] 1 False\n");
    session.snapshot().await.unwrap();
}

#[tokio::test]
async fn a_template_shares_its_context_and_not_its_randomness() {
    let mut template = session();
    let text = "a line of the context\n".repeat(1_000_000).into_bytes();
    template.add_context(Context::Text(text), None).await.unwrap();
    run(&mut template, "import random, os\nlines = context.count('line')").await;
    let image = runtime().template(&template.snapshot().await.unwrap()).unwrap();
    let mut drawn = std::collections::HashSet::new();
    for round in 0..3 {
        let mut child = runtime().environment(&image, EnvironmentOptions::default()).unwrap();
        let cell = "print(lines, len(context), context[-8:-1], random.random())";
        let text = print(&mut child, cell).await;
        assert!(text.starts_with("1000000 22000000 context "), "{round}: {text}");
        assert!(drawn.insert(text), "two children drew the same random number");
        child.reset().await.unwrap();
        assert_eq!(print(&mut child, "print(lines)").await, "1000000\n");
        let private = child.snapshot().await.map(|_| child.private_bytes()).unwrap();
        assert!(private < 8 << 20, "{private:?} bytes of a child's own");
        let bytes = child.hibernate().await.unwrap();
        assert!(bytes < 4 << 20, "what the template has is not written: {bytes}");
        assert_eq!(print(&mut child, "print(len(context))").await, "22000000\n");
    }
}

#[tokio::test]
async fn a_session_goes_on_with_other_options_where_they_differ() {
    let tool = Tool::new("ask", |_| Ok(Value::Int(7)));
    let env = |name: &str| vec![(name.to_owned(), "1".to_owned())];
    let mut first = open(EnvironmentOptions {
        tools: vec![tool.clone()],
        policy: Policy { env: env("ONE"), ..Policy::default() },
        ..EnvironmentOptions::default()
    });
    assert_eq!(print(&mut first, "print(ask())").await, "7\n");
    let snapshot = first.snapshot().await.unwrap();
    let mut without = runtime().resume(&snapshot, EnvironmentOptions::default()).unwrap();
    let gone = run(&mut without, "ask()").await;
    assert_eq!(gone.exception.unwrap().type_name, "NameError");
    let other = Tool::new("other", |_| Ok(Value::Int(8)));
    let options = EnvironmentOptions {
        tools: vec![tool, other],
        policy: Policy { env: env("TWO"), ..Policy::default() },
        ..EnvironmentOptions::default()
    };
    let mut more = runtime().resume(&snapshot, options).unwrap();
    let cell = "import os\nprint(ask(), other(), os.environ['ONE'], os.environ['TWO'])";
    assert_eq!(print(&mut more, cell).await, "7 8 1 1\n");
    let small = Limits { memory_bytes: 64 << 20, ..Limits::default() };
    run(&mut more, "big = bytearray(100_000_000)").await;
    let snapshot = more.snapshot().await.unwrap();
    let options = EnvironmentOptions { limits: small, ..EnvironmentOptions::default() };
    let error = runtime().resume(&snapshot, options).unwrap_err();
    assert!(error.to_string().starts_with("limits.memory_bytes: "), "{error}");
}

#[tokio::test]
async fn a_large_state_is_saved_and_found_again() {
    let mut session = session();
    let make = "import hashlib\nbig = bytearray(range(256)) * 120_000\nparts = [bytes([n % 256]) * 5000 for n in range(6000)]\n\
                def digest(): return hashlib.sha256(big).hexdigest()[:8], hashlib.sha256(b''.join(parts)).hexdigest()[:8]";
    run(&mut session, make).await;
    let expected = shown(&mut session, "digest()").await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("large");
    let snapshot = session.snapshot().await.unwrap();
    snapshot.save(&file).unwrap();
    run(&mut session, "big[5] = 0; parts[7] = b''; del parts[100:200]").await;
    assert_ne!(shown(&mut session, "digest()").await, expected);
    let stopped = run(&mut session, "big[9] = 1; import os; os._exit(3)").await;
    assert!(stopped.rolled_back);
    assert_eq!(shown(&mut session, "big[9]").await, "9");
    session.restore(&snapshot).await.unwrap();
    assert_eq!(shown(&mut session, "digest()").await, expected);
    let loaded = runtime().load_snapshot(&file, &Limits::default()).unwrap();
    let mut loaded = runtime().resume(&loaded, EnvironmentOptions::default()).unwrap();
    assert_eq!(shown(&mut loaded, "digest()").await, expected);
    run(&mut loaded, "import os; noise = os.urandom(20_000_000); check = noise[-5:]").await;
    let bytes = loaded.hibernate().await.unwrap();
    assert!(bytes > 20_000_000, "what only it has is written: {bytes}");
    assert_eq!(shown(&mut loaded, "noise[-5:] == check").await, "True");
    let mut fork = session.fork().await.unwrap();
    assert_eq!(fork.execute("digest()").await.unwrap().value.unwrap(), expected);
}

#[tokio::test]
async fn a_file_says_what_it_is_and_is_refused_when_it_is_not_that() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("s.kaa");
    let mut session = session();
    run(&mut session, "x = 1").await;
    let bytes = session.snapshot().await.unwrap().save(&file).unwrap();
    assert_eq!(bytes, std::fs::metadata(&file).unwrap().len());
    let error = session.snapshot().await.unwrap().save("/dev/null").unwrap_err();
    assert!(error.to_string().contains("isn't a file"), "{error}");
    let header = inspect_snapshot(&file).unwrap();
    assert_eq!((header.image.name.as_str(), header.session.cells), ("base", 1));
    let good = std::fs::read(&file).unwrap();
    type Damage = fn(&mut Vec<u8>);
    let cases: BTreeMap<&str, Damage> = BTreeMap::from([
        ("empty", (|bytes| bytes.clear()) as Damage),
        ("another file", |bytes| bytes[..7].copy_from_slice(b"PK\x03\x04abc")),
        ("newer", |bytes| bytes[8] = 200),
        ("truncated", |bytes| bytes.truncate(bytes.len() - 1)),
        ("half", |bytes| bytes.truncate(bytes.len() / 2)),
        ("altered", |bytes| {
            let at = bytes.len() / 2;
            bytes[at] ^= 1;
        }),
        ("longer", |bytes| bytes.push(0)),
    ]);
    for (what, damage) in cases {
        let mut bytes = good.clone();
        damage(&mut bytes);
        std::fs::write(&file, bytes).unwrap();
        let error = runtime().load_snapshot(&file, &Limits::default()).unwrap_err();
        assert!(matches!(error, Error::Incompatible { .. }), "{what}: {error:?}");
    }
    assert!(matches!(
        runtime().load_snapshot("/nowhere", &Limits::default()),
        Err(Error::Io { .. })
    ));
    std::fs::write(&file, &good).unwrap();
    let small = Limits { memory_bytes: 16 << 20, ..Limits::default() };
    let error = runtime().load_snapshot(&file, &small).unwrap_err();
    assert!(error.to_string().contains("`memory_bytes`"), "{error}");
    let sci = image("sci");
    let mut science = runtime().environment(&sci, EnvironmentOptions::default()).unwrap();
    let snapshot = session.snapshot().await.unwrap();
    let error = science.restore(&snapshot).await.unwrap_err();
    assert!(error.to_string().contains("`sci`") && error.to_string().contains("`base`"), "{error}");
    assert_eq!(print(&mut science, "print(1)").await, "1\n", "the session is as it was");
}
