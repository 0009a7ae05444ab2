//! The law of snapshots: whatever a session went through, a cell in it does what it would have done
//! in a session that just ran, to the byte and to the unit of fuel.
//!
//! Programs are drawn from a small grammar, the same ones on every run.

mod common;
#[path = "common/law.rs"]
mod law;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use common::{open, run, runtime};
use kaa::{
    Clock, Environment, EnvironmentExt, EnvironmentOptions, Error, Limits, Outcome, Policy,
    Snapshot, WasmEnvironment,
};
use law::{compare, fault, kaa, report, runner, seen};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestCaseResult};

/// Programs of the property test. More find more; these fit into half a minute.
const CASES: u32 = 40;
/// Programs that also go through the program `kaa`: each is three processes.
const PROCESS_CASES: u32 = 4;
/// Walks of the stress test, and their steps.
const WALKS: u32 = 8;
const STEPS: usize = 40;

const FUEL: u64 = 60_000_000;
const SEED: u64 = 11;
const START_SECONDS: u64 = 1_700_000_000;

const NAMES: &[&str] = &["a", "b", "c", "d"];

/// What cells consist of; `$v` and `$w` are variables, `$n` is a number. Most need a variable of some
/// type, and raise when it has another: that is wanted too.
const STATEMENTS: &[&str] = &[
    "$v = $n",
    "$v = [$n, $n + 1]",
    "$v = {'k': $n, 'l': [1, 2]}",
    "$v = set(map(str, range($n % 60)))",
    "$v = 'text$n' * $n",
    "$v = ''.join(chr(97 + k % 26) for k in range($n * 20))",
    "$v = ','.join(map(str, range($n * 20)))",
    "$v = {k: k * $n for k in range($n % 300)}",
    "$v = [str(k) * 3 for k in range($n)]",
    "$v = [$w, $w]",
    "$v.append($n)",
    "$v += [$n]",
    "$v['k$n'] = $n",
    "$v[0] = $n % 256",
    "$v.pop()",
    "del $v",
    "def $v(n, seen=[]):\n    seen.append(n)\n    return len(seen) + $n",
    "print($v($n))",
    "class $v:\n    made = 0\n    def __init__(self):\n        type(self).made += 1\n        self.n = $n\n    def __repr__(self): return f'<{self.n} of {self.made}>'",
    "$w = $v()",
    "$v = (n * $n for n in range(1000)); print(next($v))",
    "print(next($v), next($v))",
    "import itertools; $v = itertools.count($n, 3); print(next($v))",
    "$v = iter({'a': 1, 'b': 2, 'c': 3}.items()); next($v)",
    "import functools\n@functools.lru_cache\ndef $v(n): return n + $n",
    "import random; print(random.random())",
    "import random; random.seed($n); $v = random.sample(range(1000), 5)",
    "import os; $v = os.urandom(8); print($v.hex())",
    "import uuid; print(uuid.uuid4())",
    "import time; print(time.time(), time.monotonic())",
    "import time; time.sleep($n / 7)",
    "import datetime; print(datetime.datetime.now())",
    "1 / 0",
    "raise KeyError('$v')",
    "try:\n    $v.missing\nexcept Exception as e:\n    $w = e; print(repr(e))",
    "def deep(n): return deep(n - 1) if n else $v\nprint(type(deep($n % 200)))",
    "print($v)",
    "print(object(), id($v), hash('$v'))",
    "print(len(repr($v)))",
    "import sys; print('line $n', file=sys.stderr)",
    "import hashlib; print(hashlib.sha256(repr($v).encode()).hexdigest())",
    "open('/tmp/$v', 'w').write('$n' * $n)",
    "open('/tmp/$v', 'a').write('$n')",
    "print(open('/tmp/$v').read()[-50:])",
    "import os; os.mkdir('/tmp/in_$v'); os.symlink('../$w', '/tmp/in_$v/link')",
    "import os; os.remove('/tmp/$v')",
    "import os; os.rename('/tmp/$v', '/tmp/$w')",
    "import os; print(sorted(os.listdir('/tmp')))",
    "import json; print(json.dumps($v)[:80])",
    "import re; print(re.findall('[a-c]+', str($v))[:5])",
    "import collections; $v = collections.Counter(str($w))",
    "import fractions; $v = fractions.Fraction($n, 7) + 1",
    "import gc; print(gc.collect())",
    "answer['content'] = '$n'",
    "$v = [object() for _ in range($n * 30)]",
    "$v = bytearray($n << 12)",
    "$v = bytearray(b'ab' * ($n << 10))",
    "$v[len($v) // 2] = $n % 256",
    "import sys; sys.exit($n)",
    "$v",
    "$n + 1",
];

/// Statements that end a cell the hard way, or change a lot of memory.
const RARE: &[&str] = &[
    "$v = 0\nwhile True: $v += 1",
    "$v = 0\nwhile True:\n    try:\n        while True: $v += 1\n    except BaseException: pass",
    "import os; $v = $n; os._exit($n % 200)",
    "$v = bytearray(b'big' * 4_000_000)",
    "import os; $v = os.urandom(9 << 20)",
    "$v = [bytes([k % 256]) * 600 for k in range(30_000)]",
];

/// The last cell of every program: shows what the others didn't. Inodes and times of files are the
/// host's, so no cell looks at those.
const PROBE: &str = "import os, random, time, hashlib\n\
    def seen(path):\n\
    \x20   for look in (lambda: os.readlink(path), lambda: open(path).read(), lambda: os.listdir(path)):\n\
    \x20       try: return look()\n\
    \x20       except OSError: pass\n\
    print([(f, seen('/tmp/' + f)) for f in sorted(os.listdir('/tmp'))])\n\
    print(random.random(), os.urandom(4), time.time(), object())\n\
    print([(n, hashlib.md5(repr(v).encode()).hexdigest()) for n, v in list(globals().items()) if len(n) == 1])";

/// Programs before and after the snapshot, and one between snapshot and restore.
type Programs = (Vec<String>, Vec<String>, Vec<String>);

fn statement() -> impl Strategy<Value = String> {
    let usual = prop::sample::select(STATEMENTS);
    let rare = prop::sample::select(RARE);
    let name = || prop::sample::select(NAMES);
    let template = prop_oneof![40 => usual, 1 => rare];
    (template, name(), name(), 0..1000_u32).prop_map(|(template, v, w, n)| {
        template.replace("$v", v).replace("$w", w).replace("$n", &n.to_string())
    })
}

fn program(cells: usize) -> impl Strategy<Value = Vec<String>> {
    let cell = prop::collection::vec(statement(), 1..5).prop_map(|lines| lines.join("\n"));
    prop::collection::vec(cell, 1..=cells)
}

fn programs() -> impl Strategy<Value = Programs> {
    let probed = program(3).prop_map(|mut cells| {
        cells.push(PROBE.to_owned());
        cells
    });
    (program(4), probed, program(3))
}

fn options() -> EnvironmentOptions {
    EnvironmentOptions {
        limits: limits(),
        policy: Policy {
            seed: Some(SEED),
            clock: Clock::Fixed(START_SECONDS * 1_000_000_000),
            ..Policy::default()
        },
        ..EnvironmentOptions::default()
    }
}

fn limits() -> Limits {
    Limits {
        fuel: FUEL,
        grace: Duration::from_millis(100),
        memory_bytes: 512 << 20,
        ..Limits::default()
    }
}

async fn run_all(session: &mut WasmEnvironment, program: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for cell in program {
        all.push(seen(&run(session, cell).await));
    }
    all
}

/// The snapshot; programs that leave files open are none that the law is about.
async fn save(session: &mut WasmEnvironment) -> Result<Snapshot, TestCaseError> {
    session.snapshot().await.map_err(|error| match &error {
        Error::Invalid { reason, .. } if reason.contains("files open") => {
            TestCaseError::reject("a file is open")
        }
        _ => fault(&error),
    })
}

fn load(file: &Path) -> Result<WasmEnvironment, TestCaseError> {
    let snapshot =
        runtime().load_snapshot(file, &Limits::default()).map_err(|error| fault(&error))?;
    // Seed and clock are the snapshot's.
    let options = EnvironmentOptions { limits: limits(), ..EnvironmentOptions::default() };
    runtime().resume(&snapshot, options).map_err(|error| fault(&error))
}

async fn hold(programs: &Programs, directory: &Path) -> TestCaseResult {
    let (first, then, other) = programs;
    let mut plain = open(options());
    let law_first = run_all(&mut plain, first).await;
    let law = run_all(&mut plain, then).await;
    drop(plain);

    let mut session = open(options());
    compare("a second session", first, &run_all(&mut session, first).await, &law_first)?;
    let snapshot = save(&mut session).await?;
    let mut fork = session.fork_session().await.map_err(|error| fault(&error))?;
    let file = directory.join("snapshot");
    snapshot.save(&file).map_err(|error| fault(&error))?;
    compare("after a snapshot", then, &run_all(&mut session, then).await, &law)?;
    compare("in a fork", then, &run_all(&mut fork, then).await, &law)?;
    drop(fork);
    for how in ["restored", "restored and hibernated", "restored over a larger one"] {
        session.restore(&snapshot).await.map_err(|error| fault(&error))?;
        match how {
            "restored and hibernated" => {
                session.hibernate().await.map_err(|error| fault(&error))?;
            }
            "restored over a larger one" => {
                run_all(&mut session, other).await;
                run(&mut session, "much = [bytearray(b'm' * 9_000_000), bytearray(1 << 24)]").await;
                session.restore(&snapshot).await.map_err(|error| fault(&error))?;
            }
            _ => {}
        }
        compare(how, then, &run_all(&mut session, then).await, &law)?;
    }
    drop(session);
    compare("from a file", then, &run_all(&mut load(&file)?, then).await, &law)?;
    let mut restless = open(options());
    let whole: Vec<String> = first.iter().chain(then).cloned().collect();
    let laws: Vec<String> = law_first.into_iter().chain(law).collect();
    for (number, (cell, law)) in whole.iter().zip(&laws).enumerate() {
        let snapshot = save(&mut restless).await?;
        match number % 4 {
            0 => drop(restless.hibernate().await.map_err(|error| fault(&error))?),
            1 => restless = restless.fork_session().await.map_err(|error| fault(&error))?,
            2 => {
                snapshot.save(&file).map_err(|error| fault(&error))?;
                restless = load(&file)?;
            }
            _ => {
                run_all(&mut restless, other).await;
                restless.restore(&snapshot).await.map_err(|error| fault(&error))?;
            }
        }
        let cell = std::slice::from_ref(cell);
        let found = run_all(&mut restless, cell).await;
        compare("moved before each cell", cell, &found, std::slice::from_ref(law))?;
    }
    Ok(())
}

#[test]
fn a_session_goes_on_as_if_nothing_had_happened() {
    let reactor = tokio::runtime::Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let result = runner(CASES, None)
        .run(&programs(), |programs| reactor.block_on(hold(&programs, directory.path())));
    report(result);
}

#[test]
fn another_process_goes_on_too() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let (seed, clock) = (format!("--seed={SEED}"), format!("--fixed-clock={START_SECONDS}"));
    let limits = [format!("--fuel={FUEL}"), "--grace=100ms".into(), "--memory=512M".into()];
    let [fuel, grace, memory] = &limits;
    let result = runner(PROCESS_CASES, None).run(&programs(), |(first, then, _)| {
        let whole: Vec<String> = first.iter().chain(&then).cloned().collect();
        let law = kaa(here, &[fuel, grace, memory, &seed, &clock], &whole);
        let before = kaa(here, &[fuel, grace, memory, &seed, &clock, "--snapshot-out=s"], &first);
        prop_assert_eq!(&before[..], &law[..first.len()]);
        let after = kaa(here, &[fuel, grace, memory, "--snapshot-in=s"], &then);
        prop_assert_eq!(&after[..], &law[first.len()..]);
        Ok(())
    });
    report(result);
}

/// What can happen to a session of the stress test.
#[derive(Debug, Clone, Copy)]
enum Step {
    Set(usize, u32),
    Delete(usize),
    Large(usize, u32),
    Next(usize),
    Snapshot,
    Restore(usize),
    Fork,
    Disk,
    Hibernate,
    HardStop(usize),
    Abandon(usize, u64),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let name = || 0..NAMES.len();
    prop_oneof![
        6 => (name(), 0..1000_u32).prop_map(|(name, n)| Step::Set(name, n)),
        2 => name().prop_map(Step::Delete),
        2 => (name(), 1..12_000_000_u32).prop_map(|(name, n)| Step::Large(name, n)),
        4 => name().prop_map(Step::Next),
        3 => Just(Step::Snapshot),
        3 => (0..5_usize).prop_map(Step::Restore),
        2 => Just(Step::Fork),
        1 => Just(Step::Disk),
        2 => Just(Step::Hibernate),
        2 => name().prop_map(Step::HardStop),
        2 => (name(), 0..4000_u64).prop_map(|(name, us)| Step::Abandon(name, us)),
        1 => Just(Step::Reset),
    ]
}

/// No limit ends a cell before the test does.
fn patient() -> EnvironmentOptions {
    EnvironmentOptions { limits: Limits { fuel: Limits::default().fuel, ..limits() }, ..options() }
}

/// What the variables are, as Python shows them.
type Model = BTreeMap<&'static str, String>;

/// A session, what is in it, and up to five states of before.
struct Walk {
    session: WasmEnvironment,
    model: Model,
    saved: Vec<(Snapshot, Model)>,
    directory: tempfile::TempDir,
}

impl Walk {
    async fn cell(&mut self, code: &str) {
        let execution = run(&mut self.session, code).await;
        assert_eq!(execution.outcome, Outcome::Completed, "{code}: {}", execution.stderr.text());
    }

    async fn take(&mut self, step: Step) -> kaa::Result<()> {
        match step {
            Step::Set(name, n) => {
                self.cell(&format!("{} = [{n}, 'x' * {n}]; ", NAMES[name])).await;
                self.model.insert(NAMES[name], format!("[{n}, {n}]"));
            }
            Step::Delete(name) => {
                self.cell(&format!("globals().pop('{}', None)", NAMES[name])).await;
                self.model.remove(NAMES[name]);
            }
            Step::Large(name, n) => {
                self.cell(&format!("{} = [{n}, bytearray(b'x' * {n})]", NAMES[name])).await;
                self.model.insert(NAMES[name], format!("[{n}, {n}]"));
            }
            Step::Next(name) => {
                let name = NAMES[name];
                let before = self.model.get(name).and_then(|text| text.strip_prefix("next "));
                match before.and_then(|count| count.parse::<u64>().ok()) {
                    Some(count) => {
                        self.cell(&format!("assert next({name}) == {count}")).await;
                        self.model.insert(name, format!("next {}", count + 1));
                    }
                    None => {
                        self.cell(&format!("{name} = (n for n in range(10**6)); next({name})"))
                            .await;
                        self.model.insert(name, "next 1".into());
                    }
                }
            }
            Step::Snapshot => {
                self.saved.push((self.session.snapshot().await?, self.model.clone()));
                if self.saved.len() > 5 {
                    self.saved.remove(0);
                }
            }
            Step::Restore(number) if !self.saved.is_empty() => {
                let (snapshot, model) = &self.saved[number % self.saved.len()];
                self.session.restore(snapshot).await?;
                self.model = model.clone();
            }
            Step::Restore(_) => {}
            Step::Fork => self.session = self.session.fork_session().await?,
            Step::Disk => {
                let file = self.directory.path().join("snapshot");
                self.session.snapshot().await?.save(&file)?;
                self.session = runtime()
                    .resume(&runtime().load_snapshot(&file, &Limits::default())?, patient())?;
            }
            Step::Hibernate => drop(self.session.hibernate().await?),
            Step::HardStop(name) => {
                let code =
                    format!("{} = bytearray(b'y' * 100_000); import os; os._exit(3)", NAMES[name]);
                let execution = run(&mut self.session, &code).await;
                assert!(execution.rolled_back);
            }
            Step::Abandon(name, microseconds) => {
                let code = format!("{} = 'never'\nwhile True: pass", NAMES[name]);
                let cell = self.session.execute(&code);
                let end = tokio::time::timeout(Duration::from_micros(microseconds), cell).await;
                assert!(end.is_err(), "a cell without an end ended");
            }
            Step::Reset => {
                self.session.reset().await?;
                self.model.clear();
            }
        }
        Ok(())
    }

    /// Everything is as the model says.
    async fn check(&mut self) {
        let show = "print({n: [len(x) if hasattr(x, '__len__') else x for x in v] \
                    if isinstance(v, list) else 'next' for n, v in sorted(globals().items()) if len(n) == 1})";
        let found = common::print(&mut self.session, show).await;
        let expected = self.model.iter().map(|(name, text)| match text.starts_with("next") {
            true => format!("'{name}': 'next'"),
            false => format!("'{name}': {text}"),
        });
        let expected = expected.collect::<Vec<_>>().join(", ");
        assert_eq!(found, format!("{{{expected}}}\n"));
    }
}

#[test]
fn a_walk_through_states_never_gets_lost() {
    let reactor = tokio::runtime::Runtime::new().unwrap();
    let steps = prop::collection::vec(step(), STEPS);
    let result = runner(WALKS, None).run(&steps, |steps| {
        reactor.block_on(async {
            let mut walk = Walk {
                session: open(patient()),
                model: Model::new(),
                saved: Vec::new(),
                directory: tempfile::tempdir().unwrap(),
            };
            for step in steps {
                walk.take(step).await.map_err(|error| fault(&error))?;
                walk.check().await;
            }
            Ok(())
        })
    });
    report(result);
}
