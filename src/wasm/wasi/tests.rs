//! WASI as hostile machine code meets it: every function, with every kind of pointer, length and
//! descriptor, also such as no C library would pass.
//!
//! Python can't say most of this, but whoever has taken over the interpreter inside its memory can.

use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use wasmtime::{Config, Engine, Instance, Linker, Module, Store, Val};

use super::{Directories, ERRNO_SUCCESS, add_to_linker, context};
use crate::agent::{Conversation, Streams};
use crate::environment::EnvironmentOptions;
use crate::limits::Limits;
use crate::policy::{Mount, Policy};
use crate::wasm::budget::Budget;
use crate::wasm::files::Files;
use crate::wasm::guest::{Guest, Handles, MemoryLimit};

/// The functions of `wasi_snapshot_preview1` with their parameters: `i` for 32 bits, `I` for 64.
const FUNCTIONS: &[(&str, &str)] = &[
    ("args_get", "ii"),
    ("args_sizes_get", "ii"),
    ("clock_res_get", "ii"),
    ("clock_time_get", "iIi"),
    ("environ_get", "ii"),
    ("environ_sizes_get", "ii"),
    ("fd_advise", "iIIi"),
    ("fd_allocate", "iII"),
    ("fd_close", "i"),
    ("fd_datasync", "i"),
    ("fd_fdstat_get", "ii"),
    ("fd_fdstat_set_flags", "ii"),
    ("fd_fdstat_set_rights", "iII"),
    ("fd_filestat_get", "ii"),
    ("fd_filestat_set_size", "iI"),
    ("fd_filestat_set_times", "iIIi"),
    ("fd_pread", "iiiIi"),
    ("fd_prestat_dir_name", "iii"),
    ("fd_prestat_get", "ii"),
    ("fd_pwrite", "iiiIi"),
    ("fd_read", "iiii"),
    ("fd_readdir", "iiiIi"),
    ("fd_renumber", "ii"),
    ("fd_seek", "iIii"),
    ("fd_sync", "i"),
    ("fd_tell", "ii"),
    ("fd_write", "iiii"),
    ("path_create_directory", "iii"),
    ("path_filestat_get", "iiiii"),
    ("path_filestat_set_times", "iiiiIIi"),
    ("path_link", "iiiiiii"),
    ("path_open", "iiiiiIIii"),
    ("path_readlink", "iiiiii"),
    ("path_remove_directory", "iii"),
    ("path_rename", "iiiiii"),
    ("path_symlink", "iiiii"),
    ("path_unlink_file", "iii"),
    ("poll_oneoff", "iiii"),
    ("proc_raise", "i"),
    ("random_get", "ii"),
    ("sched_yield", ""),
    ("sock_accept", "iii"),
    ("sock_recv", "iiiiii"),
    ("sock_send", "iiiii"),
    ("sock_shutdown", "ii"),
];
const MEMORY_BYTES: u64 = 1 << 20;
/// Calls of each function with arguments drawn from those below.
const ROUNDS: usize = 400;
/// Far more than any call takes that does no more than it may.
const TOO_LONG: Duration = Duration::from_secs(20);

/// A module that is nothing but its imports, and what [`Handles`] has to find.
fn module() -> String {
    let mut text = String::from("(module\n");
    for (name, parameters) in FUNCTIONS {
        let kind = |letter| if letter == 'I' { "i64" } else { "i32" };
        let parameters: Vec<&str> = parameters.chars().map(kind).collect();
        text += &format!(
            "(import \"wasi_snapshot_preview1\" \"{name}\" (func ${name} (param {}) (result i32)))\n\
             (export \"{name}\" (func ${name}))\n",
            parameters.join(" ")
        );
    }
    text += &format!("(memory (export \"memory\") {})\n", MEMORY_BYTES >> 16);
    for (name, parameters) in [("one", "i32"), ("two", "i32 i32"), ("three", "i32 i32 i32")] {
        text += &format!(
            "(func (export \"{name}\") (param {parameters}) (result i32) (i32.const 0))\n"
        );
    }
    text + ")"
}

struct Machine {
    store: Store<Guest>,
    instance: Instance,
}

impl Machine {
    async fn new(host: &Path, limits: &Limits) -> Self {
        let at = |name: &str| host.join(name);
        for name in ["lib", "scratch", "empty", "mount", "bait"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        for (name, text) in [("lib/zip", "library"), ("bait/secret", "bait"), ("mount/f", "mount")]
        {
            std::fs::write(at(name), text).unwrap();
        }
        let mounts = vec![Mount { host: at("mount"), guest: "/data".into(), writable: true }];
        let policy = Policy { mounts, ..Policy::default() };
        let (stdlib, scratch, root) = (at("lib"), at("scratch"), at("empty"));
        let directories = Directories { stdlib: &stdlib, scratch: &scratch, root: &root };
        let options = EnvironmentOptions::default();
        let guest = Guest {
            wasi: context(&directories, &policy, None, None).unwrap(),
            files: Files::new(&scratch, limits.disk_bytes, &["/data".into()], 0),
            scratch: None,
            plain: false,
            clock: None,
            random: None,
            streams: Streams::default(),
            conversation: Conversation::new(&options, [0; 16]).unwrap(),
            budget: Budget::start(limits.clone()),
            memory_limit: MemoryLimit::new(MEMORY_BYTES, Weak::new()),
            leave: Arc::default(),
            signal: Arc::default(),
            handles: None,
            fault: None,
            refused_bytes: None,
            running: false,
            mailbox: None,
        };
        let engine = Engine::new(&Config::new()).unwrap();
        let mut linker = Linker::new(&engine);
        add_to_linker(&mut linker).unwrap();
        let module = Module::new(&engine, wat::parse_str(module()).unwrap()).unwrap();
        let mut store = Store::new(&engine, guest);
        let instance = linker.instantiate_async(&mut store, &module).await.unwrap();
        let handles = Handles {
            memory: instance.get_memory(&mut store, "memory").unwrap(),
            globals: Arc::default(),
            fuel: None,
            floor: None,
            host_alloc: instance.get_typed_func(&mut store, "one").unwrap(),
            interrupt: instance.get_typed_func(&mut store, "one").unwrap(),
            run_source: instance.get_typed_func(&mut store, "two").unwrap(),
            eval_code: instance.get_typed_func(&mut store, "three").unwrap(),
            new_text: instance.get_typed_func(&mut store, "two").unwrap(),
            set_item: instance.get_typed_func(&mut store, "three").unwrap(),
            initialize: None,
        };
        store.data_mut().handles = Some(Arc::new(handles));
        Self { store, instance }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        let memory = self.store.data().handles().unwrap().memory;
        memory.data_mut(&mut self.store)[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The error number that a call returns, or `None` when it ends the guest.
    async fn call(&mut self, name: &str, arguments: &[u64]) -> Option<i32> {
        let (_, parameters) = FUNCTIONS.iter().find(|(known, _)| *known == name).unwrap();
        let value = |(letter, value): (char, &u64)| match letter {
            'I' => Val::I64(*value as i64),
            _ => Val::I32(*value as u32 as i32),
        };
        let arguments: Vec<Val> = parameters.chars().zip(arguments).map(value).collect();
        let function = self.instance.get_func(&mut self.store, name).unwrap();
        let mut result = [Val::I32(-1)];
        let since = Instant::now();
        let called = function.call_async(&mut self.store, &arguments, &mut result).await;
        assert!(since.elapsed() < TOO_LONG, "{name}{arguments:?} took {:?}", since.elapsed());
        called.ok().map(|()| result[0].unwrap_i32())
    }
}

/// SplitMix64: the same calls on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[(self.next() % values.len() as u64) as usize]
    }
}

/// What is passed: descriptors, addresses, lengths and flags, good ones and what lies around their ends.
const VALUES: &[u64] = &[
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    16,
    24,
    48,
    64,
    255,
    1024,
    1025,
    4096,
    4097,
    0x1_0000,
    0x1_0001,
    MEMORY_BYTES - 8,
    MEMORY_BYTES - 1,
    MEMORY_BYTES,
    MEMORY_BYTES + 1,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fff0,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

#[tokio::test]
async fn no_argument_does_harm() {
    let host = tempfile::tempdir().unwrap();
    let limits = Limits {
        wall: Duration::from_millis(100),
        grace: Duration::from_millis(1),
        disk_bytes: 4 << 20,
        ..Limits::default()
    };
    let mut machine = Machine::new(host.path(), &limits).await;
    let mut random = Random(1);
    let mut answering = 0;
    for (name, parameters) in FUNCTIONS {
        let mut answers = 0;
        for _ in 0..ROUNDS {
            // Paths, buffers and subscriptions, for those that look into memory.
            machine.put(0, b"../bait/secret\0data/f\0/./data/../../bait/secret\0\xff\xfe\0f");
            let noise: Vec<u8> = (0..64).flat_map(|_| random.of(VALUES).to_le_bytes()).collect();
            machine.put(64, &noise);
            let argument = |_| match random.next() % 2 {
                // Often enough good ones, so that the others are looked at at all.
                0 => random.of(&VALUES[..9]),
                _ => random.of(VALUES),
            };
            let arguments: Vec<u64> = parameters.chars().map(argument).collect();
            answers += usize::from(machine.call(name, &arguments).await.is_some());
        }
        answering += usize::from(answers > 0);
    }
    // The others always have something that no such call may have, which ends the guest.
    assert!(answering > FUNCTIONS.len() / 2, "{answering} functions ever answer");
    let look = |name: &str| std::fs::read_to_string(host.path().join(name)).unwrap();
    assert_eq!((look("lib/zip"), look("bait/secret")), ("library".into(), "bait".into()));
    let names = |name: &str| std::fs::read_dir(host.path().join(name)).unwrap().count();
    assert_eq!((names("lib"), names("bait"), names("empty"), names("")), (1, 1, 0, 5));
}

#[tokio::test]
async fn what_the_host_makes_for_a_call_is_bounded() {
    let host = tempfile::tempdir().unwrap();
    let mut machine = Machine::new(host.path(), &Limits::default()).await;
    machine.put(0, &b"./".repeat(400_000));
    let (long, whole) = (800_000, u64::from(u32::MAX));
    // Refused before anything is made of the length: INVAL, NAMETOOLONG, FAULT, or the guest's end.
    for (name, arguments, expected) in [
        ("random_get", &[0, whole][..], None),
        ("random_get", &[0, MEMORY_BYTES], Some(ERRNO_SUCCESS)),
        ("path_open", &[4, 0, 0, long, 0, whole, whole, 0, 0], Some(37)),
        ("path_create_directory", &[4, 0, long], Some(37)),
        ("path_filestat_get", &[4, 0, 0, long, 0], Some(37)),
        ("path_filestat_set_times", &[4, 0, 0, long, 0, 0, 0], Some(37)),
        ("path_link", &[4, 0, 0, long, 4, 0, 1], Some(37)),
        ("path_link", &[4, 0, 0, 1, 4, 0, long], Some(37)),
        ("path_readlink", &[4, 0, long, 0, 10, 0], Some(37)),
        ("path_remove_directory", &[4, 0, long], Some(37)),
        ("path_rename", &[4, 0, long, 4, 0, 1], Some(37)),
        ("path_rename", &[4, 0, 1, 4, 0, long], Some(37)),
        ("path_symlink", &[0, long, 4, 0, 1], Some(37)),
        ("path_symlink", &[0, 1, 4, 0, long], Some(37)),
        ("path_unlink_file", &[4, 0, long], Some(37)),
        ("poll_oneoff", &[0, 0, 1025, 0], Some(28)),
        ("fd_write", &[1, 0, 1025, 0], Some(21)),
    ] {
        assert_eq!(machine.call(name, arguments).await, expected, "{name}{arguments:?}");
    }
}

#[tokio::test]
async fn pipes_in_a_mount_are_not_waited_for() {
    let host = tempfile::tempdir().unwrap();
    let mut machine = Machine::new(host.path(), &Limits::default()).await;
    let made = std::process::Command::new("mkfifo").arg(host.path().join("mount/pipe")).status();
    assert!(made.unwrap().success());
    std::os::unix::fs::symlink("pipe", host.path().join("mount/link")).unwrap();
    machine.put(0, b"pipelinkf");
    const FOLLOW: u64 = 1;
    for (name, at, length, expected) in [("pipe", 0, 4, 2), ("link", 4, 4, 2), ("f", 8, 1, 0)] {
        for rights in [1 << 1, 1 << 6, (1 << 29) - 1] {
            let arguments = [6, FOLLOW, at, length, 0, rights, 0, 0, 64];
            let opened = machine.call("path_open", &arguments);
            let answer = tokio::time::timeout(TOO_LONG, opened).await;
            assert_eq!(answer.expect("it comes back"), Some(expected), "{name} {rights:#x}");
        }
    }
}
