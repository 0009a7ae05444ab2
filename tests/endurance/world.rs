//! What an embedder has: a runtime, images, a pool, tenants, models and tools; and the books of the
//! test.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest};
use kaa::{
    Clock, EnvironmentOptions, Image, LocalBackend, Mount, Policy, Pool, PoolPolicy, Profile,
    Quotas, Runtime, Store, Tenant, Tool, Value,
};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::common::store_root;

/// Sessions that idle for so long are hibernated.
pub(crate) const IDLE: Duration = Duration::from_millis(100);

/// Everything that lives as long as the process.
pub(crate) struct World {
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) base: Image,
    pub(crate) sci: Image,
    pub(crate) pool: Pool,
    pub(crate) tenants: Vec<Tenant>,
    /// One that may have two sessions.
    pub(crate) narrow: Tenant,
    /// Where there is a Python.
    pub(crate) local: Option<LocalBackend>,
    pub(crate) lm: Arc<dyn LmHandler>,
    pub(crate) tally: Tally,
    /// Files of the test's own.
    pub(crate) directory: PathBuf,
}

impl World {
    pub(crate) fn new(local: Option<LocalBackend>, directory: PathBuf) -> Self {
        let runtime = Arc::new(Runtime::open(Store::open(store_root()).unwrap()).unwrap());
        let image = |name| runtime.image(name, &|_| {}).unwrap();
        let (base, sci) = (image("base"), image("sci"));
        let policy = PoolPolicy { idle: IDLE, awake: 12, free_bytes: 0, ..PoolPolicy::default() };
        let pool = Pool::new(Arc::clone(&runtime), policy).unwrap();
        let tenant = |name, quotas| runtime.tenant(name, quotas).unwrap();
        let slow = Quotas { compute_per_second: Duration::from_millis(600), ..Quotas::default() };
        let tenants = vec![tenant("one", Quotas::default()), tenant("slow", slow)];
        let narrow = tenant("narrow", Quotas { sessions: 2, ..Quotas::default() });
        let (lm, tally) = (Arc::new(Moody), Tally::default());
        Self { runtime, base, sci, pool, tenants, narrow, local, lm, tally, directory }
    }

    /// Options as any embedder may have them.
    pub(crate) fn options(&self, rng: &mut StdRng) -> EnvironmentOptions {
        let mut options = self.plain();
        if rng.random_bool(0.2) {
            let which = rng.random_range(0..self.tenants.len());
            options.tenant = Some(self.tenants[which].clone());
        }
        match rng.random_range(0..6) {
            0 => {
                options.policy.seed = Some(rng.random());
                options.policy.clock = Clock::Fixed(1_700_000_000_000_000_000);
            }
            1 => {
                let host = self.directory.clone();
                let guest = "/data".to_owned();
                options.policy.mounts.push(Mount { host, guest, writable: false });
            }
            2 => {
                options.profile = Profile::OpenEnv;
                let imports = ["asyncio", "concurrent", "json", "os", "re", "time"];
                let imports = imports.map(str::to_owned).to_vec();
                options.policy.allowed_imports = Some(imports);
                options.policy = Policy { env: vec![("A".into(), "b".into())], ..options.policy };
            }
            _ => {}
        }
        options
    }

    /// What all options have: a model, and tools.
    pub(crate) fn plain(&self) -> EnvironmentOptions {
        EnvironmentOptions {
            lm: Some(Arc::clone(&self.lm)),
            tools: vec![
                Tool::new("double", |call| match &call.args[..] {
                    [Value::Int(n)] => Ok(Value::Int(n * 2)),
                    _ => Err(kaa::ToolError::of_type("TypeError", "double(n)")),
                }),
                Tool::new_async("never", |_| std::future::pending()),
            ],
            ..EnvironmentOptions::default()
        }
    }
}

/// The words of a panic that is wanted.
pub(crate) const PLANNED: &str = "planned";

/// A model that does what its prompt says: answers late, never, with an error, or by a panic.
struct Moody;

#[async_trait]
impl LmHandler for Moody {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let text = request.prompt.to_text().into_owned();
        let answer = match text.split_once(' ') {
            Some(("slow", time)) => {
                tokio::time::sleep(Duration::from_millis(time.parse().unwrap())).await;
                "late".into()
            }
            Some(("fail", why)) => return Err(LmError::new(why)),
            _ if text == "never" => std::future::pending().await,
            _ if text == "panic" => panic!("{PLANNED}"),
            _ => text,
        };
        Ok(LmCompletion { model: "moody".into(), response: answer, ..LmCompletion::default() })
    }
}

/// How often each thing happened.
#[derive(Default)]
pub(crate) struct Tally(Mutex<BTreeMap<String, u64>>);

impl Tally {
    pub(crate) fn add(&self, what: &str, count: u64) {
        let mut counts = self.0.lock().unwrap();
        match counts.get_mut(what) {
            Some(sum) => *sum += count,
            None => drop(counts.insert(what.to_owned(), count)),
        }
    }

    pub(crate) fn note(&self, what: &str) {
        self.add(what, 1);
    }

    pub(crate) fn all(&self) -> BTreeMap<String, u64> {
        self.0.lock().unwrap().clone()
    }
}
