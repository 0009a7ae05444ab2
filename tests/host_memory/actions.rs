//! What is done to sessions: by cells, from outside, and leaks on purpose.

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kaa::lm::{LmError, ScriptedHandler};
use kaa::{
    Context, Environment, EnvironmentExt, EnvironmentOptions, ExecuteOptions, Execution, Limit,
    Limits, Mount, Outcome, Policy, Tool, ToolError, Value, WasmEnvironment,
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::common::open;

/// What every session begins with: `big` and `text`, of 100,000 bytes and characters.
pub(crate) const BEGIN: &str = "big = b'x' * 100_000; text = 'x' * 100_000";

/// What a cell must come to, so that it does what its name says.
pub(crate) enum End {
    Completes,
    /// With an exception of this type.
    Raises(&'static str),
    Exits,
    /// At a limit, which is short for this cell.
    Stops,
    /// With an error of the host's: the session broke the protocol.
    Breaks,
}
use End::{Breaks, Completes, Exits, Raises, Stops};

pub(crate) struct Cell {
    pub(crate) name: &'static str,
    end: End,
    code: &'static str,
}

const fn cell(name: &'static str, end: End, code: &'static str) -> Cell {
    Cell { name, end, code }
}

pub(crate) const CELLS: &[Cell] = &[
    cell("open and close", Completes, "for n in range(50): open(f'/tmp/{n % 3}', 'w').close()"),
    cell(
        "open and roll back",
        Exits,
        "f = [open(f'/tmp/{n}', 'w') for n in range(50)]; import os; os._exit(1)",
    ),
    cell(
        "descriptors",
        Completes,
        "import os\ntry:\n    f = [os.open('/data/plain', 0) for n in range(300)]\nexcept OSError: pass\nfor n in range(400):\n    try: os.close(n)\n    except OSError: pass",
    ),
    cell(
        "failing opens",
        Completes,
        "for n in range(100):\n    try: open('/none/' + 'n' * n)\n    except OSError: pass",
    ),
    cell(
        "long names",
        Completes,
        "import os\nfor n in range(100):\n    try: os.stat('/tmp/' + text)\n    except OSError: pass",
    ),
    cell(
        "directories",
        Completes,
        "import os\nfor n in range(20): os.mkdir(f'/tmp/d{n}')\nos.listdir('/tmp')\nfor n in range(20): os.rmdir(f'/tmp/d{n}')",
    ),
    cell("reads", Completes, "for n in range(50): open('/data/plain').read()"),
    cell("writes", Completes, "open('/tmp/w', 'wb').write(big * 10)"),
    cell("messages", Raises("ValueError"), "raise ValueError(text)"),
    cell("long types", Raises("T"), "raise type('T' * 100_000, (Exception,), {})(text)"),
    cell(
        "tracebacks",
        Raises("ZeroDivisionError"),
        "def f(n):\n    return f(n - 1) + 1 if n else 1 / 0\nf(300)",
    ),
    cell(
        "chains",
        Raises("ValueError"),
        "e = None\nfor n in range(200):\n    new = ValueError(text[:1000]); new.__cause__ = e; e = new\nraise e",
    ),
    cell("syntax errors", Raises("SyntaxError"), "x = ("),
    cell("prints", Completes, "for n in range(20): print(text)"),
    cell("floods", Completes, "for n in range(200): print(text)"),
    cell(
        "raw writes",
        Completes,
        "import os\nfor n in range(20): os.write(1, big); os.write(2, big)",
    ),
    cell(
        "warnings",
        Completes,
        "import warnings\nfor n in range(50): warnings.warn(text[:1000] + str(n))",
    ),
    cell("last values", Completes, "[text] * 20"),
    cell(
        "variables",
        Completes,
        "globals().update({f'v{n}': text[n:n + 2000] for n in range(300)})",
    ),
    cell(
        "names",
        Completes,
        "globals()['n' * 50_000 + str(id(object()))] = 1\nfor k in [k for k in globals() if k[:2] == 'nn']: del globals()[k]",
    ),
    cell("answers", Completes, "answer['content'] = text * 5; answer['ready'] = True"),
    cell("final variables", Completes, "v = text * 5\nprint(FINAL_VAR('v')[:10])"),
    cell(
        "model calls",
        Completes,
        "assert llm_query(text) == text; assert llm_query_batched([text] * 10) == [text] * 10",
    ),
    cell("failing calls", Completes, "assert 'refused' in llm_query('fail ' + text)"),
    cell("tools", Completes, "take(text, [big] * 3, k={'a': text})"),
    cell(
        "failing tools",
        Completes,
        "for n in range(10):\n    try: fail(text)\n    except KeyError: pass\n    else: 1/0",
    ),
    cell(
        "unknown values",
        Completes,
        "for n in range(20):\n    try: take(object())\n    except TypeError: pass\n    else: 1/0",
    ),
    cell("exits", Exits, "raise SystemExit(text)"),
    cell("traps", Exits, "import os; os.abort()"),
    cell("growth and rollback", Exits, "x = bytearray(40_000_000); import os; os._exit(1)"),
    cell("growth", Completes, "x = bytearray(20_000_000); del x"),
    cell("soft stops", Stops, "while True: pass"),
    cell(
        "hard stops",
        Stops,
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ),
    cell("sleeps", Completes, "import time\nfor n in range(20): time.sleep(0.0001)"),
    cell(
        "imports",
        Completes,
        "import sys\nfor name in ('csv', 'wave', 'colorsys'):\n    sys.modules.pop(name, None); __import__(name)",
    ),
    cell("lies", Breaks, "import _host\n_host.call(b'garbage')"),
    cell(
        "late lies",
        Breaks,
        "import _host\nh = b'{\"op\":\"lm\",\"prompts\":[\"' + big + b'\",0]}'\n_host.call(len(h).to_bytes(4, 'big') + h)",
    ),
];

impl Cell {
    pub(crate) async fn run(&self, session: &mut WasmEnvironment) {
        let limits = matches!(self.end, Stops).then(|| Limits {
            compute: Duration::from_millis(20),
            grace: Duration::from_millis(10),
            ..Limits::default()
        });
        let result = session.execute_opts(self.code, ExecuteOptions { limits }).await;
        assert!(self.end.is_met(&result), "{}: {:.1000}", self.name, format!("{result:?}"));
    }
}

impl End {
    pub(crate) fn is_met(&self, result: &kaa::Result<Execution>) -> bool {
        let Ok(execution) = result else { return matches!(self, Breaks) };
        let kind = execution.exception.as_ref().map_or("", |exception| &exception.type_name);
        match self {
            Completes => execution.outcome == Outcome::Completed,
            Raises(name) => execution.outcome == Outcome::Raised && kind.starts_with(name),
            Exits => matches!(execution.outcome, Outcome::Exited { .. }),
            Stops => execution.outcome == Outcome::LimitReached,
            Breaks => false,
        }
    }
}

/// What is done to a session from outside.
#[derive(Debug)]
pub(crate) enum Method {
    Contexts,
    VariablesOutAndIn,
    ListsOfVariables,
    Snapshots,
    Restores,
    Forks,
    Resets,
    Hibernations,
    Sessions,
    Interrupts,
    DroppedCells,
}

pub(crate) const METHODS: &[Method] = &[
    Method::Contexts,
    Method::VariablesOutAndIn,
    Method::ListsOfVariables,
    Method::Snapshots,
    Method::Restores,
    Method::Forks,
    Method::Resets,
    Method::Hibernations,
    Method::Sessions,
    Method::Interrupts,
    Method::DroppedCells,
];

impl Method {
    pub(crate) async fn call(&self, session: &mut WasmEnvironment, host: &Host) {
        match self {
            Self::Contexts => {
                let text = Context::Text(vec![b'x'; 200_000]);
                session.add_context(text, Some(3)).await.unwrap();
            }
            Self::VariablesOutAndIn => {
                let value = session.get_variable("text").await.unwrap().unwrap();
                session.set_variable("again", value).await.unwrap();
            }
            Self::ListsOfVariables => assert!(!session.list_variables().await.unwrap().is_empty()),
            Self::Snapshots => drop(session.snapshot().await.unwrap()),
            Self::Restores => {
                let snapshot = session.snapshot().await.unwrap();
                session.execute("x = text * 10").await.unwrap();
                session.restore(&snapshot).await.unwrap();
            }
            Self::Forks => {
                let mut fork = session.fork_session().await.unwrap();
                fork.execute("x = text * 10").await.unwrap();
            }
            Self::Resets => {
                session.reset().await.unwrap();
                session.execute(BEGIN).await.unwrap();
            }
            Self::Hibernations => drop(session.hibernate().await.unwrap()),
            Self::Sessions => {
                open(host.options()).execute("x = 'x' * 100_000").await.unwrap();
            }
            Self::Interrupts => {
                let interrupt = session.interrupt();
                let (cell, ()) = tokio::join!(session.execute("while True: pass"), async {
                    tokio::task::yield_now().await;
                    interrupt.interrupt();
                });
                assert_eq!(cell.unwrap().limit, Some(Limit::Interrupt));
            }
            Self::DroppedCells => {
                let cell = session.execute("x = text * 50\nwhile True: pass");
                let cell = tokio::time::timeout(Duration::from_millis(5), cell).await;
                assert!(cell.is_err(), "it has ended: {cell:?}");
            }
        }
    }
}

/// What is leaked on purpose with each repetition, and the figure that has to show it.
pub(crate) struct Leak {
    pub(crate) name: &'static str,
    pub(crate) figure: &'static str,
    pub(crate) plant: fn(&Host),
}

pub(crate) const LEAKS: &[Leak] = &[
    Leak {
        name: "a hundred bytes",
        figure: "heap bytes",
        plant: |_| std::mem::forget(vec![1_u8; 100]),
    },
    Leak {
        name: "a list that grows",
        figure: "heap bytes",
        plant: |_| {
            static LIST: Mutex<Vec<[u8; 100]>> = Mutex::new(Vec::new());
            LIST.lock().unwrap().push([1; 100]);
        },
    },
    Leak {
        name: "a descriptor",
        figure: "descriptors",
        plant: |host| std::mem::forget(File::open(host.mounts.path()).unwrap()),
    },
    Leak {
        name: "a session",
        figure: "address space",
        plant: |host| std::mem::forget(open(host.options())),
    },
    Leak {
        name: "a thread",
        figure: "threads",
        plant: |_| {
            std::thread::spawn(|| {
                loop {
                    std::thread::park();
                }
            });
        },
    },
];

/// What all tests share: one executor, and two directories that sessions have as mounts.
pub(crate) struct Host {
    executor: Runtime,
    mounts: TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        let executor = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // A thread that waits for blocking work would be there at one look and not at the next.
            .thread_keep_alive(Duration::from_millis(1))
            .build()
            .unwrap();
        let mounts = tempfile::tempdir().unwrap();
        for mount in ["read", "write"] {
            std::fs::create_dir(mounts.path().join(mount)).unwrap();
        }
        std::fs::write(mounts.path().join("read/plain"), "plain").unwrap();
        File::create(mounts.path().join("read/long")).unwrap().set_len(200_000_000).unwrap();
        Self { executor, mounts }
    }

    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.executor.block_on(future)
    }

    pub(crate) fn options(&self) -> EnvironmentOptions {
        let mount = |name: &str, guest: &str, writable| Mount {
            host: self.mounts.path().join(name),
            guest: guest.into(),
            writable,
        };
        let mounts = vec![mount("read", "/data", false), mount("write", "/output", true)];
        let tools = vec![
            Tool::new("take", |_| Ok(Value::None)),
            Tool::new("fail", |call| {
                Err(ToolError::of_type("KeyError", format!("{:?}", call.args)))
            }),
        ];
        let lm = ScriptedHandler::from_fn(|request| match request.prompt.to_text() {
            prompt if prompt.starts_with("fail") => Err(LmError::new("refused")),
            prompt => Ok(prompt.into_owned()),
        });
        EnvironmentOptions {
            policy: Policy { mounts, ..Policy::default() },
            tools,
            lm: Some(Arc::new(lm)),
            ..EnvironmentOptions::default()
        }
    }
}
