//! What cells see in each profile, and the parts of Python that a Wasm guest needs help with.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{open, print, profiled, run, session};
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest, ScriptedHandler};
use kaa::{Context, Environment, EnvironmentOptions, Outcome, Policy, Profile};

/// `(cells, what the last one prints, its value, its final answer)`.
type Case = (&'static [&'static str], &'static str, Option<&'static str>, Option<&'static str>);

const RLM: &[Case] = &[
    (&["1 + 1"], "", Some("2"), None),
    (&["x = 5"], "", None, None),
    (&["x = 5\nx"], "", Some("5"), None),
    (&["None"], "", None, None),
    (
        &["print(SHOW_VARS())"],
        "No variables created yet. Use ```repl``` blocks to create variables.\n",
        None,
        None,
    ),
    (&["x = 5\n_y = 1", "print(SHOW_VARS())"], "Available variables: {'x': 'int'}\n", None, None),
    (&["x = 5", "print(FINAL_VAR('x'), FINAL_VAR(' \"x\" '))"], "5 5\n", None, None),
    (
        &["x = 5", "print(FINAL_VAR('y'))"],
        "Error: Variable 'y' not found. Available variables: ['x']. You must create and assign a variable BEFORE calling FINAL_VAR on it.\n",
        None,
        None,
    ),
    (&["llm_query = None\ncontext = 1", "print(callable(llm_query))"], "True\n", None, None),
    (&["answer['content'] = 'a'\nanswer['ready'] = True"], "", None, Some("a")),
    (&["answer['ready'] = True\nanswer['content'] = 7"], "", None, Some("7")),
    (&["answer.update(content='u', ready=True)"], "", None, Some("u")),
    (&["answer = {'content': 'r', 'ready': True}"], "", None, Some("r")),
    (&["answer['ready'] = True", "1"], "", Some("1"), None),
    (&["answer['content'] = 'not yet'"], "", None, None),
    (
        &["class A:\n    pass\nimport pickle\nprint(type(pickle.loads(pickle.dumps(A()))) is A)"],
        "True\n",
        None,
        None,
    ),
    (
        &["def g():\n    yield 1\n    yield 2\ni = g()\nnext(i)", "print(next(i))"],
        "2\n",
        None,
        None,
    ),
    (&["print(rlm_query('x'))"], "Error: No LM handler configured\n", None, None),
    (&["print(llm_query(None).startswith('Error: LM query failed'))"], "True\n", None, None),
    (
        &[
            "import asyncio\nasync def f(n):\n    await asyncio.sleep(0.01)\n    return n\nasync def m():\n    print(await asyncio.gather(f(1), f(2)))\nasyncio.run(m())",
        ],
        "[1, 2]\n",
        None,
        None,
    ),
    (
        &["from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(P(1))"],
        "P(x=1)\n",
        None,
        None,
    ),
    (
        &["import sqlite3, zlib, hashlib, decimal\nprint(decimal.Decimal(1) / 3)"],
        "0.3333333333333333333333333333\n",
        None,
        None,
    ),
    (&["try: input()\nexcept EOFError: print('eof')"], "eof\n", None, None),
    (&["del answer, context_0", "1"], "", Some("1"), None),
    (
        &["import inspect\ndef f(): return 1\nprint(inspect.getsource(f), end='')"],
        "def f(): return 1\n",
        None,
        None,
    ),
    (
        &["print(__name__, __import__('__main__').__dict__ is globals())"],
        "__main__ True\n",
        None,
        None,
    ),
];

const OPENENV: &[Case] = &[
    (&["1 + 1"], "2\n", Some("2"), None),
    (&["x = 5"], "5\n", Some("5"), None),
    (&["print('p')\n{'a': (1, None)}"], "p\n{\"a\": [1, null]}\n", Some("{'a': (1, None)}"), None),
    (&["print('FINAL(f(x))')"], "FINAL(f(x))\n", None, Some("f(x)")),
    (&["x = 5", "print(FINAL_VAR('x'))"], "FINAL(5)\n", None, Some("5")),
    (&["print(SHOW_VARS())", "y = 1\nprint(SHOW_VARS())"], "['answer', 'y']\n", None, None),
];

#[tokio::test]
async fn each_profile_has_its_own_rules() {
    let mut wrong = Vec::new();
    for (profile, cases) in [(Profile::Rlm, RLM), (Profile::OpenEnv, OPENENV)] {
        for (cells, stdout, value, answer) in cases {
            let mut session = profiled(profile);
            let mut last = None;
            for cell in *cells {
                last = Some(run(&mut session, cell).await);
            }
            let last = last.unwrap();
            let found = (last.stdout.text().into_owned(), last.final_answer.as_deref());
            if found != ((*stdout).to_owned(), *answer)
                || (value.is_some() && last.value.as_deref() != *value)
            {
                wrong.push(format!(
                    "{profile:?} {cells:?}: {found:?} {:?}\n{}",
                    last.value,
                    last.stderr.text()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[tokio::test]
async fn openenv_cuts_streams_refuses_imports_and_raises_lm_errors() {
    let mut session = open(EnvironmentOptions {
        profile: Profile::OpenEnv,
        lm: Some(Arc::new(ScriptedHandler::from_fn(|_| Err(LmError::new("kaput"))))),
        ..EnvironmentOptions::default()
    });
    let long = run(&mut session, "print('x' * 10_000)").await;
    assert_eq!(
        long.stdout.text(),
        format!("{}\n... (truncated, total 10001 chars)", "x".repeat(8192))
    );
    let refused = run(&mut session, "import os").await;
    let exception = refused.exception.unwrap();
    assert!(
        exception.message.starts_with("Import of os is not allowed. Authorized imports are: ["),
        "{}",
        exception.message
    );
    assert!(
        refused.stderr.text().starts_with("ImportError: Import of os"),
        "{}",
        refused.stderr.text()
    );
    assert_eq!(
        run(&mut session, "import json, statistics, collections").await.outcome,
        Outcome::Completed
    );
    let raised = run(&mut session, "llm_query('x')").await;
    assert!(raised.exception.unwrap().message.contains("kaput"));
    let new = run(&mut session, "a = 'y' * 1000\n_b = 2").await;
    let names: Vec<_> =
        new.variables.iter().map(|v| (v.name.as_str(), v.new, v.repr.len())).collect();
    assert_eq!(names, [("a", true, 503)]);
}

#[tokio::test]
async fn imports_can_be_allowed_by_name() {
    let policy = Policy { allowed_imports: Some(vec!["json".into()]), ..Policy::default() };
    let mut session = open(EnvironmentOptions { policy, ..EnvironmentOptions::default() });
    assert_eq!(print(&mut session, "import json\nprint(json.loads('1'))").await, "1\n");
    let refused = run(&mut session, "import csv").await.exception.unwrap();
    assert_eq!(refused.message, "Import of csv is not allowed. Authorized imports are: ['json']");
}

#[tokio::test]
async fn reports_name_new_and_changed_variables() {
    let mut session = session();
    let first =
        run(&mut session, "a = [1]\nb = 'x' * 600\n_c = 1\nimport math\ndef f(): pass").await;
    let seen: Vec<_> =
        first.variables.iter().map(|v| (v.name.as_str(), v.type_name.as_str(), v.new)).collect();
    let expected = [
        ("a", "list", true),
        ("b", "str", true),
        ("math", "module", true),
        ("f", "function", true),
    ];
    assert_eq!(seen, expected);
    assert_eq!(first.variables[1].repr, format!("'{}...", "x".repeat(499)));
    let second = run(&mut session, "a.append(2)\nb = 1\n_c = 2").await;
    let seen: Vec<_> =
        second.variables.iter().map(|v| (v.name.as_str(), v.repr.as_str(), v.new)).collect();
    assert_eq!(seen, [("a", "[1, 2]", false), ("b", "1", false)]);
}

#[tokio::test]
async fn the_alias_of_a_context_is_kept() {
    let mut session = session();
    session.add_context(Context::Text(b"one".to_vec()), None).await.unwrap();
    run(&mut session, "context = 'mine'").await;
    assert_eq!(print(&mut session, "print(context)").await, "one\n");
    run(&mut session, "context_0 = 'moved'").await;
    assert_eq!(print(&mut session, "print(context, context_0)").await, "moved moved\n");
}

/// Answers after a while, and knows how many it answered at once.
#[derive(Default)]
struct Slow {
    now: AtomicUsize,
    most: AtomicUsize,
    batches: AtomicUsize,
}

#[async_trait::async_trait]
impl LmHandler for Slow {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(100)).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
        self.batches.fetch_add(1, Ordering::SeqCst);
        Ok(LmCompletion {
            response: request.prompt.to_text().to_uppercase(),
            ..LmCompletion::default()
        })
    }
}

#[tokio::test]
async fn threads_and_pools_gather_lm_calls_into_a_batch() {
    let handler = Arc::new(Slow::default());
    let mut session =
        open(EnvironmentOptions { lm: Some(handler.clone()), ..EnvironmentOptions::default() });
    let cells = [
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool: print(list(pool.map(llm_query, 'abcdefgh')))",
        "def ask(x):\n    return llm_query('p' + x) + '!'\nwith ThreadPoolExecutor(8) as pool: print([f.result() for f in [pool.submit(ask, x) for x in 'abcdefgh']])",
        "import threading\nout = {}\ndef work(x): out[x] = llm_query(x)\nts = [threading.Thread(target=work, args=(x,)) for x in 'abcdefgh']\nfor t in ts: t.start()\nfor t in ts: t.join()\nprint([out[x] for x in 'abcdefgh'])",
        "print(llm_query_batched(list('abcdefgh')))",
        "import asyncio\nasync def m(): return await asyncio.gather(*[asyncio.to_thread(llm_query, x) for x in 'abcdefgh'])\nprint(asyncio.run(m()))",
    ];
    let plain = "['A', 'B', 'C', 'D', 'E', 'F', 'G', 'H']\n";
    let asked = "['PA!', 'PB!', 'PC!', 'PD!', 'PE!', 'PF!', 'PG!', 'PH!']\n";
    for (cell, expected) in cells.into_iter().zip([plain, asked, plain, plain, plain]) {
        handler.most.store(0, Ordering::SeqCst);
        let started = Instant::now();
        assert_eq!(print(&mut session, cell).await, expected, "{cell}");
        assert_eq!(handler.most.load(Ordering::SeqCst), 8, "{cell}");
        assert!(started.elapsed() < Duration::from_millis(400), "{cell}: {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn a_batch_is_bounded_and_in_order() {
    let handler = Arc::new(Slow::default());
    let mut session = open(EnvironmentOptions {
        lm: Some(handler.clone()),
        limits: kaa::Limits { lm_concurrency: 5, ..kaa::Limits::default() },
        ..EnvironmentOptions::default()
    });
    let code = "r = llm_query_batched([f'p{i}' for i in range(20)])\nprint(r == [f'P{i}' for i in range(20)])";
    assert_eq!(print(&mut session, code).await, "True\n");
    assert_eq!(handler.most.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn the_sci_image_has_numpy_and_pandas() {
    let image = common::image("sci");
    let options = EnvironmentOptions::default();
    let mut session = common::runtime().environment(&image, options).unwrap();
    let code = "import numpy as np, pandas as pd\nprint(int(np.arange(10).sum()), pd.DataFrame({'a': [1, 2]})['a'].sum())\nprint(np.random.rand() != 0)";
    assert_eq!(print(&mut session, code).await, "45 3\nTrue\n");
    assert_eq!(session.status(), kaa::Status::Ready);
}

/// Fails for one prompt.
struct Fussy;

#[async_trait::async_trait]
impl LmHandler for Fussy {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        if request.prompt.to_text() == "bad" {
            return Err(LmError::new("refused"));
        }
        ScriptedHandler::echo().complete(request).await
    }
}

#[tokio::test]
async fn answers_beside_a_failure_are_counted_in_every_profile() {
    for (profile, printed) in [
        (Profile::Rlm, "['a', 'Error: llm() call failed - refused', 'b']"),
        (Profile::OpenEnv, "llm() call failed - refused"),
    ] {
        let lm: Option<Arc<dyn LmHandler>> = Some(Arc::new(Fussy));
        let mut session = open(EnvironmentOptions { lm, profile, ..EnvironmentOptions::default() });
        let code =
            "try: r = llm_query_batched(['a', 'bad', 'b'])\nexcept Exception as e: r = e\nprint(r)";
        let cell = run(&mut session, code).await;
        assert_eq!(cell.stdout.text().trim(), printed);
        assert_eq!((cell.lm_calls.len(), session.lm_usage().calls()), (2, 2), "{profile:?}");
        let code = "try: r = llm_query_batched(['a'] * 1000, model='m' * 1_000_000)[999]\nexcept Exception as e: r = e\nprint(r)";
        let cell = run(&mut session, code).await;
        let refused = "the model's name has 1000000 bytes; it can have 1024";
        assert!(cell.stdout.text().trim().ends_with(refused), "{}", cell.stdout.text());
    }
}

#[tokio::test]
async fn a_final_answer_may_be_long_but_not_endless() {
    const MAX: usize = 64 << 20;
    for profile in [Profile::Rlm, Profile::OpenEnv] {
        let mut session = profiled(profile);
        for (content, bytes) in [
            ("'x' * 17_000_000", 17_000_000),
            ("'\\xe9' * 2000 + '\\ud800'", 4003),
            ("'x' * (65 << 20)", MAX),
            // Cut between characters of three bytes.
            ("'\\u20ac' * (22 << 20)", MAX - 1),
        ] {
            let code = format!("answer = {{'content': {content}, 'ready': True}}");
            let done = run(&mut session, &code).await;
            let answer = done.final_answer.unwrap();
            assert_eq!((done.outcome, answer.len()), (Outcome::Completed, bytes), "{content}");
            let is_cut = done.stderr.text().contains("only its first");
            assert_eq!(is_cut, bytes >= MAX - 1, "{content}: {}", done.stderr.text());
            let first = answer.chars().next().unwrap();
            assert!(answer.chars().rev().skip(1).all(|char| char == first));
        }
    }
}
