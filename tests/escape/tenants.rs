//! Other tenants: what one wrote, said or was told is nowhere in what the next one begins with.
//!
//! `src/wasm/session/tests.rs` looks at the slots themselves, after every way for a session to end. Here the
//! look is at what a session is as a whole, whatever became of the one before.

use std::sync::Arc;
use std::time::Duration;

use kaa::lm::ScriptedHandler;
use kaa::{
    Clock, Context, Environment, EnvironmentExt, EnvironmentOptions, Limits, Policy, Quotas,
    Runtime, Store, Tool, ToolError, Value, WasmEnvironment,
};
use serde_json::json;

use super::common::{image, open, print, run, session, store_root};
use super::parts::Parts;

/// In a memory only if a tenant has put it there: it is put together where it's used.
fn secret() -> String {
    ["hunter", "2-of-", "tenant-", "one"].concat()
}

pub(crate) fn find(memory: &[u8], word: &[u8]) -> Option<usize> {
    let first = *word.first()?;
    let starts = memory.iter().enumerate().filter(|(_, byte)| **byte == first);
    starts.map(|(at, _)| at).find(|at| memory[*at..].starts_with(word))
}

/// The memory that sessions of an image begin with.
pub(crate) fn image_memory(name: &str) -> Vec<u8> {
    let image = image(name);
    let key = &image.manifest().key;
    std::fs::read(store_root().join("images").join(key).join("memory.bin")).unwrap()
}

/// Everything that a session has of its own, by way of a file.
async fn state(session: &mut WasmEnvironment) -> Parts {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("state");
    session.snapshot().await.unwrap().save(&file).unwrap();
    Parts::read(&file)
}

/// A tenant that leaves its secret in every place that a session has.
async fn live(secret: &str) {
    let tools = vec![
        Tool::new("tell", |call| Ok(call.args.into_iter().next().unwrap_or(Value::None))),
        Tool::new("fail", |call| Err(ToolError::of_type("KeyError", format!("{:?}", call.args)))),
    ];
    let options = EnvironmentOptions {
        lm: Some(Arc::new(ScriptedHandler::echo())),
        tools,
        policy: Policy { env: vec![("KEY".into(), secret.into())], ..Policy::default() },
        ..EnvironmentOptions::default()
    };
    // A session without grants has descriptors and scratch that the next one may get.
    for options in [options, EnvironmentOptions::default()] {
        let mut tenant = open(options);
        let text = secret.repeat(1000).into_bytes();
        tenant.add_context(Context::Text(text.clone()), None).await.unwrap();
        tenant.add_context(Context::Bytes(text), None).await.unwrap();
        tenant.add_history(&json!([{"role": "user", "content": secret}]), None).await.unwrap();
        tenant.set_variable("given", Value::from(secret)).await.unwrap();
        let code = format!(
            "import json, sys, builtins, os\n\
             s = {secret:?}\n\
             json.kept = builtins.kept = sys.kept = s\n\
             print(s * 1000); print(s * 1000, file=sys.stderr)\n\
             freed = [s * n for n in range(400)]; del freed\n\
             grown = bytearray(s.encode() * 400_000)\n\
             gone = [bytearray(s.encode() * 4000) for _ in range(100)]; del gone\n\
             def deep(n, t): return deep(n - 1, t + s) if n else t\n\
             deep(150, s)\n\
             open('/tmp/' + s, 'w').write(s * 1000); os.environ[s] = s\n\
             globals()[s.replace('-', '_')] = type(s, (), {{s: s}})()\n\
             if 'tell' in globals():\n    tell(s * 3000); llm_query(s * 3000); llm_query_batched([s] * 50)\n    try: fail(s)\n    except KeyError: pass\n\
             raise ValueError(s * 1000)"
        );
        let execution = run(&mut tenant, &code).await;
        assert_eq!(execution.exception.unwrap().type_name, "ValueError");
        run(&mut tenant, "import os; os.abort()").await;
        run(&mut tenant, "more = bytearray(given.encode() * 1_000_000)").await;
    }
}

#[tokio::test]
async fn sessions_do_not_see_each_other() {
    let mut one = session();
    let mut two = session();
    let hide =
        "secret = 'mine'\nopen('/tmp/secret', 'w').write('mine')\nimport json\njson.marker = 1";
    run(&mut one, hide).await;
    let code = "import os, json\nprint('secret' in globals(), os.listdir('/tmp'), hasattr(json, 'marker'))";
    assert_eq!(print(&mut two, code).await, "False [] False\n");
    drop(one);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut reused = session();
    assert_eq!(print(&mut reused, code).await, "False [] False\n");
}

#[tokio::test]
async fn no_secret_of_one_is_in_the_memory_of_another() {
    let secret = secret();
    assert_eq!(find(&image_memory("base"), secret.as_bytes()), None);
    for round in 0..2 {
        live(&secret).await;
        // One that begins at once, and those that begin in all slots that were given back since.
        let mut next: Vec<WasmEnvironment> = vec![session()];
        tokio::time::sleep(Duration::from_millis(200)).await;
        next.extend((0..3).map(|_| session()));
        for (number, session) in next.iter_mut().enumerate() {
            // Memory that nobody has set to anything is as whoever had it before left it. The word that is
            // looked for is another one here, so that it's in this memory only if it was.
            let masked: Vec<u8> = secret.bytes().map(|byte| byte ^ 1).collect();
            let code = format!(
                "import numpy, os\nfound = numpy.empty(60_000_000, 'u1')\n\
                 print(bytes({masked:?}) in (found ^ 1).tobytes(), os.listdir('/tmp'))"
            );
            assert_eq!(print(session, &code).await, "False []\n");
            let parts = state(session).await;
            let memory: Vec<u8> = parts.pages.into_values().collect::<Vec<_>>().concat();
            assert!(memory.len() > 1 << 20, "{} bytes", memory.len());
            assert_eq!(find(&memory, secret.as_bytes()), None, "round {round}, session {number}");
            assert!(!parts.header.to_string().contains(&secret), "round {round}");
        }
    }
}

/// A session after many others is the same, to the last bit of its memory, as the first one of a runtime.
#[tokio::test]
async fn a_used_runtime_gives_the_same_sessions_as_a_new_one() {
    let options = || EnvironmentOptions {
        policy: Policy {
            seed: Some(5),
            clock: Clock::Fixed(1_800_000_000_000_000_000),
            ..Policy::default()
        },
        ..EnvironmentOptions::default()
    };
    let cells =
        ["import json, random", "x = [random.random() for _ in range(1000)]", "y = json.dumps(x)"];
    let mut all = Vec::new();
    for is_new in [true, false, false] {
        let new = Runtime::open(Store::open(store_root()).unwrap()).unwrap();
        let mut session = match is_new {
            true => new.environment(&new.image("base", &|_| {}).unwrap(), options()).unwrap(),
            false => {
                live(&secret()).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
                open(options())
            }
        };
        for cell in cells {
            session.execute(cell).await.unwrap();
        }
        all.push(state(&mut session).await);
    }
    assert!(!all[0].pages.is_empty());
    for other in &all[1..] {
        let differ = all[0].pages.iter().filter(|(at, page)| other.pages.get(at) != Some(page));
        assert_eq!(differ.count(), 0, "pages differ");
        assert_eq!(other.pages.len(), all[0].pages.len());
        assert_eq!(other.header["globals"], all[0].header["globals"]);
    }
}

/// A tenant that takes what there is doesn't keep others from what is theirs.
#[tokio::test]
async fn a_neighbour_has_its_memory_and_disk() {
    let limits = Limits { memory_bytes: 256 << 20, disk_bytes: 4 << 20, ..Limits::default() };
    let greedy = EnvironmentOptions { limits, ..EnvironmentOptions::default() };
    let (mut greedy, mut other) = (open(greedy), session());
    let code = "x = []\ntry:\n    while True: x.append(bytes(1 << 20))\nexcept MemoryError: pass
try:
    with open('/tmp/f', 'wb') as f:
        while True: f.write(bytes(1 << 16))
except OSError: pass
print(len(x) > 100)";
    assert_eq!(print(&mut greedy, code).await, "True\n");
    let code = "y = bytearray(100_000_000); print(open('/tmp/f', 'wb').write(bytes(10_000_000)))";
    assert_eq!(print(&mut other, code).await, "10000000\n");
}

/// Sender and receiver of one bit, if pages that somebody wrote are faster for the next one in the slot.
const TOUCH: &str = "import time\nb = bytearray(300_000)";
const TIME: &str = "import time\nt = time.perf_counter_ns(); b = bytearray(300_000); t = time.perf_counter_ns() - t\nprint(t)";

/// The README's figures on what a recycled slot tells by its speed: to another session of its tenant which
/// pages were written before, to another tenant nothing. What lies beneath is asserted beside the slots, in
/// `src/wasm/session/tests.rs`: no page is there when one goes to another tenant.
#[tokio::test]
#[ignore = "measures; what is asserted are pages, in src/wasm/session/tests.rs"]
async fn the_speed_of_a_recycled_slot() {
    for receiver_name in ["sender", "other"] {
        let mut times = [Vec::new(), Vec::new()];
        for trial in 0..40 {
            let bit = trial % 2;
            let runtime = Runtime::open(Store::open(store_root()).unwrap()).unwrap();
            let image = runtime.image("base", &|_| {}).unwrap();
            let tenants = ["sender", "other"]
                .map(|name| (name, runtime.tenant(name, Quotas::default()).unwrap()));
            let session = |wanted: &str| {
                let of_name = tenants.iter().find(|(name, _)| *name == wanted);
                let tenant = of_name.map(|(_, tenant)| tenant.clone());
                let options = EnvironmentOptions { tenant, ..EnvironmentOptions::default() };
                runtime.environment(&image, options).unwrap()
            };
            let mut sender = session("sender");
            run(&mut sender, if bit == 1 { TOUCH } else { "import time" }).await;
            drop(sender);
            tokio::time::sleep(Duration::from_millis(20)).await;
            let mut receiver = session(receiver_name);
            let took: u64 = print(&mut receiver, TIME).await.trim().parse().unwrap();
            times[bit].push(took);
        }
        for (bit, times) in times.iter_mut().enumerate() {
            times.sort_unstable();
            let last = times.len() - 1;
            println!(
                "{receiver_name}, {bit}: {} ns, median {}, at most {}",
                times[0],
                times[last / 2],
                times[last]
            );
        }
    }
}
