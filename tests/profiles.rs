//! What cells see in each profile, and the parts of Python that a Wasm guest needs help with.

mod common;

use std::sync::Arc;

use common::{open, print, profiled, run};
use kaa::lm::{LmCompletion, LmError, LmHandler, LmRequest, ScriptedHandler};
use kaa::{Environment, EnvironmentOptions, Outcome, Profile};

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
