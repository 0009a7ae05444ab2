//! WASI as hostile machine code meets it: every function, with every kind of pointer, length and
//! descriptor, also such as no C library would pass.
//!
//! Python can't say most of this, but whoever has taken over the interpreter inside its memory can.

mod world;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use wasmtime::{Engine, Instance, InstancePre, Linker, Module, Store, Val};

use super::{Directories, ERRNO_SUCCESS, add_to_linker, context};
use crate::agent::{Conversation, Streams};
use crate::environment::EnvironmentOptions;
use crate::limits::Limits;
use crate::policy::{Mount, Policy};
use crate::wasm::budget::Budget;
use crate::wasm::files::Files;
use crate::wasm::guest::{Guest, Handles, MemoryLimit};

use world::{NamedPath, World};

/// The functions of `wasi_snapshot_preview1` with what their parameters are, by the names in [`KINDS`]; a
/// path, which is two of them, its address and its length, by those in [`world::ROLES`].
const FUNCTIONS: &[(&str, &str)] = &[
    ("args_get", "buffer out"),
    ("args_sizes_get", "out out"),
    ("clock_res_get", "clock out"),
    ("clock_time_get", "clock time out"),
    ("environ_get", "buffer out"),
    ("environ_sizes_get", "out out"),
    ("fd_advise", "fd size size advice"),
    ("fd_allocate", "fd size size"),
    ("fd_close", "fd"),
    ("fd_datasync", "fd"),
    ("fd_fdstat_get", "fd out"),
    ("fd_fdstat_set_flags", "fd fdflags"),
    ("fd_fdstat_set_rights", "fd rights rights"),
    ("fd_filestat_get", "fd out"),
    ("fd_filestat_set_size", "fd size"),
    ("fd_filestat_set_times", "fd time time times"),
    ("fd_pread", "fd buffers count size out"),
    ("fd_prestat_dir_name", "dir buffer length"),
    ("fd_prestat_get", "dir out"),
    ("fd_pwrite", "fd buffers count size out"),
    ("fd_read", "fd buffers count out"),
    ("fd_readdir", "dir buffer length cookie out"),
    ("fd_renumber", "fd fd"),
    ("fd_seek", "fd size whence out"),
    ("fd_sync", "fd"),
    ("fd_tell", "fd out"),
    ("fd_write", "fd buffers count out"),
    ("path_create_directory", "dir new"),
    ("path_filestat_get", "dir lookup file out"),
    ("path_filestat_set_times", "dir lookup file time time times"),
    ("path_link", "place lookup file place new"),
    ("path_open", "dir lookup file oflags rights rights fdflags out"),
    ("path_readlink", "dir link buffer length out"),
    ("path_remove_directory", "dir empty"),
    ("path_rename", "place file place new"),
    ("path_symlink", "file dir new"),
    ("path_unlink_file", "dir file"),
    ("poll_oneoff", "waits out count out"),
    ("proc_raise", "count"),
    ("random_get", "buffer length"),
    ("sched_yield", ""),
    ("sock_accept", "fd fdflags out"),
    ("sock_recv", "fd buffers count fdflags out out"),
    ("sock_send", "fd buffers count fdflags out"),
    ("sock_shutdown", "fd count"),
];

/// Kinds of parameters, with good ones of each.
const KINDS: &[(&str, &[u64])] = &[
    ("advice", &[0, 1, 2, 3, 4, 5]),
    ("buffer", &[BUFFER]),
    ("buffers", &[BUFFERS, BUFFERS + 8]),
    ("clock", &[0, 1]),
    ("cookie", &[0, 1, 2]),
    ("count", &[1, 1, 2]),
    ("dir", &[3, 4, 4, 5, 6, 6, OWN_DIRECTORY]),
    ("fd", &[1, 2, 3, 4, 5, 6, MOUNT_FILE, MOUNT_FILE, SCRATCH_FILE, SCRATCH_FILE, OWN_DIRECTORY]),
    ("fdflags", &[0, 0, 1]),
    ("length", &[16, 256, 4096]),
    ("lookup", &[0, 0, 1]),
    ("oflags", &[0, 0, 1, 1, 2, 4, 8, 9]),
    ("out", &[OUT, OUT + 64]),
    ("place", &[4, 5, 6, 6, 6, 6, 6, 6]),
    ("rights", &[READ, WRITE, READ | WRITE, RIGHTS_ALL]),
    ("size", &[0, 1, 100]),
    ("time", &[0, 1, 1_000_000_000]),
    ("times", &[0, 1, 2, 4, 5, 8, 10]),
    ("waits", &[WAITS]),
    ("whence", &[0, 1, 2]),
];
/// Those of 64 bits.
const WIDE: &[&str] = &["cookie", "rights", "size", "time"];
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 6;
const RIGHTS_ALL: u64 = (1 << 29) - 1;

/// Where good arguments lead to: arrays of buffers, subscriptions, noise, paths one after another, a
/// buffer of a page, and room for answers.
const BUFFERS: u64 = 0x100;
const WAITS: u64 = 0x200;
const NOISE: u64 = 0x400;
const PATHS: u64 = 0x1000;
const BUFFER: u64 = 0x4000;
const OUT: u64 = 0x6000;
/// Descriptors that the guest itself has opened, after those of its session.
const MOUNT_FILE: u64 = 7;
const SCRATCH_FILE: u64 = 8;
const OWN_DIRECTORY: u64 = 9;

const MEMORY_BYTES: u64 = 1 << 16;
/// Calls of each function, each by a machine of its own.
const ROUNDS: usize = 400;
/// Of these so many succeed at least, so that the others were worth a try.
const SUCCESSES_MIN: usize = ROUNDS / 40;
/// Functions that never succeed, and what they would need.
const NEVER: &[(&str, &str)] = &[
    ("fd_allocate", "room that is there before it's written, which wasmtime-wasi doesn't promise"),
    ("fd_fdstat_set_rights", "rights of descriptors, which have gone from WASI"),
    ("proc_raise", "signals"),
    ("sock_accept", "a socket"),
    ("sock_recv", "a socket"),
    ("sock_send", "a socket"),
    ("sock_shutdown", "a socket"),
];
/// Far more than any call takes that does no more than it may.
const TOO_LONG: Duration = Duration::from_secs(20);

/// The kinds of a function's parameters, one for each.
fn kinds(name: &str) -> Vec<&'static str> {
    let (_, kinds) = FUNCTIONS.iter().find(|(known, _)| *known == name).unwrap();
    let is_path = |kind| world::ROLES.iter().any(|(role, _)| *role == kind);
    let each = |kind| if is_path(kind) { vec!["address", "length"] } else { vec![kind] };
    kinds.split_whitespace().flat_map(each).collect()
}

/// A module that is nothing but its imports, and what [`Handles`] has to find.
fn module() -> String {
    let (mut imports, mut text) = (String::new(), String::new());
    for (name, _) in FUNCTIONS {
        let width = |kind| if WIDE.contains(&kind) { "i64" } else { "i32" };
        let parameters: Vec<&str> = kinds(name).into_iter().map(width).collect();
        // Called from within, since a caller has the memory.
        let passed: Vec<String> =
            (0..parameters.len()).map(|at| format!("(local.get {at})")).collect();
        imports += &format!(
            "(import \"wasi_snapshot_preview1\" \"{name}\" (func ${name} (param {}) (result i32)))\n",
            parameters.join(" ")
        );
        text += &format!(
            "(func (export \"{name}\") (param {}) (result i32) (call ${name} {}))\n",
            parameters.join(" "),
            passed.join(" ")
        );
    }
    text += &format!("(memory (export \"memory\") {})\n", MEMORY_BYTES >> 16);
    for (name, parameters) in [("one", "i32"), ("two", "i32 i32"), ("three", "i32 i32 i32")] {
        text += &format!(
            "(func (export \"{name}\") (param {parameters}) (result i32) (i32.const 0))\n"
        );
    }
    format!("(module\n{imports}{text})")
}

/// What all machines are made of.
fn template() -> &'static InstancePre<Guest> {
    static TEMPLATE: OnceLock<InstancePre<Guest>> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let engine = Engine::default();
        let mut linker = Linker::new(&engine);
        add_to_linker(&mut linker).unwrap();
        let module = Module::new(&engine, wat::parse_str(module()).unwrap()).unwrap();
        linker.instantiate_pre(&module).unwrap()
    })
}

struct Machine {
    store: Store<Guest>,
    instance: Instance,
}

impl Machine {
    async fn new(host: &Path, limits: &Limits) -> Self {
        let at = |name: &str| host.join(name);
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
        let mut store = Store::new(template().module().engine(), guest);
        let instance = template().instantiate_async(&mut store).await.unwrap();
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

    fn get(&self) -> &[u8] {
        self.store.data().handles().unwrap().memory.data(&self.store)
    }

    /// The error number that a call returns, or `None` when it ends the guest.
    async fn call(&mut self, name: &str, arguments: &[u64]) -> Option<i32> {
        let value = |(kind, value): (&str, &u64)| match WIDE.contains(&kind) {
            true => Val::I64(*value as i64),
            false => Val::I32(*value as u32 as i32),
        };
        let kinds = kinds(name);
        assert_eq!(kinds.len(), arguments.len(), "{name}");
        let arguments: Vec<Val> = kinds.into_iter().zip(arguments).map(value).collect();
        let function = self.instance.get_func(&mut self.store, name).unwrap();
        let mut result = [Val::I32(-1)];
        let since = Instant::now();
        let called = function.call_async(&mut self.store, &arguments, &mut result).await;
        assert!(since.elapsed() < TOO_LONG, "{name}{arguments:?} took {:?}", since.elapsed());
        called.ok().map(|()| result[0].unwrap_i32())
    }

    /// Puts there what good arguments lead to, and some noise.
    fn lay_out(&mut self, paths: &[NamedPath], random: &mut StdRng) {
        let pairs = [BUFFER, 16, BUFFER + 64, 1000, BUFFER + 2048, 0];
        let pairs: Vec<u8> = pairs.iter().flat_map(|word| (*word as u32).to_le_bytes()).collect();
        self.put(BUFFERS as usize, &pairs);
        // A clock that has come, and a file that can be read.
        let mut waits = [0; 96];
        waits[16] = 1;
        (waits[24], waits[56], waits[64]) = (1, 1, MOUNT_FILE as u8);
        self.put(WAITS as usize, &waits);
        let noise: Vec<u8> = (0..64).flat_map(|_| of(random, VALUES).to_le_bytes()).collect();
        self.put(NOISE as usize, &noise);
        let bytes: Vec<u8> = paths.iter().flat_map(|path| path.bytes.clone()).collect();
        self.put(PATHS as usize, &bytes);
    }

    /// Opens what a guest may have open, with the numbers that the arguments count on.
    async fn open_own(&mut self) {
        for (directory, path, rights, fd) in [
            (6, "f", READ | WRITE, MOUNT_FILE),
            (4, "f", READ | WRITE, SCRATCH_FILE),
            (6, "d", READ, OWN_DIRECTORY),
        ] {
            assert_eq!(self.open(directory, path, rights).await, Some(fd), "{path}");
        }
    }

    /// The descriptor under which a path is open then, links followed.
    async fn open(&mut self, directory: u64, path: &str, rights: u64) -> Option<u64> {
        self.put(BUFFER as usize, path.as_bytes());
        let length = path.len() as u64;
        let arguments = [directory, 1, BUFFER, length, 0, rights, rights, 0, OUT];
        let opened = self.call("path_open", &arguments).await == Some(ERRNO_SUCCESS);
        let word = self.get()[OUT as usize..][..4].try_into().unwrap();
        opened.then(|| u32::from_le_bytes(word).into())
    }

    /// Reads and lists whatever can be by now, also by way of what a call may have made; whether there
    /// is anything of the bait in it.
    async fn finds_bait(&mut self) -> bool {
        let mut found = world::is_bait(self.get());
        for directory in [4, 6] {
            self.open(directory, "new", READ).await;
        }
        let opened = self.store.data().files.open_fds().into_iter();
        for fd in opened.filter(|fd| u64::from(*fd) > OWN_DIRECTORY) {
            self.put(BUFFERS as usize, &[BUFFER as u32, 4096].map(u32::to_le_bytes).concat());
            self.call("fd_pread", &[fd.into(), BUFFERS, 1, 0, OUT]).await;
            found |= world::is_bait(&self.get()[BUFFER as usize..]);
            self.call("fd_readdir", &[fd.into(), BUFFER, 4096, 0, OUT]).await;
            found |= world::is_bait(&self.get()[BUFFER as usize..]);
        }
        found
    }
}

fn of<T: Copy>(random: &mut StdRng, values: &[T]) -> T {
    *values.choose(random).unwrap()
}

/// What else is passed as descriptors, addresses, lengths and flags: what lies around the ends of good ones.
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

/// Arguments of a call: of some all are good ones, of some most, of some half.
fn arguments(name: &str, paths: &[NamedPath], random: &mut StdRng) -> Vec<u64> {
    let wild = of(random, &[0.0, 0.0, 0.1, 0.5]);
    let (_, kinds) = FUNCTIONS.iter().find(|(known, _)| *known == name).unwrap();
    let mut arguments = Vec::new();
    for kind in kinds.split_whitespace() {
        let first = arguments.len();
        match KINDS.iter().find(|(known, _)| *known == kind) {
            Some((_, good)) => arguments.push(of(random, good)),
            None => {
                let role = of(random, &[kind, kind, kind, world::OUT, ""]);
                let fit = (0..paths.len()).filter(|at| role.is_empty() || paths[*at].role == role);
                let number = of(random, &fit.collect::<Vec<_>>());
                let before: usize = paths[..number].iter().map(|path| path.bytes.len()).sum();
                arguments.extend([PATHS + before as u64, paths[number].bytes.len() as u64]);
            }
        }
        for argument in &mut arguments[first..] {
            if random.random_bool(wild) {
                *argument = of(random, VALUES);
            }
        }
    }
    arguments
}

#[tokio::test]
async fn no_argument_does_harm() {
    let limits = Limits {
        wall: Duration::from_millis(20),
        grace: Duration::from_millis(1),
        disk_bytes: 4 << 20,
        ..Limits::default()
    };
    let mut random = StdRng::seed_from_u64(1);
    let (mut world, mut successes, mut wrong) = (World::new(), BTreeMap::new(), Vec::new());
    for (name, _) in FUNCTIONS {
        for _ in 0..ROUNDS {
            world.mend();
            let paths = world.paths();
            let mut machine = Machine::new(world.path(), &limits).await;
            machine.open_own().await;
            machine.lay_out(&paths, &mut random);
            let arguments = arguments(name, &paths, &mut random);
            let answer = machine.call(name, &arguments).await;
            *successes.entry(*name).or_insert(0) += usize::from(answer == Some(ERRNO_SUCCESS));
            let (finds_bait, harm) = (machine.finds_bait().await, world.harm());
            if finds_bait || !harm.is_empty() {
                let what = if finds_bait { "found bait" } else { "did harm" };
                let paths = shown(&paths);
                wrong.push(format!("{name}{arguments:?} {what} {harm:?}, with {paths}"));
                world = World::new();
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    for (name, count) in successes {
        match NEVER.iter().find(|(never, _)| *never == name) {
            Some((_, needs)) => assert_eq!(count, 0, "{name}, without {needs}"),
            None => assert!(count >= SUCCESSES_MIN, "{name} succeeded {count} times"),
        }
    }
}

/// Paths with their addresses, as the arguments name them.
fn shown(paths: &[NamedPath]) -> String {
    let mut at = PATHS;
    let mut text = String::new();
    for path in paths {
        text += &format!(" {at}: {:?}", String::from_utf8_lossy(&path.bytes));
        at += path.bytes.len() as u64;
    }
    text
}

#[tokio::test]
async fn what_the_host_makes_for_a_call_is_bounded() {
    let host = World::new();
    let mut machine = Machine::new(host.path(), &Limits::default()).await;
    machine.put(0, &b"./".repeat(30_000));
    let (long, whole) = (60_000, u64::from(u32::MAX));
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
    let host = World::new();
    let mut machine = Machine::new(host.path(), &Limits::default()).await;
    let made = std::process::Command::new("mkfifo").arg(host.path().join("mount/pipe")).status();
    assert!(made.unwrap().success());
    std::os::unix::fs::symlink("pipe", host.path().join("mount/to")).unwrap();
    machine.put(0, b"pipetof");
    const FOLLOW: u64 = 1;
    for (name, at, length, expected) in [("pipe", 0, 4, 2), ("to", 4, 2, 2), ("f", 6, 1, 0)] {
        for rights in [1 << 1, 1 << 6, (1 << 29) - 1] {
            let arguments = [6, FOLLOW, at, length, 0, rights, 0, 0, 64];
            let opened = machine.call("path_open", &arguments);
            let answer = tokio::time::timeout(TOO_LONG, opened).await;
            assert_eq!(answer.expect("it comes back"), Some(expected), "{name} {rights:#x}");
        }
    }
}
