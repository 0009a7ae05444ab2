//! Recycled slots: of a tenant nothing is left for the next one, wherever it was.

use std::sync::Arc;
use std::time::Duration;

use super::{Session, Start};
use crate::environment::{Environment, EnvironmentExt, EnvironmentOptions, Outcome};
use crate::image::Store;
use crate::lm::Ledger;
use crate::tenant::{Quotas, Tenant};
use crate::wasm::opening::{self, Origin, Ties};
use crate::wasm::{Image, Runtime, WasmEnvironment};

/// In memory it's only there when a tenant has put it there.
const SECRET: &[u8] = b"hunter2hunter2";

/// Where a tenant leaves its secret: on the heap, in a module and a builtin, on the stack of a deep
/// recursion, in freed memory, and in a file.
const SMALL: &str = "import json, builtins\n\
    s = 'hunter2' * 4\n\
    json.secret = builtins.secret = s.encode()\n\
    x = [s * n for n in range(50)]\n\
    freed = [s * n for n in range(500)]; del freed\n\
    def f(n, t): return f(n - 1, t + 'hunter2') if n else t\n\
    f(150, s)\n\
    open('/tmp/f', 'w').write(s)";

/// In memory that has grown, live and freed, and in rows that become runs over the image.
const LARGE: &str = "big = bytearray(b'hunter2' * 2_000_000)\n\
    gone = [bytearray(b'hunter2' * 200_000) for _ in range(20)]; del gone\n\
    many = [b'hunter2' * 300 for _ in range(3000)]";

/// What happens to a tenant before it goes.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Dropped,
    Reset,
    Restored,
    RestoredToEarlier,
    HardStopped,
    Trapped,
    Abandoned,
    Hibernated,
    HibernatedAndWoken,
    Forked,
    FileOpen,
}

const FATES: &[Fate] = &[
    Fate::Dropped,
    Fate::Reset,
    Fate::Restored,
    Fate::RestoredToEarlier,
    Fate::HardStopped,
    Fate::Trapped,
    Fate::Abandoned,
    Fate::Hibernated,
    Fate::HibernatedAndWoken,
    Fate::Forked,
    Fate::FileOpen,
];

fn runtime() -> Runtime {
    let root = std::env::var_os("KAA_CACHE").map_or_else(
        || dirs::cache_dir().expect("a user has a cache directory").join("kaa"),
        Into::into,
    );
    Runtime::open(Store::open(root).unwrap()).unwrap()
}

/// A new session, as the host has it.
fn open_of(tenant: &Tenant, runtime: &Runtime, image: &Image) -> Session {
    let seat = Arc::new(tenant.open_session().unwrap());
    let ties = Ties { seat, signal: Arc::default(), ledger: Ledger::default() };
    let options = EnvironmentOptions::default();
    opening::open(&runtime.shared, image, &options, Origin::Image, &ties).unwrap()
}

async fn cell(tenant: &mut WasmEnvironment, code: &str) {
    let execution = tenant.execute(code).await.unwrap();
    assert_eq!(execution.outcome, Outcome::Completed, "{code}: {:?}", execution.exception);
}

async fn live_and_go(mut tenant: WasmEnvironment, secrets: &[&str], fate: Fate) {
    cell(&mut tenant, "before = 'hunter2' * 10").await;
    let earlier = tenant.snapshot().await.unwrap();
    for secret in secrets {
        cell(&mut tenant, secret).await;
    }
    match fate {
        Fate::Dropped => {}
        Fate::Reset => tenant.reset().await.unwrap(),
        Fate::Restored => {
            let snapshot = tenant.snapshot().await.unwrap();
            cell(&mut tenant, "x = None; more = 'hunter2' * 100_000").await;
            tenant.restore(&snapshot).await.unwrap();
        }
        Fate::RestoredToEarlier => tenant.restore(&earlier).await.unwrap(),
        Fate::HardStopped => {
            let code = "more = 'hunter2' * 100_000; import os; os._exit(3)";
            assert!(tenant.execute(code).await.unwrap().rolled_back);
        }
        Fate::Trapped => {
            let code = "more = 'hunter2' * 100_000; import os; os.abort()";
            assert!(tenant.execute(code).await.unwrap().rolled_back);
        }
        Fate::Abandoned => {
            let code = "more = 'hunter2' * 100_000\nwhile True: pass";
            let cell = tenant.execute(code);
            assert!(tokio::time::timeout(Duration::from_millis(20), cell).await.is_err());
        }
        Fate::Hibernated => drop(tenant.hibernate().await.unwrap()),
        Fate::HibernatedAndWoken => {
            tenant.hibernate().await.unwrap();
            cell(&mut tenant, "more = 'hunter2' * 100_000").await;
        }
        Fate::Forked => {
            let mut fork = tenant.fork_session().await.unwrap();
            cell(&mut fork, "more = 'hunter2' * 100_000").await;
        }
        Fate::FileOpen => cell(&mut tenant, "o = open('/tmp/o', 'w'); o.write('hunter2')").await,
    }
}

/// Waits until everything that was dropped is ready to be used again.
async fn settle(start: &Start) {
    let mut before = usize::MAX;
    for _ in 0..1000 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let now = start.idle().len();
        if now > 0 && now == before {
            return;
        }
        before = now;
    }
    panic!("no slot is used again");
}

fn find(memory: &[u8]) -> Option<usize> {
    memory.windows(SECRET.len()).position(|window| window == SECRET)
}

/// The next tenant, as the host sees it before its first cell.
fn check_new(session: &mut Session, image: &Image, what: &str) {
    let start = &image.0.start;
    let guest = session.guest();
    assert!(guest.files.open_fds().is_empty() && guest.files.is_unused(), "{what}");
    // A session with a new instance has no less room.
    assert_ne!(guest.memory_limit.table_bytes, 0, "{what}: tables don't count");
    let scratch = guest.scratch.as_ref().unwrap().path();
    assert_eq!(std::fs::read_dir(scratch).unwrap().count(), 0, "{what}: files are left");
    let (memory, globals) = session.state();
    if memory != start.memory.contents() {
        panic!("{what}: the memory is not as in the image, the secret is at {:?}", find(memory));
    }
    let recorded: Vec<u64> = start.globals.iter().map(|record| record.bits).collect();
    assert_eq!(globals, recorded, "{what}");
    // What the memory grows by next is what the tenant before had grown by.
    let store = session.store_mut();
    let handles = store.data().handles.clone().unwrap();
    let before = handles.memory.data_size(&*store);
    handles.memory.grow(&mut *store, 400).unwrap();
    let grown = &handles.memory.data(&*store)[before..];
    assert!(grown.chunks(4096).all(|page| page == [0; 4096]), "{what}: grown, {:?}", find(grown));
}

/// The next tenant, as its own code sees it.
async fn check_own(tenant: &mut WasmEnvironment, what: &str) -> String {
    let look = "import os, json, builtins\n\
        fds = [os.open(f'/tmp/{n}', os.O_CREAT | os.O_RDWR) for n in range(3)]\n\
        left = [fd for fd in range(3, 200) if fd not in fds and not isinstance(os_error(fd), str)]\n\
        print(sorted(os.listdir('/tmp')), fds, left, hasattr(json, 'secret'), hasattr(builtins, 'secret'))\n\
        print(any(n - bytearray(n).count(0) for n in (100, 10_000, 1_000_000, 20_000_000)), len(globals()))";
    let define = "def os_error(fd):\n    import os\n    try: return os.fstat(fd).st_mode\n    except OSError as e: return str(e)";
    cell(tenant, define).await;
    let execution = tenant.execute(look).await.unwrap();
    assert_eq!(execution.outcome, Outcome::Completed, "{what}: {:?}", execution.exception);
    let text = execution.stdout.text().into_owned();
    assert!(text.contains("False False\nFalse "), "{what}: {text}");
    text
}

#[tokio::test]
async fn nothing_of_a_tenant_is_left_for_the_next_one() {
    let runtime = runtime();
    let image = runtime.image("base", &|_| {}).unwrap();
    let open = || runtime.environment(&image, EnvironmentOptions::default()).unwrap();
    let other = runtime.tenant("other", Quotas::default()).unwrap();
    let start = &image.0.start;
    assert!(find(start.memory.contents()).is_none());
    let unspoilt = check_own(&mut open(), "the first one").await;
    for secrets in [&[SMALL][..], &[LARGE], &[SMALL, LARGE]] {
        for fate in FATES {
            let what = format!("{fate:?}, {} bytes of code", secrets.concat().len());
            settle(start).await;
            start.idle().clear();
            live_and_go(open(), secrets, *fate).await;
            settle(start).await;
            let slots = start.idle().len();
            for slot in (0..slots).rev() {
                // In turns one of the same tenant, and of another.
                let tenant = if slot % 2 == 0 { runtime.default_tenant() } else { other.clone() };
                let mut next = open_of(&tenant, &runtime, &image);
                assert_eq!(start.idle().len(), slot, "{what}: the slot is used again");
                check_new(&mut next, &image, &what);
            }
            // The same again, for one that looks for itself.
            live_and_go(open(), secrets, *fate).await;
            settle(start).await;
            let slots = start.idle().len();
            let mut next = open();
            assert_eq!(start.idle().len(), slots - 1, "{what}: the slot is used again");
            assert_eq!(check_own(&mut next, &what).await, unspoilt, "{what}");
        }
    }
}

/// The pages of a session's memory that are there before it has done anything: those that it reads or
/// writes faster than the others.
#[cfg(target_os = "linux")]
fn resident_pages(session: &Session) -> Vec<usize> {
    use std::os::unix::fs::FileExt;
    let page = rustix::param::page_size();
    let first = session.slot.base_for_test() / page;
    let mut words = vec![0; session.start.memory.bytes() / page * 8];
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    pagemap.read_exact_at(&mut words, first as u64 * 8).unwrap();
    let present = |word: &[u8]| u64::from_ne_bytes(word.try_into().unwrap()) >> 62 != 0;
    let pages = words.chunks_exact(8).enumerate().filter(|(_, word)| present(word));
    pages.map(|(number, _)| number).collect()
}

/// How fast a slot is tells a tenant nothing of the one that had it before.
#[tokio::test]
#[cfg(target_os = "linux")]
async fn a_slot_goes_to_another_tenant_without_its_resident_pages() {
    let runtime = runtime();
    let image = runtime.image("base", &|_| {}).unwrap();
    let start = &image.0.start;
    let (one, two) = (runtime.default_tenant(), runtime.tenant("two", Quotas::default()).unwrap());
    for secret in [SMALL, LARGE] {
        for fate in [Fate::Dropped, Fate::Trapped] {
            for (next, is_same) in [(&one, true), (&two, false)] {
                let options = EnvironmentOptions::default();
                live_and_go(runtime.environment(&image, options).unwrap(), &[secret], fate).await;
                settle(start).await;
                let slots = start.idle().len();
                let session = open_of(next, &runtime, &image);
                assert_eq!(start.idle().len(), slots - 1, "{fate:?}: the slot is used again");
                let pages = resident_pages(&session).len();
                assert_eq!(pages > 50, is_same, "{fate:?}: {pages} pages");
                assert!(is_same || pages == 0, "{fate:?}: {pages} pages");
            }
            start.idle().clear();
        }
    }
}

/// A tenant's own slots come first, also those that are not ready yet.
#[tokio::test]
async fn a_tenant_gets_its_own_slots_first() {
    let runtime = runtime();
    let image = runtime.image("base", &|_| {}).unwrap();
    let start = &image.0.start;
    let (one, two) = (runtime.default_tenant(), runtime.tenant("two", Quotas::default()).unwrap());
    let owner = |tenant: &Tenant| tenant.open_session().unwrap().owner();
    let sessions = [&one, &two, &one].map(|tenant| open_of(tenant, &runtime, &image));
    sessions.into_iter().for_each(Session::give_back);
    assert_eq!((start.idle().len(), start.ended().len()), (0, 3));
    drop(open_of(&two, &runtime, &image));
    assert_eq!(start.ended().len(), 2);
    assert!(start.ended().iter().all(|ended| ended.owner.is(&owner(&one))));
    settle(start).await;
    assert_eq!(start.idle().len(), 2);
    let bytes = start.memory.bytes();
    assert!(
        start.take_idle(bytes, &owner(&two)).unwrap().owner.is(&owner(&one)),
        "none of its own"
    );
    assert!(start.take_idle(bytes, &owner(&one)).is_some());
    assert!(start.take_idle(bytes, &owner(&one)).is_none());
}

#[tokio::test]
async fn a_child_of_a_template_leaves_zeros_beyond_the_image() {
    let runtime = runtime();
    let image = runtime.image("base", &|_| {}).unwrap();
    let start = Arc::clone(&image.0.start);
    let mut template = runtime.environment(&image, EnvironmentOptions::default()).unwrap();
    cell(
        &mut template,
        "room = bytearray(b'x' * 20_000_000); small = [b'y' * 3000 for _ in range(5000)]",
    )
    .await;
    let snapshot = template.snapshot().await.unwrap();
    let child_image = runtime.template(&snapshot).unwrap();
    for round in 0..3 {
        let mut child = runtime.environment(&child_image, EnvironmentOptions::default()).unwrap();
        assert_eq!(
            child.execute("room[5], len(room), small[77][5]").await.unwrap().value.unwrap(),
            "(120, 20000000, 121)"
        );
        let hide = "for n in range(0, 20_000_000, 4096): room[n:n + 14] = b'hunter2hunter2'\nsmall[:] = [b'hunter2' * 400 for _ in small]";
        cell(&mut child, hide).await;
        drop(child);
        settle(&start).await;
        let (largest, size) = {
            let idle = start.idle();
            let largest = idle.iter().max_by_key(|idle| idle.bytes).expect("one is idle");
            (
                largest.store.as_ref().map(|store| {
                    let memory = store.data().handles.as_ref().expect("handles").memory;
                    memory.data(store).to_vec()
                }),
                largest.bytes,
            )
        };
        let memory = largest.expect("its instance is used again");
        assert!(size == memory.len() && size > start.memory.bytes(), "round {round}: {size}");
        let (inside, beyond) = memory.split_at(start.memory.bytes());
        assert!(inside == start.memory.contents(), "round {round}");
        assert!(beyond.iter().all(|byte| *byte == 0), "round {round}: {:?}", find(&memory));
    }
    let mut plain = runtime.environment(&image, EnvironmentOptions::default()).unwrap();
    assert_eq!(plain.execute("'room' in globals()").await.unwrap().value.unwrap(), "False");
}
