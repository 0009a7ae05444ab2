//! What is special to sessions in processes of this host; the contract is in `conformance.rs`.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest, ScriptedHandler};
use kaa::{
    Backend, Clock, Environment, EnvironmentExt, EnvironmentOptions, Error, ExecuteOptions,
    Execution, Limit, Limits, LocalBackend, LocalOptions, Mount, Outcome, Policy, Status, Value,
};

fn backend() -> LocalBackend {
    let path = std::env::var("PATH").unwrap();
    LocalBackend::new(LocalOptions { path, ..LocalOptions::default() })
}

async fn open(options: EnvironmentOptions) -> Box<dyn Environment> {
    backend().open(options).await.unwrap()
}

async fn limited(limits: Limits) -> Box<dyn Environment> {
    open(EnvironmentOptions { limits, ..EnvironmentOptions::default() }).await
}

async fn run(session: &mut Box<dyn Environment>, code: &str) -> Execution {
    session.execute(code).await.unwrap()
}

async fn value(session: &mut Box<dyn Environment>, code: &str) -> String {
    let execution = run(session, code).await;
    execution.value.unwrap_or_else(|| panic!("{code}: {}", execution.stderr.text()))
}

/// Whether there is a process of this number that isn't a zombie.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(since.elapsed() < Duration::from_secs(20), "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_hard_stop_poisons_and_a_reset_helps() {
    let limits = Limits {
        compute: Duration::from_millis(100),
        grace: Duration::from_millis(100),
        ..Limits::default()
    };
    let mut session = limited(limits).await;
    let soft = run(&mut session, "x = 1\nwhile True: pass").await;
    assert_eq!((soft.outcome, soft.limit), (Outcome::LimitReached, Some(Limit::Compute)));
    assert_eq!(value(&mut session, "x").await, "1");
    // In CPython 3.11 a loop's jump back is outside of the `try` around it.
    let stubborn = "print('begun')\ndef spin():\n  while True: pass\nwhile True:\n  try: spin()\n  except BaseException: pass";
    let hard = run(&mut session, stubborn).await;
    assert_eq!((hard.outcome, hard.rolled_back), (Outcome::LimitReached, false));
    assert_eq!(hard.stdout.text(), "begun\n");
    assert_eq!(session.status(), Status::Poisoned);
    let refused = session.execute("1").await.unwrap_err();
    assert!(matches!(&refused, Error::Poisoned { reason } if reason.contains("compute limit")));
    session.reset().await.unwrap();
    assert_eq!(value(&mut session, "'x' in globals()").await, "False");
}

/// Cells that attack the channel, and what has to come of them. Whatever it is, the host knows soon,
/// and a reset gives a session that works.
#[tokio::test]
async fn no_cell_forges_a_message_or_hangs_the_host() {
    const FRAMES: &str = r#"
import os, struct
done = b'{"op":"done","outcome":"exited","exit_code":9}'
call = struct.pack(">I", len(done)) + done
inner = struct.pack(">IIQ", len(call), 1, 0) + call
outer = [b"D" + struct.pack(">I", len(inner) + 12) + bytes(12) + inner]
for event in (b'{"event":"dead","killed":false,"code":9,"signal":null,"starved":false}', b'{"event":"ready"}'):
    outer.append(b"C" + struct.pack(">I", len(event)) + event)
"#;
    let writes = |range: &str| {
        format!(
            "{FRAMES}\nfor fd in {range}:\n    for frame in outer + [inner, call]:\n        try: os.write(fd, frame)\n        except OSError: pass\nx = 7"
        )
    };
    let cases = [
        ("writes to low descriptors", writes("range(0, 21)"), Some("7")),
        ("prints frames", format!("{FRAMES}\nimport sys\nfor frame in outer: sys.stdout.buffer.write(frame)\nx = 7"), Some("7")),
        ("closes low descriptors", "import os\nos.closerange(0, 21)\nx = 7".into(), Some("7")),
        ("replaces its streams", "import os\nfd = os.open('/dev/null', os.O_RDWR)\nfor at in range(3): os.dup2(fd, at)\nx = 7".into(), Some("7")),
        ("forks, and both go on", "import os\npid = os.fork()\nx = 7 if pid else 8".into(), Some("7")),
        ("a child asks models", "import os\npid = os.fork()\nif not pid: llm_query('x')\nx = 7".into(), Some("7")),
        ("a child stays", "import os, time\nif not os.fork(): time.sleep(60)\nx = 7".into(), Some("7")),
        ("traces", "import sys\nsys.settrace(lambda *a: 1/0)\nx = 7".into(), None),
        ("closes everything", "import os\nos.closerange(0, 65536)".into(), None),
        ("kills its parent", "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)".into(), None),
        ("stops its parent", "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\nx = 7\ntime.sleep(60)".into(), None),
        ("kills itself", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)".into(), None),
        ("exits", "import os\nprint('said')\nos._exit(3)".into(), None),
        ("crashes", "import ctypes\nctypes.string_at(0)".into(), None),
        ("floods the channel", format!("{FRAMES}\nfor fd in range(200, 2000):\n    try:\n        os.fstat(fd)\n        while True: os.write(fd, inner)\n    except OSError: pass"), None),
        ("guesses the channel, once", format!("{FRAMES}\nfor fd in range(200, 2000):\n    try: os.write(fd, inner)\n    except OSError: pass"), None),
        ("writes nonsense to the channel", "import os\nfor fd in range(200, 2000):\n    try: os.write(fd, b'\\xff' * 64)\n    except OSError: pass\nimport time\ntime.sleep(60)".into(), None),
    ];
    let limits = Limits { wall: Duration::from_secs(2), ..Limits::default() };
    for (name, code, intact) in cases {
        let lm: Arc<dyn LmHandler> = Arc::new(ScriptedHandler::echo());
        let options = EnvironmentOptions {
            limits: limits.clone(),
            lm: Some(lm),
            ..EnvironmentOptions::default()
        };
        let mut session = open(options).await;
        let since = Instant::now();
        let result = session.execute(&code).await;
        assert!(since.elapsed() < Duration::from_secs(25), "{name}: {:?}", since.elapsed());
        if let Ok(execution) = &result {
            assert_ne!(execution.outcome, Outcome::Exited { code: 9 }, "{name}");
        }
        if let Some(expected) = intact {
            assert_eq!(result.unwrap().outcome, Outcome::Completed, "{name}");
            assert_eq!(value(&mut session, "x").await, expected, "{name}");
            assert_eq!(run(&mut session, "print('out')").await.stdout.text(), "out\n", "{name}");
        }
        session.reset().await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(value(&mut session, "6 * 7").await, "42", "{name}");
        session.close().await.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[tokio::test]
async fn a_worker_that_ends_is_a_result_and_its_output_is_kept() {
    let cases = [
        ("import os\nprint('said')\nos._exit(3)", Outcome::Exited { code: 3 }, "exited with 3"),
        (
            "import os\nprint('said')\nos.kill(os.getpid(), 11)",
            Outcome::Exited { code: 139 },
            "signal 11",
        ),
    ];
    for (code, outcome, reason) in cases {
        let mut session = open(EnvironmentOptions::default()).await;
        let execution = run(&mut session, code).await;
        assert_eq!((execution.outcome, execution.stdout.text().as_ref()), (outcome, "said\n"));
        assert!(execution.stderr.text().contains(reason), "{}", execution.stderr.text());
        assert_eq!(session.status(), Status::Poisoned);
        session.reset().await.unwrap();
        assert_eq!(value(&mut session, "1").await, "1");
    }
}

#[tokio::test]
async fn nothing_stays_behind() {
    let code = "import os, subprocess\nfrom pathlib import Path\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\nPath('file').write_text('x')\nprint(os.getpid(), os.getppid(), child.pid, os.getcwd())";
    for end in ["close", "drop", "reset"] {
        let mut session = open(EnvironmentOptions::default()).await;
        let printed = run(&mut session, code).await.stdout.text().into_owned();
        let parts: Vec<&str> = printed.split_whitespace().collect();
        let [worker, supervisor, child, folder] = parts[..] else { panic!("{printed}") };
        assert!(is_alive(worker) && is_alive(supervisor) && is_alive(child));
        match end {
            "close" => session.close().await.unwrap(),
            "drop" => drop(session),
            _ => {
                session.reset().await.unwrap();
                assert!(!is_alive(worker) && !is_alive(child) && is_alive(supervisor));
                session.close().await.unwrap();
            }
        }
        until(&format!("{end}: {printed}"), || {
            ![worker, supervisor, child].into_iter().any(is_alive) && !Path::new(folder).exists()
        })
        .await;
    }
}

#[tokio::test]
async fn a_future_that_is_dropped_ends_its_cell() {
    let mut session = open(EnvironmentOptions::default()).await;
    let pid = value(&mut session, "import os\nos.getpid()").await;
    let cell = session.execute("while True: pass");
    assert!(tokio::time::timeout(Duration::from_millis(200), cell).await.is_err());
    assert_eq!(session.status(), Status::Poisoned);
    until("the worker goes on", || !is_alive(&pid)).await;
    session.reset().await.unwrap();
    assert_eq!(value(&mut session, "1").await, "1");
}

/// Answers after a while, whatever is asked.
struct Slow(Duration);

#[async_trait::async_trait]
impl LmHandler for Slow {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        tokio::time::sleep(self.0).await;
        ScriptedHandler::echo().complete(request).await
    }
}

#[tokio::test]
async fn threads_ask_models_at_the_same_time() {
    let lm: Arc<dyn LmHandler> = Arc::new(Slow(Duration::from_millis(400)));
    let mut session =
        open(EnvironmentOptions { lm: Some(lm), ..EnvironmentOptions::default() }).await;
    let code = "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool: answers = list(pool.map(llm_query, 'abcdefgh'))\n''.join(answers)";
    let execution = run(&mut session, code).await;
    assert_eq!(execution.value.as_deref(), Some("'abcdefgh'"), "{}", execution.stderr.text());
    assert_eq!((execution.lm_calls.len(), execution.usage.lm_calls), (8, 8));
    // Eight after the other take 3.2 s; what is measured is the host's own wait.
    assert!(execution.usage.host_wait < Duration::from_millis(1600), "{:?}", execution.usage);
}

#[tokio::test]
async fn a_limit_in_a_wait_for_models_stops_the_cell() {
    let lm: Arc<dyn LmHandler> = Arc::new(Slow(Duration::from_secs(60)));
    let limits = Limits { wall: Duration::from_millis(300), ..Limits::default() };
    let options = EnvironmentOptions { limits, lm: Some(lm), ..EnvironmentOptions::default() };
    let mut session = open(options).await;
    let pool = "from concurrent.futures import ThreadPoolExecutor\nlist(ThreadPoolExecutor(4).map(llm_query, 'abcd'))";
    for code in ["llm_query('x')", "llm_query_batched(['x'] * 5)", pool] {
        let execution = run(&mut session, code).await;
        assert_eq!(
            (execution.outcome, execution.limit),
            (Outcome::LimitReached, Some(Limit::Wall)),
            "{code}"
        );
        assert_eq!(value(&mut session, "1").await, "1", "{code}");
    }
}

#[tokio::test]
async fn memory_is_bounded_as_data_of_the_process() {
    let mut session = limited(Limits { memory_bytes: 128 << 20, ..Limits::default() }).await;
    let execution = run(&mut session, "x = 1\nb = bytearray(1 << 30)").await;
    assert_eq!(execution.exception.unwrap().type_name, "MemoryError");
    assert_eq!(value(&mut session, "x").await, "1");
}

#[tokio::test]
async fn compute_counts_children_and_not_sleep() {
    let limits = Limits { compute: Duration::from_secs(1), ..Limits::default() };
    let mut session = limited(limits).await;
    let slept = run(&mut session, "import time\ntime.sleep(1.5)").await;
    assert_eq!(slept.outcome, Outcome::Completed);
    let child =
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])";
    let execution = run(&mut session, child).await;
    assert_eq!((execution.outcome, execution.limit), (Outcome::LimitReached, Some(Limit::Compute)));
}

#[tokio::test]
async fn what_a_process_cannot_do_is_refused_by_name() {
    let policy = |policy: Policy| EnvironmentOptions { policy, ..EnvironmentOptions::default() };
    let mount = Mount::parse("/etc:/data").unwrap();
    let limits = Limits { fuel: 1000, ..Limits::default() };
    let cases = [
        ("a seed", policy(Policy { seed: Some(1), ..Policy::default() })),
        ("a fixed clock", policy(Policy { clock: Clock::Fixed(0), ..Policy::default() })),
        ("mounts", policy(Policy { mounts: vec![mount], ..Policy::default() })),
        (
            "limits.fuel",
            EnvironmentOptions { limits: limits.clone(), ..EnvironmentOptions::default() },
        ),
    ];
    for (name, options) in cases {
        match backend().open(options).await {
            Err(Error::Unsupported { backend: "local", operation }) => assert_eq!(operation, name),
            other => panic!("{name}: {:?}", other.map(|_| ())),
        }
    }
    let mut session = open(EnvironmentOptions::default()).await;
    let options = ExecuteOptions { limits: Some(limits) };
    let refused = session.execute_opts("1", options).await;
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
    assert!(!session.capabilities().isolated);
}

#[tokio::test]
async fn a_missing_or_unfit_python_is_named() {
    for (python, words) in [("/no/such/python3", "/no/such/python3"), ("/bin/false", "ended with")]
    {
        let backend =
            LocalBackend::new(LocalOptions { python: python.into(), ..LocalOptions::default() });
        match backend.open(EnvironmentOptions::default()).await {
            Err(error @ Error::Unavailable { .. }) => {
                assert!(error.to_string().contains(words), "{error}");
            }
            other => panic!("{python}: {:?}", other.map(|_| ())),
        }
    }
}

#[tokio::test]
async fn what_an_interpreter_says_before_it_is_ready_is_understood() {
    let unfit = r#"{"event":"unfit","python":"3.7"}"#;
    let cases = [
        (format!("printf 'C\\0\\0\\0\\{:o}%s' '{unfit}'", unfit.len()), "found 3.7"),
        ("printf 'Hello, I am no Python.'".into(), "broke the protocol"),
        ("echo 'no such module' >&2; exit 3".into(), "no such module"),
        ("printf 'O\\377\\377\\377\\377'; sleep 60".into(), "a frame of 4294967295 bytes"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (at, (words, expected)) in cases.into_iter().enumerate() {
        let script = folder.path().join(format!("python{at}"));
        std::fs::write(&script, format!("#!/bin/sh\n{words}\n")).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let backend = LocalBackend::new(LocalOptions { python: script, ..LocalOptions::default() });
        let error = backend.open(EnvironmentOptions::default()).await.map(drop).unwrap_err();
        assert!(error.to_string().contains(expected), "{words}: {error}");
    }
}

#[tokio::test]
async fn setup_code_runs_first_and_its_failure_is_shown() {
    let with = |code: &str| {
        let path = std::env::var("PATH").unwrap();
        LocalBackend::new(LocalOptions {
            path,
            setup_code: Some(code.into()),
            ..LocalOptions::default()
        })
    };
    let mut session =
        with("import math\nready = 1").open(EnvironmentOptions::default()).await.unwrap();
    assert_eq!(value(&mut session, "ready, math.pi > 3").await, "(1, True)");
    run(&mut session, "ready = 2").await;
    session.reset().await.unwrap();
    assert_eq!(value(&mut session, "ready").await, "1");
    let failed = with("1/0").open(EnvironmentOptions::default()).await.map(drop).unwrap_err();
    assert!(
        matches!(&failed, Error::Invalid { what, reason } if what == "setup_code" && reason.contains("ZeroDivisionError")),
        "{failed}"
    );
}

#[tokio::test]
async fn the_hosts_environment_is_not_the_sessions() {
    let policy = Policy { env: vec![("GIVEN".into(), "yes".into())], ..Policy::default() };
    let mut session = open(EnvironmentOptions { policy, ..EnvironmentOptions::default() }).await;
    let names = value(&mut session, "import os\nsorted(os.environ)").await;
    assert!(!names.contains("CARGO") && names.contains("GIVEN"), "{names}");
    session.set_variable("v", Value::from("x")).await.unwrap();
    assert_eq!(session.get_variable("v").await.unwrap(), Some(Value::from("x")));
}

/// A guest that asks slow models.
async fn asking(wait: Duration, limits: Limits) -> Box<dyn Environment> {
    let lm: Arc<dyn LmHandler> = Arc::new(Slow(wait));
    open(EnvironmentOptions { limits, lm: Some(lm), ..EnvironmentOptions::default() }).await
}

/// Alarms are how Python bounds a wait, and their handlers raise wherever the thread of the cells is.
#[tokio::test]
async fn a_handler_that_raises_tears_no_message() {
    const ALARM: &str = "import signal, threading, time\narmed = True\ndef ring(*_):\n  global armed\n  if armed:\n    armed = False\n    raise TimeoutError('rung')\nsignal.signal(signal.SIGALRM, ring)\n";
    let cases = [
        ("in a wait", "signal.setitimer(signal.ITIMER_REAL, 0.1)\nllm_query('x')", "rung"),
        (
            "while another thread reads",
            "thread = threading.Thread(target=llm_query, args=('t',))\nthread.start()\ntime.sleep(.1)\nsignal.setitimer(signal.ITIMER_REAL, 0.1)\nsaid = llm_query('x')\nthread.join()\nsaid",
            "rung",
        ),
        (
            "again and again",
            "end, good, n = time.time() + 2, 0, 0\nsignal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\nwhile time.time() < end:\n  try:\n    armed = True\n    n += 1\n    text = str(n) * (300_000 if n % 7 == 0 else 1)\n    assert add(text) == text\n    good, armed = good + 1, False\n  except TimeoutError: pass\nsignal.setitimer(signal.ITIMER_REAL, 0)\ngood > 5",
            "True",
        ),
        ("between cells", "signal.setitimer(signal.ITIMER_REAL, 0.1)\n1", "1"),
    ];
    for (name, code, expected) in cases {
        let limits =
            Limits { wall: Duration::from_secs(10), tool_calls: u32::MAX, ..Limits::default() };
        let mut session = asking(Duration::from_millis(400), limits).await;
        let echo = |call: kaa::ToolArgs| Ok(call.args.into_iter().next().unwrap_or(Value::None));
        session.register_tool(kaa::Tool::new("add", echo)).unwrap();
        let found = value(&mut session, &format!("{ALARM}{code}")).await;
        assert!(found.contains(expected), "{name}: {found}");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(value(&mut session, "llm_query('y')").await, "'y'", "{name}");
    }
}

#[tokio::test]
async fn a_reset_whose_future_is_dropped_loses_the_state() {
    let mut session = open(EnvironmentOptions::default()).await;
    let reset = session.reset();
    assert!(tokio::time::timeout(Duration::ZERO, reset).await.is_err());
    assert_eq!(session.status(), Status::Poisoned);
    let refused = session.execute("1").await.unwrap_err();
    assert!(
        matches!(&refused, Error::Poisoned { reason } if reason.contains("reset")),
        "{refused}"
    );
    session.reset().await.unwrap();
    assert_eq!(value(&mut session, "1").await, "1");
}

/// A cell that ends as its limit is reached: what its supervisor says then is not the next one's.
#[tokio::test]
async fn a_limit_is_not_taken_for_the_next_cells() {
    let limits = Limits {
        compute: Duration::from_millis(30),
        grace: Duration::from_millis(30),
        ..Limits::default()
    };
    let mut session = limited(limits).await;
    for at in 0..40 {
        let spin = format!(
            "import time\nend = time.process_time() + 0.029 + {at} * 0.0001\ntry:\n  while time.process_time() < end: pass\nexcept BaseException:\n  end = time.process_time() + 0.029 + {at} * 0.0001\n  while time.process_time() < end: pass"
        );
        let first = run(&mut session, &spin).await;
        if session.status() == Status::Poisoned {
            assert_eq!(first.outcome, Outcome::LimitReached);
            session.reset().await.unwrap();
        }
        let next = run(&mut session, "1").await;
        assert_eq!((next.outcome, next.limit), (Outcome::Completed, None), "{at}");
    }
}

#[test]
fn nothing_stays_behind_a_runtime_that_is_gone() {
    let code = "import os, subprocess\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\nprint(os.getpid(), os.getppid(), child.pid, os.getcwd())";
    for is_dropped_inside in [true, false] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut session = runtime.block_on(open(EnvironmentOptions::default()));
        let printed = runtime.block_on(run(&mut session, code)).stdout.text().into_owned();
        if is_dropped_inside {
            runtime.block_on(async { drop(session) });
            drop(runtime);
        } else {
            drop(runtime);
            drop(session);
        }
        let mut parts: Vec<&str> = printed.split_whitespace().collect();
        let folder = parts.pop().unwrap();
        let since = Instant::now();
        while parts.iter().any(|pid| is_alive(pid)) || Path::new(folder).exists() {
            assert!(since.elapsed() < Duration::from_secs(10), "{is_dropped_inside}: {printed}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[tokio::test]
async fn what_is_too_long_for_the_host_costs_no_state() {
    let limits = Limits { memory_bytes: 2 << 30, ..Limits::default() };
    let mut session = asking(Duration::ZERO, limits).await;
    run(&mut session, "x = 'a' * (270 << 20)").await;
    let refused = session.get_variable("x").await.unwrap_err();
    assert!(matches!(&refused, Error::Invalid { reason, .. } if reason.contains("268435456")));
    let said = value(&mut session, "llm_query(x)").await;
    assert!(said.contains("the host takes 268435456"), "{said}");
    assert_eq!(value(&mut session, "len(x)").await, (270 << 20).to_string());
}

#[tokio::test]
async fn a_context_that_does_not_fit_costs_no_state() {
    let mut session = limited(Limits { memory_bytes: 128 << 20, ..Limits::default() }).await;
    run(&mut session, "x = 5").await;
    let context = kaa::Context::Bytes(vec![1; 200 << 20]);
    let refused = session.add_context(context, None).await.unwrap_err();
    assert!(matches!(&refused, Error::Invalid { what, .. } if what == "context"), "{refused}");
    assert_eq!(value(&mut session, "x").await, "5");
}

#[tokio::test]
async fn a_reset_takes_the_files_along() {
    let mut session = open(EnvironmentOptions::default()).await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("kept"), "").unwrap();
    let code = format!(
        "import os\nopen('struct.py', 'w').write('1/0')\nos.symlink({:?}, 'link')\nhome = os.getcwd()\nos.makedirs('a/b')\nopen('a/b/file', 'w').close()\nos.chmod('a', 0)\nfor _ in range(2000):\n  os.mkdir('d' * 9); os.chdir('d' * 9)\nos.chdir(home)",
        outside.path()
    );
    assert_eq!(run(&mut session, &code).await.outcome, Outcome::Completed);
    session.reset().await.unwrap();
    assert_eq!(value(&mut session, "import os\nos.listdir('.')").await, "[]");
    assert!(outside.path().join("kept").exists());
}

#[tokio::test]
async fn threads_that_go_on_asking_do_not_cost_a_stopped_cell_its_state() {
    let limits = Limits { wall: Duration::from_millis(300), ..Limits::default() };
    let mut session = asking(Duration::from_secs(60), limits).await;
    let pool = "x = 1\nfrom concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool: list(pool.map(llm_query, 'abcdefgh' * 10))";
    let execution = run(&mut session, pool).await;
    assert_eq!((execution.outcome, execution.limit), (Outcome::LimitReached, Some(Limit::Wall)));
    assert_eq!(value(&mut session, "x").await, "1");
}

#[tokio::test]
async fn what_waiting_calls_hold_is_bounded() {
    let limits = Limits { memory_bytes: 2 << 30, ..Limits::default() };
    let mut session = limited(limits).await;
    session
        .register_tool(kaa::Tool::new_async("keep", |call| async move {
            tokio::time::sleep(Duration::from_secs(2)).await;
            Ok(Value::from(call.args.len() as i64))
        }))
        .unwrap();
    let code = "import threading\nfound = []\ndef ask():\n  try: found.append(keep(data))\n  except RuntimeError as error: found.append(str(error))\ndata = b'x' * (100 << 20)\nthreads = [threading.Thread(target=ask) for _ in range(4)]\n[thread.start() for thread in threads]\n[thread.join() for thread in threads]\nsorted(map(str, found))";
    let found = value(&mut session, code).await;
    assert!(found.starts_with("['1', '1', 'calls that wait have more than"), "{found}");
    assert_eq!(value(&mut session, "keep(data)").await, "1");
}

/// A session whose `dill` is Python's own `pickle`, which is enough for what has no functions.
async fn pickling(folder: &Path, limits: Limits) -> Box<dyn Environment> {
    std::fs::write(folder.join("dill.py"), "from pickle import dumps, loads\n").unwrap();
    let env = vec![("PYTHONPATH".to_owned(), folder.to_string_lossy().into_owned())];
    let policy = Policy { env, ..Policy::default() };
    open(EnvironmentOptions { policy, limits, ..EnvironmentOptions::default() }).await
}

#[tokio::test]
async fn a_snapshot_that_is_stopped_costs_no_state() {
    let folder = tempfile::tempdir().unwrap();
    let mut session = pickling(folder.path(), Limits::default()).await;
    let slow =
        "import time\nclass Slow:\n  def __reduce__(self): time.sleep(20)\nx, y = Slow(), Slow()";
    run(&mut session, slow).await;
    let interrupt = session.interrupt();
    let stop = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        interrupt.interrupt();
        std::future::pending::<()>().await
    };
    let refused = tokio::select! {
        refused = session.snapshot() => refused.unwrap_err(),
        () = stop => unreachable!(),
    };
    assert!(matches!(&refused, Error::Invalid { .. }), "{refused}");
    assert_eq!(value(&mut session, "type(x).__name__").await, "'Slow'");
}

#[tokio::test]
async fn a_snapshot_of_another_hand_is_taken_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let mut session = pickling(folder.path(), Limits::default()).await;
    let file = folder.path().join("other.dill");
    let cases = [
        ("{'a': 1, '__kaa__': {'counts': 5}}", true),
        ("{'a': 1, '__kaa__': {'first': [[]], 'answer': 3}}", true),
        ("{'a': 1, '__kaa__': 7}", true),
        ("{1: 1}", false),
        ("[]", false),
    ];
    for (record, is_taken) in cases {
        run(&mut session, "k = 4").await;
        let write = format!("import pickle\nopen({file:?}, 'wb').write(pickle.dumps({record}))\n1");
        run(&mut session, &write).await;
        let restored = session.restore(&backend().load_snapshot(&file).unwrap()).await;
        assert_eq!(restored.is_ok(), is_taken, "{record}: {restored:?}");
        let left = value(&mut session, "'k' in globals(), 'a' in globals()").await;
        assert_eq!(left, if is_taken { "(False, True)" } else { "(True, False)" }, "{record}");
        run(&mut session, "globals().pop('a', None)").await;
    }
}
