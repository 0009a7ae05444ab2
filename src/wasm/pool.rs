//! Many sessions that are rarely used: those that idle are hibernated, by policy.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::Value as Json;
use tokio::sync::MutexGuard as EnvironmentGuard;

use super::{Image, Runtime, WasmEnvironment};
use crate::agent::Signal;
use crate::agent::check_tool;
use crate::environment::{
    Capabilities, Context, Environment, EnvironmentOptions, ExecuteOptions, Execution, Interrupt,
    Status, Tool, Variable,
};
use crate::error::{Error, Result};
use crate::lm::{Ledger, UsageSummary};
use crate::snapshot::Snapshot;
use crate::tenant::Seat;
use crate::value::Value;

/// When a [`Pool`] hibernates sessions.
///
/// ```
/// use kaa::PoolPolicy;
/// use std::time::Duration;
///
/// let policy = PoolPolicy { idle: Duration::from_secs(5), ..PoolPolicy::default() };
/// assert!(policy.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolPolicy {
    /// A session that nobody has used for so long is hibernated. Default 60 s, at least 1 ms.
    pub idle: Duration,
    /// Sessions that have memory at once. Default 1,000. Before another gets it, the one that was
    /// used longest ago is hibernated. Sessions in use are not counted out: there may be more of them.
    pub awake: usize,
    /// Private memory of all awake sessions, in bytes. Default 4 GiB. Beyond it those that were used
    /// longest ago are hibernated.
    pub memory_bytes: u64,
    /// Memory that the machine keeps free for others, in bytes, where the system tells (Linux).
    /// Default 512 MiB; 0 doesn't look. Below it sessions are hibernated, an eighth of them at a time.
    pub free_bytes: u64,
}

impl Default for PoolPolicy {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(60),
            awake: 1_000,
            memory_bytes: 4 << 30,
            free_bytes: 512 << 20,
        }
    }
}

impl PoolPolicy {
    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the field that is out of its range.
    pub fn validate(&self) -> Result<()> {
        if self.idle < Duration::from_millis(1) {
            return Err(Error::invalid("policy.idle", "must be at least 1 ms"));
        }
        if self.awake == 0 {
            return Err(Error::invalid("policy.awake", "must be at least 1"));
        }
        Ok(())
    }
}

/// What a [`Pool`] has, and did so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStatus {
    /// Sessions that have memory.
    pub awake: usize,
    /// Sessions that are files.
    pub hibernated: usize,
    /// Private memory of the awake ones in bytes, as of their last checkpoints.
    pub private_bytes: u64,
    /// Size of the files in bytes.
    pub file_bytes: u64,
    /// How often a session was hibernated.
    pub hibernations: u64,
    /// How often one was woken.
    pub wakes: u64,
    /// How often one could not be hibernated, since it has files open or the disk is full. It's tried
    /// again after its next use.
    pub refused: u64,
}

/// Keeps sessions, and memory for those of them that are used.
///
/// A [`PooledEnvironment`] is used like any other environment; one that was hibernated is woken by its
/// next use, in a few milliseconds. A task on the tokio runtime applies the policy.
///
/// ```no_run
/// # async fn example(runtime: std::sync::Arc<kaa::Runtime>) -> kaa::Result<()> {
/// use kaa::{EnvironmentExt, EnvironmentOptions, Pool, PoolPolicy};
///
/// let pool = Pool::new(runtime.clone(), PoolPolicy { awake: 100, ..PoolPolicy::default() })?;
/// let image = runtime.image("base", &|_| {})?;
/// let mut sessions = Vec::new();
/// for _ in 0..1_000 {
///     let mut session = pool.environment(&image, EnvironmentOptions::default()).await?;
///     session.execute("x = 1").await?;
///     sessions.push(session);
/// }
/// assert!(pool.status().hibernated >= 900);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    runtime: Arc<Runtime>,
    policy: PoolPolicy,
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    next: AtomicU64,
    started: Instant,
    sweeping: AtomicBool,
    hibernations: AtomicU64,
    wakes: AtomicU64,
    refused: AtomicU64,
}

/// A session of the pool, and what is known of it without its lock.
struct Entry {
    environment: tokio::sync::Mutex<WasmEnvironment>,
    signal: Arc<Signal>,
    ledger: Ledger,
    /// Milliseconds from the start of the pool to the last use.
    used: AtomicU64,
    awake: AtomicBool,
    /// Not to be tried again before the next use.
    refused: AtomicBool,
    seat: Arc<Seat>,
    file_bytes: AtomicU64,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Pool {
    /// An empty pool.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a policy that makes no sense.
    pub fn new(runtime: Arc<Runtime>, policy: PoolPolicy) -> Result<Self> {
        policy.validate()?;
        Ok(Self(Arc::new(Inner {
            runtime,
            policy,
            entries: Mutex::default(),
            next: AtomicU64::new(0),
            started: Instant::now(),
            sweeping: AtomicBool::new(false),
            hibernations: AtomicU64::new(0),
            wakes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })))
    }

    /// A new session.
    ///
    /// # Errors
    ///
    /// As [`Runtime::environment`].
    pub async fn environment(
        &self,
        image: &Image,
        options: EnvironmentOptions,
    ) -> Result<PooledEnvironment> {
        self.0.make_room().await;
        Ok(self.adopt(self.0.runtime.environment(image, options)?))
    }

    /// Takes a session into the pool, such as one that was resumed from a snapshot.
    #[must_use]
    pub fn adopt(&self, environment: WasmEnvironment) -> PooledEnvironment {
        let entry = Arc::new(Entry {
            signal: environment.signal(),
            ledger: environment.ledger(),
            used: AtomicU64::new(self.0.now()),
            awake: AtomicBool::new(!environment.is_hibernated()),
            refused: AtomicBool::new(false),
            seat: Arc::clone(environment.seat()),
            file_bytes: AtomicU64::new(0),
            environment: tokio::sync::Mutex::new(environment),
        });
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        self.0.entries().insert(number, Arc::clone(&entry));
        self.0.start_sweeping();
        PooledEnvironment { entry, number, pool: self.clone(), new_tools: Vec::new() }
    }

    /// What the pool has, and did so far.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let mut status = PoolStatus {
            hibernations: load(&self.0.hibernations),
            wakes: load(&self.0.wakes),
            refused: load(&self.0.refused),
            ..PoolStatus::default()
        };
        for entry in self.0.entries().values() {
            if entry.awake.load(Ordering::Acquire) {
                status.awake += 1;
                status.private_bytes += entry.seat.memory_bytes();
            } else {
                status.hibernated += 1;
                status.file_bytes += load(&entry.file_bytes);
            }
        }
        status
    }

    /// Applies the policy now, without waiting for the task that does so. Returns how many sessions
    /// were hibernated.
    pub async fn sweep(&self) -> usize {
        self.0.sweep().await
    }
}

impl Inner {
    fn entries(&self) -> MutexGuard<'_, HashMap<u64, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Starts the task that applies the policy, if it doesn't run and there is a runtime for it.
    fn start_sweeping(self: &Arc<Self>) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.sweeping.swap(true, Ordering::AcqRel) {
            return;
        }
        let period = (self.policy.idle / 4).clamp(Duration::from_millis(1), Duration::from_secs(1));
        let pool = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(period).await;
                let Some(pool) = Weak::upgrade(&pool) else { return };
                pool.sweep().await;
            }
        });
    }

    /// Those that could be hibernated, the longest unused first.
    fn candidates(&self) -> Vec<Arc<Entry>> {
        let idle = |entry: &&Arc<Entry>| {
            entry.awake.load(Ordering::Acquire) && !entry.refused.load(Ordering::Acquire)
        };
        let mut entries: Vec<_> = self.entries().values().filter(idle).cloned().collect();
        entries.sort_by_key(|entry| entry.used.load(Ordering::Acquire));
        entries
    }

    /// Hibernates until one more may be awake.
    async fn make_room(&self) {
        let awake = |entry: &Arc<Entry>| entry.awake.load(Ordering::Acquire);
        let count = self.entries().values().filter(|entry| awake(entry)).count();
        let Some(mut surplus) = (count + 1).checked_sub(self.policy.awake) else { return };
        if surplus == 0 {
            return;
        }
        for entry in self.candidates() {
            surplus -= usize::from(self.hibernate(&entry).await);
            if surplus == 0 {
                return;
            }
        }
    }

    async fn sweep(&self) -> usize {
        let candidates = self.candidates();
        let bytes = |entry: &Arc<Entry>| entry.seat.memory_bytes();
        let mut total: u64 = candidates.iter().map(bytes).sum();
        let mut surplus = candidates.len().saturating_sub(self.policy.awake);
        if self.policy.free_bytes > 0
            && available_bytes().is_some_and(|free| free < self.policy.free_bytes)
        {
            surplus = surplus.max(candidates.len().div_ceil(8));
        }
        let idle = u64::try_from(self.policy.idle.as_millis()).unwrap_or(u64::MAX);
        let mut done = 0;
        for entry in candidates {
            let unused = self.now().saturating_sub(entry.used.load(Ordering::Acquire)) >= idle;
            if !unused && surplus == 0 && total <= self.policy.memory_bytes {
                break;
            }
            let before = bytes(&entry);
            if self.hibernate(&entry).await {
                done += 1;
                surplus = surplus.saturating_sub(1);
                total = total.saturating_sub(before);
            }
        }
        done
    }

    /// Hibernates one, unless it's in use.
    async fn hibernate(&self, entry: &Entry) -> bool {
        let Ok(mut environment) = entry.environment.try_lock() else { return false };
        if environment.is_hibernated() || environment.status() == Status::Poisoned {
            return false;
        }
        match environment.hibernate().await {
            Ok(bytes) => {
                entry.file_bytes.store(bytes, Ordering::Relaxed);
                entry.awake.store(false, Ordering::Release);
                self.hibernations.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(_) => {
                entry.refused.store(true, Ordering::Release);
                self.refused.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }
}

/// Memory that the system could give to somebody, in bytes.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A session of a [`Pool`].
pub struct PooledEnvironment {
    entry: Arc<Entry>,
    number: u64,
    pool: Pool,
    /// Registered while the session may have been on its way to disk.
    new_tools: Vec<Tool>,
}

impl std::fmt::Debug for PooledEnvironment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PooledEnvironment").field("number", &self.number).finish_non_exhaustive()
    }
}

impl PooledEnvironment {
    /// The session, which can't be hibernated as long as the guard lives.
    async fn lock(&mut self) -> Result<InUse<'_>> {
        let (entry, pool) = (&*self.entry, &*self.pool.0);
        entry.used.store(pool.now(), Ordering::Release);
        let asleep = !entry.awake.load(Ordering::Acquire);
        if asleep {
            pool.make_room().await;
        }
        let mut guard = entry.environment.lock().await;
        if guard.is_hibernated() {
            pool.wakes.fetch_add(1, Ordering::Relaxed);
        }
        entry.awake.store(true, Ordering::Release);
        entry.refused.store(false, Ordering::Release);
        for tool in self.new_tools.drain(..) {
            guard.register_tool(tool)?;
        }
        Ok(InUse { guard, entry, pool })
    }
}

impl Drop for PooledEnvironment {
    fn drop(&mut self) {
        self.pool.0.entries().remove(&self.number);
    }
}

/// A session while it's used.
struct InUse<'pool> {
    guard: EnvironmentGuard<'pool, WasmEnvironment>,
    entry: &'pool Entry,
    pool: &'pool Inner,
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.entry.used.store(self.pool.now(), Ordering::Release);
        self.entry.awake.store(!self.guard.is_hibernated(), Ordering::Release);
    }
}

#[async_trait]
impl Environment for PooledEnvironment {
    fn status(&self) -> Status {
        // Whoever has the lock is hibernating it, which a poisoned session isn't.
        self.entry.environment.try_lock().map_or(Status::Ready, |guard| guard.status())
    }

    fn capabilities(&self) -> Capabilities {
        WasmEnvironment::CAPABILITIES
    }

    fn interrupt(&self) -> Interrupt {
        self.entry.signal.handle()
    }

    async fn execute_opts(&mut self, code: &str, options: ExecuteOptions) -> Result<Execution> {
        // Before the session is there, which may take a while: an interrupt holds for it too.
        self.entry.signal.take();
        self.lock().await?.guard.run_cell(code, options).await
    }

    async fn set_variable(&mut self, name: &str, value: Value) -> Result<()> {
        self.lock().await?.guard.set_variable(name, value).await
    }

    async fn get_variable(&mut self, name: &str) -> Result<Option<Value>> {
        self.lock().await?.guard.get_variable(name).await
    }

    async fn list_variables(&mut self) -> Result<Vec<Variable>> {
        self.lock().await?.guard.list_variables().await
    }

    async fn add_context(&mut self, context: Context, index: Option<u32>) -> Result<u32> {
        self.lock().await?.guard.add_context(context, index).await
    }

    async fn add_history(&mut self, messages: &Json, index: Option<u32>) -> Result<u32> {
        self.lock().await?.guard.add_history(messages, index).await
    }

    fn lm_usage(&self) -> UsageSummary {
        self.entry.ledger.total()
    }

    fn register_tool(&mut self, tool: Tool) -> Result<()> {
        check_tool(&tool)?;
        self.new_tools.push(tool);
        Ok(())
    }

    async fn snapshot(&mut self) -> Result<Snapshot> {
        self.lock().await?.guard.snapshot().await
    }

    async fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.lock().await?.guard.restore(snapshot).await
    }

    async fn fork(&mut self) -> Result<Box<dyn Environment>> {
        let pool = self.pool.clone();
        let fork = self.lock().await?.guard.fork_session().await?;
        pool.0.make_room().await;
        Ok(Box::new(pool.adopt(fork)))
    }

    async fn reset(&mut self) -> Result<()> {
        self.lock().await?.guard.reset().await
    }

    async fn close(mut self: Box<Self>) -> Result<()> {
        let mut session = self.lock().await?;
        session.guard.close_files().await
    }
}
