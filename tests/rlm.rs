//! The RLM loop: what is said, how it ends, what it may spend, and its children.

mod common;

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kaa::lm::{
    BudgetLimits, LmCompletion, LmError, LmHandler, LmKind, LmRequest, ModelUsage, Prompt,
};
use kaa::{
    Backend, Compaction, Context, Dialect, Ending, EnvironmentOptions, Quotas, Rlm, RlmCompletion,
    RlmError, RlmEvent, RlmObserver, RlmOptions, RlmProgress, RlmStop, RlmTool, Tool, Value,
    WasmBackend,
};
use serde_json::Value as Json;

type Answer = dyn Fn(&LmRequest, usize) -> Result<String, LmError> + Send + Sync;

/// A model in a function, which sees the request and its number; it writes down what it was asked.
struct Model {
    answer: Box<Answer>,
    /// Of calls that aren't the root's own.
    latency: Duration,
    asked: Mutex<Vec<LmRequest>>,
    in_flight: AtomicUsize,
    most: AtomicUsize,
}

struct InFlight<'a>(&'a AtomicUsize);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait::async_trait]
impl LmHandler for Model {
    async fn complete(&self, request: &LmRequest) -> Result<LmCompletion, LmError> {
        let number = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(request.clone());
            asked.len() - 1
        };
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        let _in_flight = InFlight(&self.in_flight);
        self.most.fetch_max(now, Ordering::SeqCst);
        if request.depth > 0 && !self.latency.is_zero() {
            tokio::time::sleep(self.latency).await;
        }
        let response = (self.answer)(request, number)?;
        let model = request.model.clone().unwrap_or_else(|| format!("depth {}", request.depth));
        let usage = vec![ModelUsage {
            model: model.clone(),
            calls: 1,
            input_tokens: 10,
            output_tokens: 1,
            cost: Some(0.01),
        }];
        Ok(LmCompletion { model, response, usage, ..LmCompletion::default() })
    }
}

fn model(
    answer: impl Fn(&LmRequest, usize) -> Result<String, LmError> + Send + Sync + 'static,
) -> Arc<Model> {
    slow_model(Duration::ZERO, answer)
}

fn slow_model(
    latency: Duration,
    answer: impl Fn(&LmRequest, usize) -> Result<String, LmError> + Send + Sync + 'static,
) -> Arc<Model> {
    Arc::new(Model {
        answer: Box::new(answer),
        latency,
        asked: Mutex::default(),
        in_flight: AtomicUsize::new(0),
        most: AtomicUsize::new(0),
    })
}

/// A model that says these things one after the other.
fn lines(lines: &[&str]) -> Arc<Model> {
    let lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    model(move |_, number| {
        lines.get(number).cloned().ok_or_else(|| LmError::new("the script is over"))
    })
}

impl Model {
    /// The messages of the call of this number.
    fn messages(&self, number: usize) -> Vec<Json> {
        match &self.asked.lock().unwrap()[number].prompt {
            Prompt::Messages(messages) => messages.as_array().unwrap().clone(),
            Prompt::Text(text) => panic!("a plain prompt: {text}"),
        }
    }

    /// The text of the last message of the call of this number.
    fn last_message(&self, number: usize) -> String {
        self.messages(number).last().unwrap()["content"].as_str().unwrap().to_owned()
    }

    fn calls(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn repl(code: &str) -> String {
    format!("```repl\n{code}\n```")
}

fn submit(expression: &str) -> String {
    repl(&format!("answer['content'] = {expression}\nanswer['ready'] = True"))
}

fn backend() -> Arc<dyn Backend> {
    Arc::new(WasmBackend::new(Arc::clone(common::runtime()), common::image("base")))
}

fn rlm(model: &Arc<Model>, options: RlmOptions) -> Rlm {
    Rlm::new(backend(), Arc::clone(model) as _, options).unwrap()
}

fn text(text: &str) -> Context {
    Context::Text(text.as_bytes().to_vec())
}

async fn complete(model: &Arc<Model>, options: RlmOptions) -> Result<RlmCompletion, RlmError> {
    rlm(model, options).complete(text("some context"), Some("what?")).await
}

#[tokio::test]
async fn a_run_is_a_chat_in_the_form_of_rlm() {
    let model = lines(&[
        "I look.\n```repl\nn = len(context)\nprint(n)\n```\n```repl\n1/0\n```\n```python\nnot run\n```",
        &submit("n * 2"),
    ]);
    let done = complete(&model, RlmOptions::default()).await.unwrap();
    assert_eq!((done.response.as_str(), done.ending), ("24", Ending::Answered));
    assert_eq!((done.turns, done.cells, done.root_model.as_str()), (2, 3, "unknown"));
    let messages = model.messages(1);
    let roles: Vec<_> = messages.iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "user", "assistant", "user", "user"]);
    let content = |at: usize| messages[at]["content"].as_str().unwrap();
    assert_eq!(
        content(1),
        "Answer the following: what?\n\nYour context is a str of 12 total characters. Each sub-LLM \
         call can handle roughly ~100k tokens at once."
    );
    assert!(content(2).ends_with("\n\nTurn 1/30:"), "{}", content(2));
    let output = content(4);
    let first = "REPL output (block 1):\n\n12\n\n\nREPL variables: ['answer', 'context_0', 'context', 'n']\n\n\n";
    let second = output.strip_prefix(first).unwrap_or_else(|| panic!("{output:?}"));
    assert!(second.starts_with("REPL output (block 2):\n\nTraceback"), "{second:?}");
    assert!(second.contains("ZeroDivisionError: division by zero"), "{second:?}");
    assert_eq!(content(5), "Turn 2/30:");
    assert!(model.asked.lock().unwrap().iter().all(|request| request.depth == 0));
    assert_eq!(done.usage.calls(), 2);
}

#[tokio::test]
async fn answers_are_found_in_every_dialect() {
    use Dialect::{Answer, Both, Final};
    let set = repl("x = 'held'");
    let cases: &[(Dialect, &[&str], &str)] = &[
        (Both, &[&submit("7")], "7"),
        (Both, &["FINAL(in the text)"], "in the text"),
        (Both, &[&set, "FINAL_VAR(x)"], "held"),
        // The block of the same turn has run by then.
        (Both, &[&format!("{set}\nFINAL_VAR(x)")], "held"),
        // A name that isn't there gives no answer, and the run goes on.
        (Both, &["FINAL_VAR(nothing)", "FINAL(later)"], "later"),
        // What is in a fence is code.
        (Both, &["```\nFINAL(an example)\n```", "FINAL(later)"], "later"),
        (Answer, &["FINAL(no)", &submit("'yes'")], "yes"),
        (Final, &[&submit("'no'"), "FINAL(yes)"], "yes"),
        (Final, &["```repl\nx = 1\n```\n FINAL( f(1) )"], "f(1)"),
        // All blocks run; the first answer counts.
        (Both, &[&format!("{}\n{}", submit("'first'"), submit("'second'"))], "first"),
        (Both, &[&repl("answer.update(content='', ready=True)")], ""),
    ];
    for (dialect, said, expected) in cases {
        let options = RlmOptions { dialect: *dialect, ..RlmOptions::default() };
        let done =
            complete(&lines(said), options).await.unwrap_or_else(|e| panic!("{said:?}: {e}"));
        assert_eq!(done.response, *expected, "{dialect:?} {said:?}");
    }
}

#[tokio::test]
async fn long_output_is_cut_and_the_variables_with_it() {
    let model = lines(&[&repl("print('x' * 30_000)"), &submit("1")]);
    complete(&model, RlmOptions::default()).await.unwrap();
    let messages = model.messages(1);
    let output = messages[4]["content"].as_str().unwrap();
    let cut = output.strip_prefix("REPL output:\n\n").unwrap();
    assert!(cut.starts_with(&"x".repeat(19_999)) && !cut.contains("variables"), "{output}");
    assert!(cut.ends_with(" chars...]"), "{}", &cut[cut.len() - 40..]);
}

#[tokio::test]
async fn after_the_last_turn_the_model_is_asked_once_more() {
    let model = lines(&["thinking", "still thinking", "it is 5"]);
    let options = RlmOptions { max_iterations: 2, ..RlmOptions::default() };
    let done = complete(&model, options).await.unwrap();
    assert_eq!((done.response.as_str(), done.ending), ("it is 5", Ending::OutOfTurns));
    assert!(model.last_message(2).starts_with("Please provide a final answer"));
}

#[tokio::test]
async fn limits_end_a_run_and_say_which() {
    let spin = repl("print('before')\nwhile True: pass");
    let ask = repl("for i in range(1000): llm_query('x')");
    let second = Duration::from_secs(1);
    let budget = |budget: BudgetLimits| RlmOptions { budget, ..RlmOptions::default() };
    let limits = BudgetLimits::default;
    let cases = [
        // A running cell is interrupted.
        (
            &spin,
            budget(BudgetLimits { wall: second, ..limits() }),
            "timeout",
            "Timeout exceeded: 1.",
        ),
        (
            &ask,
            budget(BudgetLimits { cost: 0.055, ..limits() }),
            "budget",
            "Budget exceeded: spent $0.060000 of $0.055000 budget",
        ),
        (
            &ask,
            budget(BudgetLimits { tokens: 30, ..limits() }),
            "tokens",
            "Token limit exceeded: 33 of 30 tokens",
        ),
        (
            &ask,
            budget(BudgetLimits { calls: 5, ..limits() }),
            "calls",
            "LM call limit exceeded: 5 + 1 > 5",
        ),
        (
            &repl("1/0"),
            RlmOptions { max_errors: 3, ..RlmOptions::default() },
            "errors",
            "Error threshold exceeded: 3 consecutive errors (limit: 3)",
        ),
    ];
    for (said, options, name, message) in cases {
        let said = said.clone();
        let model = model(move |request, _| match request.depth {
            0 => Ok(said.clone()),
            _ => Ok("y".into()),
        });
        let error = complete(&model, options).await.expect_err(name);
        assert_eq!(error.reason.name(), name);
        assert!(error.to_string().starts_with(message), "{error}");
        assert!(error.reason.is_limit() && error.partial_answer.is_some(), "{name}");
        assert_eq!(error.usage.calls() as usize, model.calls(), "{name}");
        assert_eq!(model.in_flight.load(Ordering::SeqCst), 0, "{name}");
    }
}

#[tokio::test]
async fn an_answer_counts_also_when_its_cell_spent_the_budget() {
    let code =
        "for i in range(3): llm_query('x')\nanswer['content'] = 'found'\nanswer['ready'] = True";
    let model = model(move |request, _| match request.depth {
        0 => Ok(repl(code)),
        _ => Ok("y".into()),
    });
    let budget = BudgetLimits { calls: 3, ..BudgetLimits::default() };
    let done = complete(&model, RlmOptions { budget, ..RlmOptions::default() }).await.unwrap();
    assert_eq!(done.response, "found");
}

#[tokio::test]
async fn a_model_that_cannot_be_asked_ends_the_run() {
    let error = complete(&lines(&["hm"]), RlmOptions::default()).await.unwrap_err();
    assert!(matches!(&error.reason, RlmStop::Lm(e) if e.message == "the script is over"));
    assert_eq!((error.partial_answer.as_deref(), error.reason.is_limit()), (Some("hm"), false));
}

#[tokio::test]
async fn a_run_can_be_cancelled_in_a_cell_and_in_a_call() {
    let stubborn = "while True:\n try:\n  while True: pass\n except BaseException: pass";
    for code in ["while True: pass", stubborn, "llm_query_batched(['x'] * 100)"] {
        let said = repl(code);
        let model = slow_model(Duration::from_secs(3600), move |_, _| Ok(said.clone()));
        let rlm = rlm(&model, RlmOptions::default());
        let canceller = rlm.clone();
        let run = tokio::spawn(async move { rlm.complete(text("x"), None).await });
        while model.calls() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        canceller.cancel();
        let error = run.await.unwrap().unwrap_err();
        assert!(matches!(error.reason, RlmStop::Cancelled), "{error}");
        assert!(error.partial_answer.is_some());
        assert_eq!(model.in_flight.load(Ordering::SeqCst), 0);
    }
}

#[tokio::test]
async fn a_dropped_run_leaves_nothing_behind() {
    let runtime = common::runtime();
    let tenant = runtime.tenant("dropped run", Quotas::default()).unwrap();
    let said = repl("llm_query_batched(['x'] * 100)");
    let model = slow_model(Duration::from_secs(3600), move |_, _| Ok(said.clone()));
    let environment =
        EnvironmentOptions { tenant: Some(tenant.clone()), ..EnvironmentOptions::default() };
    let rlm = rlm(&model, RlmOptions { environment, ..RlmOptions::default() });
    let run = rlm.complete(text("x"), None);
    assert!(tokio::time::timeout(Duration::from_millis(500), run).await.is_err());
    assert!(model.most.load(Ordering::SeqCst) > 1, "it was dropped before it called");
    assert_eq!(model.in_flight.load(Ordering::SeqCst), 0);
    let usage = tenant.usage();
    assert_eq!((usage.sessions, usage.cells_running, usage.cells_waiting), (0, 0, 0));
}

#[tokio::test]
async fn usage_is_counted_per_model_session_and_tenant() {
    let runtime = common::runtime();
    let tenant = runtime.tenant("counted run", Quotas::default()).unwrap();
    let environment =
        EnvironmentOptions { tenant: Some(tenant.clone()), ..EnvironmentOptions::default() };
    let model = model(|request, number| match (request.depth, number) {
        (0, 0) => Ok(repl("llm_query('a', model='small')\nllm_query_batched(['b', 'c'])")),
        (0, _) => Ok(submit("'done'")),
        _ => Ok("y".into()),
    });
    let options = RlmOptions { environment, model: Some("big".into()), ..RlmOptions::default() };
    let mut session = rlm(&model, options).session().await.unwrap();
    let done = session.complete(text("x"), None).await.unwrap();
    let counts = |usage: &kaa::lm::UsageSummary| -> Vec<(String, u64)> {
        usage.models().map(|usage| (usage.model.clone(), usage.calls)).collect()
    };
    let all = [("big".to_owned(), 2), ("depth 1".to_owned(), 2), ("small".to_owned(), 1)];
    assert_eq!(counts(&done.usage), all);
    assert_eq!(counts(&tenant.usage().lm_usage), all);
    assert_eq!(counts(&session.environment().lm_usage()), all[1..]);
    assert_eq!(done.root_model, "big");
    session.close().await.unwrap();
}

#[tokio::test]
async fn a_conversation_keeps_its_session() {
    let model = lines(&[
        &format!("{}\n{}", repl("kept = context"), submit("kept")),
        &submit("kept + context_1 + str(len(history)) + str(answer['ready'])"),
    ]);
    let mut session = rlm(&model, RlmOptions::default()).session().await.unwrap();
    assert_eq!(session.complete(text("one"), None).await.unwrap().response, "one");
    let second = session.complete(text("two"), Some("and now?")).await.unwrap();
    assert_eq!(second.response, "onetwo4False");
    let note = model.last_message(1);
    assert!(note.contains("Note: You have 2 contexts available (context_0 through context_1)."));
    assert!(note.ends_with("1 prior conversation history available in the `history` variable."));
    let code = "print([message['role'] for message in history_1])";
    let cell = session.environment().execute_opts(code, Default::default()).await.unwrap();
    let printed = cell.stdout.text().into_owned();
    assert_eq!(printed, "['system', 'user', 'user', 'assistant']\n");
    session.close().await.unwrap();
}

#[tokio::test]
async fn a_long_conversation_is_replaced_by_a_summary() {
    let model = lines(&[
        &repl(&format!("x = 5\nprint('y' * {})", 14_000)),
        "I have x = 5.",
        &repl("print(len(history), history[-1]['type'], x)"),
        &submit("x"),
    ]);
    let compaction = Compaction { context_tokens: 4_000, threshold: 0.75 };
    let options = RlmOptions { compaction: Some(compaction), ..RlmOptions::default() };
    let done = complete(&model, options).await.unwrap();
    assert_eq!(done.response, "5");
    assert!(model.last_message(1).contains("replaced by a summary"));
    let after = model.messages(2);
    assert_eq!(after.len(), 5, "system, metadata, summary, go on, turn");
    assert_eq!(after[2]["content"], "I have x = 5.");
    assert!(after[3]["content"].as_str().unwrap().contains("compacted 1 time(s)"));
    assert!(model.messages(3)[6]["content"].as_str().unwrap().contains("2 summary 5"));
}

#[tokio::test]
async fn tools_are_functions_code_and_data() {
    let add = Tool::new("add", |call| match &call.args[..] {
        [Value::Int(a), Value::Int(b)] => Ok(Value::Int(a + b)),
        _ => Err(kaa::ToolError::new("two integers")),
    });
    let tools = vec![
        RlmTool::host(add).described("adds two integers"),
        RlmTool::code("double", "def double(x):\n    return add(x, x)"),
        RlmTool::value("limit", 100),
    ];
    let model = lines(&[&submit("double(limit) + add(1, 2)")]);
    let done = complete(&model, RlmOptions { tools, ..RlmOptions::default() }).await.unwrap();
    assert_eq!(done.response, "203");
    let system = model.messages(0)[0]["content"].as_str().unwrap().to_owned();
    for line in [
        "- `add`: adds two integers",
        "- `double`: A custom function",
        "- `limit`: A custom int value",
    ] {
        assert!(system.contains(line), "{line}");
    }
}

#[tokio::test]
async fn wrong_options_are_refused_before_anything_runs() {
    let tools = |tools: Vec<RlmTool>| RlmOptions { tools, ..RlmOptions::default() };
    let cases = [
        (
            RlmOptions { max_iterations: 0, ..RlmOptions::default() },
            "max_iterations: must be at least 1",
        ),
        (RlmOptions { max_depth: 0, ..RlmOptions::default() }, "max_depth: must be at least 1"),
        (
            tools(vec![RlmTool::value("context", 1), RlmTool::code("answer", "answer = 1")]),
            "tools: Custom tools cannot override reserved REPL functions: ['answer', 'context']. \
             Reserved names: ['FINAL', ",
        ),
        (tools(vec![RlmTool::value("a b", 1)]), "tool name `a b`: it must be a Python identifier"),
        (
            tools(vec![RlmTool::value("a", 1), RlmTool::value("a", 2)]),
            "tools: there are two named `a`",
        ),
    ];
    for (options, message) in cases {
        let error = Rlm::new(backend(), lines(&[]), options).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
    for (code, message) in [
        ("def other(): pass", "the code of tool `f`: Traceback"),
        ("1/0", "the code of tool `f`: Traceback"),
    ] {
        let error = complete(&lines(&[]), tools(vec![RlmTool::code("f", code)])).await.unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
    }
}

/// A model whose root delegates to children and whose children answer about their own context.
fn delegating(root: &'static str) -> Arc<Model> {
    model(move |request, _| {
        if request.kind != LmKind::Llm {
            return Err(LmError::new("a recursive call came through"));
        }
        match (&request.prompt, request.depth) {
            (Prompt::Messages(_), 0) => Ok(repl(root)),
            (Prompt::Messages(_), _) if request.model.as_deref() == Some("broken") => {
                Err(LmError::new("no such model"))
            }
            (Prompt::Messages(_), _) => Ok(submit("f'child of {context}: ' + llm_query('leaf')")),
            (Prompt::Text(text), depth) => Ok(format!("{text} at {depth}")),
        }
    })
}

const ASK_CHILDREN: &str = "r = rlm_query_batched(['a', 'b', 'c'])
r.append(rlm_query('d', model='broken'))
r.append(rlm_query([{'role': 'user', 'content': 'e'}]))
answer['content'] = '\\n'.join(r)
answer['ready'] = True";

#[tokio::test]
async fn recursive_calls_are_answered_by_children_with_sessions() {
    let model = delegating(ASK_CHILDREN);
    let options = RlmOptions { max_depth: 2, record: true, ..RlmOptions::default() };
    let done = complete(&model, options).await.unwrap();
    assert_eq!(
        done.response,
        "child of a: leaf at 2\nchild of b: leaf at 2\nchild of c: leaf at 2\n\
         Error: Child RLM completion failed - no such model\n\
         child of [{'content': 'e', 'role': 'user'}]: leaf at 2"
    );
    // The root, five children of which one failed, and their four leaves; all are in the sum.
    assert_eq!((model.calls(), done.usage.calls()), (10, 9));
    let calls = done.metadata.unwrap()["iterations"][0]["code_blocks"][0]["result"]["rlm_calls"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(calls.len(), 4, "failures are not recorded");
    assert_eq!(calls[1]["response"], "child of b: leaf at 2");
    let child = &calls[1]["metadata"]["iterations"][0];
    assert_eq!(child["final_answer"], "child of b: leaf at 2");
    assert_eq!(calls[1]["usage_summary"]["model_usage_summaries"]["depth 2"]["total_calls"], 1);
}

#[tokio::test]
async fn children_run_within_the_cell_of_their_tenant_that_asked_for_them() {
    let model = delegating(ASK_CHILDREN);
    let quotas = Quotas { cells: 1, queue: 0, ..Quotas::default() };
    let tenant = common::runtime().tenant("one cell at a time", quotas).unwrap();
    let environment =
        EnvironmentOptions { tenant: Some(tenant.clone()), ..EnvironmentOptions::default() };
    let options = RlmOptions { max_depth: 2, environment, ..RlmOptions::default() };
    let done = complete(&model, options).await.unwrap();
    assert!(done.response.starts_with("child of a: leaf at 2\nchild of b"), "{}", done.response);
    let usage = tenant.usage();
    assert_eq!((usage.refused.queue, usage.cells_running, usage.sessions), (0, 0, 0));
}

#[tokio::test]
async fn at_the_deepest_level_a_recursive_call_is_a_plain_one() {
    let code =
        "answer['content'] = rlm_query('p') + '|' + '|'.join(rlm_query_batched(['q', 'bad']))
answer['ready'] = True";
    for (max_depth, expected) in [
        (1, "p!|q!|Error: llm() call failed - no"),
        (2, "child: p!|q!|Error: LM query failed at max depth - no"),
    ] {
        let model = model(move |request, _| match (&request.prompt, request.depth) {
            (Prompt::Text(text), _) if text == "bad" => Err(LmError::new("no")),
            (Prompt::Text(text), _) => Ok(format!("{text}!")),
            (Prompt::Messages(_), 0) if max_depth == 2 => {
                Ok(submit("'child: ' + rlm_query('task')"))
            }
            (Prompt::Messages(_), _) => Ok(repl(code)),
        });
        let options = RlmOptions { max_depth, ..RlmOptions::default() };
        assert_eq!(complete(&model, options).await.unwrap().response, expected);
    }
}

#[tokio::test]
async fn children_are_bounded_in_number_and_at_once() {
    let code = "r = rlm_query_batched(['x'] * 8)\nanswer['content'] = str([r.count('done'), r[-1]])\nanswer['ready'] = True";
    let model = slow_model(Duration::from_millis(60), move |request, _| {
        Ok(if request.depth == 0 { repl(code) } else { submit("'done'") })
    });
    let options = RlmOptions {
        max_depth: 2,
        max_children: 6,
        max_concurrent_subcalls: 2,
        ..RlmOptions::default()
    };
    let done = complete(&model, options).await.unwrap();
    assert_eq!(done.response, "[6, 'Error: max_children_total exceeded']");
    assert_eq!(model.most.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn children_share_the_budget() {
    let code = "answer['content'] = '|'.join(rlm_query_batched(['x'] * 3))\nanswer['ready'] = True";
    let model = model(move |request, _| {
        Ok(if request.depth == 0 { repl(code) } else { repl("print('again')") })
    });
    let budget = BudgetLimits { calls: 9, ..BudgetLimits::default() };
    let options =
        RlmOptions { max_depth: 2, max_concurrent_subcalls: 1, budget, ..RlmOptions::default() };
    let done = complete(&model, options).await.unwrap();
    let spent = "LM call limit exceeded: 9 + 1 > 9";
    let expected =
        format!("Error: Child RLM budget exceeded - {spent}|Error: {spent}|Error: {spent}");
    assert_eq!((done.response, model.calls()), (expected, 9));
}

#[tokio::test]
async fn children_can_share_the_context_of_the_root() {
    let model = delegating("answer['content'] = rlm_query('task')\nanswer['ready'] = True");
    let options = RlmOptions { max_depth: 2, share_context: true, ..RlmOptions::default() };
    let big = "0123456789".repeat(1_000_000);
    let done = rlm(&model, options.clone()).complete(text(&big), None).await.unwrap();
    assert_eq!(done.response, "child of task: leaf at 2");
    let child = model.messages(1);
    let turn = child[2]["content"].as_str().unwrap();
    assert!(turn.contains("You have 2 contexts available (context_0 through context_1)"), "{turn}");
    let reading = model_that_reads();
    let done = rlm(&reading, options).complete(text(&big), None).await.unwrap();
    assert_eq!(done.response, "10000000 task");
}

fn model_that_reads() -> Arc<Model> {
    model(|request, _| {
        Ok(match request.depth {
            0 => submit("rlm_query('task')"),
            _ => submit("f'{len(context_1)} {context}'"),
        })
    })
}

#[tokio::test]
async fn trajectories_are_written_in_the_form_of_rlm() {
    let directory = tempfile::tempdir().unwrap();
    let model = lines(&[
        &repl("n = 5\nf = len\nprint(llm_query('sub'))"),
        "the sub-call's answer",
        &submit("n"),
    ]);
    let log_dir = Some(directory.path().join("new/logs"));
    let options = RlmOptions { log_dir, model: Some("big".into()), ..RlmOptions::default() };
    let big = "context ".repeat(100_000);
    let done = rlm(&model, options).complete(text(&big), Some("what?")).await.unwrap();
    let path = done.log.unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("rlm_20") && name.ends_with(".jsonl"), "{name}");
    let log = fs::read_to_string(&path).unwrap();
    assert!(log.len() < 100_000, "the context is repeated: {} bytes", log.len());
    let lines: Vec<Json> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!((&lines[0]["type"], &lines[0]["root_model"]), (&"metadata".into(), &"big".into()));
    assert_eq!(
        (&lines[0]["environment_type"], &lines[0]["max_depth"]),
        (&"wasm".into(), &1.into())
    );
    let first = &lines[1];
    assert_eq!((&first["type"], &first["iteration"]), (&"iteration".into(), &1.into()));
    assert!(first["final_answer"].is_null() && first["iteration_time"].as_f64().unwrap() > 0.0);
    assert_eq!(first["prompt"].as_array().unwrap().len(), 3);
    let result = &first["code_blocks"][0]["result"];
    assert_eq!(result["stdout"], "the sub-call's answer\n");
    assert_eq!(result["locals"]["n"], 5);
    assert!(result["locals"]["context"].as_str().unwrap().starts_with("context context"));
    let call = &result["rlm_calls"][0];
    assert_eq!(
        (&call["prompt"], &call["response"]),
        (&"sub".into(), &"the sub-call's answer".into())
    );
    assert_eq!((&call["prompt_tokens"], &call["completion_tokens"]), (&10.into(), &1.into()));
    assert_eq!(call["usage_summary"]["model_usage_summaries"]["depth 1"]["total_cost"], 0.01);
    let second = &lines[2];
    assert_eq!(second["final_answer"], "5");
    assert!(second["code_blocks"][0]["result"]["locals"].get("context").is_none());
}

#[derive(Default)]
struct Watcher(Mutex<Vec<(String, RlmProgress)>>);

impl RlmObserver for Watcher {
    fn event(&self, event: RlmEvent<'_>, progress: &RlmProgress) {
        let text = format!("{event:?}");
        let name = text.split([' ', '{']).next().unwrap().to_owned();
        self.0.lock().unwrap().push((name, *progress));
    }
}

#[tokio::test]
async fn observers_see_every_step() {
    let watcher = Arc::new(Watcher::default());
    let model = delegating("answer['content'] = rlm_query('task')\nanswer['ready'] = True");
    let file = tempfile::NamedTempFile::new().unwrap();
    let options = RlmOptions {
        max_depth: 2,
        observer: Some(Arc::clone(&watcher) as _),
        // A file where a directory should be: the run goes on without its log.
        log_dir: Some(file.path().to_owned()),
        ..RlmOptions::default()
    };
    complete(&model, options).await.unwrap();
    let seen = watcher.0.lock().unwrap();
    let names: Vec<&str> = seen.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "LogFailed",
            "TurnBegan",
            "Responded",
            "CellBegan",
            "ChildBegan",
            "TurnBegan",
            "Responded",
            "CellBegan",
            "CallsBegan",
            "CallsEnded",
            "CellEnded",
            "ChildEnded",
            "CellEnded",
        ]
    );
    let last = seen.last().unwrap().1;
    assert_eq!((last.turn, last.cells, last.children, last.calls), (1, 2, 1, 3));
    assert_eq!((last.calls_in_flight, last.input_tokens, last.output_tokens), (0, 30, 3));
    assert!((last.cost.unwrap() - 0.03).abs() < 1e-9);
}

#[tokio::test]
async fn a_cell_does_not_begin_when_the_run_has_to_end() {
    // The root's own call uses up the tokens; its cell would run for minutes.
    let model = lines(&[&repl("while True: pass")]);
    let budget = BudgetLimits { tokens: 10, ..BudgetLimits::default() };
    let error = complete(&model, RlmOptions { budget, ..RlmOptions::default() }).await.unwrap_err();
    assert_eq!(error.reason.name(), "tokens");
    assert!(error.partial_answer.is_some());
}

#[tokio::test]
async fn a_response_may_have_many_blocks_but_not_any_number() {
    let many = vec![repl("n = globals().get('n', 0) + 1\nprint(n)"); 100].join("\n");
    let model = lines(&[&many, &submit("n")]);
    let done = complete(&model, RlmOptions::default()).await.unwrap();
    assert_eq!((done.response.as_str(), done.cells), ("64", 65));
    let output = model.messages(1)[4]["content"].as_str().unwrap().to_owned();
    assert!(output.ends_with("REPL output (block 65):\nNot run: of a response 64 blocks are."));
}

#[tokio::test]
async fn the_calls_of_a_loop_are_within_the_quotas_of_its_tenant() {
    let runtime = common::runtime();
    let quotas = Quotas { lm_calls: 2, ..Quotas::default() };
    let tenant = runtime.tenant("few calls", quotas).unwrap();
    let environment =
        EnvironmentOptions { tenant: Some(tenant.clone()), ..EnvironmentOptions::default() };
    let model = lines(&["thinking", "still", "never sent"]);
    let options = RlmOptions { environment, ..RlmOptions::default() };
    let error = complete(&model, options).await.unwrap_err();
    assert!(error.to_string().contains("over its quota of lm_calls: 2 + 1 > 2"), "{error}");
    assert_eq!(
        (model.calls(), tenant.usage().lm_calls, tenant.usage().lm_usage.calls()),
        (2, 2, 2)
    );
}

#[tokio::test]
async fn what_was_answered_counts_when_the_rest_is_dropped() {
    let said = repl("llm_query_batched(['x'] * 200)");
    let model = slow_model(Duration::from_millis(300), move |_, _| Ok(said.clone()));
    let budget = BudgetLimits { wall: Duration::from_millis(900), ..BudgetLimits::default() };
    let tenant = common::runtime().tenant("partly answered", Quotas::default()).unwrap();
    let environment =
        EnvironmentOptions { tenant: Some(tenant.clone()), ..EnvironmentOptions::default() };
    let options = RlmOptions { budget, environment, ..RlmOptions::default() };
    let error = complete(&model, options).await.unwrap_err();
    assert_eq!(error.reason.name(), "timeout");
    let counted = error.usage.calls();
    assert!(counted > 32, "the root's call and a wave of 32 at least, not {counted}");
    assert_eq!(tenant.usage().lm_usage.calls(), counted);
}

#[tokio::test]
async fn long_answers_and_odd_contexts_come_through() {
    let model = lines(&[&repl("x = 'é' * 3_000_000"), "FINAL_VAR(x)"]);
    let done = complete(&model, RlmOptions::default()).await.unwrap();
    assert_eq!(done.response.chars().count(), 3_000_000);
    let model = lines(&[&submit("repr([context[0] != context[0], context[1]])")]);
    let odd = Context::Json(br#"[NaN, "\ud800"]"#.to_vec());
    let done = rlm(&model, RlmOptions::default()).complete(odd, None).await.unwrap();
    assert_eq!(done.response, r"[True, '\ud800']");
}

#[tokio::test]
async fn a_log_is_cut_to_what_people_read() {
    let directory = tempfile::tempdir().unwrap();
    let flood = vec![repl("print('x' * 1_000_000)"); 30].join("\n");
    let model = lines(&[&flood, &submit("1")]);
    let options =
        RlmOptions { log_dir: Some(directory.path().to_owned()), ..RlmOptions::default() };
    let done = complete(&model, options).await.unwrap();
    let bytes = fs::metadata(done.log.unwrap()).unwrap().len();
    assert!(bytes < 3_000_000, "{bytes} bytes");
}
