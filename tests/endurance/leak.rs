//! Leaks on purpose, to see that the test sees them.

use std::any::Any;
use std::fs::File;
use std::io::{PipeReader, PipeWriter};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use kaa::EnvironmentOptions;

use crate::world::World;

/// Names what is leaked.
pub(crate) const VARIABLE: &str = "KAA_ENDURANCE_LEAK";

/// `(name, once in so many scenes)`.
const LEAKS: &[(&str, u64)] =
    &[("page", 1), ("fork", 5), ("descriptor", 10), ("file", 10), ("thread", 10), ("process", 10)];

/// Leaks and the figures that have to show them, which in each group no other leak moves. A fork has a bit
/// of everything.
pub(crate) const GROUPS: &[&[(&str, &str)]] = &[
    &[
        ("page", "heap"),
        ("descriptor", "descriptors"),
        ("file", "files in TMPDIR"),
        ("thread", "threads"),
        ("process", "children"),
    ],
    &[("fork", "address space")],
];

/// What is never given back.
pub(crate) struct Leak {
    names: Vec<&'static str>,
    scenes: AtomicU64,
    kept: Mutex<Vec<Box<dyn Any + Send>>>,
    /// The stdin of all processes, which end with it.
    stdin: (PipeReader, PipeWriter),
}

impl Leak {
    /// What the variable says, if it's set.
    pub(crate) fn from_env() -> Option<Self> {
        let names = std::env::var(VARIABLE).ok()?;
        let known = |name: &str| {
            let found = LEAKS.iter().find(|(leak, _)| *leak == name);
            found.unwrap_or_else(|| panic!("{VARIABLE} must be of {LEAKS:?}")).0
        };
        Some(Self {
            names: names.split(',').map(known).collect(),
            scenes: AtomicU64::new(0),
            kept: Mutex::default(),
            stdin: std::io::pipe().expect("a pipe"),
        })
    }

    /// Leaks, when it's time to.
    pub(crate) async fn plant(&self, world: &World) {
        let scene = self.scenes.fetch_add(1, Ordering::Relaxed);
        for (name, every) in LEAKS {
            if self.names.contains(name) && scene.is_multiple_of(*every) {
                let thing = self.thing(name, world).await;
                self.kept.lock().unwrap().push(thing);
            }
        }
    }

    async fn thing(&self, name: &str, world: &World) -> Box<dyn Any + Send> {
        match name {
            "page" => Box::new(vec![1_u8; 4096]),
            "fork" => {
                let open = world.runtime.environment(&world.base, EnvironmentOptions::default());
                Box::new(open.unwrap().fork_session().await.unwrap())
            }
            "descriptor" => Box::new(File::open("/dev/null").unwrap()),
            "file" => Box::new(tempfile::NamedTempFile::new().unwrap().into_temp_path()),
            "thread" => Box::new(std::thread::spawn(|| {
                loop {
                    std::thread::park();
                }
            })),
            "process" => {
                let stdin = self.stdin.0.try_clone().unwrap();
                Box::new(Command::new("cat").stdin(stdin).spawn().unwrap())
            }
            other => panic!("no leak {other}"),
        }
    }
}
