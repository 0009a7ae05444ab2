//! The session that lives through all of it, and the mirror in which its state is known.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::pin::pin;
use std::time::Duration;

use kaa::{
    Environment, EnvironmentOptions, ExecuteOptions, Execution, Limit, Limits, Outcome,
    PooledEnvironment, Snapshot, Value,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::sessions::print;
use crate::twister::Twister;
use crate::world::{IDLE, World};

const SEED: u32 = 20_260_101;

/// What the session begins with: state in globals, in a generator half-way, in a random generator, in
/// a closure, in an object, in one large buffer, and in a file.
const BEGIN: &str = "
import itertools, os, random, time, zlib
count = 0
table = {}
def squares():
    total = 0
    for n in itertools.count(1):
        total = (total + n * n) % 1_000_003
        yield total
generator = squares()
dice = random.Random(20260101)
def adder():
    total = 0
    def add(n):
        nonlocal total
        total += n
        return total
    return add
add = adder()
class Stack:
    def __init__(self): self.items = []
stack = Stack()
bulk = bytearray()
open('/tmp/notes', 'w').close()
";

/// Shows everything, and takes a step where that's the only way to see.
const SHOW: &str = "print(count, next(generator), dice.getrandbits(32), add(1), stack.items, \
                    len(bulk), zlib.crc32(bulk), os.path.getsize('/tmp/notes'))\nprint(table)";

/// What Python has, as the host knows it.
#[derive(Clone)]
struct Mirror {
    count: u64,
    table: BTreeMap<u32, u32>,
    generated: u64,
    total: u64,
    dice: Twister,
    added: u64,
    stack: Vec<u32>,
    /// The first of three bytes that come again and again, and how many there are.
    bulk: (u8, usize),
    notes: u64,
}

impl Mirror {
    fn new() -> Self {
        Self {
            count: 0,
            table: BTreeMap::new(),
            generated: 0,
            total: 0,
            dice: Twister::new(SEED),
            added: 0,
            stack: Vec::new(),
            bulk: (0, 0),
            notes: 0,
        }
    }

    /// What [`SHOW`] prints, with the steps that it takes.
    fn show(&mut self) -> String {
        self.generated += 1;
        self.total = (self.total + self.generated * self.generated) % 1_000_003;
        self.added += 1;
        let (first, bytes) = self.bulk;
        let bulk: Vec<u8> = [first, 1, 2].into_iter().cycle().take(bytes).collect();
        let mut text = format!(
            "{} {} {} {} {:?} {} {} {}\n{{",
            self.count,
            self.total,
            self.dice.bits(),
            self.added,
            self.stack,
            bulk.len(),
            checksum(&bulk),
            self.notes
        );
        for (number, (key, value)) in self.table.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            let _ = write!(text, "{comma}{key}: {value}");
        }
        text + "}\n"
    }
}

/// As `zlib.crc32`.
fn checksum(bytes: &[u8]) -> u32 {
    let step = |sum: u32, _| sum >> 1 ^ (0xedb8_8320 & (sum & 1).wrapping_neg());
    let table: Vec<u32> = (0..256).map(|byte| (0..8).fold(byte, step)).collect();
    let next = |sum: u32, byte: &u8| sum >> 8 ^ table[((sum ^ u32::from(*byte)) & 0xff) as usize];
    !bytes.iter().fold(u32::MAX, next)
}

/// The session with its mirror.
pub(crate) struct Veteran {
    session: PooledEnvironment,
    mirror: Mirror,
    /// A state of before.
    saved: Option<(Snapshot, Mirror)>,
    rng: StdRng,
}

impl Veteran {
    /// Begins it in the pool.
    pub(crate) async fn begin(world: &World, seed: u64) -> Self {
        let limits = Limits { memory_bytes: 256 << 20, ..Limits::default() };
        let options = EnvironmentOptions { limits, ..world.plain() };
        let mut session = world.pool.environment(&world.base, options).await.unwrap();
        print(&mut session, BEGIN).await;
        Self { session, mirror: Mirror::new(), saved: None, rng: StdRng::seed_from_u64(seed) }
    }

    /// Takes a step, and checks everything.
    pub(crate) async fn step(&mut self, world: &World) {
        match self.rng.random_range(0..20) {
            0..8 => self.advance().await,
            8..13 => self.is_stopped(world).await,
            13 => self.is_given_up(world).await,
            14 => self.is_forked(world).await,
            15 => self.is_saved(world).await,
            16 => {
                self.saved = Some((self.session.snapshot().await.unwrap(), self.mirror.clone()));
            }
            17 => {
                if let Some((snapshot, mirror)) = &self.saved {
                    self.session.restore(snapshot).await.unwrap();
                    self.mirror = mirror.clone();
                    world.tally.note("the one session: rewound");
                }
            }
            18 => tokio::time::sleep(IDLE * 2).await,
            _ => {
                let names = self.session.list_variables().await.unwrap();
                assert!(names.iter().any(|variable| variable.name == "table"));
            }
        }
        self.check().await;
        world.tally.note("the one session: checked");
    }

    /// Everything is as the mirror has it.
    pub(crate) async fn check(&mut self) {
        let found = print(&mut self.session, SHOW).await;
        assert_eq!(found, self.mirror.show(), "the state of the session that lives through all");
    }

    /// Gives up the state of before, with all that it shares with the session.
    pub(crate) fn forget(&mut self) {
        self.saved = None;
    }

    async fn advance(&mut self) {
        let (mirror, rng) = (&mut self.mirror, &mut self.rng);
        let n = rng.random_range(0..1000_u32);
        let code = match rng.random_range(0..6) {
            0 => {
                mirror.count += u64::from(n);
                format!("count += {n}")
            }
            // Keys only ever come at the end, so that Python's order is the mirror's.
            1 => {
                let first = mirror.table.last_key_value().map_or(0, |(key, _)| key + 1);
                mirror.table.extend((first..first + n % 50).map(|key| (key, key ^ n)));
                format!("table.update((k, k ^ {n}) for k in range({first}, {first} + {}))", n % 50)
            }
            2 => {
                mirror.table.retain(|key, _| key % 3 != n % 3);
                format!("table = {{k: v for k, v in table.items() if k % 3 != {}}}", n % 3)
            }
            3 => {
                if mirror.stack.len() > 20 {
                    mirror.stack.truncate(5);
                }
                mirror.stack.push(n);
                format!("if len(stack.items) > 20: del stack.items[5:]\nstack.items.append({n})")
            }
            4 => {
                let bytes = [0, 100, 70_000, 3_000_000][n as usize % 4];
                mirror.bulk = (n as u8, bytes);
                format!("bulk[:] = (bytes([{}, 1, 2]) * {bytes})[:{bytes}]", n as u8)
            }
            _ => {
                mirror.notes += u64::from(n);
                format!("with open('/tmp/notes', 'a') as notes: notes.write('x' * {n})\ndel notes")
            }
        };
        print(&mut self.session, &code).await;
    }

    /// Stopped by a limit, an exception or its own end: what is kept is kept, and else it's undone.
    async fn is_stopped(&mut self, world: &World) {
        const STUBBORN: &str = "count += 1\nwhile True:\n    try:\n        while True: pass\n    \
                                except BaseException: pass";
        const ENDS: &[(&str, bool, Option<Limit>)] = &[
            ("count += 1\nwhile True: pass", true, Some(Limit::Fuel)),
            ("count += 1\ntime.sleep(100)", true, Some(Limit::Wall)),
            ("count += 1\nllm_query('never')", true, Some(Limit::Wall)),
            (STUBBORN, false, Some(Limit::Fuel)),
            ("count += 1; os._exit(3)", false, None),
            ("count += 1; os.abort()", false, None),
            ("count += 1; 1 / 0", true, None),
            ("count += 1; bytearray(300_000_000)", true, None),
            ("count += 1\ndef f(): return f()\nf()", true, None),
        ];
        let (code, kept, limit) = ENDS[self.rng.random_range(0..ENDS.len())];
        let mut limits = Limits::default();
        match limit {
            Some(Limit::Fuel) => limits.fuel = 40_000_000,
            Some(_) => limits.wall = Duration::from_millis(20),
            None => {}
        }
        if !kept {
            limits.grace = Duration::from_millis(2);
        }
        let options = ExecuteOptions { limits: Some(limits) };
        let found = self.session.execute_opts(code, options).await.unwrap();
        let Execution { outcome, rolled_back, .. } = found;
        assert_ne!(outcome, Outcome::Completed, "{code}");
        assert_eq!((found.limit, rolled_back), (limit, !kept), "{code}: {found:?}");
        self.mirror.count += u64::from(kept);
        // On a busy machine its time may be over before the cell's first statement.
        if limit == Some(Limit::Wall) {
            let count = self.session.get_variable("count").await.unwrap();
            let (before, after) = (self.mirror.count - 1, self.mirror.count);
            match count {
                Some(Value::Int(count)) if count == before as i64 => self.mirror.count = before,
                count => assert_eq!(count, Some(Value::Int(after as i64)), "{code}"),
            }
        }
        let how = if kept { "stopped" } else { "rolled back" };
        world.tally.note(&format!("the one session: {how}"));
    }

    /// A cell that nobody waits for any more never was.
    async fn is_given_up(&mut self, world: &World) {
        let time = Duration::from_micros(self.rng.random_range(0..5000));
        let code = "count += 1\nbulk[:] = b'lost'\nwhile True: pass";
        let cell = pin!(self.session.execute_opts(code, ExecuteOptions::default()));
        assert!(tokio::time::timeout(time, cell).await.is_err());
        world.tally.note("the one session: given up");
    }

    /// A fork has the same state, and goes its own way.
    async fn is_forked(&mut self, world: &World) {
        let mut fork = self.session.fork().await.unwrap();
        let mut mirror = self.mirror.clone();
        assert_eq!(print(&mut *fork, SHOW).await, mirror.show(), "a fork");
        print(&mut *fork, "count = -1; table = None; bulk.clear()").await;
        world.tally.note("the one session: forked");
    }

    /// What is saved to a file is what it is.
    async fn is_saved(&mut self, world: &World) {
        let file = tempfile::NamedTempFile::new_in(&world.directory).unwrap();
        self.session.snapshot().await.unwrap().save(file.path()).unwrap();
        let snapshot = world.runtime.load_snapshot(file.path(), &Limits::default()).unwrap();
        let mut other = world.runtime.resume(&snapshot, world.plain()).unwrap();
        let mut mirror = self.mirror.clone();
        assert_eq!(print(&mut other, SHOW).await, mirror.show(), "from a file");
        world.tally.note("the one session: saved");
    }
}
