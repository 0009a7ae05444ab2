//! Endurance: everything that embedders do with sessions, for as long as one likes, in one process
//! with two worker threads; and nothing of it stays.
//!
//! Tasks do at random what embedders do: sessions are made in slots used before and in new ones, run
//! cells, are forked, rewound, saved to files and loaded, hibernated and woken, made from templates,
//! stopped by every limit, ended by traps, and dropped in the middle of everything; models answer late,
//! never, with errors, and by panics; tenants reach their quotas; sessions in processes come and go.
//! One session lives through all of it, and must have exactly the state that the host has of it
//! (`endurance/veteran.rs`).
//!
//! Every few seconds all but that one is given up, and when the process is at rest, its memory,
//! descriptors, threads, mappings, address space, child processes and files are counted. They have to
//! be flat: `endurance/judge.rs` says what that means. The process is one of its own, with a `TMPDIR`
//! of its own, in which nothing may be left when it has ended. Where there is no procfs, nothing is
//! counted; all the rest is the same.
//!
//! | variable | |
//! |---|---|
//! | `KAA_ENDURANCE` | how long, `90`, `90s` or `30m`; without it 20 s |
//! | `KAA_ENDURANCE_SEED` | of what is chosen at random; without it 1 |
//! | `KAA_ENDURANCE_LEAK` | plants leaks, which have to be found: of `page`, `fork`, `descriptor`, `file`, `thread`, `process`, with commas between |
//!
//! Short runs with leaks are a part of the test.

mod common;
#[path = "endurance/drops.rs"]
mod drops;
#[path = "endurance/judge.rs"]
mod judge;
#[path = "endurance/leak.rs"]
mod leak;
#[path = "endurance/sample.rs"]
mod sample;
#[path = "endurance/sessions.rs"]
mod sessions;
#[path = "endurance/stops.rs"]
mod stops;
#[path = "endurance/twister.rs"]
mod twister;
#[path = "endurance/veteran.rs"]
mod veteran;
#[path = "endurance/world.rs"]
mod world;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kaa::{LocalBackend, LocalOptions};
use libtest_mimic::{Arguments, Failed, Trial};
use peak_alloc::PeakAlloc;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use leak::Leak;
use sample::{METRICS, Sample, sample};
use stops::STOPS;
use veteran::Veteran;
use world::{PLANNED, World};

/// Counts what is allocated and not given back.
#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// How long all of it takes.
const TIME: &str = "KAA_ENDURANCE";
const SEED: &str = "KAA_ENDURANCE_SEED";
/// Set in the process that does it: where the test's own files are.
const INSIDE: &str = "KAA_ENDURANCE_INSIDE";

const TIME_DEFAULT: Duration = Duration::from_secs(20);
/// How long leaks are planted in each process, and how long at most if they weren't found.
const LEAKS_TIME: Duration = Duration::from_secs(6);
const LEAKS_TIME_MAX: Duration = Duration::from_secs(60);
/// From this time on every kind of stop has its turn.
const MIX_TIME: Duration = Duration::from_secs(60);
/// What there has to be, per minute: a fifth of what a busy machine of two processors does.
const MIX: &[(&str, f64)] = &[
    ("sessions", 300.0),
    ("forks", 40.0),
    ("rewinds", 40.0),
    ("cells dropped", 30.0),
    ("dropped at a checkpoint", 8.0),
    ("other calls dropped", 15.0),
    ("the one session: checked", 25.0),
];
/// Tasks at once that do what embedders do; beside them one has the session that lives through it, and
/// one sessions in processes.
const TASKS: u64 = 6;
/// The time to the next quiet moment is a fortieth of all, within these; but there are some in any time.
const ROUND_MIN: Duration = Duration::from_millis(1500);
const ROUND_MAX: Duration = Duration::from_secs(10);
/// The process is at rest within this, or something goes on that shouldn't.
const REST_MAX: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    if let Some(directory) = std::env::var_os(INSIDE) {
        return inside(directory.into());
    }
    let mut trials = vec![
        Trial::test("every_limit_has_a_stop", || {
            stops::every_limit_has_one();
            Ok(())
        }),
        Trial::test("leaks_are_told_from_noise", || {
            judge::tells_leaks_from_noise();
            Ok(())
        }),
        Trial::test("nothing_stays_of_many_sessions", outside),
    ];
    if Path::new("/proc/self").exists() {
        trials.push(Trial::test("leaks_are_found", leaks_are_found));
    }
    let mut arguments = Arguments::from_args();
    // They would take each other's processors.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Starts the process, and looks for what it has left.
fn outside() -> Result<(), Failed> {
    let (temporary, own) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let status = wait(process(own.path(), temporary.path()), time())?;
    if !status.success() {
        return Err(format!("see above: {status}").into());
    }
    for directory in [temporary.path(), own.path()] {
        let left: Vec<_> = directory.read_dir()?.flatten().map(|entry| entry.path()).collect();
        if !left.is_empty() {
            return Err(format!("the process left {left:?}").into());
        }
    }
    Ok(())
}

/// Plants every leak, those in one process that show in different figures.
fn leaks_are_found() -> Result<(), Failed> {
    for group in leak::GROUPS {
        // A busy machine leaks slowly.
        let mut seconds = LEAKS_TIME.as_secs();
        loop {
            let (temporary, own) = (tempfile::tempdir()?, tempfile::tempdir()?);
            let words = own.path().join("stderr");
            let mut process = process(own.path(), temporary.path());
            let names: Vec<&str> = group.iter().map(|(name, _)| *name).collect();
            process.env(TIME, seconds.to_string()).env(leak::VARIABLE, names.join(","));
            process.stderr(File::create(&words)?);
            wait(process, Duration::from_secs(seconds))?;
            let words = std::fs::read_to_string(words)?;
            let is_found = |figure: &str| {
                words.lines().any(|line| line.starts_with(&format!("grown: {figure}")))
            };
            if group.iter().all(|(_, figure)| is_found(figure)) {
                break;
            }
            seconds *= 3;
            if seconds > LEAKS_TIME_MAX.as_secs() {
                return Err(format!("not all of {group:?} were found:\n{words}").into());
            }
        }
    }
    Ok(())
}

/// The process of its own.
fn process(own: &Path, temporary: &Path) -> Command {
    let mut process = Command::new(std::env::current_exe().expect("a program has a path"));
    process
        .env(INSIDE, own)
        .env("TMPDIR", temporary)
        // Each of glibc's arenas keeps the most that was ever in use in it, and threads move between
        // them: with fewer of them that is reached before the end of the warm-up.
        .env("MALLOC_ARENA_MAX", "2")
        .env("MALLOC_MMAP_THRESHOLD_", "131072")
        .stdin(Stdio::null());
    process
}

/// Runs it to its end, which is soon after this time.
fn wait(mut process: Command, time: Duration) -> Result<ExitStatus, Failed> {
    let mut process = process.spawn()?;
    let patience = time * 3 + Duration::from_secs(600);
    let started = Instant::now();
    while started.elapsed() < patience {
        if let Some(status) = process.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    process.kill()?;
    Err(format!("it still ran after {patience:?}").into())
}

fn time() -> Duration {
    let Ok(text) = std::env::var(TIME) else { return TIME_DEFAULT };
    let (number, unit) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60),
        None => (text.strip_suffix('s').unwrap_or(&text), 1),
    };
    let number: u64 =
        number.parse().unwrap_or_else(|_| panic!("{TIME} is `90`, `90s` or `30m`, not `{text}`"));
    Duration::from_secs(number * unit)
}

/// In the process of its own.
fn inside(directory: PathBuf) -> ExitCode {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.payload_as_str() != Some(PLANNED) {
            usual(info);
        }
    }));
    let executor = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        // Threads that wait for blocking work would be there at one quiet moment and not at the next.
        .thread_keep_alive(Duration::from_millis(100))
        .build()
        .expect("an executor");
    let grown = executor.block_on(endure(directory));
    for words in &grown {
        eprintln!("grown: {words}");
    }
    if grown.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What grew.
async fn endure(directory: PathBuf) -> Vec<String> {
    let (time, started) = (time(), Instant::now());
    let seed = std::env::var(SEED).map_or(1, |text| text.parse().expect("a seed is a number"));
    let world = Arc::new(World::new(local(), directory));
    let leak = Leak::from_env().map(Arc::new);
    let watch = Watch::start(common::store_root().join("scratch"));
    let mut veteran = Veteran::begin(&world, seed).await;
    let round = (time / 40).clamp(ROUND_MIN.min(time / 12), ROUND_MAX);
    let next_stop = Arc::new(AtomicUsize::new(0));
    let mut moments = Vec::new();
    let mut rounds = 0;
    while started.elapsed() < time {
        let until = Instant::now() + round;
        let mut tasks = Vec::new();
        for task in 0..=TASKS {
            let rng = StdRng::seed_from_u64(seed ^ (rounds << 8 | task));
            let work = Work {
                world: Arc::clone(&world),
                leak: leak.clone(),
                next_stop: Arc::clone(&next_stop),
                rng,
            };
            tasks.push(tokio::spawn(work.run(until, task == TASKS)));
        }
        let (of_veteran, mut living) = (Arc::clone(&world), veteran);
        let life = tokio::spawn(async move {
            while Instant::now() < until {
                living.step(&of_veteran).await;
            }
            living
        });
        for task in tasks {
            task.await.expect("a task has failed; what it says is above");
        }
        veteran = life.await.expect("the session that lives through all has failed");
        sessions::crowd(&world).await;
        veteran.check().await;
        veteran.forget();
        if let Some(sample) = rest(&world, &watch.scratch).await {
            if time > TIME_DEFAULT {
                eprintln!(
                    "{}",
                    sample::row(&format!("after {} s", started.elapsed().as_secs()), &sample)
                );
            }
            moments.push((started.elapsed().as_secs_f64(), sample));
        }
        rounds += 1;
    }
    veteran.check().await;
    report(&world, started.elapsed(), &moments, &watch.end());
    let warm = moments.iter().filter(|(at, _)| *at > time.as_secs_f64() / 5.0);
    let mut grown = judge::growth(&warm.copied().collect::<Vec<_>>());
    if time >= MIX_TIME {
        grown.extend(too_few(&world, time));
    }
    let usage = world.runtime.usage();
    // The one that lives is all that is left.
    let left = usage.iter().map(|tenant| tenant.sessions).sum::<u32>();
    if left != 1 {
        grown.push(format!("{} sessions are on the books of tenants", left - 1));
    }
    grown
}

/// What there wasn't enough of for the rest to mean anything.
fn too_few(world: &World, time: Duration) -> Vec<String> {
    let tally = world.tally.all();
    let mut missing = stops::missing(&tally);
    for (what, per_minute) in MIX {
        let count = tally.get(*what).copied().unwrap_or(0);
        if (count as f64) < *per_minute * time.as_secs_f64() / 60.0 {
            missing.push(format!("{count} {what}"));
        }
    }
    missing.iter().map(|what| format!("nothing, as there was too little: {what}")).collect()
}

/// The local backend, where there is a Python for it.
fn local() -> Option<LocalBackend> {
    let script = "import sys; sys.exit(sys.version_info < (3, 9))";
    let found = Command::new("python3").args(["-c", script]).stdin(Stdio::null()).status();
    let path = std::env::var("PATH").ok()?;
    let is_there = found.is_ok_and(|status| status.success());
    if !is_there {
        eprintln!("no sessions in processes: there is no `python3` of 3.9 or newer");
    }
    is_there.then(|| LocalBackend::new(LocalOptions { path, ..LocalOptions::default() }))
}

/// One task of a round.
struct Work {
    world: Arc<World>,
    leak: Option<Arc<Leak>>,
    /// So that the stops come equally often.
    next_stop: Arc<AtomicUsize>,
    rng: StdRng,
}

impl Work {
    async fn run(mut self, until: Instant, processes: bool) {
        while Instant::now() < until {
            if processes {
                sessions::process(&self.world, &mut self.rng).await;
                tokio::time::sleep(Duration::from_millis(300)).await;
                continue;
            }
            self.scene().await;
            self.world.tally.note("scenes");
            if let Some(leak) = &self.leak {
                leak.plant(&self.world).await;
            }
        }
    }

    async fn scene(&mut self) {
        let (world, rng) = (&self.world, &mut self.rng);
        match rng.random_range(0..100) {
            0 => sessions::huge(world, rng).await,
            1..25 => sessions::usual(world, rng).await,
            25..35 => sessions::forks(world, rng).await,
            35..41 => sessions::rewinds(world, rng).await,
            41..44 => sessions::disk(world, rng).await,
            44..46 => sessions::pooled(world, rng).await,
            46..49 => sessions::asleep(world, rng).await,
            49..51 => sessions::template(world, rng).await,
            51..54 => sessions::services(world, rng).await,
            54 => sessions::science(world).await,
            55 => sessions::quota(world).await,
            56..58 => sessions::models(world).await,
            58 if rng.random_bool(0.3) => sessions::runtime(world).await,
            58..73 => drops::cell(world, rng).await,
            73..77 => drops::checkpoint(world, rng).await,
            77..81 => drops::others(world, rng).await,
            81..83 => drops::pooled(world, rng).await,
            83 => drops::panics(world).await,
            84..88 => drops::aborted(world, rng).await,
            _ => {
                let number = self.next_stop.fetch_add(1, Ordering::Relaxed);
                stops::run(world, &STOPS[number % STOPS.len()]).await;
            }
        }
    }
}

/// The process when nothing goes on in it: the one session is a file, and two looks, some time apart,
/// see the same counts.
async fn rest(world: &World, scratch: &Path) -> Option<Sample> {
    let started = Instant::now();
    let mut last = sample(scratch)?;
    let mut same = 0;
    while same < 3 || world.pool.status().awake > 0 {
        assert!(
            started.elapsed() < REST_MAX,
            "not at rest: {:?}\n{}",
            world.pool.status(),
            sample::row("", &last)
        );
        tokio::time::sleep(Duration::from_millis(40)).await;
        let now = sample(scratch)?;
        // Memory may be given back at any time.
        let counts = |sample: &Sample| -> Vec<u64> { sample[3..].to_vec() };
        same = if counts(&now) == counts(&last) { same + 1 } else { 0 };
        last = now;
    }
    Some(last)
}

/// Looks at the process every second, whatever goes on, for the highest figures.
struct Watch {
    scratch: PathBuf,
    ended: Arc<AtomicBool>,
    highest: Arc<Mutex<Sample>>,
}

impl Watch {
    fn start(scratch: PathBuf) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let highest = Arc::new(Mutex::new([0; METRICS.len()]));
        let watch =
            Self { scratch: scratch.clone(), ended: Arc::clone(&ended), highest: highest.clone() };
        std::thread::spawn(move || {
            while !ended.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_secs(1));
                let Some(now) = sample(&scratch) else { return };
                let mut highest = highest.lock().unwrap();
                for (most, value) in highest.iter_mut().zip(now) {
                    *most = value.max(*most);
                }
            }
        });
        watch
    }

    fn end(&self) -> Sample {
        self.ended.store(true, Ordering::Release);
        *self.highest.lock().unwrap()
    }
}

fn report(world: &World, took: Duration, moments: &[(f64, Sample)], highest: &Sample) {
    let seconds = took.as_secs_f64();
    eprintln!("\nendurance: {seconds:.0} s, {} quiet moments", moments.len());
    for (what, count) in world.tally.all() {
        eprintln!("{count:>9}  {:>8.1}/s  {what}", count as f64 / seconds);
    }
    let status = world.pool.status();
    eprintln!("{:>9}  of the pool: hibernated, {} woken", status.hibernations, status.wakes);
    let (Some((_, last)), Some(warm)) =
        (moments.last(), moments.iter().find(|(at, _)| *at > seconds / 5.0))
    else {
        return eprintln!("nothing was counted: there is no procfs");
    };
    eprintln!("{}", sample::header());
    eprintln!("{}", sample::row("after the first", &moments[0].1));
    eprintln!("{}", sample::row("after the warm-up", &warm.1));
    eprintln!("{}", sample::row("at the end", last));
    eprintln!("{}", sample::row("highest under load", highest));
}
