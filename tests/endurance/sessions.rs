//! What embedders do with sessions that nobody stops: run, fork, rewind, save, share, give back.

use std::time::Duration;

use kaa::{
    Backend, Context, Environment, EnvironmentExt, EnvironmentOptions, Error, ExecuteOptions,
    Execution, Limits, Outcome, Runtime, Value, WasmEnvironment,
};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::world::{IDLE, World};

/// Cells of many kinds, and what each prints in a session that has a model and tools.
const CELLS: &[(&str, &str)] = &[
    ("print(1 + 1)", "2\n"),
    ("import json; print(json.loads(json.dumps({'a': [1, 2]})))", "{'a': [1, 2]}\n"),
    ("import re; print(re.findall(r'\\d+', 'a1b22'))", "['1', '22']\n"),
    ("print(sum(n * n for n in range(2000)))", "2664667000\n"),
    ("print(len({k: str(k) for k in range(5000)}))", "5000\n"),
    ("big = bytearray(b'x' * 3_000_000); print(len(big))", "3000000\n"),
    ("rows = [[n] * 10 for n in range(3000)]; print(len(rows))", "3000\n"),
    ("gen = (n for n in range(9)); print(next(gen), next(gen))", "0 1\n"),
    ("open('/tmp/a', 'w').write('x' * 1000); print(len(open('/tmp/a').read()))", "1000\n"),
    ("import os; os.makedirs('/tmp/d/e', exist_ok=True); print(os.listdir('/tmp/d'))", "['e']\n"),
    // The descriptor stays open for as long as the session lives.
    ("left_open = open('/tmp/b', 'w'); print(left_open.write('abc'))", "3\n"),
    ("print(double(21))", "42\n"),
    ("print(llm_query('hello'))", "hello\n"),
    ("print(llm_query('slow 3'))", "late\n"),
    ("print(llm_query_batched(['a', 'slow 2', 'b']))", "['a', 'late', 'b']\n"),
    ("def deep(n): return deep(n - 1) + 1 if n else 0\nprint(deep(800))", "800\n"),
    (
        "import asyncio\nasync def later(n):\n    await asyncio.sleep(0.001)\n    return n\n\
         async def main(): return await asyncio.gather(*map(later, range(3)))\n\
         print(asyncio.run(main()))",
        "[0, 1, 2]\n",
    ),
    (
        "from concurrent.futures import ThreadPoolExecutor\n\
         with ThreadPoolExecutor(4) as pool: print(list(pool.map(len, ['a', 'bb'])))",
        "[1, 2]\n",
    ),
    ("try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    print(error)", "division by zero\n"),
];

/// Runs a cell that has to complete, and gives what it printed.
pub(crate) async fn print<E: Environment + ?Sized>(session: &mut E, code: &str) -> String {
    let Execution { outcome, stdout, stderr, .. } = session.execute(code).await.unwrap();
    assert_eq!(outcome, Outcome::Completed, "{code}: {}", stderr.text());
    stdout.text().into_owned()
}

fn open(world: &World, options: EnvironmentOptions) -> WasmEnvironment {
    world.tally.note("sessions");
    world.runtime.environment(&world.base, options).unwrap()
}

/// A session with some cells, dropped or closed.
pub(crate) async fn usual(world: &World, rng: &mut StdRng) {
    let mut session = open(world, world.options(rng));
    for _ in 0..rng.random_range(1..5) {
        let (code, expected) = CELLS[rng.random_range(0..CELLS.len())];
        assert_eq!(print(&mut session, code).await, expected, "{code}");
        world.tally.note("cells");
    }
    match rng.random_range(0..4) {
        0 => Box::new(session).close().await.unwrap(),
        1 => {
            session.reset().await.unwrap();
            assert_eq!(print(&mut session, "print('json' in globals())").await, "False\n");
            world.tally.note("resets");
        }
        _ => {}
    }
}

/// More sessions at once than there are slots to use again, on both images.
pub(crate) async fn crowd(world: &World) {
    for image in [&world.base, &world.sci] {
        let mut sessions = Vec::new();
        for n in 0..40 {
            let options = EnvironmentOptions::default();
            let mut session = world.runtime.environment(image, options).unwrap();
            assert_eq!(print(&mut session, &format!("print({n})")).await, format!("{n}\n"));
            sessions.push(session);
        }
        world.tally.add("sessions", 40);
        world.tally.note("crowds of 40");
    }
}

/// A family of forks, each of which goes its own way.
pub(crate) async fn forks(world: &World, rng: &mut StdRng) {
    let mut parent = open(world, world.options(rng));
    let bulk = [10, 1000, 100_000, 100_000, 2_000_000, 12_000_000][rng.random_range(0..6)];
    let code = format!("own = [1]; bulk = bytearray(b'f' * {bulk}); gen = iter(range(100))");
    print(&mut parent, &code).await;
    let mut family = vec![parent];
    for n in 1..rng.random_range(2..5) {
        let from = rng.random_range(0..family.len());
        let mut child = family[from].fork_session().await.unwrap();
        print(&mut child, &format!("own = [{n} * 10]; bulk[0] = {n}; next(gen)")).await;
        family.push(child);
        world.tally.note("forks");
    }
    for (n, member) in family.iter_mut().enumerate() {
        let first = if n == 0 { usize::from(b'f') } else { n };
        let own = if n == 0 { 1 } else { n * 10 };
        let found = print(member, "print(own[0], bulk[0], len(bulk), next(gen) > -1)").await;
        assert_eq!(found, format!("{own} {first} {bulk} True\n"));
    }
}

/// Back to earlier states, and over to later ones.
pub(crate) async fn rewinds(world: &World, rng: &mut StdRng) {
    let mut session = open(world, world.options(rng));
    let mut saved = Vec::new();
    for n in 0..rng.random_range(2..6) {
        let size = rng.random_range(1..400_000);
        print(&mut session, &format!("n = {n}; x = bytearray({size})")).await;
        saved.push((n, size, session.snapshot().await.unwrap()));
    }
    for _ in 0..3 {
        let (n, size, snapshot) = &saved[rng.random_range(0..saved.len())];
        session.restore(snapshot).await.unwrap();
        assert_eq!(print(&mut session, "print(n, len(x))").await, format!("{n} {size}\n"));
        world.tally.note("rewinds");
    }
}

/// To a file and back.
pub(crate) async fn disk(world: &World, rng: &mut StdRng) {
    let mut session = open(world, world.options(rng));
    let size = rng.random_range(1..4_000_000);
    let code = format!("x = bytearray(b'd' * {size}); open('/tmp/kept', 'w').write('{size}')");
    print(&mut session, &code).await;
    let file = tempfile::NamedTempFile::new_in(&world.directory).unwrap();
    session.snapshot().await.unwrap().save(file.path()).unwrap();
    drop(session);
    let snapshot = world.runtime.load_snapshot(file.path(), &Limits::default()).unwrap();
    let mut session = world.runtime.resume(&snapshot, world.plain()).unwrap();
    let found = print(&mut session, "print(len(x), open('/tmp/kept').read())").await;
    assert_eq!(found, format!("{size} {size}\n"));
    world.tally.note("saved and loaded");
}

/// Sessions of the pool, which idle until they're files, and are woken.
pub(crate) async fn pooled(world: &World, rng: &mut StdRng) {
    let mut sessions = Vec::new();
    for n in 0..rng.random_range(2..8) {
        let mut session = world.pool.environment(&world.base, world.plain()).await.unwrap();
        print(&mut session, &format!("x = [{n}] * 1000; gen = iter(range({n}, 99))")).await;
        sessions.push(session);
    }
    world.tally.add("sessions", sessions.len() as u64);
    tokio::time::sleep(IDLE.mul_f64(rng.random_range(0.0..2.0))).await;
    for (n, session) in sessions.iter_mut().enumerate() {
        if rng.random_bool(0.7) {
            assert_eq!(print(session, "print(x[999], next(gen))").await, format!("{n} {n}\n"));
        }
    }
}

/// A session of its own that goes to sleep and is woken.
pub(crate) async fn asleep(world: &World, rng: &mut StdRng) {
    let mut session = open(world, world.options(rng));
    let size = rng.random_range(1..3_000_000);
    print(&mut session, &format!("x = bytearray({size})")).await;
    session.hibernate().await.unwrap();
    if rng.random_bool(0.8) {
        assert_eq!(print(&mut session, "print(len(x))").await, format!("{size}\n"));
    }
    world.tally.note("hibernated");
}

/// One context, and a session for each of the questions about it.
pub(crate) async fn template(world: &World, rng: &mut StdRng) {
    let mut session = open(world, world.plain());
    let bytes = rng.random_range(1_000_000..5_000_000);
    session.add_context(Context::Text(vec![b'c'; bytes]), None).await.unwrap();
    let template = world.runtime.template(&session.snapshot().await.unwrap()).unwrap();
    drop(session);
    for _ in 0..rng.random_range(1..5) {
        let mut session = world.runtime.environment(&template, world.options(rng)).unwrap();
        world.tally.note("sessions");
        assert_eq!(print(&mut session, "print(len(context))").await, format!("{bytes}\n"));
        if rng.random_bool(0.3) {
            print(&mut session, "context = context.upper()").await;
        }
    }
    world.tally.note("templates");
}

/// Data in and out beside cells.
pub(crate) async fn services(world: &World, rng: &mut StdRng) {
    let mut session = open(world, world.options(rng));
    let value = Value::Str("v".repeat(rng.random_range(1..300_000)));
    session.set_variable("v", value.clone()).await.unwrap();
    assert_eq!(session.get_variable("v").await.unwrap(), Some(value));
    assert_eq!(session.list_variables().await.unwrap().len(), 1);
    let history = serde_json::json!([{"role": "user", "content": "hello"}]);
    session.add_history(&history, None).await.unwrap();
    session.add_context(Context::Json(b"{\"a\": [1, 2]}".to_vec()), None).await.unwrap();
    session.add_context(Context::Bytes(vec![7; 100_000]), None).await.unwrap();
    assert!(session.add_context(Context::Json(b"{".to_vec()), None).await.is_err());
    let found = print(&mut session, "print(context_0['a'], len(context_1), len(history))").await;
    assert_eq!(found, "[1, 2] 100000 1\n");
    world.tally.note("services");
}

/// A session that grows far beyond its image: its slot gives that back.
pub(crate) async fn huge(world: &World, rng: &mut StdRng) {
    let mut session = open(world, world.plain());
    let bytes = rng.random_range(20_000_000..60_000_000);
    let code = format!("huge = bytearray(b'x' * {bytes}); print(len(huge))");
    assert_eq!(print(&mut session, &code).await, format!("{bytes}\n"));
    world.tally.note("sessions of 20 MB and more");
}

/// Models that answer late, with an error, and many at once.
pub(crate) async fn models(world: &World) {
    let mut session = open(world, world.plain());
    for (code, expected) in [
        ("print(llm_query('fail out of order'))", "Error: out of order\n"),
        ("print(llm_query('slow 5'))", "late\n"),
        ("print(len(set(llm_query_batched([f'slow {n % 4}' for n in range(100)]))))", "1\n"),
        ("print(llm_query('x' * 1_000_000) == 'x' * 1_000_000)", "True\n"),
    ] {
        assert_eq!(print(&mut session, code).await, expected, "{code}");
    }
    world.tally.note("sessions that ask models");
}

/// A runtime of its own, which goes with its only session.
pub(crate) async fn runtime(world: &World) {
    let store = world.runtime.store().clone();
    let opened = tokio::task::spawn_blocking(move || {
        let runtime = Runtime::open(store).unwrap();
        let image = runtime.image("base", &|_| {}).unwrap();
        (runtime, image)
    });
    let (runtime, image) = opened.await.unwrap();
    let mut session = runtime.environment(&image, world.plain()).unwrap();
    assert_eq!(print(&mut session, "print(1)").await, "1\n");
    world.tally.note("runtimes");
}

/// Numpy and pandas.
pub(crate) async fn science(world: &World) {
    let mut session = world.runtime.environment(&world.sci, world.plain()).unwrap();
    world.tally.note("sessions of sci");
    let code = "import numpy, pandas\nframe = pandas.DataFrame({'a': range(1000)})\n\
                print(int(frame.a.sum()), int(numpy.arange(1000).sum()))";
    assert_eq!(print(&mut session, code).await, "499500 499500\n");
}

/// A tenant that has all that it may have is refused, and has it again when some is given back.
pub(crate) async fn quota(world: &World) {
    let options = || EnvironmentOptions {
        tenant: Some(world.narrow.clone()),
        ..EnvironmentOptions::default()
    };
    let open = || world.runtime.environment(&world.base, options());
    let (first, second, third) = (open(), open(), open());
    for refused in [&first, &second, &third].into_iter().filter_map(|one| one.as_ref().err()) {
        assert!(matches!(refused, Error::Quota { quota: "sessions", .. }), "{refused}");
    }
    // Others of this test may have them all; three at once nobody has.
    assert!(third.is_err() || second.is_err() || first.is_err());
    world.tally.note("refused by a quota");
}

/// A session in a process, which is dropped sooner or later.
pub(crate) async fn process(world: &World, rng: &mut StdRng) {
    let Some(local) = &world.local else { return };
    let opening = local
        .open(EnvironmentOptions { lm: Some(world.lm.clone()), ..EnvironmentOptions::default() });
    world.tally.note("processes");
    let patience = Duration::from_millis(rng.random_range(0..400));
    let session = match rng.random_range(0..4) {
        0 => tokio::time::timeout(patience, opening).await,
        _ => Ok(opening.await),
    };
    let Ok(session) = session else { return world.tally.note("processes dropped half open") };
    let mut session = session.unwrap();
    assert_eq!(print(&mut *session, "x = 41; print(x + 1)").await, "42\n");
    match rng.random_range(0..5) {
        0 => {
            let endless = session.execute("while True: pass");
            assert!(tokio::time::timeout(patience / 2, endless).await.is_err());
            world.tally.note("processes dropped in a cell");
        }
        1 => {
            let asking = session.execute("llm_query('never')");
            assert!(tokio::time::timeout(patience / 2, asking).await.is_err());
            world.tally.note("processes dropped in a cell");
        }
        2 => {
            let died = session
                .execute("import os, subprocess\nsubprocess.Popen(['sleep', '100'])\nos._exit(3)")
                .await;
            assert!(died.unwrap().rolled_back || session.status() == kaa::Status::Poisoned);
            world.tally.note("processes that died");
        }
        3 => {
            let limits = Some(Limits { wall: Duration::from_millis(100), ..Limits::default() });
            let options = ExecuteOptions { limits };
            let slow = session.execute_opts("import time; time.sleep(100)", options).await.unwrap();
            assert_eq!(slow.limit, Some(kaa::Limit::Wall));
            world.tally.note("processes stopped by wall");
        }
        _ => session.close().await.unwrap(),
    }
}
