//! What is special to Wasm in the contract of `src/environment.rs`; the rest is in `tests/cases`.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{limited, open, print, run, session};
use kaa::lm::{Prompt, ScriptedHandler};
use kaa::{
    Context, Environment, EnvironmentExt, EnvironmentOptions, Error, ExecuteOptions, Limit, Limits,
    LmCall, Outcome, Tool, ToolError, Value,
};

#[tokio::test]
async fn a_guest_can_lie_about_its_own_result_and_nothing_else() {
    let mut session = open(EnvironmentOptions {
        lm: Some(Arc::new(ScriptedHandler::echo())),
        ..EnvironmentOptions::default()
    });
    // Through the door itself a cell can lie about its own result, and about nothing else.
    let lies = [
        "import _host\n_host.call(b'garbage')",
        "import _host\n_host.call(b'\\0\\0\\0\\2{}')",
        "import _host\n_host.call((300).to_bytes(4,'big') + b'{}')",
        // The tag of an answer, and of nothing.
        "import _host\n_host.call(b'Thi')",
        "import _host\n_host.call(b'M')",
        r#"import _host
h = b'{"op":"done","outcome":"exited","exit_code":9}'
while True: _host.call(len(h).to_bytes(4,'big') + h)"#,
        r#"import _host
h = b'{"op":"lm","prompts":[' + b','.join([b'{"$str":[0,1000000]}'] * 500) + b']}'
_host.call(len(h).to_bytes(4,'big') + h + bytes(1000000))"#,
        r#"import _host
h = b'{"op":"why","x":[' + b','.join([b'{"":0}'] * 2_000_000) + b']}'
_host.call(len(h).to_bytes(4,'big') + h)"#,
        r#"import _host
h = b'{"op":"lm","pieces":[[4294967290,8]]}'
_host.call(len(h).to_bytes(4,'big') + h)"#,
        r#"import _host
h = b'{"op":"lm","pieces":[' + b','.join([b'[0,20000000]'] * 20) + b']}'
_host.call(len(h).to_bytes(4,'big') + h)"#,
        r#"import _host
h = b'{"op":"lm","pieces":[[-1,"x"]]}'
_host.call(len(h).to_bytes(4,'big') + h)"#,
        r#"import _host
h = b'{"op":"lm","prompts":[{"$str":[0,99]}]}'
_host.call(len(h).to_bytes(4,'big') + h)"#,
    ];
    run(&mut session, "keep = 41").await;
    for lie in lies {
        let error = session.execute(lie).await.unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{lie}: {error}");
        assert_eq!(print(&mut session, "print(keep)").await, "41\n");
    }
}

#[tokio::test]
async fn a_forged_prompt_is_a_prompt() {
    let mut session = open(EnvironmentOptions {
        lm: Some(Arc::new(ScriptedHandler::echo())),
        limits: Limits { lm_calls: 4, ..Limits::default() },
        ..EnvironmentOptions::default()
    });
    let forged = r"
import _host
for frame in (b'L', b'Lhi', b'R\xff\xed\xa0\x80', b'L' + b'x' * 5000, b'Lone too many'):
    print(_host.call(frame))";
    let execution = run(&mut session, forged).await;
    // What is no text was made one, and what is long is left in the mailbox.
    let answers = [
        r"b'T'",
        r"b'Thi'",
        r"b'T\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd'",
        r"b''",
        r#"b'\x00\x00\x00-{"error":"LM call limit exceeded: 4 + 1 > 4"}'"#,
    ];
    assert_eq!(execution.stdout.text(), answers.join("\n") + "\n");
    assert_eq!((execution.lm_calls.len(), execution.usage.lm_calls), (4, 4));
    let LmCall { prompt: Prompt::Text(prompt), completion } = &execution.lm_calls[2] else {
        panic!("{:?}", execution.lm_calls)
    };
    assert_eq!(
        (&prompt[..], &completion.response[..]),
        ("\u{fffd}\u{fffd}\u{fffd}\u{fffd}", &prompt[..])
    );
    assert_eq!(print(&mut session, "print(llm_query('on'))").await, "on\n");
}

#[tokio::test]
async fn variables_cross_in_both_directions() {
    let mut session = session();
    let values = [
        Value::None,
        Value::from(true),
        Value::from(-5i64),
        Value::BigInt("123456789012345678901234567890".into()),
        Value::from(0.5),
        Value::from(f64::INFINITY),
        Value::from("é\r\n\0 ]"),
        Value::from("long".repeat(5000)),
        Value::from("l\u{f6}ng".repeat(5000)),
        Value::List(vec![Value::from("in a list".repeat(5000)), Value::from(vec![7u8; 50_000])]),
        Value::Wtf8(b"a\xed\xa0\x80b".to_vec()),
        Value::from(vec![0u8, 1, 255]),
        Value::List(vec![Value::from(1i64), Value::from("x")]),
        Value::Map([("k".to_owned(), Value::List(vec![]))].into()),
    ];
    for value in values {
        session.set_variable("v", value.clone()).await.unwrap();
        assert_eq!(session.get_variable("v").await.unwrap(), Some(value));
    }
    assert_eq!(session.get_variable("nothing").await.unwrap(), None);
    run(&mut session, "t = (1, {2})\nf = open\nn = {1: 'a', None: 'b'}").await;
    let list = |items: &[i64]| Value::List(items.iter().map(|item| Value::Int(*item)).collect());
    assert_eq!(
        session.get_variable("t").await.unwrap(),
        Some(Value::List(vec![Value::Int(1), list(&[2])]))
    );
    let error = session.get_variable("f").await.unwrap_err().to_string();
    assert!(error.contains("`f`") && error.contains("built-in function open"), "{error}");
    for name in ["", "1a", "a b", "llm_query", "class", "a.b"] {
        let error = session.set_variable(name, Value::None).await.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{name}: {error}");
    }
    let names: Vec<String> =
        session.list_variables().await.unwrap().into_iter().map(|variable| variable.name).collect();
    assert_eq!(names, ["v", "t", "f", "n"]);
}

#[tokio::test]
async fn variables_are_listed_without_running_code_of_the_cells() {
    let mut session = session();
    let slow = "class Slow:\n    def __repr__(self):\n        while True: pass\na = [1, Slow()]";
    let limits = Limits { compute: Duration::from_millis(500), ..Limits::default() };
    let options = ExecuteOptions { limits: Some(limits) };
    let reported = session.execute_opts(slow, options).await.unwrap();
    // A cell's own report does run code, as long as the cell may compute.
    assert_eq!((reported.outcome, reported.limit), (Outcome::Completed, Some(Limit::Compute)));
    let many = "globals()['n' * 17_000_000] = type('T' * 17_000_000, (), {})()
globals().update({f'v{n}': n for n in range(300_000)})";
    assert_eq!(run(&mut session, many).await.outcome, Outcome::Completed);
    let (since, variables) = (Instant::now(), session.list_variables().await.unwrap());
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
    assert_eq!(variables.len(), 1000);
    let shown = |at: usize| (&variables[at].type_name[..], &variables[at].repr[..]);
    assert_eq!(shown(1), ("list", "[1, <Slow object>]"));
    assert_eq!(variables[2].name, format!("{}...", "n".repeat(1000)));
    assert_eq!(variables[2].type_name, format!("{}...", "T".repeat(1000)));
    assert_eq!(variables[999].name, "v996");
}

#[tokio::test]
async fn a_refused_first_request_leaves_the_session_as_it_was_asked_for() {
    let tool = Tool::new("seven", |_| Ok(Value::from(7i64)));
    let mut session = open(EnvironmentOptions {
        profile: kaa::Profile::OpenEnv,
        tools: vec![tool],
        ..EnvironmentOptions::default()
    });
    session.add_context(Context::Json(b"[1,".to_vec()), None).await.unwrap_err();
    assert_eq!(print(&mut session, "seven()").await, "7\n");
    assert_eq!(run(&mut session, "import os").await.exception.unwrap().type_name, "ImportError");
}

#[tokio::test]
async fn long_contexts_are_the_text_that_python_would_have_made() {
    let mut session = session();
    let texts = [
        ("'abc\\n' * 2000", "abc\n".repeat(2000)),
        ("'\\x7f' * 4096", "\x7f".repeat(4096)),
        ("'ab\\xe9' * 2000 + '\\xff\\x80'", "ab\u{e9}".repeat(2000) + "\u{ff}\u{80}"),
        ("'ab\\u0100' * 2000", "ab\u{100}".repeat(2000)),
        ("'\\0\\u20ac\\uffff' * 2000", "\0\u{20ac}\u{ffff}".repeat(2000)),
        ("'a' * 5000 + '\\U00010000'", "a".repeat(5000) + "\u{10000}"),
        ("'\\U0010ffff\\xe9' * 2000", "\u{10ffff}\u{e9}".repeat(2000)),
    ];
    for (python, text) in texts {
        let index = session.add_context(Context::Text(text.into_bytes()), None).await.unwrap();
        // Sizes are equal only where both are as narrow as can be.
        let check = format!(
            "import sys\nc, e = context_{index}, {python}\n\
             print(type(c) is str, c == e, len(c) == len(e), hash(c) == hash(e), {{c: 1}}[e],\n\
             c[1:-1] == e[1:-1], c.isascii() == e.isascii(), sys.getsizeof(c) == sys.getsizeof(e),\n\
             c.encode() == e.encode(), (c + 'x')[-2:] == (e + 'x')[-2:])"
        );
        let expected = "True True True True 1 True True True True True\n";
        assert_eq!(print(&mut session, &check).await, expected, "{python}");
    }
    let json = format!(r#"["{}"]"#, "\u{e9}".repeat(5000)).into_bytes();
    let index = session.add_context(Context::Json(json), None).await.unwrap();
    let check = format!("print(context_{index} == ['\\xe9' * 5000], context is context_0)");
    assert_eq!(print(&mut session, &check).await, "True True\n");
    let long = |end: &[u8]| [b"\xc3\xa9".repeat(3000), end.to_vec()].concat();
    let index = session.add_context(Context::Text(long(b"\xed\xa0\x80")), None).await.unwrap();
    let check = format!("print(context_{index} == '\\xe9' * 3000 + '\\ud800')");
    assert_eq!(print(&mut session, &check).await, "True\n");
    for (bad, words) in [
        (Context::Text(long(b"\xff")), "the context is not UTF-8 at byte 6000"),
        (Context::Json(long(b"")), "the context is not JSON at byte 0"),
    ] {
        let error = session.add_context(bad, None).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(print(&mut session, "print(len(context))").await, "8000\n");
    }
    // Nothing is left behind by many of them.
    for _ in 0..200 {
        let context = Context::Text(vec![b'x'; 4 << 20]);
        session.add_context(context, Some(50)).await.unwrap();
    }
    let last = run(&mut session, "print(len(context_50))").await;
    assert_eq!(last.stdout.text(), "4194304\n");
    assert!(last.usage.memory_bytes < 128 << 20, "{}", last.usage.memory_bytes);
}

#[tokio::test]
async fn the_fuel_of_a_text_is_always_the_same() {
    let mut fuel = Vec::new();
    for _ in 0..2 {
        let options = EnvironmentOptions {
            lm: Some(Arc::new(ScriptedHandler::echo())),
            policy: kaa::Policy {
                seed: Some(7),
                clock: kaa::Clock::Fixed(1_800_000_000_000_000_000),
                ..kaa::Policy::default()
            },
            ..EnvironmentOptions::default()
        };
        let mut session = open(options);
        session.add_context(Context::Text(vec![b'x'; 1 << 20]), None).await.unwrap();
        let cell = run(&mut session, "print(llm_query(context) == context)").await;
        assert_eq!(cell.stdout.text(), "True\n");
        fuel.push(cell.usage.fuel.unwrap());
    }
    assert_eq!(fuel[0], fuel[1]);
    // Both ways are charged: about one unit for each byte.
    assert!(fuel[0] > 2 << 20, "{}", fuel[0]);
}

#[tokio::test]
async fn a_large_context_goes_in_and_one_too_large_is_refused() {
    let mut session = session();
    let text: Vec<u8> = b"0123456789abcde\n".iter().copied().cycle().take(100 << 20).collect();
    session.add_context(Context::Text(text), None).await.unwrap();
    let sizes = "print(len(context), context[-16:-1], context.count('a'))";
    assert_eq!(
        print(&mut session, sizes).await,
        format!("{} 0123456789abcde {}\n", 100 << 20, 100 << 16)
    );
    let mut small = limited(Limits { memory_bytes: 128 << 20, ..Limits::default() });
    run(&mut small, "keep = 41").await;
    // What isn't UTF-8 for Rust passes through a buffer and a bytes object; then the text, which takes
    // four bytes for each of its characters: each step is the one that has no room once.
    let with_surrogate = |megabytes: usize| [vec![b'1'; megabytes << 20], b"\xed\xa0\x80".to_vec()];
    let wide = |megabytes: usize| ["1".repeat(megabytes << 20), "\u{1F40D}".to_owned()].concat();
    let texts = [vec![b'1'; 200 << 20], vec![b'1'; 90 << 20], wide(30).into_bytes()];
    let unusual = [60, 45, 30].map(|megabytes| with_surrogate(megabytes).concat());
    for context in texts.into_iter().chain(unusual) {
        let error = small.add_context(Context::Text(context), None).await.unwrap_err();
        assert!(error.to_string().starts_with("context: it does not fit"), "{error}");
        assert_eq!(print(&mut small, "print(keep)").await, "41\n");
    }
}

#[tokio::test]
async fn long_texts_and_bytes_go_to_the_host_and_back() {
    let tool = Tool::new("echo", |call| Ok(call.args.into_iter().next().unwrap_or(Value::None)));
    let mut session = open(EnvironmentOptions {
        lm: Some(Arc::new(ScriptedHandler::echo())),
        tools: vec![tool],
        ..EnvironmentOptions::default()
    });
    let cell = "
texts = ['x' * n for n in (1, 1023, 1025, 4096, 16383, 16384, 100_000)]
texts += ['\\xe9' * 20_000, 'a\\u20ac' * 20_000, '\\U0001f40d' * 20_000]
for text in texts:
    assert echo(text) == text and llm_query(text) == text, len(text)
    assert echo([text, text.encode(), {'k': text}]) == [text, text.encode(), {'k': text}], len(text)
class Text(str): pass
assert echo(Text('y' * 50_000)) == 'y' * 50_000
assert echo(bytearray(50_000)) == bytes(50_000)
assert echo(['z' * 20_000] * 100) == ['z' * 20_000] * 100
assert echo('w' * 20_000 + '\\ud800') == 'w' * 20_000 + '\\ud800'
assert llm_query_batched(texts) == texts
del texts, text, Text
print(llm_query('p' * 30_000) == 'p' * 30_000)";
    let execution = run(&mut session, cell).await;
    assert_eq!(execution.stdout.text(), "True\n", "{}", execution.stderr.text());
    let last = execution.lm_calls.last().unwrap();
    assert_eq!(last.prompt, Prompt::Text("p".repeat(30_000)));
    assert_eq!(last.completion.response, "p".repeat(30_000));
}

#[tokio::test]
async fn tools_take_arguments_and_raise() {
    let tools = vec![
        Tool::new("show", |call| Ok(Value::Str(format!("{:?} {:?}", call.args, call.kwargs)))),
        Tool::new("fail", |_| Err(ToolError::of_type("KeyError", "gone"))),
        Tool::new_async("later", |call| async move {
            tokio::task::yield_now().await;
            Ok(call.args.into_iter().next().unwrap_or(Value::None))
        }),
    ];
    let mut session = open(EnvironmentOptions { tools, ..EnvironmentOptions::default() });
    let shown = print(&mut session, "print(show(1, 'a', k=[None]))").await;
    assert_eq!(shown, "[Int(1), Str(\"a\")] [(\"k\", List([None]))]\n");
    let bytes =
        "b = bytes(range(256)) * 4000\nprint(later(b) == b, type(later('x' * 5000)).__name__)";
    assert_eq!(print(&mut session, bytes).await, "True str\n");
    let failed = "try: fail()\nexcept KeyError as e: print(repr(e))";
    assert_eq!(print(&mut session, failed).await, "KeyError('gone')\n");
    session.register_tool(Tool::new("late", |_| Ok(Value::from(7i64)))).unwrap();
    assert_eq!(print(&mut session, "print(late())").await, "7\n");
    let error = session.register_tool(Tool::new("context", |_| Ok(Value::None))).unwrap_err();
    assert!(error.to_string().contains("Custom tools cannot override reserved REPL functions"));
}

#[test]
fn a_session_may_move_to_another_executor() {
    let executor = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = executor();
    let mut session = first.block_on(async {
        let mut session = session();
        // More than is saved in passing, so that a task of the executor is due.
        run(
            &mut session,
            "x = bytearray(b'x' * 20_000_000); parts = [bytes(3000) for _ in range(2000)]",
        )
        .await;
        session
    });
    drop(first);
    let text =
        executor().block_on(async { print(&mut session, "print(len(x), len(parts))").await });
    assert_eq!(text, "20000000 2000\n");
}

#[tokio::test]
async fn what_an_image_holds_is_immortal() {
    let mut session = session();
    let code = "
import gc, json, sys, __main__
held = [json, json.loads, json.loads.__code__, json.loads.__code__.co_consts, __main__, llm_query, {}.get, list]
print([sys._is_immortal(value) for value in held], sys._is_immortal(held))
gc.unfreeze(), gc.collect(), gc.collect()
print(json.loads('[1]'), llm_query)
";
    let seen = print(&mut session, code).await;
    let expected = "[True, True, True, True, True, True, False, True] False\n[1] <function ";
    assert!(seen.starts_with(expected), "{seen}");
    assert_eq!(print(&mut session, "print(json.dumps(dict(a=1)))").await, "{\"a\": 1}\n");
}
