//! Leaks on purpose, to see that the test sees them.

use std::any::Any;
use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use kaa::EnvironmentOptions;

use crate::world::World;

/// Names what is leaked.
pub(crate) const VARIABLE: &str = "KAA_ENDURANCE_LEAK";

/// `(name, once in so many scenes)`.
const LEAKS: &[(&str, u64)] =
    &[("page", 1), ("fork", 50), ("descriptor", 20), ("file", 20), ("thread", 50), ("process", 50)];

/// What is never given back.
pub(crate) struct Leak {
    name: &'static str,
    every: u64,
    scenes: AtomicU64,
    kept: Mutex<Vec<Box<dyn Any + Send>>>,
}

impl Leak {
    /// What the variable says, if it's set.
    pub(crate) fn from_env() -> Option<Self> {
        let name = std::env::var(VARIABLE).ok()?;
        let found = LEAKS.iter().find(|(leak, _)| *leak == name);
        let (name, every) = *found.unwrap_or_else(|| panic!("{VARIABLE} must be one of {LEAKS:?}"));
        Some(Self { name, every, scenes: AtomicU64::new(0), kept: Mutex::default() })
    }

    /// Leaks, when it's time to.
    pub(crate) async fn plant(&self, world: &World) {
        if !self.scenes.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.every) {
            return;
        }
        let thing: Box<dyn Any + Send> = match self.name {
            "page" => Box::new(vec![1_u8; 4096]),
            "fork" => {
                let open = world.runtime.environment(&world.base, EnvironmentOptions::default());
                Box::new(open.unwrap().fork_session().await.unwrap())
            }
            "descriptor" => Box::new(File::open("/dev/null").unwrap()),
            "file" => Box::new(tempfile::NamedTempFile::new().unwrap()),
            "thread" => Box::new(std::thread::spawn(|| {
                loop {
                    std::thread::park();
                }
            })),
            // It ends with its stdin.
            _ => Box::new(Command::new("cat").stdin(Stdio::piped()).spawn().unwrap()),
        };
        self.kept.lock().unwrap().push(thing);
    }
}
